"""The weights take in memory what they take on disk; on a CPU all but norms and biases are views of the mapped file."""

from armor.format.checkpoint import SUFFIXES
from armor.format.shards import Shards
from tests.packed import packed
from tests.vllm.served import SHAPE, served


def parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}


def mappings(file):
    """The addresses at which a file is mapped into this process."""
    lines = [line for line in open("/proc/self/maps").read().splitlines() if line.endswith(str(file))]
    return [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]


def test_packed_linears_take_their_bytes_on_disk_and_no_matrix_is_copied(tmp_path):
    folder = packed(tmp_path, vocab_size=320, **SHAPE) / "checkpoint"  # one that vLLM does not round up
    shards = Shards(folder)
    with served(folder) as llm:
        (held,) = llm.apply_model(parameters)
        linears = {name: p for name, p in held.items() if name.rpartition(".")[2].rpartition("_")[0] in SUFFIXES}
        on_disk = [shards.bytes_of(name) for name in shards.names() if name.rpartition(".")[2] in SUFFIXES]
        assert sorted(p.numel() * p.itemsize for p in linears.values()) == sorted(on_disk)
        assert not [name for name in held.keys() - linears.keys() if "proj" in name]  # embeddings and norms alone
        mapped = mappings(folder / "model.safetensors")
        matrices = [*linears.values(), *(p for p in held.values() if p.ndim > 1)]
        assert all(any(p.data_ptr() in where for where in mapped) for p in matrices)
