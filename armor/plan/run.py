"""From a configuration to its plan."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from armor.config.loading import load_config
from armor.config.run import Config
from armor.format.layout import RESULTS
from armor.plan.machine import Host, card_named
from armor.plan.need import Plan
from armor.plan.subject import subject
from armor.plan.submitted import submitted, table
from armor.plan.table import Planned, kinds, planned, text, too_small

__all__ = ["make_plan", "opened"]


@contextmanager
def opened(config: Config, card: str, folder: Path) -> Iterator[tuple[Plan, Path]]:
    """The plan of `config` for a run in `folder`, and the temporary folder with all models' headers."""
    known, host = card_named(card), Host.here(folder / RESULTS)
    models = dict.fromkeys(model for model, _ in config.pairs())
    with tempfile.TemporaryDirectory(prefix="armor-plan-") as place:
        results = Path(place) / RESULTS
        yield Plan(config, {name: subject(config, name, results) for name in models}, host, known), results


def make_plan(
    files: Sequence[Path], card: str, folder: Path, measure: bool, profile: str | None = None
) -> tuple[Planned, list[str]]:
    """The plan of a configuration for a run in `folder`, and the lines that say it.

    `measure`: time this machine too. `profile`: say what is submitted with this profile of Snakemake. Raises ArmorError
    where a stage would, for what headers tell.
    """
    config = load_config(*files)
    with opened(config, card, folder) as (plan, results):
        rates = speed = None
        if measure:
            from armor.plan.measure import bandwidth
            from armor.plan.measure import rates as timed

            rates, speed = timed(plan.subjects, kinds(plan, results)), bandwidth()
        found = planned(plan, results, rates)
        lines = [*text(found, plan, speed)]
        if profile is not None:
            asked = submitted(files, profile, results.parent)
            problems = (*found.problems, *too_small(asked, found.stages))
            found = found.replace(submitted=asked, problems=problems)
            lines += ["", *table(asked, profile)]
        return found, lines
