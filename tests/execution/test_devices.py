"""One device, one job: with fake devices, which the lease never opens."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from armor.core.errors import ArmorError
from armor.execution import devices

# Takes a lease, writes into a file per device who holds it, again and again, and lets go by ending.
JOB = """
import logging, os, sys, time
logging.basicConfig(level="INFO")
from armor.execution.devices import lease
assert lease(int(sys.argv[1])) == "cuda:0"
files = [open(name.replace("/", "_"), "a", buffering=1) for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    for file in files:
        print(os.getpid(), file=file)
    time.sleep(0.01)
"""
# As `nvidia-smi` prints: two cards, the second split in two.
NVIDIA_SMI = """#!/bin/sh
case $1 in
--list-gpus) cat <<END
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-1c2d3e4f)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736)
  MIG 3g.20gb     Device  1: (UUID: MIG-a28ad590)
END
;;
*) echo "GPU-5d5ba0d6, NVIDIA A100-SXM4-40GB, 40960, 1024"; echo "GPU-1c2d3e4f, NVIDIA A100-SXM4-40GB, 40960, [N/A]";;
esac
"""


@pytest.fixture(autouse=True)
def fake_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-5f3a,MIG-1/2,3")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(devices, "_held", held := [])
    for key in devices.SCHEDULER_JOBS:
        monkeypatch.delenv(key, raising=False)
    yield
    for descriptor in held:
        os.close(descriptor)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def start(folder, count, seconds, **environment):
    command = [sys.executable, "-c", JOB, str(count), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(Path(devices.__file__).parents[2]), **environment}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def holders(file):
    """Who held a device, in turn."""
    return [pid for pid, _ in groupby(file.read_text().split())]


def test_twenty_jobs_on_four_devices_some_killed(tmp_path):
    folder = tmp_path / "held"
    folder.mkdir()
    jobs = [start(folder, 1 + index % 2, 0.3) for index in range(20)]
    killed = random.Random(0).sample(jobs, 6)
    for job in killed:  # some wait, some hold
        time.sleep(0.2)
        job.kill()
    ended = Counter(job.wait(timeout=100) for job in jobs)
    assert ended.keys() <= {0, -9} and ended[0] >= 14
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["0", "3", "GPU-5f3a", "MIG-1_2"]
    for file in files:  # nobody comes back once another had it
        assert len(holders(file)) == len(set(holders(file)))
    counts = Counter(pid for file in files for pid in holders(file))
    for index, job in enumerate(jobs):
        assert counts[str(job.pid)] == 1 + index % 2 or job in killed
        job.stderr.close()
    assert devices.lease(4) == "cuda:0"  # none is lost


def test_a_killed_job_gives_its_devices_back_and_waiting_is_shown(tmp_path):
    holder = start(tmp_path, 4, 60)
    wait_for(lambda: (tmp_path / "3").exists())
    assert {device.holder for device in devices.list_devices()} == {f"pid {holder.pid}, 4"}
    waiting = start(tmp_path, 2, 0)
    lines = [waiting.stderr.readline()]
    holder.kill()
    assert waiting.wait(timeout=30) == 0
    assert "waiting for 2 of 4 GPUs" in lines[0] and f"pid {holder.pid}" in lines[0]
    assert {device.holder for device in devices.list_devices()} == {None}  # what is left is but a file
    for job in (holder, waiting):
        job.communicate()


def test_a_job_of_a_scheduler_leases_among_its_own(tmp_path):
    """Two jobs of a scheduler may call different devices by one name; the jobs of a group share theirs."""
    running = [start(tmp_path, 1, 60, SLURM_JOB_ID=job, CUDA_VISIBLE_DEVICES="0") for job in "12"]
    wait_for(lambda: (tmp_path / "0").exists() and len(set(holders(tmp_path / "0"))) == 2)
    third = start(tmp_path, 1, 0, SLURM_JOB_ID="2", CUDA_VISIBLE_DEVICES="0")
    assert "waiting for 1 of 1 GPUs" in third.stderr.readline()
    for job in (*running, third):
        job.kill()
        job.communicate()


def test_a_lease_sets_the_names_it_took(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1/2, 3 ,GPU-5f3a")
    assert devices.lease(2) == "cuda:0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-1/2,3"


@pytest.mark.parametrize("names", ["0,1,-1,2", "0,1,,2", "0,1,0"])
def test_cuda_reads_no_further_than_an_invalid_name_and_none_twice(monkeypatch, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert devices.visible_devices() == ["0", "1"]


def test_more_than_is_visible_fails_at_once():
    with pytest.raises(ArmorError, match="5 GPUs asked for, 4 visible"):
        devices.lease(5)


def test_zero_means_the_cpu():
    assert devices.lease(0) == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("names", ["", "-1", "NoDevFiles"])
def test_no_device_means_the_cpu_and_says_so(monkeypatch, caplog, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert devices.lease(1) == "cpu"
    assert "no CUDA device is visible" in caplog.text


def test_without_a_choice_all_that_nvidia_smi_lists(nvidia_smi, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.visible_devices() == ["GPU-5d5ba0d6", "MIG-c7384736", "MIG-a28ad590"]


def test_two_names_of_one_device_are_one_device(nvidia_smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-5d5b,GPU-5d5ba0d6,1,MIG-c7384736")
    assert devices.visible_devices() == ["0", "1"]


def test_the_command_lists_devices_memory_and_holders(nvidia_smi, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(sys, "argv", ["armor", "factorize", "--layer", "3", "--output", "layer_3.safetensors"])
    devices.lease(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-a28ad590")
    done = subprocess.run(
        [sys.executable, "-m", "armor.command.cli", "devices"], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == (
        f"0  NVIDIA A100-SXM4-40GB  1.1 of 42.9 GB used  pid {os.getpid()}, factorize -> layer_3.safetensors"
    )
    assert second == "MIG-a28ad590  unknown card  memory unknown  free"


def test_the_file_of_a_holder_is_json(tmp_path):
    devices.lease(1)
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert json.loads(file.read_text())["pid"] == os.getpid()
