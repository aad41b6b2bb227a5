"""GPT-2 and its kind: their linears are transformers' Conv1D, which holds its weight as (in, out).

Here they become linears like any other, so that they are inspected, compressed and loaded as such. Files keep the form
that transformers reads: what stays dense is (in, out) there. Only a weight that is compressed is read as (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Turned", "conv1d", "turn", "turned"]


class Turned(nn.Linear):
    """The linear of a Conv1D. Its weight is a view of the Conv1D's, transposed; its bias is the same one."""

    def __init__(self, of: Conv1D) -> None:
        rows, columns = of.nf, of.nx
        super().__init__(columns, rows, device="meta")
        self.weight = nn.Parameter(of.weight.detach().T, requires_grad=of.weight.requires_grad)
        self.bias = of.bias

    def reset_parameters(self) -> None:
        pass


def conv1d(linear: nn.Linear) -> Conv1D:
    """The Conv1D of a linear that has a bias."""
    with torch.device("meta"):
        made = Conv1D(linear.out_features, linear.in_features)
    made.weight = nn.Parameter(linear.weight.detach().T, requires_grad=linear.weight.requires_grad)
    made.bias = linear.bias
    return made


def turn(model: nn.Module) -> None:
    """Put a linear in the place of each Conv1D of `model`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, Turned(module))


@contextmanager
def turned(model: nn.Module) -> Iterator[None]:
    """Each Conv1D of `model` is a linear while the context lasts. One that is still there is a Conv1D after."""
    turn(model)
    try:
        yield
    finally:
        for name, module in list(model.named_modules()):
            if isinstance(module, Turned):
                model.set_submodule(name, conv1d(module))
