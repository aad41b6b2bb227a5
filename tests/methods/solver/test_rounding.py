"""From floats to integers: the loss is never above that of plain pruning at the same bits, and no sweep over the
numbers makes the error larger."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core.integers import expand_scales, round_, rounded
from armor.core.pattern import Pattern, is_nm
from armor.core.quantization import LIMITS
from armor.methods.armor import armor
from armor.methods.armor_gram import armor_gram
from armor.methods.nowag import nowag
from armor.methods.solver.integers import descended
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.output import damped, output_error
from armor.methods.solver.rounding import quantize
from armor.methods.solver.settings import SolverSettings
from armor.methods.sparsegpt import sparsegpt
from tests.methods.problems import correlated, error

ARMOR = {"block_size": 8, "solver": SolverSettings(iterations=5)}


@settings(max_examples=24, deadline=None)
@given(
    st.sampled_from([(16, 16), (24, 32), (8, 48)]),
    st.sampled_from(["2:4", "4:8", "50%"]),
    st.sampled_from([*LIMITS]),
    st.sampled_from(["int8", "bfloat16"]),
    st.sampled_from([1, 4, 16, 64]),
    st.sampled_from([1e-4, 1.0, 1e3]),
    st.sampled_from([1e-3, 1.0]),
    st.sampled_from(["the weight", "the output", "the output, by its Gram matrix"]),
    st.integers(0, 2**31),
)
def test_never_above_plain_pruning_at_the_same_bits(shape, pattern, core, blocks, group, scale, small, near, seed):
    """Of factors that are near the weight as of those that are near its output."""
    weight, importance, gram = correlated(*shape, seed)
    weight *= scale
    weight[:, 3] *= small  # its error hardly counts at the output, but as much as any in the proxy loss
    to_output, how = near != "the weight", {"core": core, "blocks": blocks, "group": group}
    if to_output:
        found = armor_gram(weight, importance, gram, pattern=pattern, **ARMOR)
    else:
        found = armor(weight, importance, pattern=pattern, **ARMOR)
    known = gram if "Gram" in near else None
    done = quantize(weight, importance, found, gram=known, to_output=to_output, **how)
    plain = quantize(weight, importance, nowag(weight, importance, pattern=pattern), core=core, group=group)
    assert done.loss <= done.start_loss == pytest.approx(plain.loss, rel=1e-5)
    assert done.loss == relative_loss(weight, Objective.of(weight, importance), done)
    assert is_nm(done.mask, Pattern.parse(pattern)) and not done.in_floats().core[~done.mask].any()
    assert done.quantization.core == core and (done.left.dtype == torch.int8) == (blocks == "int8")


@pytest.mark.parametrize("core", LIMITS)
def test_a_method_of_another_loss_keeps_its_mask_and_its_weights(core):
    """SparseGPT gives up proxy loss for the error of the output; NoWag-P's weights must not take its place."""
    weight, importance, gram = correlated(16, 32)
    found = sparsegpt(weight, importance, gram)
    done, plain = (
        quantize(weight, importance, each, core=core, group=32) for each in (found, nowag(weight, importance))
    )
    assert torch.equal(done.mask, found.mask) and done.loss > done.start_loss == pytest.approx(plain.loss)
    assert output_error(weight, gram, done) < output_error(weight, gram, plain)


@pytest.mark.parametrize("core", LIMITS)
def test_what_was_fitted_to_the_output_is_not_pulled_back_to_the_weight_and_keeps_the_promise(core):
    weight, importance, gram = correlated(32, 32)
    found = armor_gram(weight, importance, gram, **ARMOR)
    as_is, toward = (quantize(weight, importance, found, core=core, group=32, to_output=own) for own in (True, False))
    assert output_error(weight, gram, as_is) < output_error(weight, gram, toward)
    assert as_is.loss < as_is.start_loss


@pytest.mark.parametrize("core", LIMITS)
def test_what_was_trained_is_rounded_as_it_is(core):
    weight, importance, _ = correlated(16, 32)
    found = armor(weight, importance, **ARMOR)
    other = torch.randn(16, 32)  # the factors serve another weight
    done = quantize(other, importance, found, core=core, trained=True)
    assert torch.equal(done.mask, found.mask) and done.loss > done.start_loss
    trained, root = found.reconstruct(), importance.sqrt()  # a channel without importance may be rounded as it will
    assert ((done.reconstruct() - trained) * root).norm() < (0.02 if core == "int8" else 0.15) * (trained * root).norm()


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
@pytest.mark.parametrize("method", [armor_gram, sparsegpt])
def test_a_gram_matrix_brings_the_output_nearer(method, core):
    weight, importance, gram = correlated(32, 32)
    found = method(weight, importance, gram, **ARMOR if method is armor_gram else {})
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
    found = armor(weight, importance, **ARMOR)
    trained = replace(found, core=found.core + 0.1 * torch.randn(32, 32) * found.mask)
    h, floats = damped(gram).float(), trained.reconstruct()
    known, unknown = (
        quantize(weight, importance, trained, core=core, blocks=blocks, gram=own, trained=True) for own in (gram, None)
    )
    parts = {"core": (core, 32), "left": (blocks, 8), "right": (blocks, 8)}
    nearest = replace(trained, **{name: as_stored(getattr(trained, name), *kind) for name, kind in parts.items()})
    errors = [output_error(floats, h, each) for each in (known, unknown, nearest)]
    assert errors[0] < errors[1] < errors[2]
