"""What the blocks of A and B cost: bits per weight of each kind of linear, before anything is computed.

Blocks of size d take d/in + d/out numbers for each weight. So they weigh most where one side is small. On a key
projection of 256 × 2048 blocks of 128 take more than 2:4 saves, and the linear would grow. `armor inspect` says so for
a model, and the report for a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from armor.core.blocksizes import block_size_for
from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.format.records.topology import Linear, Topology
from armor.format.shards import WIDTHS

__all__ = ["block_costs"]

PATTERN = Pattern(2, 4)
BLOCK_SIZES = (32, 64, 128)


def _kind_of(linear: Linear) -> str:
    """The name of a linear within its decoder layer, like self_attn.k_proj."""
    return re.split(r"\.\d+\.", linear.name)[-1]


def block_costs(topology: Topology) -> Iterator[str]:
    """A line for each kind of linear: bits per weight at 2:4 for a few block sizes, and which of them do not pay."""
    kinds = {(_kind_of(linear), linear.out_features, linear.in_features): linear.dtype for linear in topology.linears()}
    for (kind, rows, columns), dtype in kinds.items():
        dense = 8 * WIDTHS[dtype]
        found = {}
        for asked in BLOCK_SIZES:
            right = block_size_for(columns, asked, PATTERN.m) if PATTERN.fits(columns) else None
            if right:
                layout = PackedLinear(rows, columns, PATTERN, block_size_for(rows, asked), right)
                found[asked] = layout.bits_per_weight(dense)
        listed = ", ".join(f"block {asked}: {bits:.2f}" for asked, bits in found.items())
        costs = f"{PATTERN} with {listed}" if found else f"{PATTERN} does not fit"
        larger = [str(asked) for asked, bits in found.items() if bits >= dense]
        warning = f" (block {' and '.join(larger)}: larger than dense)" if larger else ""
        yield f"{kind} {rows} x {columns}: {dense} bits/weight dense, {costs}{warning}"
