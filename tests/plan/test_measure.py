"""What is timed of a machine: every kind of work that a plan has, dense and packed, and sums that follow."""

from __future__ import annotations

import dataclasses

from armor.plan.measure import rates
from armor.plan.table import kinds, planned
from armor.plan.work import Forward, Solve, Start, Step
from tests.plan.test_plan import made
from tests.tiny import tiny_model


def test_every_kind_is_timed_and_the_seconds_are_amounts_by_rates(tmp_path):
    plan, without, place = made(tiny_model(tmp_path / "model", layers=2), tmp_path / "plan")
    wanted = kinds(plan, place)
    assert {type(kind).__name__ for kind in wanted} == {"Start", "Read", "Forward", "Step", "Head", "Train", "Solve"}
    packed = {kind.recipe for kind in wanted if isinstance(kind, Forward | Step)}
    assert packed == {None, "armor", "bits"} and sum(isinstance(kind, Solve) for kind in wanted) >= 2
    started = {kind: 1.0 for kind in wanted if isinstance(kind, Start)}  # each is an import of all libraries
    timed = rates(plan.subjects, wanted - started.keys()) | started
    assert timed.keys() == wanted and all(seconds > 0 for seconds in timed.values())
    found = planned(plan, place, timed)
    assert without.elapsed_seconds is None and all(stage.seconds > 0 for stage in found.stages)
    twice = planned(plan, place, {kind: 2 * seconds for kind, seconds in timed.items()})
    assert abs(twice.elapsed_seconds / found.elapsed_seconds - 2) < 1e-6
    more = dataclasses.replace(plan, host=dataclasses.replace(plan.host, cores=4))
    assert planned(more, place, timed).elapsed_seconds < found.elapsed_seconds
