"""Points in time of a computation.

On a CUDA device a point is an event in the card's own queue, for the host is ahead of the card; elsewhere it is the
clock's.
"""

from __future__ import annotations

import time

import torch

__all__ = ["mark", "seconds_between"]

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
