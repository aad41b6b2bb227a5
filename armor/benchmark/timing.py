"""Points in time of a computation, and what many times between them say.

On a CUDA device a point is an event in the card's own queue, for the host is ahead of the card; elsewhere it is the
clock's. One time says little on a machine that does other things too: medians and quartiles over rounds are kept, with
the times themselves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from armor.format.records.benchmark import Runs

__all__ = ["mark", "ratios", "seconds_between", "summary"]

Mark = float | torch.cuda.Event


def mark(device: torch.device | str) -> Mark:
    """This point in time, on `device`."""
    if torch.device(device).type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from one point to a later one; on a card it is waited for."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    if isinstance(start, torch.cuda.Event) or isinstance(end, torch.cuda.Event):
        raise TypeError("two points of one device are needed")
    return end - start


def summary(runs: Sequence[float]) -> Runs:
    """The median, the quartiles and the `runs` themselves."""
    first, median, third = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else [runs[0]] * 3
    return Runs(median=median, quartiles=(first, third), runs=tuple(runs))


def ratios(above: Sequence[float], below: Sequence[float]) -> Runs:
    """The summary of above / below, round by round, so that what else ran falls on both."""
    return summary([a / b for a, b in zip(above, below, strict=True)])
