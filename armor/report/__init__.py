"""The results for a person: a summary as CSV, JSON, Markdown and LaTeX, and one self-contained page."""

from armor.report.compare import compare
from armor.report.page import build
from armor.report.tables import print_table

__all__ = ["build", "compare", "print_table"]
