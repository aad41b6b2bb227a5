"""What an edit makes run again: every setting, every module of armor/, a version of a record and of every package.

    python -m benchmarks.reruns                   print a table as Markdown; status 1 if a row is not as it should be
    python -m benchmarks.reruns armor/training    only the edits with this in their names; several may be given
    python -m benchmarks.reruns --folder FOLDER   keep the run there, or ask the one that is there

A tiny random mixture of experts goes through every stage of the workflow, and a dense Llama through a few; the tests'
stand-in serves in place of vLLM. Then each edit is made by itself, in the configuration or in a copy of the code, and
Snakemake says in a dry run what it would run. Nothing more and nothing less: in every row that must be what `armor
explain` has reasons for (armor.run.explain), which compares what the records say instead of what Snakemake remembers.
For a setting, `edits` also says which stage comes first. A setting of the configuration's types without a row is an
error. That the hash of a stage's code holds all that it executes is in tests/workflow/test_jobs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

from armor.config.run import Config
from armor.core.typed import Typed
from armor.methods import METHODS
from armor.run.stages import STAGES
from tests.engine import stand_in
from tests.hub import hub
from tests.tiny import tiny_gguf, tiny_model
from tests.wheels import wheel
from tests.workflow.conftest import REPOSITORY, Run
from tests.workflow.test_jobs import ITEM
from tests.workflow.test_rerun import explained

TRAINING = {"steps": 2, "batch": 2, "sequences": 3, "held_out": 1, "warm_up": 1}
OVER = [{"block_size": 4}, {"block_size": 8}, {"method": "dense"}]
OTHERS = {
    "*.q_proj": "sparsegpt",
    "*.k_proj": "nowag",
    "*.v_proj": "magnitude",
    "*.experts.0.*": "oats",
    "*.experts.1.*": "basil",
    "*.experts.2.gate_proj": "lora",
    "*.experts.2.up_proj": "armor_gram",
    "*.experts.3.gate_proj": "gptq",
    "*.experts.3.up_proj": "int4",
    "*.experts.3.down_proj": "int8",
}
"""Every method but armor, wanda and dense, each for some linears of one recipe."""
NEW = [{"modules": "*.o_proj", "layers": [index]} for index in range(2)]
"""For methods that are not among them yet."""
TEXT_EDITS = {
    "text": (
        {"dataset": "some/text"},
        {"package": "words==1.0", "file": "words/some.txt"},
        {"mixture": [{"files": ["README.md"]}, {"files": ["LICENSE"]}]},
    ),
    "text.files": ["README.md"],
    "text.subset": "en",
    "text.split": "test",
    "text.streaming": True,
    "text.column": "body",
    "text.documents": [0, 1],
    "text.separator": " ",
    "text.detokenize": "wikitext",
}
TRAINING_EDITS = {
    "steps": 3,
    "batch": 1,
    "sequences": 4,
    "held_out": 2,
    "sequence_length": 16,
    "calibration": "grams",
    "rate": 1e-2,
    "norm_rate": 0.1,
    "warm_up": 0,
    "core": False,
    "patience": 1,
}


def below(key: str, edits: dict[str, Any]) -> dict[str, Any]:
    """The same edits of what stands at `key`."""
    return {f"{key}.{name}": value for name, value in edits.items()}


def edits(folder: Path) -> dict[str, dict[str, Any]]:
    """Another value for every setting of `finished`, by the stage that runs again first; a tuple has several.

    Hidden states do not count as first: they are deleted after use, and made again for who needs them.
    """
    return {
        "fetch": {
            "models.plain": (
                {"folder": str(folder / "other")},
                {"hub": "someone/model", "revision": "abc"},
                {"gguf": str(folder / "model.gguf")},
                {"package": "tinymodel==1.0", "file": "tinymodel/folder"},
            ),
            "models.plain.dtype": "bfloat16",
        },
        "calibrate": below("calibrations.words", TEXT_EDITS)
        | {
            "calibrations.words.sequences": 3,
            "calibrations.words.sequence_length": 16,
            "calibrations.words.gram": True,
            "calibrations.words.hidden_states_memory_gb": 1.0,
            "recipes.armor.calibration": "grams",
        },
        "sensitivity": {
            "seed": 1,
            "recipes.bits.calibration": "grams",
            "recipes.bits.budget.sequences": 2,
            "recipes.bits.budget.sequence_length": 16,
        },
        "price": {
            "recipes.bits.budget.over": OVER[:2],
            "recipes.bits.budget.over.0.method": "nowag",
            "recipes.bits.budget.over.0.pattern": "1:4",
            "recipes.bits.budget.over.0.block_size": 16,
            "recipes.bits.budget.over.0.rank": 4,
            "recipes.bits.budget.iterations": 4,
        },
        "budget": {"recipes.bits.budget.bits": 22},
        "experts": {
            "recipes.armor.method": "nowag",
            "recipes.armor.pattern": "1:4",
            "recipes.armor.block_size": 4,
            "recipes.armor.solver.iterations": 4,
            "recipes.armor.solver": (
                {"iterations": 3, "algorithm": "published"},
                {"iterations": 3, "algorithm": "published", "selection": "uniform"},
            ),
            "recipes.armor.experts_per_job": 3,
            "recipes.armor.share_right": True,
            "recipes.armor.keep_dense": ["*.k_proj"],
            "recipes.armor.overrides.0.method": "nowag",
            "recipes.armor.overrides.0.pattern": "1:4",
            "recipes.armor.overrides.0.block_size": 16,
            "recipes.armor.overrides.0.rank": 4,
            "recipes.armor.overrides.0.layers": [0],
            "recipes.armor.overrides.0.modules": "*.up_proj",
            "recipes.armor.overrides.0.solver": (
                {"iterations": 5},
                {"algorithm": "published"},
                {"algorithm": "published", "selection": "uniform"},
            ),
        },
        "factorize": {
            "recipes.mixed.rank": 4,
            "recipes.mixed.gptq.group": 16,
            "recipes.mixed.int4.group": 16,
        },
        "refine": below("recipes.refined.refine", TRAINING_EDITS)
        | {
            "recipes.refined.refine.inputs": "compressed",
            "recipes.armor.refine": TRAINING,
            "runs.0.models": ["tiny", "plain"],
        },
        "quantize": {
            "recipes.integers.base": "armor",
            "recipes.integers.quantize.core": "int4",
            "recipes.integers.quantize.blocks": "bfloat16",
            "recipes.integers.quantize.group": 32,
            "recipes.integers.quantize.overrides.0.core": "int4",
            "recipes.integers.quantize.overrides.0.blocks": "bfloat16",
            "recipes.integers.quantize.overrides.0.group": 8,
            "recipes.integers.quantize.overrides.0.leave": True,
            "recipes.integers.quantize.overrides.0.layers": [0],
            "recipes.integers.quantize.overrides.0.modules": "*.up_proj",
        },
        "tune": below("recipes.tuned.tune", TRAINING_EDITS),
        "predict": below("evaluations.words", TEXT_EDITS)
        | {
            "evaluations.words.sequences": 3,
            "evaluations.words.sequence_length": 16,
            "evaluations.words.dtype": "bfloat16",
            "evaluations.words.predictions_gb": 1.0,
        },
        "evaluate": {"runs.0.recipes": ["dense", "armor", "tuned", "mixed"]},
        "tasks": {
            "evaluations.questions.text.documents": [0, 1],
            "evaluations.questions.tasks": ["last_word"],
            "evaluations.questions.shots": 1,
            "evaluations.questions.items": 5,
            "evaluations.questions.samples": True,
            "evaluations.questions.dtype": "bfloat16",
            "evaluations.questions": {
                "text": {"package": "words==1.0", "file": "words/some.txt"},
                "tasks": ["last_word"],
                "engine": "vllm",
                "options": ["--enforce-eager"],
            },
            "runs.0.evaluations": ["words", "questions"],
        },
        "benchmark": {
            "benchmarks.decode.prompt_tokens": 5,
            "benchmarks.decode.new_tokens": 5,
            "benchmarks.decode.batch_sizes": [1, 2],
            "benchmarks.decode.prompts": ["A"],
            "benchmarks.decode.repeats": 3,
            "benchmarks.decode.dtype": "float32",
        },
        "serving": {
            "benchmarks.decode": {"engine": "vllm"},
            "benchmarks.serve.prompt_tokens": 5,
            "benchmarks.serve.new_tokens": 5,
            "benchmarks.serve.clients": [2],
            "benchmarks.serve.requests": 2,
            "benchmarks.serve.options": ["--enforce-eager"],
            "benchmarks.serve.repeats": 2,
            "benchmarks.serve.dtype": "float32",
            "runs.0.benchmarks": ["decode", "serve"],
        },
        "report": {"recipes.more": {"method": "wanda", "calibration": "words"}},
    }


def settings_of(kind: type[Typed]) -> Iterator[str]:
    """The settings of a type and of its parts, as in `recipes.*.overrides.*.rank`; parts of its own type add none."""
    for name, field in kind.model_fields.items():
        parts = [(path, part) for path, part in parts_of(field.annotation) if part is not kind]
        yield from () if parts else (name,)
        for path, part in parts:
            yield from (".".join((name, *path, rest)) for rest in settings_of(part))


def parts_of(annotation: Any) -> Iterator[tuple[tuple[str, ...], type[Typed]]]:
    """The types of settings within an annotation, each with a star for every list or dict around it."""
    if isinstance(annotation, type) and issubclass(annotation, Typed):
        yield (), annotation
    around = ("*",) if get_origin(annotation) in (dict, list) else ()
    for inner in get_args(annotation):
        yield from ((around + path, part) for path, part in parts_of(inner))


def named(key: str, value: Any) -> Iterator[str]:
    """The keys that an edit gives a value."""
    yield key
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from named(f"{key}.{name}", inner)


def missing(rows: list[tuple[str, str, Any]]) -> list[str]:
    """The settings of a configuration that no row edits."""
    given = [key for _, edit, value in rows for key in named(edit, value)]
    pattern = {setting: setting.replace(".", r"\.").replace("*", "[^.]+") for setting in settings_of(Config)}
    return [setting for setting in pattern if not any(re.fullmatch(pattern[setting], key) for key in given)]


def edited(config: dict, key: str, value: Any) -> dict:
    """`config` with another value at `key`; numbers are places in lists."""
    config = place = json.loads(json.dumps(config))  # no part of it stands at two places
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    for part in parents:
        place = place[part] if isinstance(part, int) else place.setdefault(part, {})
    place[last] = value
    return config


def finished(folder: Path) -> Run:
    """A run of two tiny models to its end, with every stage; made in `folder`, or continued there."""
    new = sorted(METHODS.keys() - {"armor", "wanda", "dense", *OTHERS.values()})
    if len(new) > len(NEW):
        sys.exit(f"{__file__}: no recipe has the methods {', '.join(new)}; give them linears in OTHERS")
    words = (REPOSITORY / "LICENSE").read_text().split()
    half = len(words) // 2
    content = {
        "calibration": " ".join(words[:half]),
        "evaluation": " ".join(words[half:]),
        "questions": "".join(map(ITEM.format, ("two", "three", "four", "five"))),
    }
    text = {name: {"text": {"files": [str(folder / f"{name}.txt")]}} for name in content}
    if not (folder / "python").is_dir():
        for name, words in content.items():
            (folder / f"{name}.txt").write_text(words)
        tiny_model(folder / "mixture", "qwen3_moe", layers=2, moe_intermediate_size=32)
        plain = tiny_model(folder / "plain", layers=2)
        tiny_model(folder / "other", layers=2, seed=1)
        tiny_gguf(folder / "model.gguf", plain)
        wheel(folder, "tinymodel", {f"folder/{path.name}": path.read_bytes() for path in plain.iterdir()})
        (folder / "python").mkdir()
        stand_in(folder / "python")
    os.environ["STAND_IN"] = str(folder / "python/turns")
    short = {"sequences": 4, "sequence_length": 32}
    armor = {"block_size": 8, "solver": {"iterations": 3}, "calibration": "words"}
    override = {"layers": [1], "modules": "*.down_proj", "solver": {"iterations": 4}}
    mixture = {"models": ["tiny"]}
    config = {
        "models": {"tiny": {"folder": str(folder / "mixture")}, "plain": {"folder": str(folder / "plain")}},
        "calibrations": {
            "words": text["calibration"] | short,
            "grams": text["calibration"] | {"sequences": 4, "sequence_length": 16, "gram": True},
        },
        "recipes": {
            "dense": {"method": "dense"},
            "armor": armor | {"experts_per_job": 2, "overrides": [override]},
            "refined": {"base": "armor", "refine": dict(TRAINING)},
            "integers": {"base": "refined", "quantize": {"overrides": [{"modules": "*.down_proj", "group": 16}]}},
            "tuned": {"base": "integers", "tune": dict(TRAINING)},
            "bits": armor | {"budget": {"bits": 24, "over": OVER, "sequences": 1, "iterations": 3}},
            "mixed": {
                "method": "wanda",
                "rank": 8,
                "calibration": "grams",
                "overrides": [{"modules": pattern, "method": method} for pattern, method in OTHERS.items()]
                + [place | {"method": method} for place, method in zip(NEW, new, strict=False)],
            },
        },
        "evaluations": {
            "words": text["evaluation"] | short,
            "questions": text["questions"] | {"tasks": ["last_word", "continuation"], "items": 4},
        },
        "benchmarks": {
            "decode": {"prompt_tokens": 4, "new_tokens": 4, "repeats": 2},
            "serve": {"engine": "vllm", "prompt_tokens": 4, "new_tokens": 4, "clients": [1], "repeats": 1},
        },
        "runs": [
            mixture | {"recipes": ["dense", "armor", "tuned"], "evaluations": ["words"], "benchmarks": ["decode"]},
            mixture | {"recipes": ["integers", "bits", "mixed"], "evaluations": [], "benchmarks": []},
            mixture | {"recipes": ["dense"], "evaluations": ["questions"], "benchmarks": ["serve"]},
            {"models": ["plain"], "recipes": ["armor"], "evaluations": [], "benchmarks": []},
        ],
    }
    run = Run(folder / "run", config)
    run.folder.mkdir(exist_ok=True)
    done = Run(run.folder, config, python=folder / "python").snakemake()
    if done.returncode:
        sys.exit(done.stderr)
    return run


def asked(run: Run, config: dict) -> tuple[dict[str, int], str, bool]:
    """Jobs by rule that would run; the same in words; whether both who are asked agree.

    `armor explain` is not asked about `states`, whose files are deleted after use and made again for who needs them,
    nor about `fetch` and `inspect`, whose records have no code: what follows compares what they say.
    """
    plan = run.would_run(config)
    first = {rule: count for rule, count in plan.items() if rule in ("fetch", "inspect")}
    try:
        told = explained(run, config)
    except AssertionError as refused:  # model.json is of another version: the layers are known when it was made again
        if "model.json: format " not in str(refused):
            raise
        told = None
    if "inspect" in plan:  # what follows is planned when the model was inspected; so that is done, elsewhere
        with tempfile.TemporaryDirectory() as name:
            begun = Run(Path(name) / "run", run.config, run.repository)
            shutil.copytree(run.folder, begun.folder, symlinks=True)
            done = replace(begun, python=run.folder.parent / "python").snakemake(
                "--", *(f"results/{model}/model.json" for model in config["models"]), config=config
            )
            if done.returncode:
                sys.exit(done.stderr)
            plan = begun.would_run(config)
            told = explained(begun, config) if told is None else told
    words = ", ".join(rule if count == 1 else f"{rule} {count}" for rule, count in plan.items()) or "nothing"
    stages = (plan.keys() | told.keys()) - {"states", "fetch", "inspect"}
    agreed = all(plan.get(rule) == told.get(rule) for rule in stages)
    if not agreed:
        print(f"explain: {told}", file=sys.stderr)
    return first | plan, "; ".join(filter(None, (", ".join(first), words))), agreed


def setting_rows(folder: Path) -> list[tuple[str, str, Any]]:
    """Every edit of a setting: the stage that comes first, the key, the value."""
    found = [(stage, key, value) for stage, own in edits(folder).items() for key, value in own.items()]
    return [
        (stage, key, one) for stage, key, value in found for one in (value if isinstance(value, tuple) else (value,))
    ]


def rows(run: Run, copied: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str, bool]]:
    """Every edit that is `wanted`, what Snakemake would run then, and whether that is as it should be."""
    if wanted("none"):
        yield "none", *asked(run, run.config)[1:]
    for stage, key, value in setting_rows(run.folder.parent):
        edit = f"`{key}`: {json.dumps(value).replace(str(run.folder.parent) + '/', '')}"
        if wanted(edit):
            plan, words, agreed = asked(run, edited(run.config, key, value))
            yield edit, words, agreed and stage == next((s for s in STAGES if s in plan and s != "states"), "")
    for name in ("Snakefile", "workflow", "config", "envs", "profiles", "armor"):
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copied / name)
    other = Run(run.folder, run.config, copied)
    for file in sorted((copied / "armor").rglob("*.py")):
        whole, edit = file.read_text(), f"`{file.relative_to(copied)}`"
        if wanted(edit):
            file.write_text(f"{whole}\nEDITED = 1\n")
            yield edit, *asked(other, run.config)[1:]
            file.write_text(whole)
    for file in sorted((copied / "armor/format/records").glob("*.py")):
        whole = file.read_text()
        newer = re.sub(r"(format_version: Literal)\[(\d+)\] = \d+", r"\1[99] = 99", whole)
        edit = f"the version of records in `{file.relative_to(copied)}`"
        if newer != whole and wanted(edit):
            file.write_text(newer)
            yield edit, *asked(other, run.config)[1:]
            file.write_text(whole)
    if wanted(edit := "every package in a newer version"):
        file = copied / "armor/execution/machine.py"  # a record says which versions made it
        file.write_text(file.read_text() + '\nreal = version\nversion = lambda name: f"{real(name)}.1"\n')
        yield edit, *asked(other, run.config)[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=[""], help="only the edits with one of these in their names")
    parser.add_argument("--folder", help="keep the run there, or ask the one that is there")
    options = parser.parse_args()
    if lost := missing(setting_rows(Path())):
        sys.exit(f"benchmarks/reruns.py: no row edits {', '.join(lost)}; add them to edits()")
    with ExitStack() as stack:
        folder = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run = finished(folder)
        _, endpoint = stack.enter_context(hub(folder / "plain"))
        os.environ |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hub"), "XDG_CACHE_HOME": str(folder / "cache")}
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
        copied = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        right = []
        print("| edit | runs again | as it should be |\n|---|---|---|")
        for edit, plan, agreed in rows(run, copied, lambda edit: any(name in edit for name in options.names)):
            print(f"| {edit} | {plan} | {'yes' if agreed else '**no**'} |", flush=True)
            right.append(agreed)
    if not right:
        sys.exit(f"benchmarks/reruns.py: no edit has {' or '.join(options.names)} in its name")
    print(f"\n{sum(right)} of {len(right)} rows are as they should be")
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
