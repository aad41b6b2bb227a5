"""Decoder layers whose factors can be trained: A, the kept values of S, B, U, V, and the layer's norms and biases.

The values to train are float32, whatever dtype they are stored in. A linear multiplies A·S·B + U·V out when it is
called, and the gradient goes through the product. For sequences of many tokens that takes less time than three steps
for every token (docs/TRIED.md). All sequences of a step can share one product (`multiplied_once`). S stays packed
between the calls. So its values, their gradient and the optimiser's two moments take half of what they would take for a
dense weight.

Quantized factors are trained through their rounding: floats and scales are kept, and every product takes the nearest
integers times their scales. The gradient passes the rounding as if it were not there (straight-through, Bengio et al.
2013, arXiv 1308.3432), and that of a scale is LSQ's (Esser et al. 2020, arXiv 1902.08153). What is stored is what was
multiplied with.

Products are bfloat16 where the device multiplies in it (`training_arithmetic`). What is looked at to decide, the loss
of what would be stored, is computed as the model will be (`stored_arithmetic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armor.core import blockdiag
from armor.core.factorization import SUFFIXES, Factorization, owner
from armor.core.integers import DTYPES, expand_scales, round_
from armor.core.packing import pack, pack_mask, unpack
from armor.core.quantization import LIMITS
from armor.format.factors import read_factors, read_others
from armor.format.shards import Shards
from armor.runtime.filling import load_layer
from armor.runtime.skeleton import Skeleton, compute_dtype

__all__ = [
    "TrainableLayer",
    "TrainableLinear",
    "load_trainable",
    "make_trainable",
    "multiplied_once",
    "put_linears",
    "rounded",
    "stored_arithmetic",
    "training_arithmetic",
]

PARTS = tuple(suffix for suffix in SUFFIXES if suffix != "core_mask")
"""What of a linear's factors may be trained, as a checkpoint names it."""
SHARED = ("right", "right_scales")
"""What another linear may hold."""


def _autocast(device: str, dtype: torch.dtype) -> AbstractContextManager:
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def training_arithmetic(device: str) -> AbstractContextManager:
    """Products in bfloat16 where that is native, in float32 elsewhere."""
    return _autocast(device, compute_dtype("bfloat16", device))


def stored_arithmetic(dtype: str, device: str) -> AbstractContextManager:
    """Products as a model of `dtype` is run on `device`."""
    return _autocast(device, compute_dtype(dtype, device))


