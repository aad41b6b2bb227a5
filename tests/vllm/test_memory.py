"""The weights take in memory what they take on disk; on a CPU all but norms and biases are views of the mapped file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from armor.core.pattern import Pattern
from armor.format.checkpoint import SUFFIXES, PackedLinear
from armor.format.shards import Shards
from benchmarks.decoding import random_checkpoint
from tests.packed import packed
from tests.tiny import tiny_model
from tests.vllm.served import FAMILIES, SHAPE, served

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}


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


def test_the_peak_while_loading_is_at_most_1_3_times_what_is_on_disk(tmp_path):
    """Every page of a weight read, in a process of its own, of a model beside which pages of libraries are few."""
    config = LARGE | {"vocab_size": 320, "max_position_embeddings": 512, "dtype": torch.bfloat16}
    dense = tiny_model(tmp_path / "dense", layers=6, **config)
    folder = random_checkpoint(dense, tmp_path / "packed", lambda *shape: PackedLinear(*shape, Pattern(2, 4), 64, 64))
    command = [sys.executable, "-m", "benchmarks.serving", "--here", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    on_disk, peak = found["bytes on disk"], found["peak, every page of a weight read"]["with files"]
    assert on_disk > 100e6 and 0.95 * on_disk < peak <= 1.3 * on_disk
