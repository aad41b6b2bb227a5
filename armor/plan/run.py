"""From a configuration to its plan."""

from __future__ import annotations

import tempfile
from pathlib import Path

from armor.config.run import Config
from armor.format.layout import RESULTS
from armor.plan.machine import Host, card_named
from armor.plan.needs import Plan
from armor.plan.subject import subject
from armor.plan.table import Planned, planned, text

__all__ = ["make_plan"]


def make_plan(config: Config, card: str, folder: Path = Path()) -> tuple[Planned, list[str]]:
    """The plan of `config` for a run in `folder`, and the lines that say it. Raises ArmorError where a stage would."""
    known, host = card_named(card), Host.here(folder / RESULTS)
    models = dict.fromkeys(model for model, _ in config.pairs())
    with tempfile.TemporaryDirectory(prefix="armor-plan-") as place:
        results = Path(place) / RESULTS
        plan = Plan(config, {name: subject(config, name, results) for name in models}, host, known)
        found = planned(plan, results, None)
        return found, [*text(found, plan, measured=False, bandwidth=None)]
