"""Numbers as people read them: a few significant digits, with units; a dash for what was not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["GAP", "duration", "number", "percent", "plus_minus", "score", "size", "span"]

GAP = "–"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, thousands set apart, nothing in powers of ten; a dash for None."""
    if value is None:
        return GAP
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    rounded = round(value, decimals)
    # 9.9996 with four digits is 10.00: rounding may add a digit before the point.
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def plus_minus(value: float | None, error: float | None = None, digits: int = 4) -> str:
    """A value and its standard error with as many decimals."""
    text = number(value, digits)
    return text if value is None or error is None else f"{text} ± {error:,.{len(text.partition('.')[2])}f}"


def percent(share: float | None, error: float | None = None) -> str:
    """A share in percent, with its standard error if given; a dash for None."""
    if share is None:
        return GAP
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + "%"


def score(value: float | None, error: float | None = None) -> str:
    """The result of a task: a share in percent, anything else as it is; with its standard error."""
    return percent(value, error) if value is None or 0 <= value <= 1 else plus_minus(value, error)


def size(count: float | None) -> str:
    """Bytes in MB or GB (powers of ten)."""
    if count is None:
        return GAP
    unit, scale = ("GB", 1e9) if count >= 1e10 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{number(count / scale, 3)} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as s, min or h."""
    if seconds is None:
        return GAP
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def span(numbers: Sequence[int]) -> str:
    """The one number, or the first and the last of several: 32 to 48."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
