"""Laws of every method: it stores what is said beforehand, the same again, and no input that can be makes it fail."""

from __future__ import annotations

import pytest
import torch

from armor.config.layers import LayerSettings
from armor.core.pattern import is_nm
from armor.core.quantization import LIMITS
from armor.factorize.asked import layouts_of
from armor.format.checkpoint import PackedLinear
from armor.format.records.topology import DecoderLayer, Linear
from armor.format.statistics import Statistics
from armor.methods import METHODS
from armor.methods.solver.settings import SolverSettings
from tests.methods.problems import correlated

OUT, COLUMNS = 24, 200  # more columns than SparseGPT and GPTQ update at once
SMALL = {"block_size": 8, "rank": 5, "solver": SolverSettings(iterations=3)}
RUN = [name for name, method in METHODS.items() if method.function]
CASES = [
    *((name, {}) for name in RUN),
    *((name, {"pattern": "50%", "rank": 1}) for name in RUN if "pattern" in METHODS[name].settings),
    *((name, {"pattern": "4:8", "rank": 100}) for name in ("armor", "oats", "basil", "lora")),
    *((name, {"rank": 0}) for name in ("oats", "basil", "lora")),
    *((name, {name: {"group": group}}) for name in ("int4", "gptq") for group in (32, 150)),
]


def asked(method, **settings):
    of_method = LayerSettings(method=method)
    return LayerSettings(
        method=method, **{key: own for key, own in (SMALL | settings).items() if key == method or of_method.takes(key)}
    )


def run(weight, importance, gram, settings):
    return METHODS[settings.method].run(weight, Statistics(importance, gram, 600), settings, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "settings"), CASES, ids=str)
def test_what_is_stored_is_what_is_said_beforehand_and_the_same_again(method, settings, dtype):
    weight, importance, gram = correlated(OUT, COLUMNS, tokens=600)
    weight, settings = weight.to(dtype), asked(method, **settings)
    found, again = (run(weight, importance, gram, settings) for _ in "ab")
    linear = Linear(
        name="q", out_features=OUT, in_features=COLUMNS, dtype="bfloat16", bias=False, shard="a", input_group=0
    )
    layout = layouts_of(DecoderLayer(index=0, prefix="layer", linears=(linear,)), settings)["q"]
    tensors = found.tensors()
    assert layout == PackedLinear.of(found)
    assert layout.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert layout.bits_per_weight(16) == 8 * stored / weight.numel()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in tensors.items())
    assert found.pattern == METHODS[method].pattern(settings)
    assert is_nm(found.mask, found.pattern) and not found.core[~found.mask].any()
    if kind := METHODS[method].integers((OUT, COLUMNS), settings):
        assert found.quantization == kind and tensors["core_scales"].dtype == torch.bfloat16
        least, most = LIMITS[kind.core]
        assert least <= int(found.core.min()) and int(found.core.max()) <= most
    else:
        assert {tensor.dtype for name, tensor in tensors.items() if name != "core_mask"} == {dtype}


@pytest.mark.parametrize("method", RUN)
def test_inputs_that_are_always_zero_do_no_harm_in_any_scale(method):
    weight, importance, gram = correlated()
    importance[3] = gram[3] = gram[:, 3] = 0
    found, *others = (run(weight, scale * importance, scale * gram, asked(method)) for scale in (1.0, 2**-20, 2**20))
    assert found.reconstruct().isfinite().all() and 0 < found.loss < 1
    assert method not in ("sparsegpt", "gptq") or not found.core[:, 3].any()
    for other in others:
        assert torch.equal(other.mask, found.mask)
        torch.testing.assert_close(other.reconstruct(), found.reconstruct())


def spoiled(tensor, value):
    tensor.view(-1)[3] = value


@pytest.mark.parametrize("method", RUN)
def test_bad_inputs_are_named(method):
    for index, value, said in (
        (0, torch.nan, "^weight: found 1 NaN or infinite"),
        (0, -torch.inf, "^weight: found 1 NaN or infinite"),
        (1, torch.inf, "^importance: found 1 NaN or infinite"),
        (1, -1, "^importance: found -1"),
        (2, torch.nan, "gram: found NaN"),
    ):
        if index < 2 or "gram" in METHODS[method].statistics:
            inputs = correlated()
            spoiled(inputs[index], value)
            with pytest.raises(ValueError, match=said):
                run(*inputs, asked(method))
    weight, importance, gram = correlated()
    with pytest.raises(ValueError, match="importance: found shape"):
        run(weight, importance[:12], gram, asked(method))
    if "gram" in METHODS[method].statistics:
        with pytest.raises(ValueError, match="gram: found .12, 12., expected"):
            run(weight, importance, gram[:12, :12], asked(method))
