"""What an edit makes run again: every module of armor/, every kind of setting, a version of a record and of a package.

    python -m benchmarks.reruns                   print a table as Markdown; status 1 if a row is not as it should be
    python -m benchmarks.reruns armor/training    only the edits with this in their names; several may be given

A tiny random model goes through the workflow, but for what integers, mixtures, tasks and serving need; an edit of what
only these execute shows as nothing. Then each edit is made by itself, in a copy of the code or in the
configuration, and Snakemake says in a dry run what it would run. Nothing more and nothing less: in every row that must
be what `armor explain` has reasons for (armor.run.explain), which compares what the records say instead of what
Snakemake remembers. That the hash of a stage's code holds all that it executes is in tests/workflow/test_jobs.py.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.tiny import tiny_model
from tests.workflow.conftest import REPOSITORY, Run
from tests.workflow.test_rerun import explained

TRAINING = {"steps": 2, "batch": 2, "sequences": 3, "held_out": 1, "warm_up": 1}
OVER = [{"block_size": 4}, {"block_size": 8}, {"method": "dense"}]
SETTINGS = {
    "seed": 1,
    "models__tiny__dtype": "bfloat16",
    "calibrations__words__sequences": 3,
    "calibrations__words__sequence_length": 16,
    "calibrations__words__gram": True,
    "calibrations__words__hidden_states_memory_gb": 1.0,
    "recipes__armor__method": "nowag",
    "recipes__armor__pattern": "1:4",
    "recipes__armor__block_size": 4,
    "recipes__armor__solver": {"iterations": 4},
    "recipes__armor__keep_dense": ["*.k_proj"],
    "recipes__armor__overrides": [{"layers": [1], "block_size": 4}],
    "recipes__armor__refine": TRAINING,
    "recipes__refined__refine__steps": 3,
    "recipes__refined__refine__rate": 1e-3,
    "recipes__refined__refine__norm_rate": 0.1,
    "recipes__refined__refine__warm_up": 0,
    "recipes__refined__refine__patience": 1,
    "recipes__refined__refine__batch": 1,
    "recipes__refined__refine__sequences": 4,
    "recipes__refined__refine__held_out": 2,
    "recipes__refined__refine__sequence_length": 16,
    "recipes__refined__refine__inputs": "compressed",
    "recipes__tuned__tune__rate": 1e-4,
    "recipes__tuned__tune__core": False,
    "recipes__bits__budget__bits": 22,
    "recipes__bits__budget__over": OVER[:2],
    "recipes__bits__budget__sequences": 2,
    "recipes__bits__budget__iterations": 4,
    "recipes__more": {"method": "wanda"},
    "evaluations__words__sequences": 3,
    "evaluations__words__sequence_length": 16,
    "evaluations__words__dtype": "bfloat16",
    "evaluations__words__predictions_gb": 1.0,
    "benchmarks__decode__prompt_tokens": 5,
    "benchmarks__decode__new_tokens": 5,
    "benchmarks__decode__batch_sizes": [1, 2],
    "benchmarks__decode__prompts": ["A"],
    "benchmarks__decode__repeats": 3,
    "benchmarks__decode__dtype": "float32",
}
"""A value for each key that is not that of `finished`."""


def finished(folder: Path) -> Run:
    """A run of a tiny model to its end, with every stage but quantize, experts, tasks and serving."""
    words = (REPOSITORY / "LICENSE").read_text().split()
    for name, part in (("calibration", words[: len(words) // 2]), ("evaluation", words[len(words) // 2 :])):
        (folder / f"{name}.txt").write_text(" ".join(part))
    config = {
        "models": {"tiny": {"folder": str(tiny_model(folder / "tiny", "llama", layers=2))}},
        "calibrations": {"words": {"text": {"files": [str(folder / "calibration.txt")]}, "sequences": 4}},
        "recipes": {
            "dense": {"method": "dense"},
            "armor": {"block_size": 8, "solver": {"iterations": 3}},
            "refined": {"base": "armor", "refine": dict(TRAINING)},
            "tuned": {"base": "refined", "tune": dict(TRAINING)},
            "bits": {
                "block_size": 8,
                "solver": {"iterations": 3},
                "budget": {"bits": 24, "over": OVER, "sequences": 1, "iterations": 3},
            },
        },
        "evaluations": {"words": {"text": {"files": [str(folder / "evaluation.txt")]}, "sequences": 4}},
        "benchmarks": {"decode": {"prompt_tokens": 4, "new_tokens": 4, "repeats": 2}},
    }
    for text in (config["calibrations"]["words"], config["evaluations"]["words"]):
        text["sequence_length"] = 32
    run = Run(folder / "run", config)
    run.folder.mkdir()
    done = run.snakemake()
    if done.returncode:
        sys.exit(done.stderr)
    return run


def asked(run: Run, config: dict) -> tuple[str, bool]:
    """What would run, in words, and whether both who are asked agree.

    `armor explain` is not asked about `states`, whose files are deleted after use and made again for who needs them,
    nor about `fetch` and `inspect`, whose records have no code: what follows compares what they say.
    """
    plan, first = run.would_run(config), ""
    try:
        told = explained(run, config)
    except AssertionError as refused:  # model.json is of another version: the layers are known when it was made again
        if "model.json: format " not in str(refused):
            raise
        told = None
    if "inspect" in plan:  # what follows is planned when the model was inspected; so that is done, elsewhere
        first = "fetch, inspect; " if "fetch" in plan else "inspect; "
        with tempfile.TemporaryDirectory() as name:
            begun = Run(Path(name) / "run", run.config, run.repository)
            shutil.copytree(run.folder, begun.folder, symlinks=True)
            done = begun.snakemake("--", "results/tiny/model.json", config=config)
            if done.returncode:
                sys.exit(done.stderr)
            plan = begun.would_run(config)
            told = explained(begun, config) if told is None else told
    words = ", ".join(rule if count == 1 else f"{rule} {count}" for rule, count in plan.items())
    stages = (plan.keys() | told.keys()) - {"states", "fetch", "inspect"}
    agreed = all(plan.get(rule) == told.get(rule) for rule in stages)
    if not agreed:
        print(f"explain: {told}", file=sys.stderr)
    return first + (words or "nothing"), agreed


def rows(run: Run, copy: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str, bool]]:
    """Every edit that is `wanted`, what Snakemake would run then, and whether that is as it should be."""
    if wanted("none"):
        yield "none", *asked(run, run.config)
    for key, value in SETTINGS.items():
        edit = f"`{key.replace('__', '.')}`: {json.dumps(value)}"
        if wanted(edit):
            yield edit, *asked(run, run.edited(**{key: value}))
    for name in ("Snakefile", "workflow", "config", "envs", "profiles", "armor"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    edited = Run(run.folder, run.config, copy)
    for file in sorted((copy / "armor").rglob("*.py")):
        whole, edit = file.read_text(), f"`{file.relative_to(copy)}`"
        if wanted(edit):
            file.write_text(f"{whole}\nEDITED = 1\n")
            yield edit, *asked(edited, run.config)
            file.write_text(whole)
    for file in sorted((copy / "armor/format/records").glob("*.py")):
        whole = file.read_text()
        newer = re.sub(r"(format_version: Literal)\[(\d+)\] = \d+", r"\1[99] = 99", whole)
        edit = f"the version of records in `{file.relative_to(copy)}`"
        if newer != whole and wanted(edit):
            file.write_text(newer)
            yield edit, *asked(edited, run.config)
            file.write_text(whole)
    if wanted(edit := "every package in a newer version"):
        file = copy / "armor/execution/machine.py"  # a record says which versions made it
        file.write_text(file.read_text() + '\nreal = version\nversion = lambda name: f"{real(name)}.1"\n')
        yield edit, *asked(edited, run.config)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "copy").mkdir()
        right = []
        print("| edit | runs again | as `armor explain` says |\n|---|---|---|")
        names = sys.argv[1:] or [""]
        for edit, plan, agreed in rows(finished(folder), folder / "copy", lambda edit: any(n in edit for n in names)):
            print(f"| {edit} | {plan} | {'yes' if agreed else '**no**'} |", flush=True)
            right.append(agreed)
    print(f"\n{sum(right)} of {len(right)} rows agree")
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
