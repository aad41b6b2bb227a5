"""The solver: W~ = W̄·diag(√d) ~ A·S·B with A, B block diagonal and S sparse, by heavy ball and annealed swaps.

With d absorbed, L = ‖A S B − W~‖² is a plain least-squares problem in each factor and splits into blocks:
‖A_i S_ij B_j − W~_ij‖², A_i shared along a block row, B_j along a block column. An iteration has two halves.

Mask. In a group, let u be the kept entry that costs least to drop and v the entry that gains most when taken up. Let G
= Aᵀ R Bᵀ and R = A S B − W~, and let ‖a_r‖²·(B Bᵀ)_uv be the curvature of row r. They give the exact change of L by
that swap, for all groups at once. Those that lower L are made together, and by simulated annealing (Metropolis et al.
1953) some that raise it. A mask that only descends stops far too early. What the search finds while it is warm is most
of the final quality. The temperature starts at a multiple of the loss per group of the block and falls to zero. Swaps
made together interact. So a block keeps its own only if its loss rose by no more than the heat allows. Otherwise it
makes fewer the next time.

Values. With P = A S, Q = R Bᵀ the half gradients are Q Sᵀ (A), Pᵀ R (B) and G (S). Each is divided by its curvature:
A's by (S B)(S B)ᵀ and B's by Pᵀ P, S's approximately by AᵀA on the left and B Bᵀ on the right (scaled gradient
descent, Tong, Ma and Chi 2021, of three factors at once). Momentum that starts small, and a cosine schedule.

The safeguard: a loss that leaps means that a curvature went stale. The solver then goes back to the best iterate with a
smaller step, and never quite up to the old step again. In the end the loss of the factors as they are stored is
compared with NoWag-P's, in float64, and the better ones returned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.blocksizes import sizes
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, PatternLike, top_n_mask
from armor.methods.solver.objective import Objective, check, finish

__all__ = ["Settings", "solve"]

_TINY = 1e-30
_NEVER = 1e30  # the cost of dropping what is not kept


@dataclass(frozen=True)
class Settings:
    """iterations is the budget and the one knob: the schedule stretches with it. docs/SOLVER.md tells the others."""

    iterations: int = 300
    step: float = 0.6  # of the heavy ball, less for a budget above 300; the cosine takes it to 1% of that
    momentum: float = 0.97  # its limit; it starts as t / (t + 3)
    core_step: float = 1.69  # S's step in units of A's and B's: its preconditioner is damped more
    core_damping: float = 0.3  # of the diagonal of AᵀA and B Bᵀ
    damping: float = 1e-2  # of the mean diagonal, in A's and B's curvature
    refresh: int = 5  # iterations between two computations of the preconditioners
    early: int = 20  # iterations at the start that compute them every time: everything changes fast then
    swap_every: int = 2  # iterations in which the mask search visits every block row once
    temperature: float = 2.0  # at the start, in units of a block's loss per group
    heat: float = 0.15  # the part of the temperature by which a visit may raise the loss of a block

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations: found {self.iterations}, expected at least 0")


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

    Returns factors in the weight's dtype; their loss is never above NoWag-P's. The trace lists (iteration, seconds,
    best relative loss) and never rises. Same seed, device and number of threads: same bytes. Raises ValueError for bad
    input.
    """
    settings = settings or Settings()
    pattern = check(weight, importance, pattern)
    objective = Objective.of(weight, importance)
    block_sizes = sizes(weight.shape, pattern, block_size)
    search = Search(weight, objective, pattern, block_sizes, seed)
    trace = list(search.run(settings))
    factors = search.factors()
    del search
    return finish(weight, objective, pattern, factors, trace, block_sizes)


def by_row(x: Tensor, size: int) -> Tensor:
    """x (rows, columns) as blocks of A meet it: (rows/size, size, columns). A view, like the next two."""
    return x.view(-1, size, x.shape[1])


