"""The weights take in memory what they take on disk; on a CPU the packed ones are views of the mapped file."""

from armor.format.checkpoint import SUFFIXES
from armor.format.shards import Shards
from tests.vllm.served import checkpoint, served


def parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.numel()}


def mappings(file):
    """The addresses at which a file is mapped into this process."""
    lines = [line for line in open("/proc/self/maps").read().splitlines() if line.endswith(str(file))]
    return [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]


def test_bytes_in_memory_are_those_on_disk_and_no_packed_tensor_is_copied(tmp_path):
    folder = checkpoint(tmp_path, "Llama")
    shards = Shards(folder)
    with served(folder) as llm:
        (held,) = llm.apply_model(parameters)
        in_memory = sum(parameter.numel() * parameter.itemsize for parameter in held.values())
        assert abs(in_memory / sum(map(shards.bytes_of, shards.names())) - 1) < 0.02
        packed = [p for name, p in held.items() if name.rpartition(".")[2].rpartition("_")[0] in SUFFIXES]
        assert len(packed) == 2 * 7 * 4
        mapped = mappings(folder / "model.safetensors")
        assert all(any(parameter.data_ptr() in where for where in mapped) for parameter in packed)
