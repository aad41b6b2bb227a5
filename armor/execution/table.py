"""Tables for a terminal: all commands print theirs by this."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

__all__ = ["text_table"]


def text_table(rows: Iterable[Sequence[str]], heads: Sequence[str] = (), left: int = 1) -> str:
    """Lines with a column for each cell of `rows`, two spaces apart; the first `left` columns begin at one place.

    The cells of the others end at one place, as numbers do. `heads` stand above.
    """
    lines = [list(row) for row in ([heads] if heads else [])] + [list(row) for row in rows]
    align = ["left" if column < left else "right" for column in range(len(lines[0]))] if lines else None
    text = tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=align)
    return "\n".join(line.rstrip() for line in text.splitlines())
