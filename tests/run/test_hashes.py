"""Which stages an edit of a module runs again: every module is edited in turn, in a copy of the package.

What must come of it is found twice: from the imports, module by module, and as written down below, room by room. So an
import that adds a stage shows here. That a hash lacks nothing that its stage executes, tests/workflow/test_jobs.py has.
"""

from __future__ import annotations

import ast
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from armor.execution.fingerprint import WITHOUT_EFFECT, code_hash, modules
from armor.methods import METHODS
from armor.run.stages import STAGES

PACKAGE = Path(__file__).resolve().parents[2] / "armor"
TRAIN = "sensitivity states refine tune"
MEASURE = "predict evaluate tasks benchmark serving"
READ_TEXT = f"calibrate {TRAIN} predict evaluate tasks"
FACTORS = "price experts factorize refine tune quantize"
MODELS = f"inspect calibrate price experts factorize quantize assemble {TRAIN} {MEASURE}"
ALL = " ".join(STAGES)
HELD_BY = {
    # what no result depends on: commands, messages, devices, provenance; what resolves settings before a job starts
    "__init__ __main__ hf command* plan* run run/* core/errors core/version format/provenance format/records/run": "",
    "execution/devices execution/log execution/machine execution/nvml training/memory": "",
    "serve/chat": "",
    "serve*": "serving",
    "assemble/export assemble/verify model/cost model/outline": "",
    "config/loading config/reading config/recipes config/reference config/run format/reference": "",
    # the stages
    "model/fetch model/hub": "fetch",
    "model/inspect model/by_hand": "inspect",
    "calibrate*": "calibrate",
    "training/sensitivity": "sensitivity",
    "factorize/prices": "price",
    "factorize/budget": "budget",
    "factorize/layer factorize/asked methods/solver/annealed methods/solver/published": "price experts factorize",
    "methods/solver/pruning methods/solver/low_rank": "price experts factorize",
    "factorize/quantize methods/solver/rounding methods/solver/integers": "quantize",
    "methods/solver/feedback methods/solver/output": "price experts factorize quantize",
    "factorize*": "price budget experts factorize quantize",
    "training/states": "sensitivity states refine",
    "training/refine": "refine",
    "training/refined format/records/refine": "refined",
    "training/tune training/spread format/records/tune": "tune",
    "training/fit training/record training/trainable": "refine tune",
    "training*": f"{TRAIN} refined",
    "assemble*": "assemble",
    "evaluate/predictions evaluate/logits": "predict evaluate",
    "evaluate/perplexity": "evaluate",
    "evaluate/tasks evaluate/built": "tasks",
    "evaluate*": "predict evaluate tasks",
    "benchmark/serving benchmark/client": "serving",
    "benchmark/rounds benchmark": "benchmark serving",
    "benchmark*": "benchmark",
    "report*": "report",
    # their settings
    "config/layers methods/solver/settings": "price budget experts factorize quantize report",
    "config/quantization": "quantize",
    "config/budget": "price budget",
    "config/training": "refine tune",
    "config/sample": TRAIN,
    "config/measures": MEASURE,
    "config/tasks": "tasks",
    "config/report": "report",
    "config/sources": f"fetch {READ_TEXT} benchmark serving",
    "config*": f"fetch {READ_TEXT} benchmark serving price budget experts factorize quantize report",
    # their files
    "format/layout format/records/report": "report",
    "format/names": ALL.replace("fetch inspect ", "").replace("serving ", ""),
    "format/statistics": f"calibrate {FACTORS}",
    "format/records/calibration": f"calibrate {FACTORS} report",
    "format/sensitivity format/records/sensitivity": "sensitivity price",
    "format/records/budget": "price budget experts factorize",
    "format/states format/records/states": "sensitivity states refine",
    "format/factors format/holes": f"{FACTORS} assemble",
    "format/records/layer": f"{FACTORS} refined assemble report",
    "format/records/checkpoint": "assemble benchmark report",
    "format/logits format/records/predictions": "predict evaluate",
    "format/records/evaluation": "evaluate tasks report",
    "format/records/benchmark": "benchmark serving report",
    "format/records/serving": "serving report",
    "format/checksums": f"assemble {MEASURE}",
    # what several stages stand on
    "methods methods/solver": f"{FACTORS} budget report",
    "methods/solver/memory methods/solver/objective": FACTORS,
    "methods/*": "price experts factorize",
    "text*": READ_TEXT,
    "runtime/streamed": "tune predict evaluate tasks",
    "runtime/streaming": "predict evaluate tasks",
    "runtime runtime/auto runtime/conv1d runtime/experts runtime/fused runtime/names runtime/skeleton": MODELS,
    "runtime/filling runtime/families*": MODELS,
    "runtime/apart runtime/calls": f"inspect {READ_TEXT}",
    "runtime/folder": f"inspect {READ_TEXT} {MEASURE}",
    "runtime*": f"inspect {MEASURE}",
    "model*": f"fetch inspect calibrate {TRAIN} price experts factorize quantize assemble",
    "core* execution* format*": ALL,
}
"""The stages whose hash may hold a module, by patterns below armor/; the first that fits counts."""


