"""The tensors of a skeleton: what is outside of its decoder layers, and its layers one at a time, in and out again."""

from __future__ import annotations

import copy
import ctypes
import sys

import torch
from torch import Tensor, nn

from armor.core.errors import ArmorError
from armor.format.shards import Shards
from armor.runtime.experts import Expert
from armor.runtime.skeleton import Skeleton

__all__ = [
    "drop_layer",
    "fill",
    "filled",
    "finite",
    "layer_bytes",
    "load_layer",
    "load_outside",
    "place_outside",
    "place_tensor",
    "read_layer",
    "unload_outside",
]


def load_outside(skeleton: Skeleton, shards: Shards, head: bool = False, values: bool = True) -> None:
    """Give the base model its real tensors outside of the decoder layers: embeddings, norms; the `head` if asked to.

    Without `values`, zeros that take no memory: enough to see what layers are called with.
    """
    tied = getattr(skeleton.model, "all_tied_weights_keys", None) or {}
    for full, owner, name, tensor in skeleton.outside(head):
        if head and full in tied:
            continue
        full = full if full in shards else tied.get(full, full)
        if full in shards:
            if values:
                _place(owner, name, shards.read(full, _target(tensor)), full, shards)
            else:
                place_tensor(owner, name, torch.zeros((), dtype=tensor.dtype).expand(shards.shape(full)))
        elif tensor.is_meta:
            raise ArmorError(
                f"{shards.folder}: has no tensor {full}, which {type(skeleton.model).__name__} needs; load the model "
                "with transformers and save it again, so that names are those of the model"
            )
    if head:
        skeleton.model.tie_weights()
    _place_first(skeleton, "cpu")


def _place_first(skeleton: Skeleton, device: str) -> None:
    """Let the first tensor of a wrapper, mostly of its images, be zeros on `device`: some move the text to where it is.

    They take no memory.
    """
    name, tensor = next(iter(skeleton.model.base_model.named_parameters()))
    owner, _, last = name.rpartition(".")
    module = skeleton.model.base_model.get_submodule(owner)
    if any(module is inner for child in skeleton.beside.values() for inner in child.modules()):
        place_tensor(module, last, torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape))


def place_outside(skeleton: Skeleton, device: str) -> None:
    """Move what `load_outside` loaded, and what is computed beside it, to `device`."""
    _place_first(skeleton, device)
    away = skeleton.away()  # on the meta device, from where nothing can be moved
    for module in skeleton.model.modules():
        if id(module) not in away:
            module._apply(lambda tensor: tensor.to(device), recurse=False)


def unload_outside(skeleton: Skeleton) -> None:
    """Drop what `load_outside` loaded; `armor.runtime.calls.observe` cannot run after it."""
    for _, owner, name, tensor in list(skeleton.outside()):
        place_tensor(owner, name, tensor.to("meta"))


def load_layer(skeleton: Skeleton, index: int, shards: Shards, device: str = "cpu", experts: bool = True) -> nn.Module:
    """Fill decoder layer `index` from its shards and return it; `drop_layer` empties it again.

    Without `experts` those of mixtures stay empty (`armor.runtime.apart`). Raises ArmorError, naming tensor and file,
    if one is missing, has another shape, or holds NaN or infinity.
    """
    return fill(skeleton.layers[index], f"{skeleton.prefix}.{index}", shards, device, experts)


def read_layer(skeleton: Skeleton, index: int, shards: Shards, device: str = "cpu", experts: bool = True) -> nn.Module:
    """As `load_layer`, but a copy: the skeleton's own layer, with the buffers that are computed, stays as it is."""
    return filled(skeleton.layers[index], f"{skeleton.prefix}.{index}", shards, device, experts)


def layer_bytes(layer: nn.Module) -> int:
    """The memory that a decoder layer of a skeleton takes when it is filled."""
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def drop_layer(layer: nn.Module) -> None:
    """Empty a decoder layer.

    The C library of Linux keeps what small tensors held, as those of experts. It is told to give that back, for part of
    it would stay beside the next layer.
    """
    layer.to("meta")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def filled(layer: nn.Module, prefix: str, shards: Shards, device: str, experts: bool = True) -> nn.Module:
    """A copy of a decoder layer, filled with its tensors, whose names begin with `prefix`. Errors as `load_layer`."""
    return fill(copy.deepcopy(layer), prefix, shards, device, experts)


def fill(module: nn.Module, prefix: str, shards: Shards, device: str, experts: bool = True) -> nn.Module:
    """Fill a module, a decoder layer or a part of it, with its tensors, whose names begin with `prefix`.

    Without `experts` those of mixtures stay empty. Errors as `load_layer`.
    """
    left = () if experts else tuple(f"{path}." for path, inner in module.named_modules() if isinstance(inner, Expert))
    for name, tensor in module.state_dict(keep_vars=True).items():
        full = f"{prefix}.{name}"
        if name.startswith(left) or (full not in shards and not tensor.is_meta):
            continue  # a buffer that is computed
        owner, _, last = name.rpartition(".")
        _place(module.get_submodule(owner), last, shards.read(full, _target(tensor)).to(device), full, shards)
    for inner in module.modules():
        for name, buffer in inner.named_buffers(recurse=False):
            if not buffer.is_meta:
                inner._buffers[name] = buffer.to(device)
    return module


def _target(tensor: Tensor) -> torch.dtype | None:
    """As in transformers: floats take the model's dtype, the rest keeps its own."""
    return tensor.dtype if tensor.is_floating_point() else None


def _place(owner: nn.Module, name: str, tensor: Tensor, full: str, shards: Shards) -> None:
    expected = getattr(owner, name).shape
    where = f"{shards.folder / shards.file_of(full)}: {full}"
    if tensor.shape != expected:
        raise ArmorError(f"{where} has shape {tuple(tensor.shape)}, expected {tuple(expected)} by config.json")
    if tensor.is_floating_point() and not finite(tensor):
        raise ArmorError(f"{where} holds NaN or infinity; the weights are damaged, fetch the model again")
    place_tensor(owner, name, tensor)


def place_tensor(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `name` of `owner`, which has one."""
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity; its extremes tell, in one pass and without a copy."""
    if tensor.dtype == torch.float8_e4m3fn:  # which has no infinity, and no extremes in torch
        return not tensor.isnan().any()
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
