"""The CPU kernel as an operator that torch's dispatcher calls without Python: armor::ready.

Where Python runs a compiled model's operators, each small linear waits for it as long as for a third of its weights
(docs/log/serving.md). torch has an interface in C for operators of other libraries, which stays the same from release
to release; they are registered by their address ("boxed"). So nothing of torch is compiled against.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from armor.runtime import cpu
from armor.runtime.library import BEST, LIBRARY, PARALLEL, PARTS, TYPES, Part, address
from armor.runtime.operator import Operands

__all__ = ["available", "ready", "table"]

_FUNCTIONS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_get_num_threads",
    "aoti_torch_check",
)
_OPERATORS = torch.library.Library("armor", "FRAGMENT")


class _Torch(ctypes.Structure):
    """`struct torch` of native/torch.c."""

    _fields_ = (*((name, ctypes.c_void_p) for name in (*_FUNCTIONS, "parallel")), ("level", ctypes.c_int))


class _Table(ctypes.Structure):
    """`struct table` of native/torch.c."""

    _fields_ = (*((name, ctypes.c_int64) for name in ("type", "dtype", "columns", "count")), ("parts", Part * PARTS))


def _register() -> dict[torch.dtype, int]:
    """Let torch call the C library for armor::ready; torch's numbers of the types, none where it cannot be called."""
    _OPERATORS.define("ready(Tensor x, Tensor table, bool with_bias, int out) -> Tensor")
    torch.library.register_fake(
        "armor::ready", lambda x, table, with_bias, out: x.new_empty(*x.shape[:-1], out), lib=_OPERATORS
    )
    try:
        libtorch = ctypes.CDLL(torch._C.__file__)  # its functions, and those of what it is linked to
        functions = [address(getattr(libtorch, name)) for name in _FUNCTIONS]
        add, begin = libtorch.aoti_torch_library_impl, libtorch.aoti_torch_library_init_impl
        numbers = {dtype: getattr(libtorch, f"aoti_torch_dtype_{str(dtype)[6:]}")() for dtype in TYPES}
    except (AttributeError, OSError):  # a torch before 2.10
        return {}
    library = ctypes.c_void_p()  # torch's; it is never given back, so the operator stays
    if LIBRARY is None or begin(b"armor", b"CPU", __file__.encode(), 0, ctypes.byref(library)):
        return {}
    LIBRARY.armor_use_torch(ctypes.byref(_Torch(*functions, PARALLEL, BEST)))
    return {} if add(library, b"ready", LIBRARY.armor_ready) else numbers


_NUMBERS = _register()


def available() -> bool:
    """Whether `ready` can be called: the C library was built, and torch has what it calls."""
    return bool(_NUMBERS)


def table(operands: Sequence[Operands], columns: int, dtype: torch.dtype) -> Tensor:
    """Linears with one input, at most 8, as `ready` takes them: a tensor of bytes, addresses among them.

    For x of `columns` columns and of `dtype`, bfloat16 or float32. Ask `cpu.supports` of each first. Whoever holds the
    table keeps the operands, contiguous ones, where they are. Raises ValueError if shapes do not fit each other.
    """
    parts = cpu.Table(operands, columns).parts
    own = _Table(TYPES[dtype], _NUMBERS[dtype], columns, len(parts), (Part * PARTS)(*parts))
    return torch.frombuffer(own, dtype=torch.uint8)


def ready(x: Tensor, table: Tensor, with_bias: bool, out: int) -> Tensor:
    """x (..., in) times the linears of `table`: (..., out), side by side, bit for bit what `cpu.linear` gives of each.

    `out` are the output channels of all; `with_bias`: with the biases that they have. No gradient goes through. Raises
    RuntimeError for an x that is not contiguous, or not what the table was made for.
    """
    return torch.ops.armor.ready(x, table, with_bias, out)
