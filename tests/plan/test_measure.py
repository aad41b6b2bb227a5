"""What is timed of a machine: every kind of work that a plan has, dense and packed, and sums that follow."""

from __future__ import annotations

import dataclasses

import pytest

from armor.config.layers import ModuleSettings
from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.plan.measure import rates
from armor.plan.needs import need
from armor.plan.table import kinds, planned
from armor.plan.work import WIDEST, Forward, Gram, Head, Read, Round, Solve, Start, Step, Train, rounding, solving
from armor.run.jobs import jobs
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
    layout = PackedLinear(64, 4 * WIDEST, Pattern(2, 4), 64, 64)
    by_gram, alone = (rounding("int4", layout, gram) for gram in (True, False))
    assert by_gram.amount == 4 * alone.amount == 4 * 64 * 4 * WIDEST and by_gram.operations > 10 * alone.operations


@pytest.mark.parametrize(
    ("layout", "gram"),
    [
        (PackedLinear(96, 90, Pattern.parse("50%")), True),
        (PackedLinear(96, 90, Pattern.parse("50%")), False),
        (PackedLinear(90, 96, Pattern(2, 4), 90, 48), True),
        (PackedLinear(90, 96, Pattern(2, 4), 90, 48), False),
        (PackedLinear(8, 2 * WIDEST + 96, Pattern(2, 4), 8, 96), True),
    ],
    ids=["pruned by gram", "pruned", "blocks by gram", "blocks", "wide by gram"],
)
def test_rounding_is_timed_with_the_pattern_and_the_blocks_of_the_linear(layout, gram):
    (kind,) = {rounding("int8", layout, gram).kind}
    assert rates({}, [kind])[kind] > 0


def test_what_rounding_needs_follows_what_it_does(tmp_path):
    """A Gram matrix counts where it is used, linears that stay dense do not, and those that share B are one."""
    recipes = {
        "armor": {"method": "armor", "block_size": 16, "solver": {"iterations": 2}},
        "plain": {"base": "armor", "quantize": {}},
        "trained": {"base": "armor", "refine": {"sequences": 2, "held_out": 1, "batch": 1, "steps": 1}, "quantize": {}},
        "part": {"method": "armor", "overrides": [{"modules": "*.mlp.*", "method": "dense"}], "quantize": {}},
    }
    of_grams = {"words": CONFIG["calibrations"]["words"] | {"gram": True}}
    plan, _, place = made(tiny_model(tmp_path / "model", layers=1), tmp_path / "plan", recipes, calibrations=of_grams)
    found = {
        job.names[1]: [work.kind for work in need(plan, job).work if isinstance(work.kind, Round)]
        for job in jobs(plan.config, place)
        if job.stage == "quantize"
    }
    assert {name: {kind.gram for kind in kinds} for name, kinds in found.items()} == {
        "plain": {False},
        "trained": {True},
        "part": {False},
    }
    assert {name: len(kinds) for name, kinds in found.items()} == {"plain": 7, "trained": 7, "part": 4}
