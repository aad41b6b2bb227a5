"""The C library of the CPU kernel: loaded, asked for its level; the structures that it reads.

It is built when the package is installed, without torch: what it calls of torch it is handed as addresses.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from armor.runtime import native  # noqa: F401  the sources, for the hash of the code

__all__ = [
    "BEST",
    "C_LIBRARY",
    "LEVELS",
    "NUMBERS",
    "PARALLEL",
    "PARTS",
    "TYPES",
    "Integers",
    "Part",
    "Product",
    "address",
]

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
NUMBERS = ("int8", "int4", "fp8")
"""The `numbers` of native/linear.h behind floats."""
PARTS = 8
"""Linears that one call multiplies with at most, PARTS of native/linear.h."""
_INTERFACE = 3  # what is called in C, and how: INTERFACE of native/armor.c


class Integers(ctypes.Structure):
    """`struct integers` of native/linear.h."""

    _fields_ = (
        ("core", ctypes.c_int),
        ("blocks", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("core_scales", "left_scales", "right_scales")),
        ("group", ctypes.c_int64),
    )


class Part(ctypes.Structure):
    """`struct part` of native/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "mask", "left", "right", "bias", "y")),
        ("integers", ctypes.POINTER(Integers)),
        *((name, ctypes.c_int64) for name in ("out", "kept", "group", "left_size", "right_size", "y_stride")),
    )


class Product(ctypes.Structure):
    """`struct product` of native/armor.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "count")),
    )


def address(function: Any) -> int | None:
    """Where a function of a library lies."""
    return ctypes.cast(function, ctypes.c_void_p).value


def _load() -> ctypes.CDLL | None:
    path = next((p for s in EXTENSION_SUFFIXES if (p := Path(__file__).with_name(f"_native{s}")).exists()), None)
    try:
        library = None if path is None else ctypes.CDLL(str(path))
    except OSError:  # built for another machine
        library = None
    if library is not None and not (hasattr(library, "armor_interface") and library.armor_interface() == _INTERFACE):
        library = None  # of another release
    if library is not None:
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        library.armor_linears.argtypes = [number] * 2 + [pointer] + [size] * 2 + [pointer, number, pointer, number]
        library.armor_products.argtypes = [number] * 2 + [pointer, number, pointer, number]
        library.armor_unpack.argtypes = [number] * 2 + [pointer] * 3 + [size] * 3 + [pointer, number]
        library.armor_unpack.restype = None
    return library


def _find_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded; without it there is one thread."""
    try:
        return address(ctypes.CDLL(None).GOMP_parallel)
    except (AttributeError, OSError, TypeError):
        return None


C_LIBRARY = _load()
"""None where it was not built, or by another release."""
PARALLEL = _find_parallel()
BEST = 0 if C_LIBRARY is None else C_LIBRARY.armor_initialize()
"""The best instruction set that this processor has and the library uses: an index into LEVELS."""
