"""report/summary.json: the table of the report, and what it was made of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from armor.format.records.base import Machine, MadeBy, Record

__all__ = ["ReportRecord"]


class ReportRecord(Record):
    """`report/summary.json`, by `armor report`: a row for each model and recipe."""

    AGAIN: ClassVar[str] = "run the report again"

    format_version: Literal[2] = 2
    rows: tuple[dict[str, Any], ...]
    """Values by column; docs/RECORDS.md lists the columns. A task's column has its name. Null is a gap."""
    made_by: MadeBy
    """What made the report."""
    machine: Machine
    """What the job ran on."""
