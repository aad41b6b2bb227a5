"""One row times every compressed linear of a model, dense, packed and without its blocks: milliseconds by shape.

Decoding a token is this and little else. A kernel that is fast on one shape may be slow on another. So each shape is
timed by itself. The weights are the model's own. All linears of a shape run one after the other. All other shapes,
dense and packed, run before any of them runs again. So no cache has kept a weight, as in decoding. A round takes first
all dense ones, then all packed ones. The core S alone shows what A and B cost: the same layers with both taken off for
a turn, so nothing is in memory twice. All dense linears run once more before that turn, for it reads the core that the
packed ones have just read. On a card the time includes the launches by the host, of which a small linear has little
else; `python -m benchmarks.runtime` measures without them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from armor.benchmark.rounds import ratios, summary
from armor.benchmark.timing import mark, seconds_between
from armor.format.checkpoint import PackedLinear
from armor.format.records.base import BlockSizes
from armor.format.records.benchmark import LinearSpeed
from armor.runtime.fused import fused_experts, unfuse
from armor.runtime.linear import ArmorLinear

__all__ = ["core_alone", "expands", "linear_speeds", "wrapped"]

M = TypeVar("M", bound=nn.Module)
ROUNDS = 11  # each takes about the time of two tokens of both models


def expands(model: nn.Module) -> bool:
    """Whether numbers with scales of a linear of `model` become floats before each product, for want of a kernel."""
    packed = (module for module in model.modules() if isinstance(module, ArmorLinear))
    return any(linear.core_scales is not None and not linear.runs_packed for linear in packed)


def wrapped(model: nn.Module) -> list[ArmorLinear]:
    """The packed linears of `model` that have an A or a B; a pruned model has none."""
    packed = (module for module in model.modules() if isinstance(module, ArmorLinear))
    return [linear for linear in packed if linear.left is not None or linear.right is not None]


@contextmanager
def core_alone(model: M) -> Iterator[M]:
    """`model` with every A and B taken off, so that S multiplies alone; afterwards the same tensors are back.

    What it computes meanwhile is nonsense, as fast as it would be without them.
    """
    names = ("left", "right", "left_scales", "right_scales")
    held = [(linear, name, getattr(linear, name)) for linear in wrapped(model) for name in names]
    try:
        for linear, name, _ in held:
            setattr(linear, name, None)
        yield model
    finally:
        for linear, name, tensor in held:
            setattr(linear, name, tensor)


def _milliseconds(linears: Sequence[nn.Module], x: Tensor) -> float:
    """Of one linear, on average, all of them multiplying x (1, in) in turn."""
    start = mark(x.device)
    for linear in linears:
        linear(x)
    return 1e3 * seconds_between(start, mark(x.device)) / len(linears)


def _unfused(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, tensors and all, with its experts as modules of their own; `model` stays as it is."""
    if not fused_experts(model):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    unfuse(other)
    return other


@torch.inference_mode()
def linear_speeds(dense: PreTrainedModel, compressed: nn.Module, rounds: int = ROUNDS) -> list[LinearSpeed]:
    """The speed of each shape, pattern and block sizes among the packed linears of `compressed`, in their order.

    The core's is over the dense ones of its own turn. `dense` has linears of the same names.
    """
    dense = _unfused(dense)
    packed: dict[PackedLinear, list[nn.Module]] = {}
    plain: dict[PackedLinear, list[nn.Module]] = {}
    rows: dict[PackedLinear, Tensor] = {}
    for name, module in compressed.named_modules():
        if isinstance(module, ArmorLinear):
            layout, weight = module.layout, module.weight
            packed.setdefault(layout, []).append(module)
            plain.setdefault(layout, []).append(dense.get_submodule(name))
            if layout not in rows:
                rows[layout] = torch.randn(1, layout.in_features).to(weight.device, weight.dtype)
    linears = {"dense": plain, "compressed": packed}
    turns = ("whole", "core") if wrapped(compressed) else ("whole",)
    times: dict[tuple[str, str, PackedLinear], list[float]] = {}
    for index in range(-1, rounds):  # the first one only warms up
        for turn in turns:
            with core_alone(compressed) if turn == "core" else nullcontext():
                for side in linears:
                    for layout, own in linears[side].items():
                        taken = _milliseconds(own, rows[layout])
                        if index >= 0:
                            times.setdefault((turn, side, layout), []).append(taken)
    records = []
    for layout, own in packed.items():
        bits = 8 * rows[layout].element_size()
        dense_times, own_times = (times["whole", side, layout] for side in linears)
        blocks = BlockSizes.of(layout.left_block_size, layout.right_block_size)
        beside, alone = (times["core", side, layout] for side in linears) if blocks else (None, None)
        records.append(
            LinearSpeed(
                out_features=layout.out_features,
                in_features=layout.in_features,
                pattern=str(layout.pattern),
                block_sizes=blocks,
                count=len(own),
                dense_milliseconds=summary(dense_times),
                milliseconds=summary(own_times),
                speedup=ratios(dense_times, own_times),
                theoretical_speedup=bits / layout.bits_per_weight(bits),
                core_milliseconds=summary(alone) if alone else None,
                core_speedup=ratios(beside, alone) if alone and beside else None,
            )
        )
    return records
