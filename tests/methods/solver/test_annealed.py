"""The laws of the solver: never worse than NoWag-P, for every input; more budget, lower loss; same seed, same bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core.pattern import Pattern, is_nm
from armor.methods.nowag import nowag
from armor.methods.solver import annealed
from armor.methods.solver.objective import Objective, relative_loss

PATTERNS = ["1:4", "2:4", "2:8", "4:8", "1:2", "50%"]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.rand(columns, generator=generator) + 0.1


def holds(weight, importance, pattern, block_size, factorization):
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


def spoil(weight: torch.Tensor, importance: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    match how:
        case "zero rows":
            weight[::2] = 0
        case "zero columns":
            weight[:, : columns // 2] = 0
        case "zeros":
            weight.zero_()
        case "zero importance":
            importance[: columns // 2] = 0
        case "no importance":
            importance.zero_()
        case "dominant channel":
            importance[-1] = importance.median() * 1e6
        case "repeated rows":
            weight[:] = weight[0]
        case "rank one":
            weight[:] = weight[:, :1] * weight[:1]
        case "denormals":
            weight *= 1e-40
        case "huge":
            weight *= 1e30
            importance *= 1e30
        case "ones":
            weight.fill_(1)
    return weight, importance


SPOILS = [
    "nothing", "zero rows", "zero columns", "zeros", "zero importance", "no importance", "dominant channel",
    "repeated rows", "rank one", "denormals", "huge", "ones",
]  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 24),
    groups=st.integers(1, 5),
    block_size=st.sampled_from([1, 3, 4, 8, 16, 64]),
    pattern=st.sampled_from(PATTERNS),
    how=st.sampled_from(SPOILS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    iterations=st.sampled_from([0, 1, 6, 25]),
    seed=st.integers(0, 99),
)
def test_guarantee(rows, groups, block_size, pattern, how, dtype, iterations, seed):
    weight, importance = spoil(*problem(rows, groups * max(Pattern.parse(pattern).m, 2), seed), how)
    weight = weight.to(dtype)
    weight = torch.where(torch.isfinite(weight), weight, 1)  # "huge" does not fit float16
    budget = annealed.Settings(iterations=iterations)
    result = annealed.solve(weight, importance, pattern=pattern, block_size=block_size, settings=budget, seed=seed)
    holds(weight, importance, pattern, block_size, result)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wrappers_and_swaps_pay(pattern):
    weight, importance = problem(32, 64)
    result = annealed.solve(
        weight, importance, pattern=pattern, block_size=16, settings=annealed.Settings(iterations=60)
    )
    holds(weight, importance, pattern, 16, result)
    assert result.loss < 0.8 * result.start_loss
    assert not result.mask.equal(nowag(weight, importance, pattern=pattern).mask)


def test_shapes_of_the_factors():
    weight, importance = problem(30, 40)
    result = annealed.solve(weight, importance, block_size=16, settings=annealed.Settings(iterations=2))
    assert result.left.shape == (2, 15, 15) and result.right.shape == (5, 8, 8)
    assert result.core.shape == result.mask.shape == (30, 40)


def test_more_iterations_never_end_higher():
    weight, importance = problem(32, 48)
    losses = [
        annealed.solve(weight, importance, block_size=16, settings=annealed.Settings(iterations=n)).loss
        for n in (0, 10, 40, 160)
    ]
    assert losses == sorted(losses, reverse=True)


def test_same_seed_same_bytes():
    weight, importance = problem(32, 48)
    one, two = (
        annealed.solve(weight, importance, block_size=16, settings=annealed.Settings(iterations=20), seed=3)
        for _ in "ab"
    )
    for key in ("core", "mask", "left", "right"):
        assert getattr(one, key).equal(getattr(two, key))


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


@pytest.mark.parametrize("group", [1, 2, 4, 8, 12])
def test_arg_min(group):
    x = torch.randn(5, 3 * group, generator=torch.Generator().manual_seed(0))
    least, column = annealed.arg_min(x.clone(), group)
    expected = x.view(5, 3, group).min(-1)
    assert column.equal(expected[1] + torch.arange(0, 3 * group, group))
    torch.testing.assert_close(least, expected[0], rtol=1e-5, atol=0)


def test_threads_agree():
    weight, importance = problem(64, 64)
    threads, losses = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            losses.append(
                annealed.solve(weight, importance, block_size=16, settings=annealed.Settings(iterations=40)).loss
            )
    finally:
        torch.set_num_threads(threads)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree():
    weight, importance = problem(64, 64)
    one, two = (
        annealed.solve(
            weight.to(device), importance.to(device), block_size=16, settings=annealed.Settings(iterations=40)
        ).loss
        for device in ("cpu", "cuda")
    )
    assert one == pytest.approx(two, rel=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["weight", "importance"])
def test_not_finite(name, bad):
    tensors = dict(zip(("weight", "importance"), problem(8, 8), strict=True))
    tensors[name].view(-1)[3] = bad
    with pytest.raises(ValueError, match=f"^{name}: found 1 NaN or infinite"):
        annealed.solve(**tensors)


def test_bad_inputs_are_named():
    weight, importance = problem(8, 8)
    with pytest.raises(ValueError, match="importance: found -1"):
        annealed.solve(weight, importance - 1 - importance.min())
    with pytest.raises(ValueError, match="importance: found shape"):
        annealed.solve(weight, importance[:4])
    with pytest.raises(ValueError, match="weight: found"):
        annealed.solve(weight.long(), importance)
    with pytest.raises(ValueError, match="row of 6 entries is not a multiple of 4"):
        annealed.solve(weight[:, :6], importance[:6])
    with pytest.raises(ValueError, match="block_size: found 0"):
        annealed.solve(weight, importance, block_size=0)
    with pytest.raises(ValueError, match="iterations: found -1"):
        annealed.Settings(iterations=-1)
