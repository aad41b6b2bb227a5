import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from armor.errors import ArmorError
from armor.execution import devices

# Takes a lease, appends when it began and ended, and holds it for a moment.
JOB = """
import os, sys, time, json
from armor.execution.devices import lease
device = lease(int(sys.argv[1]))
begin = time.monotonic(); time.sleep(0.1); end = time.monotonic()
print(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], begin, end, device]))
"""


@pytest.fixture(autouse=True)
def fake_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-5f3a,MIG-1/2,3")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def start(count, code=JOB):
    return subprocess.Popen([sys.executable, "-c", code, str(count)], stdout=subprocess.PIPE, text=True)


def test_no_device_is_held_twice_and_none_is_lost():
    jobs = [start(1 + index % 2) for index in range(12)]
    leases = []
    for job in jobs:
        output, _ = job.communicate(timeout=60)
        assert job.returncode == 0
        names, begin, end, device = json.loads(output)
        assert device == "cuda:0"
        leases += [(name, begin, end) for name in names.split(",")]
    assert len(leases) == 18
    for name, begin, end in leases:
        others = [x for x in leases if x[0] == name and x != (name, begin, end)]
        assert all(e <= begin or b >= end for _, b, e in others)
    assert len(Counter(name for name, *_ in leases)) == 4


def test_a_killed_job_gives_its_devices_back():
    holder = start(4, JOB.replace("time.sleep(0.1)", "print('held', flush=True); time.sleep(60)"))
    assert holder.stdout.readline() == "held\n"
    waiting = start(4)
    time.sleep(1.0)
    assert waiting.poll() is None
    holder.kill()
    assert waiting.wait(timeout=30) == 0
    holder.communicate()
    waiting.communicate()


def test_more_than_is_visible_fails_at_once():
    with pytest.raises(ArmorError, match="5 GPUs asked for, 4 visible"):
        devices.lease(5)


def test_zero_means_the_cpu():
    assert devices.lease(0) == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_no_device_means_the_cpu_and_says_so(monkeypatch, caplog):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.lease(1) == "cpu"
    assert "no CUDA device is visible" in caplog.text
