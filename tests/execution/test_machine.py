"""What a job runs on: how much of the host's memory is its own, and what is said where it is too little."""

import psutil
import pytest
import torch

from armor.core.errors import ArmorError
from armor.execution.machine import enough_memory, host_memory_bytes


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({}, None),
        ({"job": "max\n", "": "1000000\n"}, 1_000_000),
        ({"job/step": "2000\n", "job": "1000\n"}, 1000),
    ],
    ids=["none", "the container's", "the job's"],
)
def test_the_smallest_limit_of_the_control_groups_counts(tmp_path, limits, expected):
    assert host_memory_bytes(tmp_path) == psutil.virtual_memory().total
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/\n0::/job/step\n")
    for group, text in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(text)
    assert host_memory_bytes(tmp_path) == (expected or psutil.virtual_memory().total)


FEWER = "give the job more, or take fewer jobs at a time"


@pytest.mark.parametrize(
    "device, error, other",
    [
        ("cpu", RuntimeError("DefaultCPUAllocator: can't allocate memory"), FEWER),
        ("cuda", torch.OutOfMemoryError("CUDA out of memory"), "compute with --gpus 0 (gpu=0)"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_do(device, error, other):
    with pytest.raises(ArmorError) as caught, enough_memory("model.layers.1", device, "lower sequence_length"):
        raise error
    assert str(caught.value) == f"model.layers.1: out of memory on {device}; lower sequence_length, or {other}"
