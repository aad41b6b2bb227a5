"""What an edit makes run again, as tables: each module of the code, each type of record, each key of the configuration.

    python -m benchmarks.reruns            print the tables as Markdown

The stages of a module are those whose hash of the code it is in (armor.execution.fingerprint); a key's is the stage
that reads it (armor.run.jobs). What follows runs again too where the result changed. tests/workflow/test_rerun.py and
test_jobs.py hold the tables to what Snakemake does and to what the stages execute. A version of a package makes nothing
run again; `armor explain` tells of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from armor.config.measures import BenchmarkSettings, EvaluationSettings
from armor.config.recipes import Recipe
from armor.config.sources import CalibrationSettings, ModelSettings
from armor.execution.fingerprint import WITHOUT_EFFECT, modules_of
from armor.methods import METHODS
from armor.run.jobs import STAGES

KEYS = {
    "fetch": ModelSettings,
    "calibrate": CalibrationSettings,
    "factorize, refine or tune": Recipe,
    "predict, evaluate or tasks": EvaluationSettings,
    "benchmark": BenchmarkSettings,
}


def modules() -> Iterator[tuple[str, str]]:
    """Every module of the package, and the stages that run again when its code changes."""
    stages = {stage: modules_of(row.entry) for stage, row in STAGES.items()}
    methods = {module: method.name for method in METHODS.values() for module in modules_of(*method.modules)}
    package = Path(__file__).resolve().parents[1] / "armor"
    for file in sorted(package.rglob("*.py")):
        name = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        found = [stage for stage, known in stages.items() if name in known]
        if not found and name in methods:
            using = [m.name for m in METHODS.values() if name in modules_of(*m.modules)]
            found = [f"factorize, of recipes with {', '.join(using)}"]
        why = "messages, devices or provenance" if name in WITHOUT_EFFECT else "no stage executes it"
        yield name, ", ".join(found) or f"none: {why}"


def main() -> None:
    print("| module | an edit of its code runs again |\n|---|---|")
    for name, stages in modules():
        print(f"| `{name}` | {stages} |")
    print("\n| key | an edit runs again |\n|---|---|")
    for stage, kind in KEYS.items():
        print(f"| {', '.join(f'`{key}`' for key in kind.model_fields)} | {stage} |")
    print("| `seed` | sensitivity, factorize, refine, tune |\n| `runs`, names | what is new, and the report |")


if __name__ == "__main__":
    main()
