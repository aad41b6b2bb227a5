"""The estimate of a factorization's peak is what the process is measured to take, and a device too small is refused."""

from __future__ import annotations

import pytest
import torch

from armor.config.layers import LayerSettings, ModuleSettings
from armor.core.errors import ArmorError
from armor.execution.machine import peak_memory_bytes
from armor.factorize.layer import factorize_layer
from armor.format.statistics import Statistics
from armor.methods import METHODS
from armor.methods.solver.settings import SolverSettings
from tests.memory import TOLD, card_of, forget_peak, held_bytes, printed_last
from tests.packed import opened, prepared


def peak_bytes(shape, itemsize, asked):
    return METHODS[asked.method].peak_bytes(shape, itemsize, asked)


def settings(method="armor", algorithm="fast", **keys):
    return ModuleSettings(method=method, solver=SolverSettings(algorithm=algorithm, iterations=2), **keys)


@TOLD
@pytest.mark.parametrize(
    ("shape", "dtype", "itemsize", "asked"),
    [
        ((1024, 1024), "float32", 4, settings(block_size=64)),
        ((1024, 1024), "float32", 4, settings(algorithm="published", block_size=64)),
        ((1024, 2048), "bfloat16", 2, settings("wanda")),
        ((1024, 1024), "float32", 4, settings("sparsegpt")),
        ((512, 512), "float32", 4, settings("armor_gram", block_size=64)),
        ((1024, 2048), "bfloat16", 2, settings("int4")),
        ((1024, 1024), "float32", 4, settings("oats", rank=64)),
        ((512, 1536), "float32", 4, settings("basil", rank=64)),
    ],
    ids=lambda value: getattr(value, "method", None) or str(value),
)
def test_the_estimate_is_within_a_fifth_of_what_is_measured(shape, dtype, itemsize, asked, monkeypatch):
    method = METHODS[asked.method]
    monkeypatch.setattr("armor.methods.oats.ALTERNATIONS", 3)  # each takes as much as the others
    monkeypatch.setattr("armor.methods.basil.ITERATIONS", 3)
    monkeypatch.setattr("armor.methods.basil.TURNS", 1)

    def measure():
        for rows, columns in ((128, 128), shape):  # a small weight first, so that libraries are loaded
            before = held_bytes()
            weight = torch.randn(rows, columns).to(getattr(torch, dtype))
            gram = torch.eye(columns) if "gram" in method.statistics else None
            forget_peak()
            method.run(weight, Statistics(torch.rand(columns) + 0.1, gram, 1), asked, 0)
            print(peak_memory_bytes() - before)

    assert peak_bytes(shape, itemsize, asked) == pytest.approx(printed_last(measure), rel=0.2)


def test_a_device_too_small_is_refused_before_work_starts(tmp_path, monkeypatch):
    root, output = prepared(tmp_path), tmp_path / "layers/layer_1.safetensors"
    layer = LayerSettings(method="armor", block_size=16)
    needed = peak_bytes((128, 64), 4, layer.for_module("model.layers.1.mlp.gate_proj"))
    card_of(monkeypatch, needed - 1)
    with pytest.raises(ArmorError, match=r"gate_proj: 128 x 64 needs about .* GB, cuda:0 has .* choose a larger GPU"):
        factorize_layer(*opened(root), 1, root / "calibration/layer_1.safetensors", layer, output, "cuda:0")
    assert not output.parent.exists()
