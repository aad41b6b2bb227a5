"""One thread for each test process: `pytest -n` starts one for every core, and two threads a core starve each other."""

import shutil

import pytest

from armor.execution.machine import set_threads

set_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model with everything that the stages make of it; `root / "checkpoint"` is the packed one."""
    from tests.packed import packed

    return packed(tmp_path_factory.mktemp("model"))


@pytest.fixture
def checkpoint(root, tmp_path):
    """A copy of the packed checkpoint that a test may break."""
    return shutil.copytree(root / "checkpoint", tmp_path / "checkpoint")
