"""What is timed of a machine: every kind of work that a plan has, dense and packed, and sums that follow."""

from __future__ import annotations

import dataclasses

from armor.config.layers import ModuleSettings
from armor.plan.measure import rates
from armor.plan.table import kinds, planned
from armor.plan.work import WIDEST, Forward, Gram, Head, Read, Round, Solve, Start, Step, Train, rounding, solving
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


def test_a_gram_matrix_is_timed_by_its_columns_and_the_search_beside_it_by_itself():
    fitted = ModuleSettings.model_validate({"method": "armor_gram", "solver": {"iterations": 300}})
    gram, search = solving(fitted, (64, 512))
    once = fitted.replace(solver=fitted.solver.replace(iterations=1))
    assert gram.kind == Gram(once, 512)
    assert search.kind == Solve(fitted) and gram.amount == search.amount == 64 * 512
    wide, _ = solving(fitted, (64, 4 * WIDEST))
    assert wide.kind == Gram(once, WIDEST) and wide.amount == 4 * 64 * 4 * WIDEST
    (alone,) = solving(ModuleSettings.model_validate({"method": "sparsegpt"}), (64, 512))
    (without,) = solving(ModuleSettings(method="wanda"), (64, 512))
    assert isinstance(alone.kind, Gram) and isinstance(without.kind, Solve)


def test_rounding_is_timed_by_the_columns_of_a_gram_matrix_too():
    by_gram, alone = (rounding("int4", 64, (64, 4 * WIDEST), gram) for gram in (True, False))
    assert by_gram.amount == 4 * alone.amount == 4 * 64 * 4 * WIDEST and by_gram.operations > 10 * alone.operations
