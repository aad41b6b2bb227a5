"""What all settings share: the types of their values, and the nearest name that exists."""

from __future__ import annotations

import difflib
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

__all__ = ["Dtype", "LocalPath", "Name", "as_list", "exactly_one", "nearest"]

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def local_path(value: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(value))
    if "$" in expanded:
        raise ValueError(f"{value}: the environment variable in this path is not set")
    return expanded


LocalPath = Annotated[str, AfterValidator(local_path)]


# A name becomes a folder under results/.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]


def exactly_one(settings: BaseModel, *keys: str) -> None:
    given = [key for key in keys if getattr(settings, key) is not None]
    if len(given) != 1:
        raise ValueError(f"expected exactly one of {', '.join(keys)}, found {' and '.join(given) or 'none'}")


def as_list(value: str | list[str] | None) -> list[str]:
    """What may stand alone or in a list, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def nearest(name: str, known: Any) -> str:
    """How a message about an unknown `name` ends: the nearest of those that are `known`, or all of them."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there is {', '.join(map(str, known)) or 'none'}"
