"""How far vLLM's log-probabilities are from transformers', for every family in every way that vLLM runs it.

In the environment of `make test-vllm`, from the repository's root, all families or those that are named:

    .venv-vllm/bin/python -m benchmarks.serving_families [FAMILY...]

The models are those of `tests/vllm`: tiny, random, compressed, in float32. What an engine fails with stands in the
table. What --output has of this processor is kept, so that a run goes on where it ended. Each way has a process of its
own: vLLM changes transformers' classes, so that it takes some models once in a process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tests.vllm import conftest  # noqa: F401  the environment of vLLM, before it is imported

# isort: split
from vllm.lora.request import LoRARequest

from armor.execution.files import read_json
from armor.execution.machine import current_machine
from armor.serve.engine import check_engine
from benchmarks.record import store
from tests.vllm.served import BOUND, BOUNDS, FAMILIES, RANK, adapted, checkpoint, difference, expected, served

LORA, OF = "LoRA", "log-probabilities apart from transformers'"
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"enforce_eager": False},
    "two ranks": {"tensor_parallel_size": 2},
    "two stages": {"pipeline_parallel_size": 2, "enforce_eager": False},  # eagerly vLLM fails on a CPU
    LORA: {"enable_lora": True},
}
"""The ways by name: vLLM's options. With LoRA there are an adapter on all compressed linears and requests without it;
the tokens of prompts do not count there, for vLLM cannot tell theirs on a CPU."""


class Family(NamedTuple):
    """A checkpoint and what transformers says of it, and where asked of it with an adapter."""

    folder: Path
    adapter: Path
    plain: list[tuple[list[int], Tensor]]
    adapted: list[tuple[list[int], Tensor]]


def made(family: str, root: Path, way: str) -> Family:
    """The checkpoint of `family` in `root`. To be made before vLLM runs, which changes transformers' classes."""
    folder, adapter = checkpoint(root, family), root / "adapter"
    with_it = expected(folder, adapted(folder, adapter)) if way == LORA else []
    return Family(folder, adapter, expected(folder), with_it)


def measured(own: Family, way: str) -> float | str:
    """The largest difference of a log-probability, or the first line of the error."""
    try:
        if way != LORA:
            with served(own.folder, **WAYS[way]) as llm:
                return difference(llm, own.plain)
        with served(own.folder, max_lora_rank=RANK, **WAYS[way]) as llm:
            request = LoRARequest("mine", 1, str(own.adapter))
            with_it = difference(llm, own.adapted, prompts=False, lora_request=request)
            return max(with_it, difference(llm, own.plain, prompts=False))
    except Exception as error:  # whatever an engine fails with is what is to be seen
        line = next(iter(str(error).splitlines()), "")
        return f"{type(error).__name__}: {line.replace(f'{own.folder.parent}/', '')}"


def kept(file: Path) -> dict[str, dict[str, float | str]]:
    """What `file` has of this processor: by family, then by way."""
    runs = read_json(file)["runs"] if file.is_file() else []
    here = current_machine().processor
    rows = [row for run in runs if (run["of"], run["processor"]) == (OF, here) for row in run["rows"]]
    return {row.pop("family"): row for row in rows}


def table(families: dict[str, dict[str, float | str]]) -> str:
    """The table in Markdown."""
    names = [family for family in FAMILIES if family in families]
    lines = ["| family | " + " | ".join(WAYS) + " |", "|---" * (1 + len(WAYS)) + "|"]
    for family in names:
        told = [families[family].get(way, "") for way in WAYS]
        cells = [f"{own:.1e}" if isinstance(own, float) else own for own in told]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="These alone, even if --output has them.")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="These alone.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="To go on with.")
    given = parser.parse_args()
    if len(given.ways) > 1:
        command = [sys.executable, "-m", "benchmarks.serving_families", "--output", str(given.output), *given.families]
        codes = [subprocess.run([*command, "--ways", way]).returncode for way in given.ways]
        raise SystemExit(max(codes))
    (way,) = given.ways
    found = kept(given.output)
    asked = given.families or [family for family in FAMILIES if way not in found.get(family, {})]
    with tempfile.TemporaryDirectory() as root:
        for family, own in {family: made(family, Path(root) / family, way) for family in asked}.items():
            found.setdefault(family, {})[way] = measured(own, way)
            print(family, way, found[family][way], flush=True)
            rows = [{"family": name, **ways} for name, ways in sorted(found.items())]
            store(given.output, OF, rows, bound=BOUND, bounds=BOUNDS, engine=check_engine())
    print(table(found))
    each = [(own, BOUNDS.get(family, BOUND)) for family, ways in found.items() for own in ways.values()]
    if any(not isinstance(own, float) or own >= bound for own, bound in each):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
