"""One thread for each test process: `pytest -n` starts one for every core, and two threads a core starve each other."""

import gc
import os
import shutil
import subprocess
import tempfile

import pytest
import torch

from armor.execution.machine import set_threads

set_threads(1)
MEMORY = "/dev/shm"  # a file system in memory: results are flushed to the disk at every step, and tests wait for that
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 8e9:
    os.environ["TMPDIR"] = tempfile.tempdir = MEMORY
CACHE = tempfile.TemporaryDirectory(prefix="armor-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # read when datasets is imported, and by the processes that tests start


def pytest_runtest_setup():
    """The same random numbers for a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """A module's tests go to one process: what they share is made once. So do all that ask for the finished run.

    The tests of the workflow come first. They take the longest and wait the most.
    """
    for item in items:
        group = "workflow" if "run" in item.fixturenames and item.path.parent.name == "workflow" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path.parent.name != "workflow")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model with everything that the stages make of it; `root / "checkpoint"` is the packed one."""
    from tests.packed import packed

    return packed(tmp_path_factory.mktemp("model"))


@pytest.fixture
def checkpoint(root, tmp_path):
    """A copy of the packed checkpoint that a test may break."""
    return shutil.copytree(root / "checkpoint", tmp_path / "checkpoint")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, and a way to change its options: size=1m, ro."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("cannot mount a disk here")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)  # mapped files keep it busy


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector shall not look at it again, nor copy it in every fork."""
    gc.collect()
    gc.freeze()
