"""A method says by its parameters what it takes; what it could never be given is refused when its file is imported."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from armor.config.layers import ModuleSettings
from armor.core.errors import ArmorError
from armor.format.statistics import Statistics
from armor.methods import METHODS, SETTINGS, STATISTICS, UNCHANGED, method
from tests.killed import REPOSITORY


def test_a_method_may_take_what_a_recipe_says_of_a_linear_and_what_a_calibration_measures():
    own = {name for name, method in METHODS.items() if method.own is not None}
    assert {*SETTINGS} == {*ModuleSettings.model_fields} - {"method"} - own | {"settings", "seed"}
    assert {*STATISTICS} == {field.name for field in fields(Statistics)} - {"tokens"}


NOT_METHODS = {
    ("quantization.py", "int8"): "a type of numbers",
    ("training.py", "dense"): "the hidden states of the dense model",
    ("reference.py", "armor"): "the command",
}


def test_the_configuration_knows_no_method_by_name():
    """No text of its code names one. Those below its fields may, for people."""
    found = set()
    for file in sorted((REPOSITORY / "armor/config").glob("*.py")):
        for node in ast.walk(tree := ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [
                    n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
                ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = {node.value} | {*re.findall(r"[\w-]+", node.value)} - {UNCHANGED}  # also an adjective
                found |= {(file.name, word) for word in words & METHODS.keys()}
    assert found == NOT_METHODS.keys()


def of_the_recipe(weight, importance, *, pattern="2:4", damping=0.01): ...


def of_the_calibration(weight, importance, damping=0.01): ...


def anything(weight, importance, **settings): ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (of_the_recipe, f"damping: no setting of that name, expected {', '.join(SETTINGS)} after"),
        (of_the_calibration, "damping: no statistic of that name, expected importance, gram before"),
        (anything, "settings: no statistic of that name, expected importance, gram before"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_parameter_that_nothing_gives_is_refused_in_one_line(function, said):
    before = dict(METHODS)
    with pytest.raises(ArmorError) as error:
        method("A title", source="nobody, never", memory=lambda shape, itemsize: 0)(function)
    text = str(error.value)
    assert text.startswith(f"{__name__}: {function.__name__}: parameter {said} the star; take it out, or make it a")
    assert "\n" not in text and before == METHODS


def untyped(weight, importance, *, settings=None): ...


def test_own_settings_need_a_type():
    with pytest.raises(ArmorError, match=r"untyped: parameter settings: None, expected Settings\(\), of a class"):
        method("A title", source="nobody, never", memory=lambda shape, itemsize: 0)(untyped)


def checked(tmp_path, text, *options):
    """`armor check` of a copy of the package with a method in a file, and the file."""
    shutil.copytree(REPOSITORY / "armor", tmp_path / "armor", ignore=shutil.ignore_patterns("__pycache__", "native"))
    file = tmp_path / "armor/methods/faulty.py"
    file.write_text(text)
    command = [sys.executable, "-m", "armor", *options, "check", "my.yaml"]
    environment = os.environ | {"PYTHONPATH": ""}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True), file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = = 2\n", "2: SyntaxError: invalid syntax"),
        ("import os\n\nos.nothing\n", "3: AttributeError: module 'os' has no attribute 'nothing'"),
    ],
)
def test_a_faulty_file_of_a_method_is_one_line(tmp_path, text, said):
    done, file = checked(tmp_path, text)
    assert done.stderr == f"armor: error: {file}:{said}; mend this file of a method, or take it out\n"
    assert (done.returncode, done.stdout) == (1, "")


def test_debug_shows_the_traceback_of_a_faulty_file(tmp_path):
    done, file = checked(tmp_path, "import os\n\nos.nothing\n", "--debug")
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert f'File "{file}", line 3' in done.stderr and "has no attribute 'nothing'" in done.stderr
