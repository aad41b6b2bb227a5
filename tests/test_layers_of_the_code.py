"""Who may import whom: downward only, stages meet in files, and what the Snakefile imports is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "armor"
FLOORS = (
    ("core",),
    ("execution", "methods"),
    ("format",),
    ("config", "runtime"),
    ("model", "text", "run", "serve", "hf"),
    ("calibrate", "factorize", "training", "assemble", "evaluate", "benchmark", "report"),
    ("plan",),
    ("command",),
)
"""The parts of the package from the ground up. A part imports from lower floors and from itself."""


def imported(path):
    """The parts of this package that a module imports, wherever in it, as (line, name below armor)."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
        else:
            continue
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("armor."))


def parts():
    return {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name[:2] != "__"}


def files_of(part):
    return sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]


def test_every_part_has_a_floor():
    assert parts() == {part for floor in FLOORS for part in floor}


@pytest.mark.parametrize("part", [part for floor in FLOORS for part in floor])
def test_a_part_imports_from_lower_floors_alone(part):
    below = {other for floor in FLOORS[: next(i for i, f in enumerate(FLOORS) if part in f)] for other in floor}
    found = [(file, *place) for file in files_of(part) for place in imported(file)]
    assert [f"{file}:{line} imports {name}" for file, line, name in found if name not in {part, *below}] == []


def test_the_package_itself_imports_its_version_and_starts_its_command_and_nothing_imports_it():
    assert [name for _, name in imported(PACKAGE / "__init__.py")] == ["core"]
    assert [name for _, name in imported(PACKAGE / "__main__.py")] == ["command"]
    importing = [
        file for file in PACKAGE.rglob("*.py") if re.search(r"^ *(import|from) armor( |$)", file.read_text(), re.M)
    ]
    assert importing == []


@pytest.mark.parametrize(
    "module", ["command.cli", "command.forkserver", "config.run", "methods", "run.jobs", "run.status", "run.explain"]
)
def test_what_the_snakefile_and_the_command_line_import_first_is_light(module):
    code = f"import sys, armor.{module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], check=True)
