import os
import resource
import signal

import pytest
import torch

from armor.core.errors import ArmorError
from armor.execution.files import (
    atomic_path,
    read_json,
    save_safetensors,
    try_lock,
    write_json,
)
from tests.forks import fork

WRITERS = [
    lambda path: write_json(path, [1.5] * 10_000),
    lambda path: save_safetensors(path, {"x": torch.zeros(10_000)}),
]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"x": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_bad_json_file_is_one_line(tmp_path):
    (tmp_path / "a").write_text("{")
    for name, said in (("a", "not valid JSON"), ("b", "no such file")):
        with pytest.raises(ArmorError, match=said):
            read_json(tmp_path / name)


@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path, write):
    """No file of that process may grow beyond 4 kB: to a writer, the same as a full disk."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(ArmorError) as caught:
            write(tmp_path / "file")
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / 'file'}: cannot be written (") and "\n" not in said

    done = fork(work, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    def work():
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            (temporary.parent / "of a library").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert fork(work, tmp_path).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    write_json(tmp_path / "file", {})
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_of_one_file_do_no_harm(tmp_path):
    with atomic_path(tmp_path / "a") as slow:
        slow.write_text("slow")
        write_json(tmp_path / "a", "fast")
        assert (tmp_path / "a").read_text() == '"fast"\n'
    assert (tmp_path / "a").read_text() == "slow" and os.listdir(tmp_path) == ["a"]


def test_a_lock_ends_with_its_process(tmp_path):
    def work():
        assert try_lock(tmp_path / "lock") is not None and try_lock(tmp_path / "lock") is None
        os.kill(os.getpid(), signal.SIGKILL)

    assert fork(work, tmp_path).returncode == -signal.SIGKILL
    descriptor = try_lock(tmp_path / "lock")
    assert descriptor is not None and try_lock(tmp_path / "lock") is None
    os.close(descriptor)
