"""A second device for a machine that has none: each of its tensors holds one of the host, and may not meet the host's.

What asks for its device everywhere works on it, as it must on a GPU. It has no speed, memory or autocast of its own.
`put_in` registers it for good, so call it in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

CARD = "card:0"
_MEET = ("aten::copy_", "aten::index.", "aten::index_put")
"""What takes tensors of both devices on a GPU too."""
_libraries: list[torch.library.Library] = []


class _OnCard(Tensor):
    """A tensor of the device, `held` on the host."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnCard:
        strides, offset = held.stride(), held.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=strides, storage_offset=offset, dtype=held.dtype, device=CARD
        )
        made.held = held
        return made

    def tolist(self) -> list:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function._schema.name, dict(kwargs or {})
        leaves, spec = pytree.tree_flatten((args, kwargs))
        strangers = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, cls) and x.dim()]
        if strangers and not f"{name}.".startswith(_MEET):
            raise RuntimeError(f"{name}: tensors of two devices, {tuple(strangers[0].shape)} is on the host")
        inner, options = pytree.tree_unflatten([x.held if isinstance(x, cls) else x for x in leaves], spec)
        to = options.pop("device", None)
        found = function(*inner, **options)
        if name.endswith("_") and isinstance(args[0], Tensor):  # done in place
            return args[0]
        if not isinstance(found, Tensor) and name == "aten::_local_scalar_dense":
            return found
        if to is not None and torch.device(to).type != "card":
            return pytree.tree_map_only(Tensor, lambda x: x.to(to), found)
        return pytree.tree_map_only(Tensor, cls, found)


class _Generator(torch.Generator):
    """One of the host, whatever device is asked for."""

    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls)


class _Module(_DummyBackendModule):
    """What torch asks a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def put_in() -> None:
    """Let this process have the device `CARD`."""
    _setup_privateuseone_for_python_backend("card", _Module())
    makers, casts = (
        torch.library.Library("aten", "IMPL", "PrivateUse1"),
        torch.library.Library("_", "IMPL", "AutocastPrivateUse1"),
    )
    makers.impl("empty.memory_format", lambda size, dtype=None, **_: _OnCard(torch.empty(size, dtype=dtype)))
    makers.impl(
        "empty_strided", lambda size, stride, dtype=None, **_: _OnCard(torch.empty_strided(size, stride, dtype=dtype))
    )
    casts.fallback(torch.library.fallthrough_kernel)
    _libraries.extend((makers, casts))
    torch.Generator = _Generator
