"""The weight stays as it is. For the dense model beside the compressed ones, and for modules that are left alone."""

from __future__ import annotations

from armor.methods import METHODS, UNCHANGED, Method

METHODS[UNCHANGED] = Method(name=UNCHANGED, title="dense", source="", idea=(__doc__ or "").strip(), function=None)
