"""The tensors of a source model under the names that records have for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from armor.execution.files import read_json
from armor.format.shards import Part, Shards

__all__ = ["CONV1D", "fused_parts", "has_conv1d", "recorded_tensors"]

CONV1D = ("gpt2", "openai-gpt")
"""Families whose linears are stored as (in, out): armor.runtime.conv1d."""


def has_conv1d(folder: Path | str) -> bool:
    """Whether the linears of the model in `folder` are stored as (in, out) when they are dense."""
    config = Path(folder) / "config.json"
    return config.is_file() and read_json(config).get("model_type") in CONV1D


def recorded_tensors(folder: Path | str, linears: Iterable[str]) -> Shards:
    """The tensors in `folder`, a weight (out, in) for each of `linears` among them.

    They are what the files hold, except for experts that are stored fused: each has a name of its own in the records.
    """
    shards, weights = Shards(folder), [f"{name}.weight" for name in linears]
    if has_conv1d(folder):
        return shards.turned(weights)
    if all(name in shards for name in weights):
        return shards
    import torch

    from armor.runtime.skeleton import open_skeleton, stored_tensors

    return stored_tensors(open_skeleton(Path(folder), torch.float32), folder)


def fused_parts(folder: Path | str) -> dict[str, Part]:
    """The tensors, under the names of records, of experts that the model in `folder` has stored fused when it is dense.

    Each is a part of a tensor under the name that files have for it.
    """
    import torch

    from armor.runtime.fused import parts_of
    from armor.runtime.skeleton import open_skeleton

    skeleton = open_skeleton(Path(folder), torch.float32)
    return {
        name: replace(part, tensor=skeleton.names.saved(part.tensor)) for name, part in parts_of(skeleton.model).items()
    }
