"""The published ARMOR optimiser (arXiv 2510.05528), as its paper describes it: the slow twin of `solver`.

An iteration is one joint Adam step on A, B and S (learning rate 1e-4, default betas, no schedule), then one step on the
mask. In every block one group of m is drawn, with probability proportional to the 1-norm of the loss gradient on it. It
gets the best of its supports with the least-squares values there. `draw` has the other rules of the paper's ablation.
20,000 iterations in the paper. Nothing makes the loss fall, so the best iterate is kept. The gradients are written out
(six block products). A drawn group is a rank-one update of its block's residual. So an iteration costs no more than it
must. An unstructured pattern has no groups to enumerate: its mask stays NoWag's.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.blocksizes import sizes
from armor.core.factorization import Factorization
from armor.core.pattern import PatternLike, top_n_mask
from armor.methods.solver.objective import Objective, check, finish, supports

__all__ = ["Settings", "solve"]

NORMS = {  # of groups (..., m), by the rules of `draw`
    "l1-random": lambda groups: groups.abs().sum(-1),
    "l2-random": lambda groups: groups.norm(dim=-1),
    "uniform": lambda groups: torch.ones_like(groups[..., 0]),
    "l1-greedy": lambda groups: groups.abs().sum(-1),
}


@dataclass(frozen=True)
class Settings:
    """iterations: 20,000 in the paper. learning_rate, betas: Adam's. selection: of `draw`. The paper's by default."""

    iterations: int = 20_000
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    selection: str = "l1-random"


@torch.no_grad()
def solve(
    weight: Tensor,
    importance: Tensor,
    *,
    pattern: PatternLike = (2, 4),
    block_size: int = 128,
    settings: Settings | None = None,
    seed: int = 0,
) -> Factorization:
    """Factorize weight (out, in) under importance (in,), any float dtype, on the weight's device, in float32.

    Returns factors in the weight's dtype, never worse than NoWag-P. Raises ValueError for bad input.
    """
    settings = settings or Settings()
    pattern = check(weight, importance, pattern)
    began = time.perf_counter()
    objective = Objective.of(weight, importance)
    w, d = objective.normal(weight), objective.importance.float()
    rows, columns = w.shape
    size_a, size_b = sizes(w.shape, pattern, block_size)
    p, q = rows // size_a, columns // size_b
    options = {"dtype": torch.float32, "device": w.device}
    generator = torch.Generator(w.device).manual_seed(seed)

    a, b = blockdiag.identity(rows, size_a, **options), blockdiag.identity(columns, size_b, **options)
    mask = top_n_mask(objective.score(weight), pattern)
    s = w * mask
    a.grad, b.grad, s.grad = grad_a, grad_b, grad_s = tuple(torch.empty_like(tensor) for tensor in (a, b, s))
    adam = torch.optim.Adam([a, b, s], lr=settings.learning_rate, betas=settings.betas, fused=True)

    left, residual, weighted, back = (torch.empty_like(w) for _ in range(4))

    def by_row(x: Tensor) -> Tensor:  # the blocks of A see x (out, in) like this: (out/d, d, in)
        return x.view(p, size_a, columns)

    def by_column(x: Tensor) -> Tensor:  # and those of B like this: (in/d, out, d)
        return x.view(rows, q, size_b).transpose(0, 1)

    table = supports(pattern, w.device) if size_b >= pattern.m else None
    total = max(float((w.square() * d).sum(dtype=torch.float64)), torch.finfo(torch.float64).tiny)
    best, kept, trace, drawn = math.inf, None, [], None

    for iteration in range(settings.iterations + 1):
        torch.bmm(a, by_row(s), out=by_row(left))
        torch.bmm(by_column(left), b, out=by_column(residual))
        residual.sub_(w)
        if drawn is not None and table is not None:
            update_groups(a, b, s, mask, left, residual, d, drawn, table, pattern.m)
        torch.mul(residual, d, out=weighted)
        loss = float(torch.dot(residual.view(-1), weighted.view(-1))) / total
        if loss < best:
            best, kept = loss, (a.clone(), s.clone(), mask.clone(), b.clone())
        trace.append((iteration, time.perf_counter() - began, best))
        if iteration == settings.iterations or not math.isfinite(loss):
            break
        torch.bmm(by_column(weighted), b.transpose(1, 2), out=by_column(back))
        torch.bmm(by_row(back), by_row(s).transpose(1, 2), out=grad_a)
        torch.bmm(by_column(left).transpose(1, 2), by_column(weighted), out=grad_b)
        torch.bmm(a.transpose(1, 2), by_row(back), out=by_row(grad_s))
        if table is not None:
            shape = (p, size_a, q, size_b // pattern.m, pattern.m)
            drawn = draw(grad_s, shape, generator, settings.selection)
        grad_s *= mask
        adam.step()
        s *= mask
    return finish(weight, objective, pattern, kept, trace, (size_a, size_b))


def draw(
    gradient: Tensor, shape: tuple[int, ...], generator: torch.Generator, selection: str = "l1-random"
) -> tuple[Tensor, Tensor]:
    """One group of every block, by a rule over the norms of gradient (out, in) on the groups.

    shape is (out/d, d, in/d, d/m, m). l1-random and l2-random draw with probability proportional to the 1-norm or the
    2-norm, uniform any group alike; l1-greedy takes the largest 1-norm. Returns row and group within the block, both
    (out/d, in/d).
    """
    p, size, q, groups, _ = shape
    share = NORMS[selection](gradient.view(shape))
    if selection != "l1-greedy":
        share /= torch.empty_like(share).exponential_(generator=generator)  # the largest of these is such a draw
    index = share.transpose(1, 2).reshape(p, q, size * groups).argmax(-1)
    return index // groups, index % groups


def update_groups(
    a: Tensor,
    b: Tensor,
    s: Tensor,
    mask: Tensor,
    left: Tensor,
    residual: Tensor,
    d: Tensor,
    drawn: tuple[Tensor, Tensor],
    table: Tensor,
    m: int,
) -> None:
    """Give the drawn groups their best support and its least-squares values; left = A S and residual follow."""
    row, group = drawn  # (out/d, in/d) each
    (p, q), size_a, size_b = row.shape, a.shape[1], b.shape[1]
    i, j = torch.arange(p, device=s.device)[:, None], torch.arange(q, device=s.device)[None]
    column = a[i, :, row]  # (p, q, size_a)
    rows_b = b.view(q, size_b // m, m, size_b)[j, group]  # (p, q, m, size_b)
    weighted_b = rows_b * d.view(1, q, 1, size_b)
    blocks = residual.view(p, size_a, q, size_b)
    fibre = column.transpose(1, 2).unsqueeze(-1)  # (p, size_a, q, 1)
    gradient = (weighted_b @ (blocks * fibre).sum(1).unsqueeze(-1)).squeeze(-1)  # (p, q, m)
    curvature = rows_b @ weighted_b.transpose(2, 3) * column.square().sum(-1)[..., None, None]  # (p, q, m, m)

    core = s.view(p, size_a, q, size_b // m, m)
    old = core[i, row, j, group]
    target = (curvature @ old.unsqueeze(-1)).squeeze(-1) - gradient
    ridge = 1e-6 * curvature.diagonal(dim1=2, dim2=3).mean(-1)[..., None, None] + torch.finfo(s.dtype).tiny
    curvature += ridge * torch.eye(m, device=s.device)
    targets = target[..., table]  # (p, q, supports, n)
    systems = curvature[..., table[:, :, None], table[:, None, :]]  # (p, q, supports, n, n)
    values = torch.linalg.solve_ex(systems, targets.unsqueeze(-1))[0].squeeze(-1)
    best = (values * targets).sum(-1).nan_to_num(-1.0).argmax(-1)  # (p, q)
    new = torch.zeros_like(old).scatter_(-1, table[best], values[i, j, best])
    core[i, row, j, group] = new
    mask.view(core.shape)[i, row, j, group] = torch.zeros_like(new, dtype=torch.bool).scatter_(-1, table[best], True)
    change = new - old
    blocks += fibre * (change.unsqueeze(-2) @ rows_b).transpose(1, 2)  # (p, 1, q, size_b)
    left.view(core.shape)[i, :, j, group] += column.unsqueeze(-1) * change.unsqueeze(-2)
