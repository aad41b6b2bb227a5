"""What is timed of a machine: every kind of work that a plan has, dense and packed, and sums that follow."""

from __future__ import annotations

import dataclasses

import pytest

from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.plan.measure import rates
from armor.plan.table import kinds, planned
from armor.plan.work import Forward, Gram, Head, Read, Round, Solve, Start, Step, Train, rounding
from tests.plan.test_plan import CONFIG, made
from tests.tiny import tiny_model


def test_every_kind_is_timed_and_the_seconds_are_amounts_by_rates(tmp_path):
    recipes = CONFIG["recipes"] | {"gram": {"method": "sparsegpt"}, "integers": {"base": "armor", "quantize": {}}}
    of_grams = {"words": CONFIG["calibrations"]["words"] | {"gram": True}}
    model = tiny_model(tmp_path / "model", layers=2)
    plan, without, place = made(model, tmp_path / "plan", recipes, calibrations=of_grams)
    wanted = kinds(plan, place)
    assert {type(kind) for kind in wanted} == {Start, Read, Forward, Step, Head, Train, Solve, Gram, Round}
    packed = {kind.recipe for kind in wanted if isinstance(kind, Forward | Step)}
    assert packed == {None, "armor", "bits", "gram"} and sum(isinstance(kind, Solve) for kind in wanted) >= 2
    started = {kind: 1.0 for kind in wanted if isinstance(kind, Start)}  # each is an import of all libraries
    timed = rates(plan.subjects, wanted - started.keys()) | started
    assert timed.keys() == wanted and all(seconds > 0 for seconds in timed.values())
    found = planned(plan, place, timed)
    assert without.elapsed_seconds is None and all(stage.seconds > 0 for stage in found.stages)
    twice = planned(plan, place, {kind: 2 * seconds for kind, seconds in timed.items()})
    assert abs(twice.elapsed_seconds / found.elapsed_seconds - 2) < 1e-6
    more = dataclasses.replace(plan, host=dataclasses.replace(plan.host, cores=4))
    assert planned(more, place, timed).elapsed_seconds < found.elapsed_seconds


@pytest.mark.parametrize(
    ("layout", "gram"),
    [(PackedLinear(96, 90, Pattern.parse("50%")), True), (PackedLinear(90, 96, Pattern(2, 4), 90, 48), False)],
    ids=["pruned by gram", "blocks"],
)
def test_rounding_is_timed_with_the_pattern_and_the_blocks_of_the_linear(layout, gram):
    kind = rounding("int8", layout, gram).kind
    assert rates({}, [kind])[kind] > 0
