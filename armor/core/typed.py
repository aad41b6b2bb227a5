"""The ground of everything that has named fields and goes through JSON or YAML: settings, and records between stages.

Unknown keys are refused and values do not change. What a field is, its unit among it, stands in the text below it: the
schema and the reference pages are made from these texts.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict

__all__ = ["Typed"]


class Typed(BaseModel):
    """Named, typed, documented fields: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, unchecked. Raises TypeError for a name that no field has."""
        if unknown := changes.keys() - type(self).model_fields.keys():
            raise TypeError(f"{type(self).__name__}: no field {min(unknown)}")
        return self.model_copy(update=changes)

    def local_files(self) -> list[str]:
        """The files of this machine whose content counts where these settings do: those of all that is in them."""
        inside = (getattr(self, name) for name in type(self).model_fields)
        return [file for value in inside if isinstance(value, Typed) for file in value.local_files()]
