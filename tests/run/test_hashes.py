"""Which stages an edit of a module runs again: every module is edited in turn, in a copy of the package.

What must come of it is found from the imports. tests/workflow/test_jobs.py shows that a hash lacks nothing that its
stage executes.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from armor.execution.fingerprint import WITHOUT_EFFECT, code_hash, modules
from armor.methods import METHODS
from armor.run.stages import STAGES

PACKAGE = Path(__file__).resolve().parents[2] / "armor"


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