def entries() -> dict[str, list[str]]:
    """The modules that the hash of each stage begins with; with all methods, where it has those of a recipe."""
    methods = [module for method in METHODS.values() for module in method.code]
    more = dict.fromkeys(("price", "experts", "factorize"), methods) | {"refine": STAGES["refine"].also(None, *"123")}
    more["serving"] = STAGES["serving"].also(None, *"12")
    return {stage: [row.entry, *more.get(stage, ())] for stage, row in STAGES.items()}


@pytest.fixture(scope="module")
def reruns(tmp_path_factory) -> dict[str, set[str]]:
    """The stages whose hash is another one after an edit of a module, by the module's name."""
    folder = tmp_path_factory.mktemp("edits")
    copy = folder / "copy"
    shutil.copytree(PACKAGE, copy / "armor", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    before = {stage: code_hash(*own, root=copy) for stage, own in entries().items()}
    found = {}
    for name, file in modules(copy).items():
        (root := folder / name).symlink_to(copy)  # hashes are kept by root, so each edit has its own
        text = file.read_bytes()
        file.write_bytes(text + b"\nEDITED = 1\n")
        found[name] = {stage for stage, own in entries().items() if code_hash(*own, root=root) != before[stage]}
        file.write_bytes(text)
    return found


def imported() -> dict[str, set[str]]:
    """The modules of the package that each module imports, wherever in it, and the packages that they lie in."""
    found = {}
    for name, file in modules().items():
        nodes = [*ast.walk(ast.parse(file.read_bytes()))]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        parts = [path.split(".") for path in (name, *names)]
        found[name] = {".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)} & modules().keys()
    return found


def test_an_edit_reruns_the_stages_that_import_the_module_and_no_other(reruns):
    edges, expected = imported(), {name: set() for name in modules()}
    for stage, own in entries().items():
        reached: set[str] = set()
        waiting = {*own}
        while waiting := waiting - reached - {*WITHOUT_EFFECT}:
            reached |= waiting
            waiting = {other for name in waiting for other in edges[name]}
        for name in reached:
            expected[name].add(stage)
    assert reruns == expected
    assert {name for name in WITHOUT_EFFECT if reruns[name]} == set()


def test_an_edit_reruns_the_stages_that_are_written_down_for_its_room(reruns):
    seen: dict[str, set[str]] = {}
    for module, stages in reruns.items():
        name = module.removeprefix("armor").removeprefix(".").replace(".", "/") or "__init__"
        room = next((p for p in HELD_BY if any(fnmatchcase(name, pattern) for pattern in p.split())), None)
        assert room is not None, f"{name}: not in HELD_BY"
        more = stages - {*HELD_BY[room].split()}
        assert not more, f"armor/{name}: an edit reruns {', '.join(sorted(more))} too"
        seen.setdefault(room, set()).update(stages)
    assert seen == {room: {*stages.split()} for room, stages in HELD_BY.items()}
