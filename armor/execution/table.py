"""Tables for a terminal: all commands print theirs by this."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

__all__ = ["text_table"]


def text_table(rows: Iterable[Sequence[str]], heads: Sequence[str] = (), align: str = "l") -> str:
    """Lines with a column for each cell of `rows`, two spaces apart. `heads` stand above.

    `align` has a letter for each of the first columns: l where its cells begin at one place, r where they end at one.
    All others end at one place, as numbers do.
    """
    lines = [list(row) for row in ([heads] if heads else [])] + [list(row) for row in rows]
    letters = align.ljust(len(lines[0]), "r") if lines else ""
    sides = ["left" if letter == "l" else "right" for letter in letters]
    text = tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=sides or None)
    return "\n".join(line.rstrip() for line in text.splitlines())
