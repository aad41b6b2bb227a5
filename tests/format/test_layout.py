"""A path is spelled once: in armor/format/layout.py, and a name that stages need too in names.py beside it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from armor.format.layout import Results
from armor.format.names import layer_file, layer_files

PACKAGE = Path(__file__).resolve().parents[2] / "armor"
OF_A_LAYER = re.compile(r"layer_($|[{*?%])")
"""In a string: layer_ before a placeholder or a wildcard. The text before a placeholder of an f-string ends there."""


def spelled(text: str | bytes) -> list[int]:
    """The lines with a string that spells a layer's file; docstrings do not count."""
    nodes = [*ast.walk(ast.parse(text))]
    bare = {node.value for node in nodes if isinstance(node, ast.Expr)}
    texts = (node for node in nodes if isinstance(node, ast.Constant) and node not in bare)
    return [node.lineno for node in texts if isinstance(node.value, str) and OF_A_LAYER.search(node.value)]


def test_only_one_module_spells_a_layers_file():
    found = {file.relative_to(PACKAGE).as_posix(): spelled(file.read_bytes()) for file in PACKAGE.rglob("*.py")}
    assert found.pop("format/names.py")
    assert not {name: lines for name, lines in found.items() if lines}


def test_the_files_of_layers_come_by_number(tmp_path):
    for index in (10, 2, 0):
        for suffix in (".json", ".safetensors"):
            layer_file(tmp_path, index).with_suffix(suffix).touch()
    assert layer_files(tmp_path) == [layer_file(tmp_path, index) for index in (0, 2, 10)]
    assert layer_files(tmp_path, ".json") == [layer_file(tmp_path, k).with_suffix(".json") for k in (0, 2, 10)]


def test_a_rules_path_is_that_of_the_file():
    assert Path(Results().factors("m", "r", 3)) == layer_file(Path(Results().layers("m", "r")), 3)
    assert Path(Results().prices("m", "r", 3)) == layer_file(Path("results/m/r/prices"), 3).with_suffix(".json")
