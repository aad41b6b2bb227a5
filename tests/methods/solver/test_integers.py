"""Integers found in rounds: no sweep makes the error larger, and a Gram matrix brings the output nearer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core.integers import expand_scales, round_, rounded
from armor.core.quantization import LIMITS
from armor.methods import METHODS
from armor.methods.solver.integers import descended
from armor.methods.solver.output import damped, output_error
from armor.methods.solver.rounding import quantize
from armor.methods.solver.settings import SolverSettings
from tests.methods.problems import correlated, error

ARMOR = {"block_size": 8, "solver": SolverSettings(iterations=5)}


def as_stored(values, kind, group):
    """The nearest of what `kind` holds."""
    if kind == "bfloat16":
        return values.bfloat16().float()
    numbers, scales = rounded(rows := values.reshape(-1, values.shape[-1]), kind, group)
    return (numbers.float() * expand_scales(scales.float(), group, rows.shape[1])).view(values.shape)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(8, 16), (5, 72), (16, 130)]), st.sampled_from([*LIMITS]), st.booleans(), st.integers(0, 2**31))
def test_no_sweep_makes_the_error_larger(shape, kind, dead, seed):
    torch.manual_seed(seed)
    wanted, inputs = torch.randn(shape), torch.randn(200, shape[1]) @ torch.randn(shape[1], shape[1])
    inputs[:, :3] *= not dead
    curvature = inputs.T @ inputs / len(inputs)
    numbers, scales = rounded(wanted, kind, 8)
    scales = expand_scales(scales.float(), 8, shape[1]) * (torch.rand(shape) < 0.5)
    found = descended(numbers.float(), scales, wanted, curvature, kind)
    before, after = (error(wanted, each * scales, curvature) for each in (numbers.float(), found))
    assert after <= before * (1 + 1e-5)
    assert torch.equal(found, round_(found.clone(), kind)) and not found[scales == 0].any()
    assert found.min() >= LIMITS[kind][0] and found.max() <= LIMITS[kind][1]


def test_blocks_on_a_diagonal_are_the_matrix_that_they_stand_for():
    wanted, blocks = torch.randn(8, 24), torch.randn(3, 8, 20)
    blocks = blocks @ blocks.transpose(1, 2)
    numbers, scales = rounded(wanted, "int4", 8)
    scales = expand_scales(scales.float(), 8, 24)
    whole = torch.block_diag(*blocks)
    found = [descended(numbers.float(), scales, wanted, each, "int4") for each in (blocks, whole)]
    assert torch.equal(*found)


@pytest.mark.parametrize("core", LIMITS)
@pytest.mark.parametrize("method", ["armor_gram", "sparsegpt"])
def test_a_gram_matrix_brings_the_output_nearer(method, core):
    weight, importance, gram = correlated(32, 32)
    options = ARMOR if method == "armor_gram" else {}
    found = METHODS[method].function(weight, importance, gram, **options)
    known, unknown = (
        quantize(weight, importance, found, core=core, group=16, gram=own, to_output=True) for own in (gram, None)
    )
    h = damped(gram).float()
    assert output_error(weight, h, known) < output_error(weight, h, unknown)
    assert torch.equal(known.mask, found.mask) and not known.in_floats().core[~known.mask].any()


@pytest.mark.parametrize("core", LIMITS)
@pytest.mark.parametrize("blocks", ["int8", "bfloat16"])
def test_what_was_trained_stays_what_it_was_at_the_output(core, blocks):
    """By the Gram matrix more than without, and that more than by numbers that go to the nearest."""
    weight, importance, gram = correlated(32, 32)
    found = METHODS["armor"].function(weight, importance, **ARMOR)
    trained = replace(found, core=found.core + 0.1 * torch.randn(32, 32) * found.mask)
    h, floats = damped(gram).float(), trained.reconstruct()
    known, unknown = (
        quantize(weight, importance, trained, core=core, blocks=blocks, gram=own, trained=True) for own in (gram, None)
    )
    parts = {"core": (core, 32), "left": (blocks, 8), "right": (blocks, 8)}
    nearest = replace(trained, **{name: as_stored(getattr(trained, name), *kind) for name, kind in parts.items()})
    errors = [output_error(floats, h, each) for each in (known, unknown, nearest)]
    assert errors[0] < errors[1] < errors[2]
