"""Small weights with statistics of their inputs, and the errors by which methods are compared."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["core_alone", "correlated", "error", "problem"]


def problem(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) and the importance of its columns, both of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return weight, torch.rand(columns, generator=generator, dtype=dtype) + 0.1


def correlated(
    rows: int = 24, columns: int = 32, seed: int = 0, tokens: int = 400, decades: float = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the mean squares of inputs that depend on each other, and their Gram matrix.

    The sizes of the inputs lie that many decades apart.
    """
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.logspace(-decades / 2, decades / 2, columns)
    return torch.randn(rows, columns, generator=generator), x.square().mean(0), x.T @ x / len(x)


def error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """The output error of a weight (out, in): the squared change of x W^T, summed, by the Gram matrix of x."""
    change = (weight - found).double()
    return float((change @ gram.double() * change).sum())


def core_alone(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """The core of the least output error on that mask, row by row, in float64."""
    core = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(mask):
        core[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept].double() @ weight[row].double())
    return core