class TrainableLinear(nn.Module):
    """y = (A·S·B + U·V) x + b with float32 parameters of the names in a checkpoint: core_values, left, right, up, down.

    Of quantized factors core_scales, left_scales and right_scales too, the latter two (count, d, 1) beside the blocks
    (count, d, d). `bias` is the linear's own parameter or None. `holder` is the linear with which this one shares B.
    """

    core_values: nn.Parameter
    core_scales: nn.Parameter | None
    core_mask: Tensor
    left: nn.Parameter | None
    left_scales: nn.Parameter | None
    right: nn.Parameter | None
    right_scales: nn.Parameter | None
    up: nn.Parameter | None
    down: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, factors: Factorization, bias: nn.Parameter | None = None, holder: TrainableLinear | None = None
    ) -> None:
        super().__init__()
        self.start = factors.to("meta")  # dtypes and what says how they are stored; the numbers are below
        self.out_features, self.in_features = factors.core.shape
        self.register_buffer("core_mask", pack_mask(factors.mask), persistent=False)
        floats = factors.in_floats()
        found = {name: getattr(factors if name.endswith("_scales") else floats, name) for name in PARTS[1:]}
        for side in ("left", "right"):
            if (scales := found[f"{side}_scales"]) is not None:
                found[f"{side}_scales"] = scales.view(*found[side].shape[:2], 1)
        for name, tensor in {PARTS[0]: pack(floats.core, factors.mask)[0], **found}.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor.float().clone()))
        for name in SHARED if holder is not None else ():
            setattr(self, name, getattr(holder, name))
        self.register_parameter("bias", bias)
        self.product: Tensor | None = None
        """A·S·B + U·V while `multiplied_once` holds it."""

    @property
    def weight(self) -> Tensor:
        """A·S·B + U·V, (out, in), differentiable."""
        weight, _ = self._unpacked()
        if self.core_scales is not None:
            weight = self._integers("core", weight) * self._scales("core")
        if (right := self._blocks("right")) is not None:
            weight = blockdiag.multiply(right.transpose(1, 2), weight)
        if (left := self._blocks("left")) is not None:
            weight = torch.bmm(left, weight.view(*left.shape[:2], -1)).view(self.out_features, -1)
        if self.up is not None and self.down is not None:
            weight = weight + self.up @ self.down
        return weight

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight if self.product is None else self.product, self.bias)

    def own(self) -> dict[str, nn.Parameter]:
        """Its parameters but for the bias, by suffix; a B that another linear holds is that one's."""
        suffixes = [suffix for suffix in PARTS if not (suffix in SHARED and self.start.right_of)]
        return {suffix: found for suffix in suffixes if (found := getattr(self, suffix)) is not None}

    def dtype(self, suffix: str) -> torch.dtype:
        """What the values of a part are stored in; float32 where they have scales, for their products round them."""
        dtype = getattr(self.start, "core" if suffix == "core_values" else suffix).dtype
        return torch.float32 if dtype in DTYPES.values() else dtype

    @torch.no_grad()
    def factors(self) -> Factorization:
        """The factors as they are now, in the dtype that they are stored in, on the CPU."""
        core, mask = self._unpacked()
        found = {name: part for name in PARTS[1:] if (part := getattr(self, name)) is not None} | {"core": core}
        for name in ("core", "left", "right"):
            if f"{name}_scales" in found:
                found[name] = self._integers(name, found[name])
        parts = {name: part.detach().to("cpu", getattr(self.start, name).dtype) for name, part in found.items()}
        parts |= {name: parts[name].view(-1) for name in ("left_scales", "right_scales") if name in parts}
        return replace(self.start, mask=mask.cpu(), **parts)

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        """The values of S, (out, in), and its mask."""
        return unpack(self.core_values, self.core_mask, self.in_features, self.start.pattern)

    def _scales(self, part: str) -> Tensor:
        """The scale of every number of core, left or right, or of every row of their blocks."""
        scales, kind = getattr(self, f"{part}_scales"), self.start.quantization
        return expand_scales(scales, kind.group, self.in_features) if part == "core" and kind else scales

    def _integers(self, part: str, values: Tensor) -> Tensor:
        """The stored numbers nearest to the `values` of core, left or right, with the gradient of what was rounded."""
        scales, kind = self._scales(part), self.start.quantization
        assert kind is not None
        exact = values / torch.where(scales == 0, 1.0, scales)
        own = kind.core if part == "core" else "int8"
        low, high = LIMITS[own]
        inside = (exact >= low) & (exact <= high)  # at a limit there is a gradient; torch 2.15's clamp has none
        exact = torch.where(inside, exact, exact.detach().clamp(low, high))
        return round_(exact.detach().clone(), own) + (exact - exact.detach())  # exact: the second is zero

    def _blocks(self, side: str) -> Tensor | None:
        """A or B, in floats."""
        blocks = getattr(self, side)
        return blocks if getattr(self, f"{side}_scales") is None else self._integers(side, blocks) * self._scales(side)


