"""run.json: the run that is at work on the results, or the last one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from armor.format.records.base import Record

__all__ = ["RunRecord"]


class RunRecord(Record):
    """`run.json`, by the workflow: the run at work, which locks the file until it ends, or the last one."""

    AGAIN: ClassVar[str] = "start the run again"

    format_version: Literal[1] = 1
    process: int
    """The number of Snakemake's process."""
    host: str
    """The machine that it runs on."""
    command_line: tuple[str, ...]
    """The command line of Snakemake."""
    typed_in: str
    """The folder in which it was typed."""
    config: dict[str, Any]
    """The configuration without its defaults."""
