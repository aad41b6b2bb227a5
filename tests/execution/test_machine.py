"""What a job runs on: how much of the host's memory is its own, and the processor's name."""

import platform

import psutil
import pytest
import torch

from armor.core.errors import ArmorError
from armor.execution.machine import _processor, enough_memory, host_memory_bytes


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({}, None),
        ({"job": "max\n", "": "max\n"}, None),
        ({"job": "max\n", "": "1000000\n"}, 1_000_000),
        ({"job/step": "2000\n", "job": "1000\n"}, 1000),
        ({"other": "1000\n"}, None),
        ({"": f"{1 << 60}\n"}, None),
    ],
    ids=["none", "no limit", "the container's", "the job's", "another job's", "more than there is"],
)
def test_the_smallest_limit_of_the_control_groups_counts(tmp_path, limits, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/\n0::/job/step\n")
    for group, text in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(text)
    assert host_memory_bytes(tmp_path) == (expected or psutil.virtual_memory().total)


def test_without_control_groups_all_memory_is_ones_own(tmp_path):
    assert host_memory_bytes(tmp_path) == psutil.virtual_memory().total


@pytest.mark.parametrize(
    "facts, expected",
    [
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 26, model 2)"),
        ("model name\t: ARMv7 Processor rev 4 (v7l)\n", "ARMv7 Processor rev 4 (v7l)"),
        ("CPU implementer\t: 0x41\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
    ids=["x86", "no family", "no name", "no file"],
)
def test_a_processor_is_told_by_name_family_and_model(tmp_path, facts, expected):
    if facts is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\n" + facts + "\nprocessor\t: 1\nmodel name\t: other\n")
    assert _processor(tmp_path) == expected


FEWER = "give the job more, or take fewer jobs at a time"


@pytest.mark.parametrize(
    "device, error, other",
    [
        ("cpu", RuntimeError("DefaultCPUAllocator: can't allocate memory"), FEWER),
        ("cpu", MemoryError(), FEWER),
        ("cuda", torch.OutOfMemoryError("CUDA out of memory"), "compute with --gpus 0 (gpu=0)"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_do(device, error, other):
    with pytest.raises(ArmorError) as caught, enough_memory("model.layers.1", device, "lower sequence_length"):
        raise error
    assert str(caught.value) == f"model.layers.1: out of memory on {device}; lower sequence_length, or {other}"
