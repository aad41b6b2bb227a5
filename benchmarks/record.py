"""What a benchmark found, without its raw runs: one line a row, in one JSON of at most 60 lines.

A file holds several runs. Each has a processor and the name of what was measured (`of`); a new run takes the place of
the one with the same two, and the others stay. A figure that was measured in rounds is its median, its interquartile
range ("iqr", third quartile minus first, in the same unit) and the number of rounds.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from armor.benchmark.rounds import summary
from armor.execution.files import atomic_path, read_json
from armor.execution.machine import Machine, current_machine

LINES = 60
KEY = ("of", "processor", "device")


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def figure(values: Sequence[float]) -> dict[str, float]:
    """The median of the rounds, their interquartile range, and how many they are."""
    found = summary(values)
    first, third = found.quartiles
    return {"median": rounded(found.median), "iqr": rounded(third - first), "rounds": len(values)}


def command() -> str:
    """The command that runs; of paths outside of this folder only the last part."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def store(output: Path, of: str, rows: list[dict], machine: Machine | None = None, **about: Any) -> None:
    """Put a run of `of` into the file `output`, in place of the last one on this processor.

    `about` is kept beside the rows. Where the file would have more than LINES lines, the oldest other runs go.
    """
    machine = machine or current_machine()
    entry = {"of": of, "date": date.today().isoformat(), "command": command()}
    entry |= machine.model_dump() | about | {"rows": rows}
    write(output, [*(read_json(output)["runs"] if output.is_file() else []), entry])


def write(output: Path, runs: list[dict]) -> None:
    """Write `runs` to the file `output`: of those with one key the last, and as many as there are lines for."""
    kept = {tuple(run[key] for key in KEY): run for run in runs}
    while len(dumped(list(kept.values())).splitlines()) > LINES and len(kept) > 1:
        key = min(list(kept)[:-1], key=lambda key: kept[key]["date"])
        del kept[key]
        print(f"{output}: more than {LINES} lines; the run of {', '.join(key)} is left out", file=sys.stderr)
    with atomic_path(output) as temporary:
        temporary.write_text(dumped(list(kept.values())), encoding="utf-8")


def dumped(runs: list[dict]) -> str:
    """As JSON: a line for what is said of a run, and a line for each of its rows."""
    parts = []
    for run in sorted(runs, key=lambda run: [run[key] for key in KEY]):
        head = json.dumps(run | {"rows": []}, allow_nan=False).removesuffix("]}")
        parts.append(head + "\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in run["rows"]) + "]}")
    return '{"runs": [\n' + ",\n".join(parts) + "]}\n"
