"""Which stages an edit of a module runs again, written down room by room: an import that adds one shows here.

That a hash lacks nothing that its stage executes is in tests/workflow/test_jobs.py.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from armor.execution.fingerprint import executed_by
from armor.methods import METHODS
from armor.run.jobs import STAGES

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
    "assemble/export assemble/verify model/outline": "",
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
    "factorize/quantize methods/solver/rounding": "quantize",
    "methods/solver/feedback": "price experts factorize quantize",
    "factorize*": "price budget experts factorize quantize",
    "training/states": "sensitivity states refine",
    "training/refine": "refine",
    "training/refined format/records/refine": "refined",
    "training/tune training/spread format/records/tune": "tune",
    "training/fit training/record training/trainable": "refine tune",
    "training/sample": TRAIN,
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
    "format/checksums": f"{TRAIN} assemble {MEASURE}",
    # what several stages stand on
    "methods methods/solver": f"{FACTORS} budget report",
    "methods/solver/memory methods/solver/objective": FACTORS,
    "methods/*": "price experts factorize",
    "model/cost": "price report",
    "text*": READ_TEXT,
    "runtime/streamed": f"tune {MEASURE.removesuffix(' serving')}",
    "runtime runtime/auto runtime/conv1d runtime/experts runtime/names runtime/skeleton": MODELS,
    "runtime*": f"inspect {TRAIN} {MEASURE}",
    "model*": f"fetch inspect calibrate {TRAIN} price experts factorize quantize assemble report",
    "core* execution* format*": ALL,
}
"""The stages whose hash may hold a module, by patterns below armor/; the first that fits counts."""


def held() -> dict[str, set[str]]:
    """The stages whose hash holds each module of the package, by its name below armor/."""
    methods = [module for method in METHODS.values() for module in method.code]
    more = dict.fromkeys(("price", "experts", "factorize"), methods) | {"refine": STAGES["refine"].also(None, *"123")}
    more["serving"] = STAGES["serving"].also(None, *"12")
    of = {stage: executed_by(row.entry, *more.get(stage, ())) for stage, row in STAGES.items()}
    names = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")]
    found = {}
    for name in (name.removesuffix("/__init__") for name in names):
        module = "armor" if name == "__init__" else f"armor.{name.replace('/', '.')}"
        found[name] = {stage for stage, modules in of.items() if module in modules}
    return found


def test_an_edit_reruns_these_stages_and_no_other():
    seen: dict[str, set[str]] = {}
    for name, stages in held().items():
        room = next((p for p in HELD_BY if any(fnmatchcase(name, pattern) for pattern in p.split())), None)
        assert room is not None, f"{name}: not in HELD_BY"
        more = stages - {*HELD_BY[room].split()}
        assert not more, f"armor/{name}: an edit reruns {', '.join(sorted(more))} too"
        seen.setdefault(room, set()).update(stages)
    assert seen == {room: {*stages.split()} for room, stages in HELD_BY.items()}
