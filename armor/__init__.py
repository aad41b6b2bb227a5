"""ARMOR Pipeline: one-shot 2:4 compression of large language models by adaptive matrix factorization."""

import importlib
from typing import Any

__all__ = ["compress"]  # pyright: ignore[reportUnsupportedDunderAll]  made when it is asked for
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`armor.compress`, imported when it is first asked for: importing armor alone stays light (PEP 562)."""
    if name == "compress":
        return importlib.import_module(".command.in_memory", __name__).compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
