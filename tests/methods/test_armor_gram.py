"""ARMOR fitted to the output: each factor against its normal equations, and the promise of `armor` beside it."""

import pytest
import torch

from armor.core.pattern import is_nm
from armor.methods.armor import armor
from armor.methods.armor_gram import armor_gram
from armor.methods.solver import output
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.output import fitted, output_error
from armor.methods.solver.settings import SolverSettings
from armor.methods.sparsegpt import damped
from tests.methods.test_low_rank import problem

FEW = SolverSettings(iterations=10)


def started(out=24, columns=32, block=8, pattern="2:4"):
    """A weight, its damped Gram matrix in float64, and factors that the search found."""
    weight, importance, gram = problem(out, columns)
    found = armor(weight, importance, pattern=pattern, block_size=block, solver=FEW)
    return weight, damped(gram, columns)[0], found


def gradients(weight, gram, a, s, b, mask):
    """Of half the output error in A, in S on its mask and in B, float64, by autograd."""
    a, s, b = (x.double().requires_grad_() for x in (a, s, b))
    error = weight.double() - torch.block_diag(*a) @ (s * mask) @ torch.block_diag(*b)
    return torch.autograd.grad((error @ gram * error).sum() / 2, (a, s, b))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%"])
@pytest.mark.parametrize("which", range(3))
def test_a_turn_ends_where_its_factor_has_no_gradient(monkeypatch, pattern, which):
    weight, gram, start = started(pattern=pattern)
    monkeypatch.setattr(output, "STEPS", 200)
    h, mask = (gram / gram.diagonal().mean()).float(), start.mask.float()
    found = [x.float() for x in (start.left, start.core, start.right)]
    before = gradients(weight, gram, *found, start.mask)[which].norm()
    wanted, (a, s, b) = weight @ h, found
    found[which] = (
        lambda: output._fitted_left(wanted, h, a, output._right(s, b)),
        lambda: output._fitted_core(wanted, h, a, s, b, mask),
        lambda: output._fitted_right(wanted, h, output._left(a, s), b),
    )[which]()
    assert gradients(weight, gram, *found, start.mask)[which].norm() < 1e-3 * before


def test_a_core_alone_becomes_the_least_squares_solution_on_its_mask(monkeypatch):
    weight, gram, start = started()
    monkeypatch.setattr(output, "STEPS", 200)
    h = (gram / gram.diagonal().mean()).float()
    ones = [torch.eye(8).repeat(len(side), 1, 1) for side in (start.left, start.right)]
    core = output._fitted_core(weight @ h, h, ones[0], start.core, ones[1], start.mask.float())
    for row, kept, values in zip(weight.double(), start.mask, core, strict=True):
        expected = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ row)
        torch.testing.assert_close(values[kept].double(), expected, rtol=1e-3, atol=1e-3)
        assert not values[~kept].any()


@pytest.mark.parametrize("rounds", range(4))
def test_the_error_falls_with_every_turn(monkeypatch, rounds):
    weight, gram, start = started()

    def error(turns):
        monkeypatch.setattr(output, "ROUNDS", turns)
        a, s, b = fitted(weight, gram, start)
        change = weight.double() - torch.block_diag(*a).double() @ s.double() @ torch.block_diag(*b).double()
        return float((change @ gram * change).sum())

    assert error(rounds + 1) < error(rounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_the_output_error_is_below_armors_and_the_proxy_loss_below_nowags(pattern, dtype):
    weight, importance, gram = problem()
    weight, sizes = weight.to(dtype), {"pattern": pattern, "block_size": 8, "solver": FEW, "seed": 3}
    found, plain = armor_gram(weight, importance, gram, **sizes), armor(weight, importance, **sizes)
    assert output_error(weight, gram, found) < 0.8 * output_error(weight, gram, plain)
    assert is_nm(found.mask, found.pattern) and not found.core[~found.mask].any()
    assert found.core.dtype == found.left.dtype == found.right.dtype == dtype
    assert found.loss < found.start_loss == plain.start_loss
    assert found.loss == relative_loss(weight, Objective.of(weight, importance), found)


@pytest.mark.parametrize("block", [1, 2, 8])
def test_the_promise_holds_whatever_the_gram_matrix_says(block):
    weight, importance, gram = problem()
    other = gram.flip(0, 1)  # the input that fires least is said to fire most
    found = armor_gram(weight, importance, other, block_size=block, solver=FEW)
    assert found.loss <= found.start_loss


def test_the_same_seed_gives_the_same_bytes():
    weight, importance, gram = problem()
    found = [armor_gram(weight, importance, gram, block_size=8, solver=FEW, seed=1) for _ in range(2)]
    for name in ("core", "left", "right"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


def test_inputs_that_are_always_zero_do_no_harm():
    weight, importance, gram = problem()
    gram[3], gram[:, 3], importance[3] = 0, 0, 0
    found = armor_gram(weight, importance, gram, block_size=8, solver=FEW)
    plain = armor(weight, importance, block_size=8, solver=FEW)
    assert found.reconstruct().isfinite().all() and found.loss < found.start_loss
    assert output_error(weight, gram, found) < output_error(weight, gram, plain)


def test_a_gram_matrix_that_does_not_fit_is_named():
    weight, importance, gram = problem()
    with pytest.raises(ValueError, match="gram: found .12, 12., expected"):
        armor_gram(weight, importance, gram[:12, :12], block_size=8, solver=FEW)
