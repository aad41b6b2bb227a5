"""From floats to integers: the loss is never above that of plain pruning at the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor.core.pattern import Pattern, is_nm
from armor.core.quantization import LIMITS
from armor.methods import METHODS
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.output import damped, output_error
from armor.methods.solver.rounding import quantize
from armor.methods.solver.settings import SolverSettings
from tests.methods.test_low_rank import problem as correlated


def problem(rows, columns, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator) * scale
    return weight, torch.rand(columns, generator=generator) ** 3


def factors_of(method, weight, importance, pattern="2:4", **options):
    return METHODS[method].function(weight, importance, pattern=pattern, **options)


ARMOR = {"block_size": 8, "solver": SolverSettings(iterations=3)}


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([(16, 16), (24, 32), (8, 48)]),
    st.sampled_from(["2:4", "4:8", "50%"]),
    st.sampled_from([*LIMITS]),
    st.sampled_from(["int8", "bfloat16"]),
    st.sampled_from([1, 4, 16, 64]),
    st.sampled_from([1e-4, 1.0, 1e3]),
    st.integers(0, 2**31),
)
def test_never_above_plain_pruning_at_the_same_bits(shape, pattern, core, blocks, group, scale, seed):
    weight, importance = problem(*shape, seed, scale)
    found = factors_of("armor", weight, importance, pattern, **ARMOR)
    done = quantize(weight, importance, found, core=core, blocks=blocks, group=group)
    plain = quantize(weight, importance, factors_of("nowag", weight, importance, pattern), core=core, group=group)
    assert done.loss <= done.start_loss
    assert done.start_loss == pytest.approx(plain.loss, rel=1e-5)
    assert done.loss == relative_loss(weight, Objective.of(weight, importance), done)
    assert is_nm(done.mask, Pattern.parse(pattern)) and not done.in_floats().core[~done.mask].any()
    assert done.quantization.core == core and (done.left.dtype == torch.int8) == (blocks == "int8")


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(16, 16), (24, 32), (8, 48)]),
    st.sampled_from(["2:4", "4:8"]),
    st.sampled_from([*LIMITS]),
    st.sampled_from(["int8", "bfloat16"]),
    st.sampled_from([4, 16, 64]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_so_it_is_of_factors_for_the_output_whether_the_gram_matrix_is_known_or_not(
    shape, pattern, core, blocks, group, known, seed
):
    weight, importance, gram = correlated(*shape, seed)
    found = METHODS["armor_gram"].function(weight, importance, gram, pattern=pattern, **ARMOR)
    how = {"core": core, "blocks": blocks, "group": group, "to_output": True}
    done = quantize(weight, importance, found, gram=gram if known else None, **how)
    assert done.loss <= done.start_loss
    assert done.loss == relative_loss(weight, Objective.of(weight, importance), done)
    assert is_nm(done.mask, Pattern.parse(pattern)) and not done.in_floats().core[~done.mask].any()


@pytest.mark.parametrize("core", LIMITS)
def test_a_method_of_another_loss_keeps_its_mask_and_its_weights(core):
    """SparseGPT gives up proxy loss for the error of the output; NoWag-P's weights must not take its place."""
    weight, _ = problem(16, 32, 0)
    inputs = torch.randn(256, 32) @ torch.randn(32, 32)  # correlated
    gram = inputs.T @ inputs / len(inputs)
    importance = gram.diagonal()
    found = METHODS["sparsegpt"].function(weight, importance, gram, pattern="2:4")
    done = quantize(weight, importance, found, core=core, group=32)
    plain = quantize(weight, importance, factors_of("nowag", weight, importance), core=core, group=32)
    assert torch.equal(done.mask, found.mask) and done.loss > done.start_loss == pytest.approx(plain.loss)
    errors = [((each.reconstruct() - weight) @ inputs.T).norm() for each in (done, plain)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("core", LIMITS)
def test_what_was_fitted_to_the_output_is_not_pulled_back_to_the_weight_and_keeps_the_promise(core):
    weight, importance, gram = correlated(32, 32)
    found = METHODS["armor_gram"].function(weight, importance, gram, **ARMOR)
    as_is, toward = (quantize(weight, importance, found, core=core, group=32, to_output=own) for own in (True, False))
    assert output_error(weight, gram, as_is) < output_error(weight, gram, toward)
    assert as_is.loss < as_is.start_loss


@pytest.mark.parametrize("core", LIMITS)
def test_what_was_trained_is_rounded_as_it_is(core):
    weight, importance = problem(16, 32, 0)
    found = factors_of("armor", weight, importance, **ARMOR)
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
    found = METHODS["armor_gram"].function(weight, importance, gram, **ARMOR)
    known, unknown = (
        quantize(weight, importance, found, core=core, group=16, to_output=True, gram=own) for own in (gram, None)
    )
    assert torch.equal(known.mask, found.mask) and known.loss <= known.start_loss
    h = damped(gram).float()
    assert output_error(weight, h, known) <= output_error(weight, h, unknown)
