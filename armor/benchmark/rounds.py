"""What many rounds of a measurement say.

One time says little on a machine that does other things too: medians and quartiles over rounds are kept, with the times
themselves.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from armor.format.records.benchmark import Runs

__all__ = ["ratios", "summary"]


def summary(runs: Sequence[float]) -> Runs:
    """The median, the quartiles and the `runs` themselves."""
    first, median, third = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else [runs[0]] * 3
    return Runs(median=median, quartiles=(first, third), runs=tuple(runs))


def ratios(above: Sequence[float], below: Sequence[float]) -> Runs:
    """The summary of above / below, round by round, so that what else ran falls on both."""
    return summary([a / b for a, b in zip(above, below, strict=True)])
