"""What must hold before a server starts: a checkpoint that is whole, sound, and of the model in its config.json.

Servers believe what they read. vLLM fills what a quantized checkpoint lacks with whatever was in memory.
"""

from __future__ import annotations

from pathlib import Path

from armor.core.errors import ArmorError
from armor.format.checkpoint import PackedLinear
from armor.format.checksums import Hashing, check_contents, open_checkpoint, read_checksums
from armor.runtime.load import check_names
from armor.serve.families import check_family

__all__ = ["Refused", "check"]


class Refused(RuntimeError):
    """What cannot be served, in one line. No ValueError: vLLM's configuration would make several lines of it."""


def check(folder: Path | str, engine: str | None = None) -> dict[str, PackedLinear]:
    """The compressed linears of the checkpoint in `folder`, by name, after a look at all that is loaded of it.

    Every file is hashed, or the numbers of shards are looked at where there are no hashes; every tensor is held against
    the model. Raises ArmorError for the first thing that is wrong, and where `engine` is "vLLM" for a family that was
    not tested there.
    """
    if not Path(folder).is_dir():
        raise ArmorError(f"{folder}: not a folder on this machine; download the checkpoint, then give its folder")
    _, shards, modules = open_checkpoint(folder)
    if engine == "vLLM":
        check_family(folder)
    sums = read_checksums(shards)
    Hashing(shards, sums, sums.files if sums else ()).wait()
    if sums is None:
        check_contents(shards, modules)
    check_names(folder)
    return modules