def by_block(x: Tensor, sizes: tuple[int, int]) -> Tensor:
    """x (rows, columns) as (rows/d, d, columns/d, d)."""
    return x.view(x.shape[0] // sizes[0], sizes[0], x.shape[1] // sizes[1], sizes[1])


def block_losses(r: Tensor, sizes: tuple[int, int]) -> Tensor:
    """The loss of every block of the residual r (rows, columns): (rows/d, columns/d)."""
    return by_block(r, sizes).square().sum((1, 3))


def left(blocks: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """out = diag(blocks) x"""
    size = blocks.shape[1]
    torch.bmm(blocks, by_row(x, size), out=by_row(out, size))
    return out


def right(x: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    """out = x diag(blocks)"""
    size = blocks.shape[1]
    torch.bmm(blockdiag.by_column(x, size), blocks, out=blockdiag.by_column(out, size))
    return out


def inverse(gram: Tensor, damping: float, diagonal_damping: float = 0.0) -> Tensor:
    """(gram + damping·mean(diagonal)·I + diagonal_damping·diag(gram))⁻¹; gram (blocks, d, d) is semidefinite."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal * diagonal_damping + damping * diagonal.mean(1, keepdim=True) + _TINY)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(gram)[0])


class Search:
    """The iterate A, S, B, mask, with P = A S and R = A S B − W~; matrices (out, in) float32, blocks (count, d, d)."""

    def __init__(
        self, weight: Tensor, objective: Objective, pattern: Pattern, block_sizes: tuple[int, int], seed: int
    ) -> None:
        self.mask = top_n_mask(objective.score(weight), pattern).float()  # 0 or 1: products with bool are slow
        w = objective.normal(weight)
        self.sizes = size_a, size_b = block_sizes
        self.group = pattern.m or size_b  # a swap stays in a group; for a percentage that is a row of a block
        self.generator = torch.Generator(w.device).manual_seed(seed)
        root = objective.importance.clamp_min(1e-8).sqrt().float()  # a floor, so that no curvature vanishes
        self.root = root / root.mean()
        self.w = w * self.root  # W~
        self.total = max(float(self.w.square().sum(dtype=torch.float64)), _TINY)
        self.a = blockdiag.identity(w.shape[0], size_a, device=w.device)
        self.b = torch.diag_embed(self.root.view(-1, size_b))
        self.s = w * self.mask
        self.best = tuple(torch.empty_like(x) for x in (self.a, self.s, self.mask.bool(), self.b))
        self.p, self.q, self.r = (torch.empty_like(w) for _ in range(3))
        self.parts = max(
            4, 2 * (w.numel() >> 22)
        )  # in which the mask search visits the block rows, to bound its memory
        self.share = torch.ones(len(self.a), len(self.b), device=w.device)  # of the swaps that a block makes at once

    def residual(self) -> float:
        """P = A S, R = P B − W~; the relative loss."""
        right(left(self.a, self.s, self.p), self.b, self.r).sub_(self.w)
        return float(torch.dot(self.r.view(-1), self.r.view(-1))) / self.total

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, S, mask and B of W̄ ~ A S B, the best found."""
        a, s, mask, b = self.best
        return a, s, mask, b / self.root.view(len(b), 1, -1)

    def run(self, settings: Settings) -> Iterator[tuple[int, float, float]]:
        """Iterate, and yield (iteration, seconds, best relative loss)."""
        began = time.perf_counter()
        n, (size_a, size_b) = settings.iterations, self.sizes
        speeds = [torch.zeros_like(x) for x in (self.a, self.s, self.b)]
        inverse_a = inverse_b = inverse_left = inverse_right = torch.empty(0)  # made anew in the first iteration
        ceiling = step = settings.step * min(1.0, (300 / max(n, 1)) ** 0.15)
        best = level = math.inf
        for iteration in range(n + 1):
            loss = self.residual()
            leap = iteration > 0 and not loss < min(2 * level, 4 * best)  # also when it is not a number
            if loss < best:
                best = loss
                for kept, now in zip(self.best, (self.a, self.s, self.mask, self.b), strict=True):
                    kept.copy_(now)
            elif leap:
                for kept, now in zip(self.best, (self.a, self.s, self.mask, self.b), strict=True):
                    now.copy_(kept)
                for speed in speeds:
                    speed.zero_()
                step, ceiling, loss = step * 0.6, ceiling * 0.8, self.residual()
            level = loss if leap or iteration == 0 else 0.9 * level + 0.1 * loss
            yield iteration, time.perf_counter() - began, best
            if iteration == n:
                return
            if leap or iteration < settings.early or iteration % settings.refresh == 0:
                inverse_a, inverse_b, inverse_left, inverse_right = self.preconditioners(settings)
            time_left = 1 - iteration / n
            if size_b >= self.group:
                # In units of the best loss, not of the present one: heat must not breed heat.
                temperature = settings.temperature * time_left**2 * min(best / max(loss, _TINY), 1.0)
                visits = self.parts // settings.swap_every
                for visit in range(iteration * visits, (iteration + 1) * visits):
                    self.swap(visit % self.parts, settings, temperature, speeds[1])

            # The value step. P serves B's gradient, and then as a buffer.
            momentum = min(settings.momentum, (iteration + 1) / (iteration + 4))
            step = min(step * 1.01, ceiling)
            eta = step * (0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * time_left)))
            gradient_b = torch.bmm(
                blockdiag.by_column(self.p, size_b).transpose(1, 2), blockdiag.by_column(self.r, size_b)
            )
            right(self.r, self.b.transpose(1, 2), self.q)
            gradient_a = torch.bmm(by_row(self.q, size_a), by_row(self.s, size_a).transpose(1, 2))
            gradient = left(self.a.transpose(1, 2), self.q, self.p).mul_(self.mask)
            right(left(inverse_left, gradient, self.q), inverse_right, self.p).mul_(self.mask)
            speeds[0].baddbmm_(gradient_a, inverse_a, beta=momentum, alpha=-eta)
            speeds[1].mul_(momentum).add_(self.p, alpha=-eta * settings.core_step)
            speeds[2].baddbmm_(inverse_b, gradient_b, beta=momentum, alpha=-eta)
            for factor, speed in zip((self.a, self.s, self.b), speeds, strict=True):
                factor.add_(speed)

    def preconditioners(self, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inverses of the damped curvatures: A's, B's, and S's on the left and on the right. P is up to date."""
        size_a, size_b = self.sizes
        t = by_row(right(self.s, self.b, self.q), size_a)
        p = blockdiag.by_column(self.p, size_b)
        return (
            inverse(torch.bmm(t, t.transpose(1, 2)), settings.damping),
            inverse(torch.bmm(p.transpose(1, 2), p), settings.damping),
            inverse(torch.bmm(self.a.transpose(1, 2), self.a), 1e-6, settings.core_damping),
            inverse(torch.bmm(self.b, self.b.transpose(1, 2)), 1e-6, settings.core_damping),
        )

    def swap(self, part: int, settings: Settings, temperature: float, speed: Tensor) -> None:
        """Change the mask of a part of the block rows; S, P and R follow, and changed groups lose their `speed`."""
        (size_a, size_b), group = self.sizes, self.group
        first, last = (len(self.a) * end // self.parts for end in (part, part + 1))
        if first == last:
            return
        rows = slice(first * size_a, last * size_a)
        s, mask, p, r, q = (x[rows] for x in (self.s, self.mask, self.p, self.r, self.q))
        a = self.a[first:last]
        g = left(a.transpose(1, 2), right(r, self.b.transpose(1, 2), q), p)  # P is a buffer until the end

        # Of every group the best swap, u for v, and by how much it lowers the loss.
        b = self.b.view(-1, group, size_b)
        grams = torch.bmm(b, b.transpose(1, 2))  # (in/group, group, group), B's share of the curvature
        row_curvature = a.square().sum(1).view(-1, 1).clamp_min(_TINY)
        column_curvature = grams.diagonal(dim1=1, dim2=2).reshape(1, -1).clamp_min(_TINY)
        cost = torch.mul(s, column_curvature, out=q).mul_(row_curvature).sub_(g, alpha=2).mul_(s)
        cost, dropped = arg_min(cost.add_(1 - mask, alpha=_NEVER), group)  # (rows, in/group) both
        gain = torch.mul(g, g, out=q).div_(column_curvature).div_(row_curvature)
        _, taken = arg_min(gain.neg_().add_(mask, alpha=_NEVER), group)
        value = s.gather(1, dropped)
        cross = grams.view(-1)[(taken % group).add_(dropped, alpha=group)].mul_(row_curvature)
        push = g.gather(1, taken).addcmul_(value, cross, value=-1)
        curvature = torch.take(column_curvature, taken).mul_(row_curvature)
        fall = push.square().div_(curvature).sub_(cost)

        # Metropolis: a swap that raises the loss by x is made with probability exp(−x / temperature).
        blocks = (last - first, size_a, len(self.b), size_b // group)
        block_loss = block_losses(r, self.sizes)
        heat = temperature * block_loss / (size_a * blocks[3])
        chance = torch.rand(fall.shape, generator=self.generator, device=fall.device)
        share = self.share[first:last]
        share_of = share[:, None, :, None]
        chosen = chance.view(blocks) < share_of
        noise = chance.view(blocks).div_(share_of).log_().mul_(heat[:, None, :, None])
        chosen = (chosen & (fall.view(blocks) > noise)).view(fall.shape)
        chosen &= (cost < 0.5 * _NEVER) & (mask.gather(1, taken) == 0)  # a group that keeps all or nothing has no swap
        chosen = chosen.float()
        del cost, cross, fall, chance, noise  # memory counts here

        # D, the change of S, and R + A D B, kept by the blocks that it does not hurt.
        new = push.div_(curvature).neg_()
        change = g.zero_().scatter_(1, dropped, -value * chosen).scatter_(1, taken, new * chosen)
        change_r = right(left(a, change, q), self.b, g)
        keep = block_losses(r.add_(change_r), self.sizes) <= block_loss * (1 + settings.heat * temperature)
        share.copy_(torch.where(keep, (share * 1.3).clamp_max(1), share * 0.5))
        keep = keep[:, None, :, None].float()
        by_block(r, self.sizes).addcmul_(by_block(change_r, self.sizes), keep - 1)  # back, where it was not kept
        chosen.view(blocks).mul_(keep)
        s.scatter_add_(1, dropped, -value * chosen).scatter_add_(1, taken, new * chosen)
        mask.scatter_add_(1, dropped, -chosen).scatter_add_(1, taken, chosen)
        left(a, s, p)
        speed[rows].view(-1, s.shape[1] // group, group).mul_(1 - chosen.unsqueeze(-1))


def arg_min(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The least entry of every group of x (rows, columns) and its column, both (rows, columns/group); overwrites x.

    The place in the group is written into the last bits of the numbers, so that one amin returns both.
    """
    bits = (1 << (group - 1).bit_length()) - 1
    place = torch.arange(group, dtype=torch.int32, device=x.device).repeat(x.shape[1] // group)
    x.view(torch.int32).bitwise_and_(~bits).bitwise_or_(place)
    least = x.view(len(x), -1, group).amin(-1)
    base = torch.arange(0, x.shape[1], group, device=x.device)
    return least, base + least.view(torch.int32).bitwise_and(bits)
