"""The weights take in memory what they take on disk: on a CPU all but norms and biases are views of the mapped file."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from benchmarks.decoding import random_checkpoint
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}


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
