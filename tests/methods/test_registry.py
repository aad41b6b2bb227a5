"""A method says by its parameters what it takes; what it could never be given is refused when its file is imported."""

from __future__ import annotations

from dataclasses import fields

import pytest

from armor.config.layers import ModuleSettings
from armor.core.errors import ArmorError
from armor.format.statistics import Statistics
from armor.methods import METHODS, SETTINGS, STATISTICS, method


def test_a_method_may_take_what_a_recipe_says_of_a_linear_and_what_a_calibration_measures():
    assert {*SETTINGS} == {*ModuleSettings.model_fields} - {"method"} | {"seed"}
    assert {*STATISTICS} == {field.name for field in fields(Statistics)} - {"tokens"}


def of_the_recipe(weight, importance, *, pattern="2:4", damping=0.01): ...


def of_the_calibration(weight, importance, damping=0.01): ...


def anything(weight, importance, **settings): ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (of_the_recipe, "damping: no setting of that name, expected pattern, block_size, solver, seed after"),
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
