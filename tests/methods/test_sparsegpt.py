"""SparseGPT against its definition, the inverse of what is left of H computed anew for every column, in float64."""

import pytest
import torch

from armor.core.pattern import Pattern, is_nm
from armor.methods.sparsegpt import DAMPING, WIDTH, sparsegpt
from armor.methods.wanda import wanda


def problem(out, columns, tokens=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=g) @ mix
    return torch.randn(out, columns, generator=g), x.square().mean(0), x.T @ x / tokens


def definition(weight, gram, pattern):
    """The pruned weight in float64, by removing one column at a time from H."""
    w, h = weight.double().clone(), gram.double().clone()
    columns = len(h)
    h += DAMPING * h.diagonal().mean() * torch.eye(columns)
    kept, m = pattern.group(columns)
    mask = torch.zeros_like(w, dtype=torch.bool)
    for j in range(columns):
        inverse = torch.linalg.inv(h[j:, j:])
        run = m if pattern.m else WIDTH
        if j % run == 0:
            end = min(j + run, columns)
            n = kept if pattern.m else end * kept // columns - j * kept // columns
            # The k-th column of the group is judged when those before it are passed.
            costs = [w[:, k] ** 2 / torch.linalg.inv(h[k:, k:])[0, 0] for k in range(j, end)]
            mask[:, j:end].scatter_(1, torch.stack(costs, 1).argsort(1, descending=True)[:, :n], True)
        pruned = w[:, j].masked_fill(mask[:, j], 0)
        w[:, j:] -= torch.outer(pruned, inverse[0] / inverse[0, 0])
    return w, mask


@pytest.mark.parametrize("pattern, out, columns", [("2:4", 9, 24), ("1:4", 5, 12), ("4:8", 6, 40), ("50%", 7, 30)])
def test_it_is_its_definition(pattern, out, columns):
    weight, importance, gram = problem(out, columns)
    found = sparsegpt(weight, importance, gram, pattern=pattern)
    expected, mask = definition(weight, gram, Pattern.parse(pattern))
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.core.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "3:6", "50%"])
def test_more_columns_than_are_updated_at_once(pattern):
    weight, importance, gram = problem(8, 204, tokens=900)
    found = sparsegpt(weight, importance, gram, pattern=pattern)
    expected, mask = definition(weight, gram, Pattern.parse(pattern))
    assert is_nm(found.mask, Pattern.parse(pattern))
    assert (found.mask != mask).float().mean() < 0.01  # near ties fall either way
    same = (found.mask == mask).all(1)
    torch.testing.assert_close(found.core[same].double(), expected[same], rtol=1e-3, atol=1e-3)


def test_the_output_error_is_below_wandas():
    weight, importance, gram = problem(32, 64)

    def error(found):
        change = (weight - found.core).double()
        return float((change @ gram.double() * change).sum())

    assert error(sparsegpt(weight, importance, gram)) < 0.8 * error(wanda(weight, importance))


def test_inputs_that_are_always_zero_are_pruned_and_do_no_harm():
    weight, importance, gram = problem(6, 16)
    gram[3], gram[:, 3], importance[3] = 0, 0, 0
    found = sparsegpt(weight, importance, gram)
    assert found.core.isfinite().all() and not found.core[:, 3].any() and is_nm(found.mask, Pattern(2, 4))
    unit = 2**-12
    smaller = sparsegpt(weight, importance * unit, gram * unit)
    assert torch.equal(smaller.mask, found.mask)
    torch.testing.assert_close(smaller.core, found.core)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_dtype_stays(dtype):
    weight, importance, gram = problem(6, 16)
    found = sparsegpt(weight.to(dtype), importance, gram)
    assert found.core.dtype == dtype and 0 < found.loss < 1 and 0 < found.start_loss < 1


def test_a_gram_matrix_that_does_not_fit_is_named():
    weight, importance, gram = problem(6, 16)
    with pytest.raises(ValueError, match="gram: found .12, 12., expected"):
        sparsegpt(weight, importance, gram[:12, :12])
    gram[2, 2] = torch.nan
    with pytest.raises(ValueError, match="gram: found NaN"):
        sparsegpt(weight, importance, gram)
