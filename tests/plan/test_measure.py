"""What is timed of a machine: every kind of work that a plan has, dense and packed, and sums that follow."""

from __future__ import annotations

import pytest

from armor.plan.measure import rates
from armor.plan.table import kinds, planned
from armor.plan.work import Start
from tests.plan.test_plan import CONFIG, made
from tests.tiny import tiny_model


def test_every_kind_is_timed_and_the_seconds_are_amounts_by_rates(tmp_path):
    """A plan without one of these recipes would not see that its kind of work cannot be timed."""
    recipes = CONFIG["recipes"] | {"gram": {"method": "sparsegpt"}, "integers": {"base": "armor", "quantize": {}}}
    of_grams = {"words": CONFIG["calibrations"]["words"] | {"gram": True}}
    model = tiny_model(tmp_path / "model", layers=2)
    plan, without, place = made(model, tmp_path / "plan", recipes, calibrations=of_grams)
    wanted = kinds(plan, place)
    started = {kind: 1.0 for kind in wanted if isinstance(kind, Start)}  # each is an import of all libraries
    timed = rates(plan.subjects, wanted - started.keys()) | started
    assert timed.keys() == wanted and all(seconds > 0 for seconds in timed.values())
    found = planned(plan, place, timed)
    assert without.elapsed_seconds is None and all(stage.seconds > 0 for stage in found.stages)
    twice = planned(plan, place, {kind: 2 * seconds for kind, seconds in timed.items()})
    assert twice.elapsed_seconds == pytest.approx(2 * found.elapsed_seconds)
