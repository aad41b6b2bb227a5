"""Who may import whom (CONTRIBUTING.md): stages meet in files, and what the Snakefile imports is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "armor"
STAGES = ("calibrate", "factorize", "assemble", "evaluate", "benchmark", "report")
GROUND = ("config", "errors", "execution", "model", "reading")
MAY_IMPORT = {
    **{stage: (stage, "runtime", "core", "text", *GROUND) for stage in STAGES},
    "in_memory": ("factorize", "hf", "core", "text", *GROUND),
    "runtime": ("runtime", "hf", "core", *GROUND),
    "hf": ("runtime", "core", *GROUND),
    "core": ("core", *GROUND),
    "text": GROUND,
    "model": GROUND,
    "execution": ("execution", "errors"),
    "config": ("core", "errors"),
    "reading": ("config", "errors"),
    "explain": ("status", *GROUND),
    "status": GROUND,
    "forkserver": ("cli", *GROUND),
    "__main__": ("cli", "forkserver"),
}


def imported(path):
    """The parts of this package that a module imports, as (line, name below armor)."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("armor."))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_it_may(part):
    files = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    found = [(file, *place) for file in files for place in imported(file)]
    assert [f"{file}:{line} imports {name}" for file, line, name in found if name not in MAY_IMPORT[part]] == []


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "config",
        "execution.devices",
        "execution.fingerprint",
        "forkserver",
        "model.topology",
        "status",
        "explain",
    ],
)
def test_what_the_snakefile_and_the_command_line_import_first_is_light(module):
    code = f"import sys, armor.{module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], check=True)
