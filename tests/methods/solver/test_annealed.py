"""The laws of the solver: never worse than NoWag-P, for every input; more budget, lower loss; same seed, same bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core.pattern import Pattern, is_nm
from armor.methods.nowag import nowag
from armor.methods.solver import annealed
from armor.methods.solver.objective import Objective, relative_loss
from tests.methods.problems import problem

PATTERNS = ["1:4", "2:4", "2:8", "4:8", "1:2", "50%"]


def holds(weight, importance, pattern, factorization):
    """The guarantee: stored loss at most NoWag-P's, both recomputed here; exactly N of M; a trace that never rises."""
    start = nowag(weight, importance, pattern=pattern).loss
    objective = Objective.of(weight, importance)
    assert factorization.loss <= factorization.start_loss == pytest.approx(start, rel=1e-12, abs=1e-300)
    recomputed = relative_loss(weight, objective, factorization)
    assert factorization.loss == pytest.approx(recomputed, rel=1e-9, abs=1e-300)
    assert is_nm(factorization.mask, Pattern.parse(pattern))
    assert not factorization.core[~factorization.mask].any()
    assert all(x.dtype == weight.dtype for x in (factorization.core, factorization.left, factorization.right))
    assert torch.isfinite(factorization.reconstruct(torch.float64)).all()
    losses = [loss for _, _, loss in factorization.trace]
    assert all(after <= before for before, after in zip(losses, losses[1:], strict=False))


def huge(weight, importance):
    weight *= 1e30
    importance *= 1e30


SPOILS = {
    "nothing": lambda w, i: None,
    "zero rows": lambda w, i: w[::2].zero_(),
    "zero columns": lambda w, i: w[:, : len(i) // 2].zero_(),
    "zeros": lambda w, i: w.zero_(),
    "zero importance": lambda w, i: i[: len(i) // 2].zero_(),
    "no importance": lambda w, i: i.zero_(),
    "dominant channel": lambda w, i: i[-1:].copy_(i.median() * 1e6),
    "repeated rows": lambda w, i: w.copy_(w[:1].expand_as(w).clone()),
    "rank one": lambda w, i: w.copy_(w[:, :1] * w[:1]),
    "denormals": lambda w, i: w.mul_(1e-40),
    "huge": huge,
    "ones": lambda w, i: w.fill_(1),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 24),
    groups=st.integers(1, 5),
    block_size=st.sampled_from([1, 3, 4, 8, 16, 64]),
    pattern=st.sampled_from(PATTERNS),
    how=st.sampled_from([*SPOILS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    iterations=st.sampled_from([0, 1, 6, 25]),
    seed=st.integers(0, 99),
)
def test_guarantee(rows, groups, block_size, pattern, how, dtype, iterations, seed):
    weight, importance = problem(rows, groups * max(Pattern.parse(pattern).m, 2), seed)
    SPOILS[how](weight, importance)
    weight = weight.to(dtype)
    weight = torch.where(torch.isfinite(weight), weight, 1)  # "huge" does not fit float16
    budget = annealed.Settings(iterations=iterations)
    result = annealed.solve(weight, importance, pattern=pattern, block_size=block_size, settings=budget, seed=seed)
    holds(weight, importance, pattern, result)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wrappers_and_swaps_pay(pattern):
    weight, importance = problem(32, 64)
    result = annealed.solve(
        weight, importance, pattern=pattern, block_size=16, settings=annealed.Settings(iterations=60)
    )
    holds(weight, importance, pattern, result)
    assert result.loss < 0.8 * result.start_loss
    assert not result.mask.equal(nowag(weight, importance, pattern=pattern).mask)


def test_more_iterations_never_end_higher():
    weight, importance = problem(32, 48)
    losses = [
        annealed.solve(weight, importance, block_size=16, settings=annealed.Settings(iterations=n)).loss
        for n in (0, 10, 40, 160)
    ]
    assert losses == sorted(losses, reverse=True)


def test_the_swap_is_exact():
    """After a visit P = A S, R = A S B − W~ and n of m still hold; at temperature 0 no block's loss rose."""
    weight, importance = problem(32, 48)
    search = annealed.Search(weight, Objective.of(weight, importance), Pattern(2, 4), (8, 16), seed=0)
    search.a += 0.2 * torch.randn(search.a.shape, generator=torch.Generator().manual_seed(1))  # NoWag's mask fits A = I
    search.residual()
    before = annealed.by_block(search.r, search.sizes).square().sum((1, 3))
    mask = search.mask.clone()
    search.parts = 1
    search.swap(0, annealed.Settings(), 0.0, torch.zeros_like(search.s))
    after = annealed.by_block(search.r, search.sizes).square().sum((1, 3))
    p, r = search.p.clone(), search.r.clone()
    search.residual()
    assert not search.mask.equal(mask) and is_nm(search.mask.bool(), Pattern(2, 4))
    assert (after <= before).all() and after.sum() < before.sum()
    torch.testing.assert_close(p, search.p)
    torch.testing.assert_close(r, search.r)


def test_threads_agree():
    weight, importance = problem(64, 64)
    threads, losses = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            losses.append(annealed.solve(weight, importance, block_size=16, settings=annealed.Settings(40)).loss)
    finally:
        torch.set_num_threads(threads)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree():
    weight, importance = problem(64, 64)
    on_cpu, on_card = (
        annealed.solve(weight.to(device), importance.to(device), block_size=16, settings=annealed.Settings(40)).loss
        for device in ("cpu", "cuda")
    )
    assert on_cpu == pytest.approx(on_card, rel=0.01)


def test_bad_inputs_are_named():
    weight, importance = problem(8, 8)
    with pytest.raises(ValueError, match="weight: found"):
        annealed.solve(weight.long(), importance)
    with pytest.raises(ValueError, match="row of 6 entries is not a multiple of 4"):
        annealed.solve(weight[:, :6], importance[:6])
    with pytest.raises(ValueError, match="block_size: found 0"):
        annealed.solve(weight, importance, block_size=0)
    with pytest.raises(ValueError, match="iterations: found -1"):
        annealed.Settings(iterations=-1)
