"""One row times every compressed linear of a model, beside its dense self: milliseconds by shape.

Decoding a token is this and little else, and a kernel that is fast on one shape may be slow on another, so each shape
is timed by itself. The weights are the model's own: all linears of a shape run one after the other, and all other
shapes, dense and packed, before any of them runs again, so that no cache has kept a weight, as in decoding: first all
dense ones, then all packed ones, round by round. On a card the time includes the launches by the host, of which a small
linear has little else; `python -m benchmarks.runtime` measures without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from armor.benchmark.timing import mark, ratios, seconds_between, summary
from armor.core.checkpoint import PackedLinear
from armor.runtime.linear import ArmorLinear

__all__ = ["linear_speeds"]

ROUNDS = 11  # each takes about the time of a token of both models


def _milliseconds(linears: Sequence[nn.Module], x: Tensor) -> float:
    """Of one linear, on average, all of them multiplying x (1, in) in turn."""
    start = mark(x.device)
    for linear in linears:
        linear(x)
    return 1e3 * seconds_between(start, mark(x.device)) / len(linears)


@torch.inference_mode()
def linear_speeds(dense: nn.Module, compressed: nn.Module, rounds: int = ROUNDS) -> list[dict]:
    """A record for each shape, pattern and block sizes among the packed linears of `compressed`, in their order.

    It holds those, the `count` of linears, `dense_milliseconds`, `milliseconds` and the `speedup` of a round (medians
    and quartiles), and `theoretical_speedup`: by the bytes of the weights. `dense` has linears of the same names.
    """
    names: dict[PackedLinear, list[str]] = {}
    for name, module in compressed.named_modules():
        if isinstance(module, ArmorLinear):
            names.setdefault(module.layout, []).append(name)
    linears = {
        side: {layout: [model.get_submodule(name) for name in own] for layout, own in names.items()}
        for side, model in (("dense", dense), ("compressed", compressed))
    }
    rows = {}
    for layout, (first, *_) in linears["compressed"].items():
        weight = first.weight
        rows[layout] = torch.randn(1, layout.in_features).to(weight.device, weight.dtype)
    times: dict[str, dict[PackedLinear, list[float]]] = {side: {layout: [] for layout in names} for side in linears}
    for index in range(-1, rounds):  # the first one only warms up
        for side in linears:
            for layout, own in linears[side].items():
                taken = _milliseconds(own, rows[layout])
                if index >= 0:
                    times[side][layout].append(taken)
    records = []
    for layout, own in names.items():
        bits = 8 * rows[layout].element_size()
        records.append(
            {
                **asdict(layout),
                "pattern": str(layout.pattern),
                "count": len(own),
                "dense_milliseconds": summary(times["dense"][layout]),
                "milliseconds": summary(times["compressed"][layout]),
                "speedup": ratios(times["dense"][layout], times["compressed"][layout]),
                "theoretical_speedup": bits / layout.bits_per_weight(bits),
            }
        )
    return records
