import os
import stat

import pytest
import torch

from armor.errors import ArmorError
from armor.execution.files import atomic_path, open_safetensors, read_json, save_safetensors, sha256, write_json


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"x": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    write_json(tmp_path / "a", {})
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_bad_json_file_is_one_line(tmp_path):
    (tmp_path / "a").write_text("{")
    for name, said in (("a", "not valid JSON"), ("b", "no such file")):
        with pytest.raises(ArmorError, match=said):
            read_json(tmp_path / name)


def test_tensors_are_written_in_one_order(tmp_path):
    x, y = torch.randn(3), torch.randn(2, 2).T
    save_safetensors(tmp_path / "a", {"x": x, "y": y})
    save_safetensors(tmp_path / "b", {"y": y, "x": x})
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    with open_safetensors(tmp_path / "a") as file:
        assert torch.equal(file.get_tensor("y"), y)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a", {})
    assert not list(tmp_path.iterdir())
