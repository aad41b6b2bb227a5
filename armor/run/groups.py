"""Which experts of a decoder layer a job compresses, where all of them are too many for one.

A job holds the factors that it finds until its end. So a large mixture is cut into groups of experts, a job each, as
large as fit into the memory that the workflow asks for such a job. This goes by shapes and settings alone, never by the
machine: the same configuration has the same jobs everywhere. Dense models and small mixtures are not cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from armor.config.layers import LayerSettings
from armor.format.records.topology import DecoderLayer, Linear
from armor.format.shards import WIDTHS

__all__ = ["JOB_BYTES", "expert_groups"]

JOB_BYTES = 14 * 10**9
"""Bytes for what a job holds: the 16 GB of the rule, less what the process and CUDA take by themselves."""


def expert_groups(layer: DecoderLayer, settings: LayerSettings, experts_per_job: int | None) -> list[str]:
    """The groups of experts of `layer` that are jobs of their own, like 0-63 and 64-127; none if one job does all."""
    experts = layer.experts()
    size = len(experts) if experts_per_job is None else experts_per_job
    if experts and experts_per_job is None and sum(_bytes(layer.linears, settings)) > JOB_BYTES:
        held, work = zip(*(_bytes(linears, settings) for linears in experts.values()), strict=True)
        fit = max(1, (JOB_BYTES - max(work)) // max(held))
        size = math.ceil(len(experts) / math.ceil(len(experts) / fit))  # groups of about one size
    if size >= len(experts):
        return []
    numbers = sorted(experts)
    return [f"{group[0]}-{group[-1]}" for group in (numbers[i : i + size] for i in range(0, len(numbers), size))]


def _bytes(linears: Iterable[Linear], settings: LayerSettings) -> tuple[int, int]:
    """What a job with these linears holds at its end: all factors twice, and statistics; and the work on the largest.

    Whatever method of the settings each has. The factors are there as they were found, core and mask, and as they are
    written.
    """
    methods = settings.methods()
    power = 2 if any("gram" in method.statistics for method in methods) else 1
    together: dict[tuple[object, int, str], int] = {}
    inputs: dict[int, int] = {}
    held = 0
    for linear in linears:
        held += 2 * linear.out_features * linear.in_features * (WIDTHS[linear.dtype] + 1)
        inputs[linear.input_group] = 4 * linear.in_features**power
        key = linear.input_group if settings.share_right else linear.name  # those that share B are one problem
        place = (key, linear.in_features, linear.dtype)
        together[place] = together.get(place, 0) + linear.out_features
    shapes = {(rows, columns, WIDTHS[dtype]) for (_, columns, dtype), rows in together.items()}
    peaks = (m.peak_bytes((rows, columns), width, settings) for rows, columns, width in shapes for m in methods)
    return held + sum(inputs.values()), max(peaks, default=0)
