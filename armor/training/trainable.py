"""Decoder layers whose factors can be trained: A, the kept values of S, B, U, V, and the layer's norms and biases.

The values to train are float32, whatever dtype they are stored in. A linear multiplies A·S·B + U·V out when it is
called, and the gradient goes through the product. For sequences of many tokens that takes less time than three steps
for every token (docs/log/refine.md). All sequences of a step can share one product (`multiplied_once`). S stays packed
between the calls. So its values, their gradient and the optimiser's two moments take half of what they would take for a
dense weight.

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
from armor.core.factorization import Factorization, owner
from armor.core.packing import pack, unpack
from armor.format.factors import read_factors, read_others
from armor.format.shards import Shards
from armor.runtime.skeleton import Skeleton, compute_dtype, load_layer

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

PARTS = ("core_values", "left", "right", "up", "down")
"""What of a linear's factors may be trained, as a checkpoint names it."""


def _autocast(device: str, dtype: torch.dtype) -> AbstractContextManager:
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def training_arithmetic(device: str) -> AbstractContextManager:
    """Products in bfloat16 where that is native, in float32 elsewhere."""
    return _autocast(device, compute_dtype("bfloat16", device))


def stored_arithmetic(dtype: str, device: str) -> AbstractContextManager:
    """Products as a model of `dtype` is run on `device`."""
    return _autocast(device, compute_dtype(dtype, device))


class TrainableLinear(nn.Module):
    """y = (A·S·B + U·V) x + b with float32 parameters: core_values, left, right, up, down, as in a checkpoint.

    `bias` is the linear's own parameter or None. `right` is that of the linear with which this one shares B, else None.
    """

    core_values: nn.Parameter
    core_mask: Tensor
    left: nn.Parameter | None
    right: nn.Parameter | None
    up: nn.Parameter | None
    down: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, factors: Factorization, bias: nn.Parameter | None = None, right: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.start = factors
        self.out_features, self.in_features = factors.core.shape
        values, bits = pack(factors.core, factors.mask)
        self.register_buffer("core_mask", bits, persistent=False)
        for name in PARTS:
            tensor = values if name == "core_values" else getattr(factors, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor.float().clone()))
        if right is not None:
            self.right = right
        self.register_parameter("bias", bias)
        self.product: Tensor | None = None
        """A·S·B + U·V while `multiplied_once` holds it."""

    @property
    def weight(self) -> Tensor:
        """A·S·B + U·V, (out, in), differentiable."""
        weight = unpack(self.core_values, self.core_mask, self.in_features, self.start.pattern)[0]
        if self.right is not None:
            weight = blockdiag.multiply(self.right.transpose(1, 2), weight)
        if self.left is not None:
            count, size, _ = self.left.shape
            weight = torch.bmm(self.left, weight.view(count, size, -1)).view(self.out_features, -1)
        if self.up is not None and self.down is not None:
            weight = weight + self.up @ self.down
        return weight

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight if self.product is None else self.product, self.bias)

    def own(self) -> dict[str, nn.Parameter]:
        """Its parameters but for the bias, by suffix; a B that another linear holds is that one's."""
        suffixes = [suffix for suffix in PARTS if not (suffix == "right" and self.start.right_of)]
        return {suffix: found for suffix in suffixes if (found := getattr(self, suffix)) is not None}

    def factors(self) -> Factorization:
        """The factors as they are now, in the dtype that they are stored in, on the CPU."""
        dtype = self.start.core.dtype
        parts = {name: getattr(self, name) for name in PARTS}
        parts = {name: part.detach().to("cpu", dtype) for name, part in parts.items() if part is not None}
        core, mask = unpack(parts.pop("core_values"), self.core_mask.cpu(), self.in_features, self.start.pattern)
        return replace(self.start, core=core, mask=mask, **parts)


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
        right = linears[owner(name, "right", right_of)].right if right_of else None
        linears[name] = TrainableLinear(factors[name], linear.bias, right)
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

    `linears` are those that `put_linears` put into it, `dtypes` what the source stores every tensor in, `others` norms
    and biases from an earlier training. Without `core` the values of S stay.
    """
    layer.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for name, parameter in layer.named_parameters():
        full, last = f"{prefix}.{name}", name.rpartition(".")[2]
        if last in ("weight", "bias") and parameter.dim() == 1:  # of norms and linears, whatever the family calls them
            if full in others:
                parameter.data.copy_(others[full])
            parameter.requires_grad_(True)
            found[full] = parameter
    stored = {name: dtypes[name] for name in found}
    for name, linear in linears.items():
        for suffix, parameter in linear.own().items():
            parameter.requires_grad_(core or suffix != "core_values")
            stored[f"{name}.{suffix}"] = linear.start.core.dtype
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
    dtypes = {name: getattr(torch, shards.dtype(name)) for name in shards.names() if name.startswith(f"{prefix}.")}
    return make_trainable(layer, prefix, linears, dtypes, read_others(factors), core)


@contextmanager
def multiplied_once(linears: Iterable[TrainableLinear]) -> Iterator[None]:
    """Multiply A·S·B + U·V out once for all that is called in the context, with its arithmetic.

    Gradients of the products add up in float32 and go through to the factors when the context ends without an error.
    Between there is a dense weight, its gradient and what the product keeps for its own: 16 bytes a weight.
    """
    products = [(linear, linear.weight) for linear in linears]
    shared = [product.detach().float().requires_grad_(product.requires_grad) for _, product in products]
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
