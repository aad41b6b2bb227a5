"""One device, one job: with fake devices, which the lease never opens."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import groupby

import pytest

from armor.core.errors import ArmorError
from armor.execution.devices import SCHEDULER_JOBS, lease, visible_devices
from tests.killed import REPOSITORY

# Takes a lease, writes into a file per device who holds it, as often as it is told, waits for the end of its input, and
# lets go by ending. Its last words are what it got.
JOB = """
import logging, os, sys, time
from armor.core.errors import ArmorError
from armor.execution.devices import lease
logging.basicConfig(level="INFO")
try:
    device = lease(int(os.environ["COUNT"]))
except ArmorError as error:
    sys.exit(str(error))
names = os.environ["CUDA_VISIBLE_DEVICES"]
files = [open(name.replace("/", "_"), "a", buffering=1) for name in names.split(",") if name]
for _ in range(30):
    for file in files:
        print(os.getpid(), file=file)
    time.sleep(0.001)
sys.stdin.read()
print(device, names)
"""


@pytest.fixture(autouse=True)
def fake_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-5f3a,MIG-1/2,3")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for key in SCHEDULER_JOBS:
        monkeypatch.delenv(key, raising=False)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The folder of a library that stands in for the driver's."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("library")
    source, target = REPOSITORY / "tests/nvml.c", folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-O0", str(source), "-o", str(target)], check=True)
    return folder


@pytest.fixture
def driver(library, monkeypatch):
    """Processes that the test starts find three cards: a whole one, one in two instances, one that is lost."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library), prepend=os.pathsep)


@pytest.fixture
def start(tmp_path):
    """Start a job in the folder held/; it ends with its input, at the latest when the test does."""
    (tmp_path / "held").mkdir()
    jobs = []

    def start(count, *arguments, **environment):
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = os.environ | {"COUNT": str(count)} | environment
        command = [sys.executable, "-c", JOB, *arguments]
        jobs.append(subprocess.Popen(command, cwd=tmp_path / "held", env=environment, text=True, **streams))
        return jobs[-1]

    yield start
    for job in jobs:
        with job:
            job.kill()


def leased(job):
    """What a job got: its torch device, and CUDA_VISIBLE_DEVICES."""
    said, log = job.communicate()
    assert job.returncode == 0, log
    return said.strip("\n").split(" ", 1)


def holders(file):
    """Who held a device, in turn."""
    return [pid for pid, _ in groupby(file.read_text().split())]


def visible():
    """What a new process finds."""
    code = "import json; from armor.execution.devices import visible_devices; print(json.dumps(visible_devices()))"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def listed():
    """Each device and who holds it, by the command."""
    command = [sys.executable, "-m", "armor.command.cli", "devices"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub("  +", "  ", line) for line in lines]


def test_twenty_jobs_on_four_devices_some_killed(start, tmp_path):
    holding = [start(1), start(2)]
    assert all("computing on GPU" in job.stderr.readline() for job in holding)
    jobs = holding + [start(1 + index % 2) for index in range(18)]
    waiting = [job for job in jobs[2:] if "waiting for" in job.stderr.readline()]
    assert len(waiting) >= 17
    killed = [holding[0], *waiting[:5]]
    for job in killed:
        job.kill()
    for job in jobs:
        job.stdin.close()
    assert Counter(job.wait() for job in jobs) == {0: 14, -9: 6}
    files = sorted((tmp_path / "held").iterdir())
    assert [file.name for file in files] == ["0", "3", "GPU-5f3a", "MIG-1_2"]
    for file in files:  # nobody comes back once another had it
        assert len(holders(file)) == len(set(holders(file)))
    counts = Counter(pid for file in files for pid in holders(file))
    assert all(counts[str(job.pid)] == 1 + index % 2 for index, job in enumerate(jobs) if job not in killed)
    assert leased(start(4))[0] == "cuda:0"  # none is lost


def test_a_job_of_a_scheduler_leases_among_its_own(start):
    """Two jobs of a scheduler may call different devices by one name; the jobs of a group share theirs."""
    for job in "12":
        line = start(1, SLURM_JOB_ID=job, CUDA_VISIBLE_DEVICES="0").stderr.readline()
        assert "computing on GPU 0" in line
    third = start(1, SLURM_JOB_ID="2", CUDA_VISIBLE_DEVICES="0")
    assert "waiting for 1 of 1 GPUs" in third.stderr.readline()


def test_cuda_reads_no_further_than_an_invalid_name(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,-1,2")
    assert visible_devices() == ["0", "1"]


def test_more_than_is_visible_fails_at_once():
    with pytest.raises(ArmorError, match="5 GPUs asked for, 4 visible"):
        lease(5)


def test_none_asked_for_or_there_means_the_cpu_and_only_the_second_is_said(monkeypatch, caplog):
    assert lease(0) == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not caplog.text and lease(1) == "cpu"
    assert "no CUDA device is visible" in caplog.text


def test_without_a_choice_all_that_the_driver_lists(driver, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible() == ["GPU-5d5ba0d6", "MIG-c7384736", "MIG-a28ad590"]


def test_without_a_driver_there_is_no_device_but_what_is_named(driver, monkeypatch):
    monkeypatch.setenv("FAKE_NVML_WITHOUT_DRIVER", "1")
    assert visible() == ["0", "GPU-5f3a", "MIG-1/2", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible() == []


def test_two_names_of_one_device_are_one_lease(driver, start):
    holder = start(1, CUDA_VISIBLE_DEVICES="1")
    assert "computing on GPU 1" in holder.stderr.readline()
    assert "waiting for 1 of 1 GPUs" in start(1, CUDA_VISIBLE_DEVICES="MIG-c73").stderr.readline()
    assert leased(start(1, CUDA_VISIBLE_DEVICES="MIG-c7,MIG-a2")) == ["cuda:0", "MIG-a2"]


def test_the_command_lists_devices_memory_and_holders(driver, start, monkeypatch):
    job = start(1, "factorize", "--layer", "3", "--output", "layer_3.safetensors", CUDA_VISIBLE_DEVICES="0,1")
    assert "computing on GPU 0" in job.stderr.readline()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-c7384736,MIG-a28ad590,GPU-elsewhere")
    assert listed() == [
        f"0  NVIDIA A100-SXM4-40GB  1.1 of 42.9 GB used  pid {job.pid}, factorize -> layer_3.safetensors",
        "MIG-c7384736  NVIDIA A100-SXM4-40GB MIG 3g.20gb  memory unknown  free",
        "MIG-a28ad590  NVIDIA A100-SXM4-40GB MIG 3g.20gb  0.0 of 21.1 GB used  free",
        "GPU-elsewhere  unknown card  memory unknown  free",
    ]


def test_the_driver_is_not_asked_where_no_device_is_asked_for():
    code = (
        "import sys; import armor.command.cli; from armor.execution.devices import lease; lease(0); "
        "sys.exit('pynvml' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
