"""Messages and progress: one line per running job on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

__all__ = ["log", "progress"]

T = TypeVar("T")
log = logging.getLogger("armor")

SECONDS_BETWEEN_LINES = 10.0


def progress(
    items: Iterable[T],
    description: str,
    total: int | None = None,
    unit: str = "it",
    amount: float = 0.0,
    amount_unit: str = "",
) -> Iterator[T]:
    """Yield `items`, showing how many are done, the rate and the time left.

    On a terminal a bar (tqdm); elsewhere, as in a log file, a line at most every 10 seconds and one at the end. With
    `amount` the rate of that many `amount_unit` (tokens, say) per item is shown too.
    """
    from tqdm import tqdm

    total = total if total is not None else length_hint(items)
    start = last = time.monotonic()
    with tqdm(desc=description, total=total, unit=unit, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            speed = f", {amount * done / (now - start):.4g} {amount_unit}/s" if amount else ""
            bar.set_postfix_str(speed.removeprefix(", "), refresh=False)
            bar.update()
            if bar.disable and (done == total or now - last >= SECONDS_BETWEEN_LINES):
                line = tqdm.format_meter(done, total, now - start, unit=unit, bar_format=_LINE)
                log.info("%s: %s%s", description, line, speed)
                last = now


_LINE = "{n_fmt}/{total_fmt} {unit} done, {rate_fmt}, {elapsed} elapsed, {remaining} left"
