"""Methods that keep every weight as an integer: the types as stored, and how far they are from the weights."""

import pytest
import torch

from armor.config.layers import ModuleSettings
from armor.config.recipes import Recipe
from armor.core.quantization import LIMITS, Quantization
from armor.factorize.asked import possible
from armor.format.checkpoint import PackedLinear
from armor.format.statistics import Statistics
from armor.methods import METHODS

GROUPS = [128, 32, 150]  # the last neither divides the columns nor is a multiple of what is updated at once


def asked(method, group=None):
    return ModuleSettings(method=method, **({method: {"group": group}} if group else {}))


def problem(out=24, columns=200, tokens=600):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(out, columns, generator=generator), Statistics(x.square().mean(0), x.T @ x / tokens, tokens)


def output_error(method, group, weight, inputs):
    """What a method loses of the output, relative: the Gram-weighted error."""
    found = METHODS[method].run(weight, inputs, asked(method, group), 0)
    change, exact = (weight - found.reconstruct()).double(), weight.double()
    gram = inputs.gram.double()
    return float((change @ gram * change).sum() / (exact @ gram * exact).sum())


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


@pytest.mark.parametrize(("method", "group"), [("int8", None), *(("int4", g) for g in GROUPS), ("gptq", 32)])
def test_what_is_stored_is_what_is_said_beforehand(method, group):
    weight, inputs = problem()
    found = METHODS[method].run(weight.bfloat16(), inputs, asked(method, group), 0)
    kind = METHODS[method].integers((24, 200), asked(method, group))
    assert found.quantization == kind and found.pattern == METHODS[method].pattern(asked(method, group))
    layout = PackedLinear(24, 200, found.pattern, quantization=kind)
    tensors = found.tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == layout.shapes()
    assert set(tensors) == {"core_values", "core_scales"} and tensors["core_scales"].dtype == torch.bfloat16
    stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert layout.bits_per_weight(32) == 8 * stored / weight.numel()
    least, most = LIMITS[kind.core]
    assert least <= int(found.core.min()) and int(found.core.max()) <= most and found.mask.all()


def test_bits():
    assert METHODS["int8"].integers((4096, 1024), asked("int8")) == Quantization("int8", None, 1024)
    bits = {
        (method, group): PackedLinear(
            4096,
            1024,
            METHODS[method].pattern(asked(method, group)),
            quantization=METHODS[method].integers((4096, 1024), asked(method, group)),
        ).bits_per_weight(16)
        for method, group in (("int8", None), ("int4", None), ("gptq", 32))
    }
    assert bits == {("int8", None): 8 + 16 / 1024, ("int4", None): 4 + 16 / 128, ("gptq", 32): 4 + 16 / 32}


def test_inputs_that_are_always_zero_do_no_harm():
    weight, inputs = problem()
    inputs.importance[3] = inputs.gram[3] = inputs.gram[:, 3] = 0
    found = METHODS["gptq"].run(weight, inputs, asked("gptq"), 0)
    assert not found.core[:, 3].any() and 0 < found.loss < 0.1


def test_rows_of_any_length_hold_integers():
    assert possible(asked("int4"), 6, 7) == (asked("int4"), None)


def test_bad_inputs():
    weight, inputs = problem()
    with pytest.raises(ValueError, match="gram: found .12, 12., expected"):
        METHODS["gptq"].run(weight, Statistics(inputs.importance, inputs.gram[:12, :12], 1), asked("gptq"), 0)
    with pytest.raises(ValueError, match="importance: found shape"):
        METHODS["int8"].run(weight, Statistics(inputs.importance[:9], None, 1), asked("int8"), 0)


@pytest.mark.parametrize("stage", ["refine", "tune", "quantize"])
def test_integers_are_not_trained_or_rounded_again(stage):
    with pytest.raises(ValueError, match=f"{stage}: int4 makes integers of whole weights, which nothing"):
        Recipe(method="armor", overrides=[{"modules": "*.down_proj", "method": "int4"}], **{stage: {}})
