"""What the settings make of a linear, from shapes alone: the method, its groups, its stored layout, its memory.

No weight is read. The stages go by it, and so does the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from armor.config.layers import Choice, LayerSettings, ModuleSettings
from armor.core.blocksizes import sizes
from armor.core.errors import ArmorError
from armor.execution.machine import device_memory_bytes
from armor.factorize.sharing import groups_of
from armor.format.checkpoint import PackedLinear
from armor.format.records.topology import DecoderLayer, Linear
from armor.format.shards import WIDTHS
from armor.methods import UNCHANGED

__all__ = [
    "check_memory",
    "choices_of",
    "groups_asked",
    "layouts_of",
    "linear_bytes",
    "possible",
    "stored_bits",
]


def possible(settings: ModuleSettings, out_features: int, in_features: int) -> tuple[ModuleSettings, str | None]:
    """The settings that a weight (out, in) allows, and a note if they are not those asked for."""
    if settings.is_dense:
        return settings, None
    method = settings.how
    pattern = method.pattern(settings)
    shape = f"{out_features} x {in_features}"
    if not pattern.fits(in_features):
        note = f"stays dense: the rows of a {shape} weight cannot hold the pattern {pattern}"
        return settings.replace(method=UNCHANGED), note
    if why := method.why_not((out_features, in_features), settings):
        return settings.replace(method=method.instead), f"pruned by {method.instead}: {why}"
    return settings, None


def groups_asked(
    layer: DecoderLayer, settings: LayerSettings, resolved: Mapping[str, ModuleSettings]
) -> list[tuple[list[Linear], ModuleSettings]]:
    """The linears of `layer` as they are compressed, those together that share B, and with what settings each group.

    `resolved` is what is asked for each linear.
    """
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in layer.linears}
    asked = {name: possible(resolved[name], *shape)[0] for name, shape in shapes.items()}
    return groups_of(layer.linears, settings.share_right, asked)


def layouts_of(layer: DecoderLayer, settings: LayerSettings) -> dict[str, PackedLinear]:
    """How the linears of `layer` will be stored, by name, without those that stay dense."""
    found: dict[str, PackedLinear] = {}
    resolved = {linear.name: settings.for_module(linear.name) for linear in layer.linears}
    for group, asked in groups_asked(layer, settings, resolved):
        last = group[0].name.rpartition(".")[2]
        for linear in () if asked.is_dense else group:
            found[linear.name] = _layout(linear, asked, None if linear is group[0] else last)
    return {linear.name: found[linear.name] for linear in layer.linears if linear.name in found}


def _layout(linear: Linear, asked: ModuleSettings, right_of: str | None = None) -> PackedLinear:
    """How a linear will be stored that is compressed as `asked`, which it allows."""
    shape = (linear.out_features, linear.in_features)
    pattern = asked.how.pattern(asked)
    blocks = sizes(shape, pattern, asked.block_size) if asked.takes("block_size") else (None, None)
    rank = (min(asked.rank, *shape) or None) if asked.takes("rank") else None
    return PackedLinear(*shape, pattern, *blocks, asked.how.integers(shape, asked), right_of, rank)


def choices_of(linear: Linear, settings: LayerSettings) -> Iterator[tuple[Choice, ModuleSettings]]:
    """A budget's choices for `linear` and the settings that each comes to; of those that are the same the first."""
    seen = []
    for choice in settings.choices(linear.name):
        asked = choice.apply(settings.for_module(linear.name)).priced
        asked, _ = possible(asked, linear.out_features, linear.in_features)
        comes_to = asked.method, None if asked.is_dense else _layout(linear, asked)
        if comes_to not in seen:
            seen.append(comes_to)
            yield choice, asked


def stored_bits(linear: Linear, asked: ModuleSettings) -> int:
    """What a linear takes that is compressed as `asked`, which it allows."""
    dense = 8 * WIDTHS[linear.dtype]
    bits = dense if asked.is_dense else _layout(linear, asked).bits_per_weight(dense)
    return round(bits * linear.out_features * linear.in_features)


def check_memory(asked: Sequence[tuple[Linear, Sequence[ModuleSettings]]], device: str) -> None:
    """Refuse a device that cannot hold what one of the linears will need, in any of the ways asked for."""
    available = device_memory_bytes(device)
    for linear, ways in asked:
        needed = linear_bytes(linear, ways)
        if available is not None and needed > available:
            raise ArmorError(
                f"{linear.name}: {linear.out_features} x {linear.in_features} needs about {needed / 1e9:.1f} GB, "
                f"{device} has {available / 1e9:.1f} GB; choose a larger GPU, or compute on the CPU with --gpus 0 "
                "(gpu=0)"
            )


def linear_bytes(linear: Linear, asked: Sequence[ModuleSettings]) -> int:
    """The memory that a linear takes at its peak, whichever of `asked` it is compressed with."""
    shape = (linear.out_features, linear.in_features)
    chosen = [possible(settings, *shape)[0] for settings in asked]
    itemsize = getattr(torch, linear.dtype).itemsize
    return max(settings.how.peak_bytes(shape, itemsize, settings) for settings in chosen)
