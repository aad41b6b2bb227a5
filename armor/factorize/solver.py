"""The solver: W~ = W̄·diag(√d) ~ A·S·B, A and B block diagonal, S sparse, by a preconditioned heavy ball and exact swaps.

With d absorbed, L = ‖A S B − W~‖² is a plain least-squares problem in each factor and splits into blocks:
‖A_i S_ij B_j − W~_ij‖², A_i shared along a block row, B_j along a block column. An iteration has two halves.

Values. With R = A S B − W~, P = A S, Q = R Bᵀ, the half gradients are Q Sᵀ (A), Pᵀ R (B) and G = Aᵀ Q (S). Each is
divided by its own curvature: A's by (S B)(S B)ᵀ, B's by Pᵀ P, both exact; S's, approximately, by AᵀA on the left and
B Bᵀ on the right (scaled gradient descent, Tong, Ma and Chi 2021, for three factors at once). Momentum, a cosine schedule.

Mask. In every group, the kept entry u that costs least to drop and the entry v that gains most when taken up: from G and
the curvature ‖a_r‖²·(B Bᵀ)_uv the exact change of the loss of that swap is known, for every group at once. All swaps that
gain are made together; they interact, so a block keeps them only if its own loss fell (losses separate by block while A
and B are fixed), and otherwise the next attempt takes a random part of them. So this half never increases the loss.

The safeguard keeps the best iterate, and goes back to it with a smaller step if the loss runs away. In the end the loss of
the factors as they are stored is compared with NoWag-P's, in float64, and the better one is returned.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from armor.core import blockdiag
from armor.core.factors import Factorization
from armor.core.nm import Pattern, top_n_mask
from armor.factorize.objective import Objective, check, finish, sizes

__all__ = ["Settings", "solve"]

_TINY = 1e-30


@dataclass(frozen=True)
class Settings:
    """iterations is the budget, and the one knob: the schedule adapts to it. The others are measured in docs/SOLVER.md."""

    iterations: int = 300
    step: float = 0.5  # of the heavy ball at its start; the cosine takes it to 1% of that
    core_step: float = 1.69  # S's step in units of A's and B's: its preconditioner is damped more
    core_damping: float = 0.3  # of the diagonal of AᵀA and B Bᵀ
    damping: float = 1e-3  # of the mean diagonal, in A's and B's curvature
    refresh: int = 10  # iterations between two computations of the preconditioners
    swap_every: int = 2  # iterations between two changes of the mask

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations: found {self.iterations}, expected at least 0")


@torch.no_grad()
def solve(
    weight: Tensor,
    importance: Tensor,
    *,
    pattern: Pattern | str | tuple[int, int] = (2, 4),
    block_size: int = 128,
    settings: Settings | None = None,
    seed: int = 0,
) -> Factorization:
    """Factorize weight (out, in) under importance (in,), any float dtype, on the weight's device, in float32.

    Returns factors in the weight's dtype; their loss is never above NoWag-P's. The trace lists (iteration, seconds, best
    relative loss) and never rises. Same seed, device and number of threads: same bytes. Raises ValueError for bad input.
    """
    settings = settings or Settings()
    pattern = check(weight, importance, pattern)
    objective = Objective.of(weight, importance)
    block_sizes = sizes(weight.shape, pattern, block_size)
    solution = _Solution(objective, pattern, block_sizes, seed)
    trace = solution.run(settings)
    best = solution.best
    del solution
    return finish(weight, objective, pattern, best, trace, block_sizes)


class _Solution:
    """The iterate A, S, B and mask, its residual, and the buffers; (out, in) matrices unless said otherwise."""

    def __init__(self, objective: Objective, pattern: Pattern, block_sizes: tuple[int, int], seed: int) -> None:
        w = objective.normal
        self.rows, self.columns = w.shape
        self.size_a, self.size_b = block_sizes
        self.group = pattern.m or self.size_b  # entries among which a swap happens; whole rows of a block for a percentage
        self.generator = torch.Generator(w.device).manual_seed(seed)
        root = objective.importance.clamp_min(1e-8).sqrt().float()  # a floor, so that no curvature vanishes
        self.w = w * root
        self.total = max(float(self.w.square().sum(dtype=torch.float64)), _TINY)
        scale = root.mean()
        self.a = blockdiag.identity(self.rows, self.size_a, device=w.device)  # (out/d, d, d)
        self.b = torch.diag_embed((root / scale).view(-1, self.size_b))  # (in/d, d, d)
        self.root = root
        self.mask = top_n_mask(objective.score(), pattern)
        self.s = torch.where(self.mask, w * scale, 0)
        self.p, self.r, self.q, self.g = (torch.empty_like(w) for _ in range(4))
        self.share = torch.ones(self.rows // self.size_a, self.columns // self.size_b, device=w.device)

    # The blocks of A see a matrix as (out/d, d, in), those of B as (in/d, out, d): views, never copies.

    def _by_row(self, x: Tensor) -> Tensor:
        return x.view(-1, self.size_a, self.columns)

    def _by_column(self, x: Tensor) -> Tensor:
        return x.view(self.rows, -1, self.size_b).transpose(0, 1)

    def _by_block(self, x: Tensor) -> Tensor:
        return x.view(self.rows // self.size_a, self.size_a, self.columns // self.size_b, self.size_b)

    def _left(self, blocks: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """out = blockdiag(blocks) x"""
        torch.bmm(blocks, self._by_row(x), out=self._by_row(out))
        return out

    def _right(self, x: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
        """out = x blockdiag(blocks)"""
        torch.bmm(self._by_column(x), blocks, out=self._by_column(out))
        return out

    def _grams(self, x: Tensor, by: str) -> Tensor:
        if by == "row":
            return torch.bmm(self._by_row(x), self._by_row(x).transpose(1, 2))
        return torch.bmm(self._by_column(x).transpose(1, 2), self._by_column(x))

    def residual(self) -> float:
        """P = A S, R = P B − W~; the relative loss."""
        self._right(self._left(self.a, self.s, self.p), self.b, self.r).sub_(self.w)
        return float(torch.dot(self.r.view(-1), self.r.view(-1))) / self.total

    def core_gradient(self) -> None:
        """Q = R Bᵀ, G = Aᵀ Q."""
        self._left(self.a.transpose(1, 2), self._right(self.r, self.b.transpose(1, 2), self.q), self.g)

    def run(self, settings: Settings) -> list[tuple[int, float, float]]:
        """Iterate; afterwards `best` holds A, S, mask and B, d taken out of B again. Returns the trace."""
        n = settings.iterations
        momentum = min(max(1 - 6 / max(n, 1), 0.8), 0.985)
        va, vb, vs = (torch.zeros_like(x) for x in (self.a, self.b, self.s))
        step, best, kept, trace = settings.step, math.inf, None, []
        began = time.perf_counter()
        for iteration in range(n + 1):
            loss = self.residual()
            if loss < best:
                best, kept = loss, [x.clone() for x in (self.a, self.s, self.mask, self.b)]
            elif not loss < 1.5 * best:  # or not a number
                self.a, self.s, self.mask, self.b = (x.clone() for x in kept)
                for v in (va, vb, vs):
                    v.zero_()
                step *= 0.6
                self.residual()
            trace.append((iteration, time.perf_counter() - began, best))
            if iteration == n:
                break
            if iteration % settings.refresh == 0:
                inverse_a, inverse_b, inverse_left, inverse_right = self.preconditioners(settings)
            self.core_gradient()
            if iteration % settings.swap_every == 0 and self.size_b >= self.group:
                changed = self.swap()
                vs.masked_fill_(changed, 0)
                self.core_gradient()
            eta = step * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * iteration / n)))
            ga = torch.bmm(self._by_row(self.q), self._by_row(self.s).transpose(1, 2))
            gb = torch.bmm(self._by_column(self.p).transpose(1, 2), self._by_column(self.r))
            va.mul_(momentum).baddbmm_(ga, inverse_a, alpha=-eta)
            vb.mul_(momentum).baddbmm_(inverse_b, gb, alpha=-eta)
            self.g.mul_(self.mask)
            self._right(self._left(inverse_left, self.g, self.q), inverse_right, self.g).mul_(self.mask)
            vs.mul_(momentum).add_(self.g, alpha=-eta * settings.core_step)
            self.a.add_(va)
            self.b.add_(vb)
            self.s.add_(vs)
        a, s, mask, b = kept
        self.best = (a, s, mask, b / self.root.view(len(b), 1, -1))
        return trace

    def preconditioners(self, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inverses of the damped curvatures: A's, B's, and S's on the left and on the right. P is up to date."""
        t = self._right(self.s, self.b, self.g)
        return (
            _inverse(self._grams(t, "row"), settings.damping, 0.0),
            _inverse(self._grams(self.p, "column"), settings.damping, 0.0),
            _inverse(torch.bmm(self.a.transpose(1, 2), self.a), 1e-6, settings.core_damping),
            _inverse(torch.bmm(self.b, self.b.transpose(1, 2)), 1e-6, settings.core_damping),
        )

    def swap(self) -> Tensor:
        """Change the mask where it pays; P and R follow. G is up to date. Returns the groups changed, as (out, in) bool."""
        rows, columns, group = self.rows, self.columns, self.group
        grams = self.b.view(columns // group, group, self.size_b)
        grams = torch.bmm(grams, grams.transpose(1, 2))  # (in/group, group, group), of the rows of B
        row_curvature = self.a.square().sum(1).view(rows, 1).clamp_min(_TINY)
        column_curvature = grams.diagonal(dim1=1, dim2=2).reshape(1, columns).clamp_min(_TINY)
        curvature = row_curvature * column_curvature

        def in_groups(x: Tensor) -> Tensor:
            return x.view(rows, columns // group, group)

        cost = torch.mul(curvature, self.s, out=self.q).sub_(self.g, alpha=2).mul_(self.s)  # of dropping an entry
        cost, drop = in_groups(cost.masked_fill_(~self.mask, math.inf)).min(-1)
        gain = torch.mul(self.g, self.g, out=self.q).div_(curvature)  # of taking one up, alone
        take = in_groups(gain.masked_fill_(self.mask, -math.inf)).max(-1)[1]
        base = torch.arange(0, columns, group, device=take.device)
        dropped, taken = base + drop, base + take  # columns (out, in/group)
        cross = grams.view(-1)[base * group + drop * group + take]
        value = self.s.gather(1, dropped)
        gradient = self.g.gather(1, taken) - row_curvature * cross * value
        taken_curvature = curvature.gather(1, taken)
        gain = gradient.square() / taken_curvature - cost
        chosen = (gain > 0) & ~self.mask.gather(1, taken)  # a group that keeps everything, or nothing, has no swap
        chance = torch.rand(gain.shape, generator=self.generator, device=gain.device)
        blocks = (rows // self.size_a, self.size_a, columns // self.size_b, self.size_b // group)
        chosen.view(blocks).logical_and_(chance.view(blocks) < self.share[:, None, :, None])

        # D, the change of S, then P + A D and R + A D B, kept by the blocks whose loss falls.
        change = self.g.zero_()
        change.scatter_(1, dropped, torch.where(chosen, -value, 0))
        new = torch.where(chosen, -gradient / taken_curvature, 0)
        change.scatter_add_(1, taken, new)
        step_p = self._left(self.a, change, self.q)
        kept_change = change.clone()
        step_r = self._right(step_p, self.b, self.g)
        fall = (self._by_block(self.r).mul(2).add_(self._by_block(step_r)).mul_(self._by_block(step_r))).sum((1, 3))
        accepted = fall <= 0
        self.share = torch.where(accepted, (self.share * 1.3).clamp_max(1), self.share * 0.5)
        keep = accepted[:, None, :, None]
        self._by_block(self.p).add_(self._by_block(step_p).mul_(keep))
        self._by_block(self.r).add_(self._by_block(step_r).mul_(keep))
        self._by_block(self.s).add_(self._by_block(kept_change).mul_(keep))
        chosen.view(blocks).logical_and_(keep)
        self.mask.scatter_(1, dropped, self.mask.gather(1, dropped) & ~chosen)
        self.mask.scatter_(1, taken, self.mask.gather(1, taken) | chosen)
        self.s.mul_(self.mask)
        return chosen.unsqueeze(-1).expand(rows, columns // group, group).reshape(rows, columns)


def _inverse(gram: Tensor, damping: float, diagonal_damping: float) -> Tensor:
    """(gram + damping·mean(diagonal)·I + diagonal_damping·diag(gram))⁻¹, batched, gram positive semidefinite."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal * diagonal_damping + damping * diagonal.mean(1, keepdim=True) + _TINY)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(gram)[0])
