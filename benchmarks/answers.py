"""Text to train on: what the dense model answered to the questions of a task.

    python -m benchmarks.answers results/MODEL/dense/evaluation/written/bbh_local.samples.jsonl answers.jsonl \\
        --leave-out subject=hyperbaton --leave-out subject=snarks

The first file is of an evaluation of the dense model with `samples: true`, of a task that it writes answers to. Each
question, with the examples before it, and its answer are a document of JSON lines: `text: {files: [answers.jsonl]}`.
Whether an answer is right does not count, for a tuned model shall write what the dense one writes. Questions that the
tuned model is judged by do not belong in it: --leave-out names them by a field of their row.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from armor.core.errors import ArmorError
from armor.execution.files import atomic_path


def documents(samples: list[dict[str, Any]], leave_out: list[str]) -> list[str]:
    """The questions of lm-eval's `samples` with their answers, each once, but those with a field "name=value"."""
    left = [tuple(one.split("=", 1)) for one in leave_out]
    if lost := [name for name, *_ in left if any(name not in sample["doc"] for sample in samples)]:
        raise ArmorError(f"--leave-out {lost[0]}: rows have no such field; they have {', '.join(samples[0]['doc'])}")
    found = {}
    for sample in samples:
        if not any(str(sample["doc"][name]) == value for name, value in left):
            found[sample["doc_id"]] = sample["arguments"][0][0] + sample["resps"][0][0]
    return list(found.values())


def main(
    samples: Annotated[Path, typer.Argument(help="evaluation/NAME/TASK.samples.jsonl of the dense model.")],
    output: Annotated[Path, typer.Argument(help="The file to write, JSON lines.")],
    leave_out: Annotated[list[str], typer.Option("--leave-out", help="FIELD=VALUE; may be given again.")] = [],  # noqa: B006
) -> None:
    """Write the documents, in an order that is drawn, and print how many there are."""
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    found = documents(rows, leave_out)
    random.Random(0).shuffle(found)
    with atomic_path(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found)
    print(f"{output}: {len(found)} documents, {sum(map(len, found))} characters")


if __name__ == "__main__":
    typer.run(main)