@dataclass(frozen=True)
class TrainableLayer:
    """A decoder layer with the tensors that are trained in it, by full name.

    `others` are norms and biases, `dtypes` what every trained tensor is stored in.
    """

    module: nn.Module
    linears: dict[str, TrainableLinear]
    others: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, by full name."""
        found = {}
        for name, linear in self.linears.items():
            for suffix, parameter in linear.own().items():
                if parameter.requires_grad:
                    found[f"{name}.{suffix}"] = parameter
        return found | self.others

    def stored(self) -> tuple[dict[str, Factorization], dict[str, Tensor]]:
        """The factors of every linear and the other tensors, as a factors file holds them, on the CPU."""
        others = {name: p.detach().to("cpu", self.dtypes[name]) for name, p in self.others.items()}
        return {name: linear.factors() for name, linear in self.linears.items()}, others


def put_linears(
    layer: nn.Module, inside: Callable[[str], str], factors: Mapping[str, Factorization]
) -> dict[str, TrainableLinear]:
    """Put trainable linears in the place of those of `layer` that `factors` are of, by full name; return them.

    `inside` gives a linear's name within the layer. They keep their biases. `layer` may be on the meta device still;
    its other tensors are loaded after.
    """
    linears: dict[str, TrainableLinear] = {}
    for name in sorted(factors, key=lambda name: factors[name].right_of is not None):  # who holds B comes first
        linear: Any = layer.get_submodule(inside(name))
        right_of = factors[name].right_of
        holder = linears[owner(name, "right", right_of)] if right_of else None
        linears[name] = TrainableLinear(factors[name], linear.bias, holder)
        layer.set_submodule(inside(name), linears[name])
    return {name: linears[name] for name in factors}


def make_trainable(
    layer: nn.Module,
    prefix: str,
    linears: dict[str, TrainableLinear],
    dtypes: Mapping[str, torch.dtype],
    others: Mapping[str, Tensor],
    core: bool = True,
) -> TrainableLayer:
    """The decoder layer `layer`, whose tensors are loaded and float32, ready to be trained.

    `linears` are those that `put_linears` put into it, `dtypes` what the source stores every tensor in that is the
    layer's own, `others` norms and biases from an earlier training. Without `core` the values of S stay.
    """
    layer.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for name, parameter in layer.named_parameters():
        full, last = f"{prefix}.{name}", name.rpartition(".")[2]
        is_own = parameter.dim() == 1 and full in dtypes
        if is_own and last in ("weight", "bias"):  # of norms, linears, convolutions
            if full in others:
                parameter.data.copy_(others[full])
            parameter.requires_grad_(True)
            found[full] = parameter
    stored = {name: dtypes[name] for name in found}
    for name, linear in linears.items():
        for suffix, parameter in linear.own().items():
            parameter.requires_grad_(core or not suffix.startswith("core_"))
            stored[f"{name}.{suffix}"] = linear.dtype(suffix)
    return TrainableLayer(layer, linears, found, stored)


def load_trainable(
    skeleton: Skeleton, index: int, shards: Shards, factors: Path, device: str = "cpu", core: bool = True
) -> TrainableLayer:
    """Decoder layer `index` of a float32 skeleton, its linears those in the file `factors`, ready to be trained.

    Raises ArmorError for a file or a shard that cannot be read.
    """
    prefix = f"{skeleton.prefix}.{index}"
    linears = put_linears(skeleton.layers[index], partial(skeleton.inside, index), read_factors(factors)[0])
    layer = load_layer(skeleton, index, shards, device)
    for linear in linears.values():
        linear.to(device)  # load_layer moves what the source has, and they are not of it
    own = [name for name in shards.names() if name.startswith(f"{prefix}.") and name not in skeleton.shared]
    dtypes = {name: getattr(torch, shards.dtype(name)) for name in own}
    return make_trainable(layer, prefix, linears, dtypes, read_others(factors), core)


@contextmanager
def multiplied_once(linears: Iterable[TrainableLinear]) -> Iterator[None]:
    """Multiply A·S·B + U·V out once for all that is called in the context, with its arithmetic.

    Gradients of the products add up in float32 and go through to the factors when the context ends without an error.
    Between there is a dense weight, its gradient and what the product keeps for its own: 16 bytes a weight.
    """
    products = [(linear, linear.weight) for linear in linears]
    shared = [p.detach().float().requires_grad_() if p.requires_grad else p for _, p in products]
    for (linear, _), one in zip(products, shared, strict=True):
        linear.product = one
    try:
        yield
        for (_, product), one in zip(products, shared, strict=True):
            if one.grad is not None:
                product.backward(one.grad.to(product.dtype))
    finally:
        for linear, _ in products:
            linear.product = None


@contextmanager
def rounded(parameters: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """The parameters as they would be stored, for as long as the context lasts."""
    exact = {name: p.data for name, p in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(dtypes[name]).float()
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = exact[name]
