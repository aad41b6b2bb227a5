"""Methods that keep every weight as an integer: the types as stored, and how far they are from the weights."""

import pytest
import torch

from armor.config.layers import ModuleSettings
from armor.config.recipes import Recipe
from armor.factorize.asked import possible
from armor.format.statistics import Statistics
from armor.methods import METHODS
from tests.methods.problems import correlated, error

GROUPS = [128, 32, 150]  # the last neither divides the columns nor is a multiple of what is updated at once


def asked(method, group=None):
    return ModuleSettings(method=method, **({method: {"group": group}} if group else {}))


def problem():
    weight, importance, gram = correlated(24, 200, tokens=600, decades=0)
    return weight, Statistics(importance, gram, 600)


def output_error(method, group, weight, inputs):
    """What a method loses of the output, relative."""
    found = METHODS[method].run(weight, inputs, asked(method, group), 0).reconstruct()
    return error(weight, found, inputs.gram) / error(weight, 0 * weight, inputs.gram)


def test_errors_fall_with_bits_and_with_feedback():
    weight, inputs = problem()
    int8 = output_error("int8", None, weight, inputs)
    for group in GROUPS:
        nearest, gptq = (output_error(method, group, weight, inputs) for method in ("int4", "gptq"))
        assert 50 * int8 < gptq < 0.75 * nearest
    assert output_error("int4", 32, weight, inputs) < output_error("int4", 128, weight, inputs)
    assert output_error("gptq", 32, weight, inputs) < output_error("gptq", 128, weight, inputs)


def test_feedback_changes_nothing_where_inputs_do_not_share_anything():
    weight, inputs = problem()
    apart = Statistics(inputs.importance, torch.diag(inputs.importance), inputs.tokens)
    nearest, gptq = (METHODS[method].run(weight, apart, asked(method), 0) for method in ("int4", "gptq"))
    assert torch.equal(gptq.core_scales, nearest.core_scales) and torch.equal(gptq.core, nearest.core)
    assert gptq.loss == gptq.start_loss == nearest.loss


def test_rows_of_any_length_hold_integers():
    assert possible(asked("int4"), 6, 7) == (asked("int4"), None)


@pytest.mark.parametrize("stage", ["refine", "tune", "quantize"])
def test_integers_are_not_trained_or_rounded_again(stage):
    with pytest.raises(ValueError, match=f"{stage}: int4 makes integers of whole weights, which nothing"):
        Recipe(method="armor", overrides=[{"modules": "*.down_proj", "method": "int4"}], **{stage: {}})
