"""From floats to integers: the loss is never above that of plain pruning at the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core.pattern import Pattern, is_nm
from armor.core.quantization import LIMITS
from armor.methods.armor import armor
from armor.methods.armor_gram import armor_gram
from armor.methods.nowag import nowag
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.output import damped, output_error
from armor.methods.solver.rounding import quantize
from armor.methods.solver.settings import SolverSettings
from armor.methods.sparsegpt import sparsegpt
from tests.methods.problems import correlated

ARMOR = {"block_size": 8, "solver": SolverSettings(iterations=3)}


@settings(max_examples=16, deadline=None)
@given(
    st.sampled_from([(16, 16), (24, 32), (8, 48)]),
    st.sampled_from(["2:4", "4:8", "50%"]),
    st.sampled_from([*LIMITS]),
    st.sampled_from(["int8", "bfloat16"]),
    st.sampled_from([1, 4, 16, 64]),
    st.sampled_from([1e-4, 1.0, 1e3]),
    st.sampled_from(["the weight", "the output", "the output, by its Gram matrix"]),
    st.integers(0, 2**31),
)
def test_never_above_plain_pruning_at_the_same_bits(shape, pattern, core, blocks, group, scale, near, seed):
    """Of factors that are near the weight as of those that are near its output."""
    weight, importance, gram = correlated(*shape, seed)
    weight *= scale
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


@pytest.mark.parametrize("core", LIMITS)
@pytest.mark.parametrize("small", [1.0, 1e-3])
def test_the_promise_holds_by_a_gram_matrix_too_and_costs_nothing(core, small):
    """Of an input with small weights the error hardly counts at the output, but as much as any in the proxy loss."""
    weight, importance, gram = correlated(24, 32)
    weight[:, 3] *= small
    found = armor_gram(weight, importance, gram, **ARMOR)
    known, unknown = (
        quantize(weight, importance, found, core=core, group=16, to_output=True, gram=own) for own in (gram, None)
    )
    assert torch.equal(known.mask, found.mask) and known.loss <= known.start_loss
    h = damped(gram).float()
    assert output_error(weight, h, known) <= output_error(weight, h, unknown)
