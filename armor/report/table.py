"""A table of texts in the four forms that people read: plain, Markdown, LaTeX and HTML."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import pandas as pd
from markupsafe import Markup, escape

from armor.execution.table import text_table
from armor.report.numbers import GAP

__all__ = ["Table", "escaped"]


class Table:
    """Texts by row and column, some of which stand out as the best.

    `best` holds (row, column) of those, `corner` is the heading of the rows' names. A row that lacks a column has a
    dash there.
    """

    def __init__(
        self,
        cells: Mapping[str, Mapping[str, str]],
        best: Collection[tuple[str, str]] = (),
        corner: str = "recipe",
    ) -> None:
        # Objects: so Markup stays Markup, and may name a row.
        index = pd.Index(list(cells), dtype=object)
        texts = pd.DataFrame(list(cells.values()), index=index, dtype=object).fillna(GAP)
        self.texts, self.corner = texts.rename_axis(columns=corner), corner
        marks = [[(row, column) in best for column in self.texts.columns] for row in cells]
        self.best = pd.DataFrame(marks, self.texts.index, self.texts.columns)

    def plain(self, width: int | None = None) -> str:
        """For a terminal, a star before the best; columns beyond `width` characters follow below."""
        texts = self.texts.where(~self.best, "*" + self.texts)
        columns = {str(heading): [str(cell) for cell in cells] for heading, cells in texts.to_dict("list").items()}
        parts: list[dict[str, list[str]]] = [{}]
        for heading, cells in columns.items():
            wider = parts[-1] | {heading: cells}
            if width and parts[-1] and len(self._lines(wider).partition("\n")[0]) > width:
                wider = {heading: cells}
                parts.append(wider)
            parts[-1] = wider
        return "\n\n".join(map(self._lines, parts))

    def _lines(self, columns: Mapping[str, Sequence[str]]) -> str:
        rows = zip(map(str, self.texts.index), *columns.values(), strict=True)
        return text_table(rows, [self.corner, *columns])

    def markdown(self) -> str:
        """The best are bold."""
        texts = self.texts.map(escaped)
        texts = texts.where(~self.best, "**" + texts + "**").rename(index=escaped, columns=escaped)
        alignment = ["left", *["right"] * len(texts.columns)]
        headings = [self.corner, *texts.columns]
        return texts.to_markdown(disable_numparse=True, colalign=alignment, headers=headings)

    def latex(self, caption: str) -> str:
        """With the rules of booktabs, in ASCII; the best are bold."""
        styler = self.texts.style
        styler.format(_symbols, escape="latex").format_index(escape="latex").format_index(
            escape="latex", axis="columns"
        )
        styler.apply(lambda _: self.best.map(lambda best: "textbf:--rwrap;" if best else ""), axis=None)
        form = {"hrules": True, "position": "htbp", "position_float": "centering"}
        columns = "l" + "r" * len(self.texts.columns)
        return styler.to_latex(column_format=columns, caption=caption.replace("_", r"\_"), **form)

    def html(self, name: str, classes: str = "data") -> Markup:
        """With the id T_`name`; the best have the class best."""
        styler = self.texts.rename_axis(columns=self.corner.capitalize()).style
        styler.set_uuid(name).set_table_attributes(f'class="{classes}"')
        styler.format(escape).format_index(escape="html").format_index(escape="html", axis="columns")
        styler.cell_ids = False
        html = styler.set_td_classes(self.best.map(lambda best: "best" if best else "")).to_html()
        return Markup(html[html.index("<table") :])  # before it stands an empty style sheet


def escaped(text: str) -> str:
    """As Markdown that shows it."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


def _symbols(text: str) -> str:
    """Those that every engine and font of LaTeX has."""
    return text.replace("±", r"$\pm$").replace(GAP, "--")
