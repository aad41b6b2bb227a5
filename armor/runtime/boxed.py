"""The CPU kernel as an operator that torch's dispatcher calls without Python: armor::cpu_linears.

Python takes as long on its way to a small linear as a quarter of its weights from memory (docs/TRIED.md). torch
has an interface in C for operators of other libraries, which stays the same from release to release: they are
registered by their address ("boxed"). So nothing of torch is compiled against.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from armor.runtime import cpu, operator
from armor.runtime.library import BEST, C_LIBRARY, PARALLEL, PARTS, TYPES, Part, address
from armor.runtime.operator import Operands

__all__ = ["available", "linears", "table"]

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
_FILE = os.fsencode(__file__)  # torch keeps where these bytes are
_OPERATORS = torch.library.Library("armor", "FRAGMENT")


class _Torch(ctypes.Structure):
    """`struct torch` of native/torch.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_FUNCTIONS, "parallel")),
        *((name, ctypes.c_int) for name in ("level", "cpu")),
    )


class _Table(ctypes.Structure):
    """`struct table` of native/torch.c."""

    _fields_ = (*((name, ctypes.c_int64) for name in ("type", "number", "columns", "filled")), ("parts", Part * PARTS))


def _register() -> dict[torch.dtype, int]:
    """Let torch call C for armor::cpu_linears; torch's numbers of the types, none where it cannot call."""
    _OPERATORS.define("cpu_linears(Tensor x, Tensor table, bool with_bias, int out) -> Tensor")
    torch.library.register_fake(
        "armor::cpu_linears", lambda x, table, with_bias, out: x.new_empty(*x.shape[:-1], out), lib=_OPERATORS
    )
    try:
        libtorch = ctypes.CDLL(torch._C.__file__)  # its functions, and those of what it is linked to
        functions = [address(getattr(libtorch, name)) for name in _FUNCTIONS]
        begin, add = libtorch.aoti_torch_library_init_impl, libtorch.aoti_torch_library_impl
        numbers = {dtype: getattr(libtorch, f"aoti_torch_dtype_{str(dtype)[6:]}")() for dtype in TYPES}
        device = libtorch.aoti_torch_device_type_cpu()
    except (AttributeError, OSError):  # a torch before 2.10
        return {}
    library = ctypes.c_void_p()  # torch's, which is never given back: so the operator stays
    if C_LIBRARY is None or begin(b"armor", b"CPU", _FILE, 0, ctypes.byref(library)):
        return {}
    C_LIBRARY.armor_use_torch(ctypes.byref(_Torch(*functions, PARALLEL, BEST, device)))
    return {} if add(library, b"cpu_linears", C_LIBRARY.armor_cpu_linears) else numbers


_NUMBERS = _register()


def available() -> bool:
    """Whether `linears` can be called: the C library was built, and torch has what it calls."""
    return bool(_NUMBERS)


def table(operands: Sequence[Operands], columns: int, dtype: torch.dtype) -> Tensor:
    """Linears with one input, at most 8, as `linears` takes them: a tensor of bytes, addresses among them.

    For x of `columns` columns and of `dtype`, bfloat16 or float32. The table keeps the memory of the operands, not what
    a tensor may be given in its place. Ask `cpu.supports` of each first. Raises ValueError for more linears, and if
    shapes do not fit each other.
    """
    if len(operands) > PARTS:
        raise ValueError(f"{len(operands)} linears with one input, expected at most {PARTS}")
    held = [operator.contiguous(own) for own in operands]
    parts = cpu.Table(held, columns).parts
    own = _Table(TYPES[dtype], _NUMBERS[dtype], columns, len(parts), (Part * PARTS)(*parts))
    own.held = [tensor.detach() for one in held for tensor in one if isinstance(tensor, Tensor)]
    return torch.frombuffer(own, dtype=torch.uint8)  # which keeps `own`


def linears(x: Tensor, table: Tensor, with_bias: bool, out: int) -> Tensor:
    """x (..., in) times the linears of `table`: (..., out), side by side, bit for bit what `cpu.linear` gives of each.

    `out` are the output channels of all; `with_bias`: with the biases that they have. No gradient goes through. Raises
    RuntimeError for an x that is not contiguous, or not what the table was made for.
    """
    return torch.ops.armor.cpu_linears(x, table, with_bias, out)
