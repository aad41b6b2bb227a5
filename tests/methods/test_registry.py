"""A method says by its parameters what it takes; what it could never be given is refused when its file is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from armor.core.errors import ArmorError
from armor.methods import METHODS, SETTINGS, method
from tests.killed import REPOSITORY


def of_the_recipe(weight, importance, *, pattern="2:4", damping=0.01): ...


def of_the_calibration(weight, importance, damping=0.01): ...


def anything(weight, importance, **settings): ...


def untyped(weight, importance, *, settings=None): ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (of_the_recipe, f"damping: no setting of that name, expected {', '.join(SETTINGS)} after the star; take it"),
        (of_the_calibration, "damping: no statistic of that name, expected importance, gram before the star; take it"),
        (anything, "settings: no statistic of that name, expected importance, gram before the star; take it out"),
        (untyped, "settings: None, expected Settings(), of a class"),
    ],
)
def test_a_parameter_that_nothing_gives_is_refused_in_one_line(function, said):
    before = dict(METHODS)
    with pytest.raises(ArmorError) as error:
        method("A title", source="nobody, never", memory=lambda shape, itemsize: 0)(function)
    text = str(error.value)
    assert text.startswith(f"{__name__}: {function.__name__}: parameter {said}")
    assert "\n" not in text and before == METHODS


def test_a_faulty_file_of_a_method_is_one_line_and_debug_shows_its_traceback(tmp_path):
    shutil.copytree(REPOSITORY / "armor", tmp_path / "armor", ignore=shutil.ignore_patterns("__pycache__", "native"))
    file = tmp_path / "armor/methods/faulty.py"

    def check(*options):
        command = [sys.executable, "-m", "armor", *options, "check", "my.yaml"]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
        )

    file.write_text("import os\n\nos.nothing\n")
    done, said = check(), "3: AttributeError: module 'os' has no attribute 'nothing'"
    assert done.stderr == f"armor: error: {file}:{said}; mend this file of a method, or take it out\n"
    assert (done.returncode, done.stdout) == (1, "")
    done = check("--debug")
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert f'File "{file}", line 3' in done.stderr and "has no attribute 'nothing'" in done.stderr
