"""ARMOR Pipeline: one-shot 2:4 compression of large language models by adaptive matrix factorization."""

import importlib
from typing import Any

from armor.core.version import __version__

__all__ = ["__version__", "compress"]  # pyright: ignore[reportUnsupportedDunderAll]  made when it is asked for


def __getattr__(name: str) -> Any:
    """`armor.compress`, imported when it is first asked for: importing armor alone stays light (PEP 562)."""
    if name == "compress":
        return importlib.import_module(".command.in_memory", __name__).compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
