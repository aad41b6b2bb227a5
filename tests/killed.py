"""Ways to kill a run at any moment and to tell whether its result is that of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

__all__ = ["left_over", "results_of"]

OF_THE_RUN = ("seconds", "peak_memory_bytes", "tokens_per_second")
"""Keys of records that say how it went, and so differ between two runs."""


def _settled(value: object) -> object:
    """A record without what differs between two runs; of a trace's (iteration, seconds, loss) the seconds go."""
    if isinstance(value, dict):
        kept = {key: _settled(inner) for key, inner in value.items() if key not in OF_THE_RUN}
        if isinstance(kept.get("trace"), list):  # in a tokenizer it is a word
            kept["trace"] = [[iteration, loss] for iteration, _, loss in kept["trace"]]
        return kept
    return [_settled(inner) for inner in value] if isinstance(value, list) else value


def results_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of everything below `folder` that a stage computes, by path; records without times and memory."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name.split("/")[0] in ("logs", "benchmarks", "report", "run.json") or "/benchmark/" in name:
            continue
        content = file.read_bytes()
        if file.suffix == ".json" and "checkpoint/" not in name:
            content = json.dumps(_settled(json.loads(content)), sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def left_over(folder: Path) -> list[str]:
    """What no finished run may leave below `folder`: temporary files, kept steps, locks."""
    return sorted(str(path) for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp")
