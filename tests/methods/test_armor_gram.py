"""ARMOR-Gram: the fit against what least squares says of it, and the promise of `armor` beside it."""

import pytest
import torch

from armor.core.pattern import is_nm
from armor.methods.armor import armor
from armor.methods.armor_gram import armor_gram
from armor.methods.nowag import nowag
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.output import fitted, output_error
from armor.methods.solver.settings import SolverSettings
from tests.methods.problems import core_alone, correlated, error

FEW = SolverSettings(iterations=10)


def started(out=24, columns=32, block=8, pattern="2:4"):
    """A weight, a Gram matrix, and factors that the search found."""
    weight, importance, gram = correlated(out, columns)
    return weight, gram, armor(weight, importance, pattern=pattern, block_size=block, solver=FEW)


def multiplied(a, s, b):
    """A·S·B in float64."""
    return torch.block_diag(*a).double() @ s.double() @ torch.block_diag(*b).double()


def gradients(weight, gram, factors, mask):
    """The norms of the gradients of half the output error in A, in S on its mask and in B, float64, by autograd."""
    a, s, b = (x.double().requires_grad_() for x in factors)
    change = weight.double() - torch.block_diag(*a) @ (s * mask) @ torch.block_diag(*b)
    found = torch.autograd.grad((change @ gram.double() * change).sum() / 2, (a, s, b))
    return [part.norm() for part in found]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
def test_a_round_ends_where_b_has_no_gradient_and_many_where_none_has(pattern):
    weight, gram, start = started(pattern=pattern)
    before, one, many = (
        gradients(weight, gram, fitted(weight, gram, start, rounds, 100), start.mask) for rounds in (0, 1, 40)
    )
    assert one[2] < 1e-3 * before[2]
    assert all(after < 0.05 * old for after, old in zip(many, before, strict=True))


def test_between_blocks_of_one_s_becomes_the_least_squares_solution_on_its_mask():
    weight, gram, start = started(block=1)
    a, s, b = fitted(weight, gram, start, rounds=2, steps=200)
    torch.testing.assert_close(multiplied(a, s, b), core_alone(weight, start.mask, gram.double()), rtol=1e-3, atol=1e-3)


def test_the_error_falls_with_every_round():
    weight, gram, start = started()
    errors = [error(weight, multiplied(*fitted(weight, gram, start, rounds)), gram) for rounds in range(6)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w[:1].expand_as(w).contiguous(),  # rank one
        lambda w: w.index_fill(0, torch.tensor([1, 2]), 0),
        lambda w: w * torch.logspace(-20, 0, len(w))[:, None],
        lambda w: w * 1e30,
        lambda w: w * 1e-30,
        torch.zeros_like,
    ],
    ids=["rank one", "rows of zeros", "tiny rows", "huge", "tiny", "zeros"],
)
@pytest.mark.parametrize("block", [1, 8, 32])
def test_weights_that_are_hard_to_fit_end_no_worse_than_the_search(spoil, block):
    weight, importance, gram = correlated(rows=32, columns=16)
    weight = spoil(weight)
    found = armor_gram(weight, importance, gram, block_size=block, solver=FEW)
    assert found.reconstruct().isfinite().all() and found.loss <= found.start_loss
    plain = nowag(weight, importance)
    assert output_error(weight, gram, found) <= output_error(weight, gram, plain) * (1 + 1e-5)


@pytest.mark.parametrize(("pattern", "dtype"), [("2:4", torch.float32), ("50%", torch.bfloat16)])
def test_the_output_error_is_below_armors_and_the_proxy_loss_below_nowags(pattern, dtype):
    weight, importance, gram = correlated()
    weight, sizes = weight.to(dtype), {"pattern": pattern, "block_size": 8, "solver": FEW, "seed": 3}
    found, plain = armor_gram(weight, importance, gram, **sizes), armor(weight, importance, **sizes)
    assert output_error(weight, gram, found) < 0.8 * output_error(weight, gram, plain)
    assert is_nm(found.mask, found.pattern) and not found.core[~found.mask].any()
    assert found.core.dtype == found.left.dtype == found.right.dtype == dtype
    assert found.loss < found.start_loss == plain.start_loss
    assert found.loss == relative_loss(weight, Objective.of(weight, importance), found)


def test_a_search_or_a_fit_that_breaks_the_promise_gives_way_to_nowag():
    weight, importance, gram = correlated()
    apart = torch.logspace(-6, 6, len(gram))
    other = apart[:, None] * gram.flip(0, 1) * apart  # the input that fires least is said to fire most
    found, plain = armor_gram(weight, importance, other, block_size=1, solver=FEW), nowag(weight, importance)
    assert found.loss == found.start_loss == plain.loss
    assert torch.equal(found.reconstruct(), plain.core)


@pytest.mark.parametrize("algorithm", ["fast", "published"])
def test_weights_one_below_the_other_that_share_b_are_each_fitted(algorithm):
    weight, importance, gram = correlated(rows=48)
    solver, names = SolverSettings(iterations=10, algorithm=algorithm), ["q_proj", "k_proj"]
    both = [
        method(weight, importance, *given, block_size=8, solver=solver).split(names, [24, 24])
        for method, given in ((armor_gram, [gram]), (armor, []))
    ]
    for rows, part, plain in zip(weight.split(24), *both, strict=True):
        assert output_error(rows, gram, part) < output_error(rows, gram, plain)


def test_a_matrix_that_is_no_gram_matrix_is_named():
    weight, importance, gram = correlated()
    with pytest.raises(ValueError, match="gram: not a Gram matrix"):
        armor_gram(weight, importance, gram - 10 * gram.flip(0), block_size=8, solver=FEW)
