"""The weights take in memory what they take on disk; on a CPU all but norms and biases are views of the mapped file."""

import pytest

from armor.format.checkpoint import SUFFIXES
from armor.format.shards import Shards
from tests.packed import packed
from tests.vllm.served import FAMILIES, SHAPE, served


def tensors(model):
    """What vLLM holds of a model: parameters, of packed experts buffers."""
    packed = ((name, own) for name, own in model.named_buffers() if name.rpartition(".")[2] in SUFFIXES)
    return {name: own for name, own in (*model.named_parameters(), *packed) if own.numel()}


def is_packed(name):
    """Whether it is of a compressed linear; in a fused one each part's tensors have its number."""
    leaf = name.rpartition(".")[2]
    return leaf in SUFFIXES or leaf.rpartition("_")[0] in SUFFIXES


def mappings(file):
    """The addresses at which a file is mapped into this process."""
    lines = [line for line in open("/proc/self/maps").read().splitlines() if line.endswith(str(file))]
    return [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in lines]


@pytest.mark.parametrize("family", ["Llama", "Qwen3 MoE"])
def test_packed_linears_take_their_bytes_on_disk_and_no_matrix_is_copied(family, tmp_path):
    kind, config = FAMILIES[family]
    folder = (
        packed(tmp_path, kind, vocab_size=320, **(SHAPE | config)) / "checkpoint"
    )  # one that vLLM does not round up
    shards = Shards(folder)
    with served(folder) as llm:
        (held,) = llm.apply_model(tensors)
        linears = {name: own for name, own in held.items() if is_packed(name)}
        on_disk = [shards.bytes_of(name) for name in shards.names() if name.rpartition(".")[2] in SUFFIXES]
        assert sorted(own.numel() * own.itemsize for own in linears.values()) == sorted(on_disk)
        assert not [name for name in held.keys() - linears.keys() if "proj" in name]  # embeddings and norms alone
        mapped = mappings(folder / "model.safetensors")
        matrices = [*linears.values(), *(own for own in held.values() if own.ndim > 1)]
        assert all(any(own.data_ptr() in where for where in mapped) for own in matrices)
