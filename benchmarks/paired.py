"""How far one model is behind another on the same items of tasks, with the standard error of that difference.

    python -m benchmarks.paired runs/refine/results/smollm2-135m/{dense,armor-tuned}/evaluation/tasks

Each folder is of an evaluation of tasks with `samples: true`. An item that both models answer alike adds nothing to the
difference. So its error is smaller than what the errors of two accuracies make together. For the mean of all tasks the
tasks are given, and only their items are drawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from tabulate import tabulate

from armor.core.errors import ArmorError
from armor.format.records.evaluation import TaskRecord


def scores(folder: Path, record: TaskRecord) -> dict[tuple[str, int, str], float]:
    """Of each item of a task, by its task, number and hash: its value of the metric that stands for the task."""
    file = folder / f"{record.task}.samples.jsonl"
    if not file.is_file():
        raise ArmorError(f"{file}: no such file; evaluate with `samples: true`")
    metric, _, kind = record.metric.partition(",")
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        if sample["filter"] == (kind or "none"):
            found[sample["task"], sample["doc_id"], sample["doc_hash"]] = float(sample[metric])
    return found


def compare(first: Path, second: Path) -> dict[str, tuple[list[float], list[float], str]]:
    """By task that both folders have: the values of the first model and of the second, item by item, and the metric.

    Raises ArmorError if the folders have no task in common, if answers were not kept, or if the items differ.
    """
    found = {}
    for file in sorted(first.glob("*.json")):
        if not (second / file.name).is_file():
            continue
        record, other = TaskRecord.read(file), TaskRecord.read(second / file.name)
        one, two = scores(first, record), scores(second, other)
        if one.keys() != two.keys() or record.metric != other.metric:
            raise ArmorError(f"{second / file.name}: other items, or another metric, than {file}; evaluate both alike")
        found[record.task] = list(one.values()), [two[item] for item in one], record.metric
    if not found:
        raise ArmorError(f"{second}: no task that {first} has too")
    return found


def difference(first: list[float], second: list[float]) -> tuple[float, float]:
    """The mean of second minus first, and its standard error."""
    each = [b - a for a, b in zip(first, second, strict=True)]
    return mean(each), stdev(each) / len(each) ** 0.5


def main(
    first: Annotated[Path, typer.Argument(help="What the other is compared with: evaluation/NAME.")],
    second: Annotated[Path, typer.Argument(help="The same evaluation of the other model.")],
) -> None:
    """Print a table: for each task, and for the mean of all, both values and their difference in percent."""
    found = compare(first, second)
    differences = [difference(one, two) for one, two, _ in found.values()]
    rows = [
        [task, len(one), metric, mean(one), mean(two), *apart]
        for (task, (one, two, metric)), apart in zip(found.items(), differences, strict=True)
    ]
    error = sum(error**2 for _, error in differences) ** 0.5 / len(rows)
    rows.append(["mean", None, None, *(mean(row[column] for row in rows) for column in (3, 4, 5)), error])
    table = [
        [task, items, metric, f"{one:.1%}", f"{two:.1%}", f"{apart:+.1%} ± {error:.1%}"]
        for task, items, metric, one, two, apart, error in rows
    ]
    print(tabulate(table, ["task", "items", "metric", "first", "second", "difference"], tablefmt="github"))


if __name__ == "__main__":
    typer.run(main)
