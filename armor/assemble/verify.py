"""Verify: everything that can be wrong with a checkpoint folder, checked; no more than one tensor in memory.

The same checks guard loading (`armor.hf`); here they cover every file that checksums.json lists, and end in a summary.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from armor.core.checkpoint import CHECKSUMS, SUFFIXES, check_checksums, check_contents, check_headers, modules_of
from armor.errors import ArmorError
from armor.execution.files import read_json
from armor.model.shards import Shards

__all__ = ["verify"]


def verify(folder: Path | str) -> dict:
    """Check a checkpoint: config, index, shards, names, shapes, dtypes, hashes, patterns, NaN. Returns a summary.

    `checksums` is false where there is no checksums.json to check by (as after save_pretrained). Raises ArmorError, one
    line, for the first thing that is wrong.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ArmorError(f"{folder}: holds no config.json; expected the folder of a checkpoint")
    config = read_json(folder / "config.json")
    found = config.get("quantization_config")
    # A recipe that leaves everything dense makes a checkpoint without packed linears, known by its checksums.
    dense = found is None and (folder / CHECKSUMS).is_file()
    modules = {} if dense else modules_of(found, f"{folder / 'config.json'}: quantization_config")
    shards = Shards(folder)
    check_headers(shards, modules)
    has_sums = check_checksums(shards)
    check_contents(shards, modules)
    packed = [f"{name}.{suffix}" for name in modules for suffix in SUFFIXES]
    packed_bytes = sum(shards.bytes_of(name) for name in packed if name in shards)
    weights = sum(layout.out_features * layout.in_features for layout in modules.values())
    names = shards.names()
    patterns = Counter(str(layout.pattern) for layout in modules.values())
    return {
        "folder": str(folder),
        "shards": len(shards.files),
        "tensors": len(names),
        "bytes": sum(shards.bytes_of(name) for name in names),
        "modules": len(modules),
        "patterns": dict(patterns),
        "bits_per_weight": 8 * packed_bytes / weights if weights else None,
        "checksums": has_sums,
    }
