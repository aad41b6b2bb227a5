"""The estimate of a factorization's peak is what the process is measured to take, and a device too small is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from armor.config.layers import LayerSettings, ModuleSettings
from armor.core.errors import ArmorError
from armor.factorize.layer import factorize_layer
from armor.methods import METHODS
from armor.methods.solver.settings import SolverSettings
from tests.memory import card_of
from tests.packed import opened, prepared

# A small weight first, so that libraries are loaded; then the kernel's high-water mark is set back.
MEASURE = """
import gc, sys, torch
from armor.config.layers import ModuleSettings
from armor.format.statistics import Statistics
from armor.execution.machine import peak_memory_bytes, resident_memory_bytes
from armor.methods import METHODS
settings = ModuleSettings.model_validate_json(sys.argv[4])
for shape in ((256, 256), (int(sys.argv[1]), int(sys.argv[2]))):
    before = resident_memory_bytes()
    weight = torch.randn(shape).to(getattr(torch, sys.argv[3]))
    gram = torch.eye(shape[1]) if "gram" in METHODS[settings.method].statistics else None
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    METHODS[settings.method].run(weight, Statistics(torch.rand(shape[1]) + 0.1, gram, 1), settings, 0)
    print(peak_memory_bytes() - before)
"""


def peak_bytes(shape, itemsize, asked):
    return METHODS[asked.method].peak_bytes(shape, itemsize, asked)


def settings(method="armor", algorithm="fast", **keys):
    return ModuleSettings(method=method, solver=SolverSettings(algorithm=algorithm, iterations=2), **keys)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("shape", "dtype", "itemsize", "asked"),
    [
        ((1024, 1024), "float32", 4, settings(block_size=64)),
        ((2560, 2560), "bfloat16", 2, settings(block_size=128)),
        ((1024, 1024), "float32", 4, settings(algorithm="published", block_size=64)),
        ((1024, 2048), "bfloat16", 2, settings("wanda")),
        ((1024, 1024), "float32", 4, settings("sparsegpt")),
        ((1024, 2048), "bfloat16", 2, settings("int4")),
    ],
    ids=["small", "large", "published", "wanda", "sparsegpt", "int4"],
)
def test_the_estimate_is_within_a_fifth_of_what_is_measured(shape, dtype, itemsize, asked):
    command = [sys.executable, "-c", MEASURE, *map(str, shape), dtype, asked.model_dump_json()]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    measured = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert peak_bytes(shape, itemsize, asked) == pytest.approx(int(measured.split()[-1]), rel=0.2)


def test_what_stays_dense_needs_nothing():
    assert peak_bytes((64, 64), 4, settings("dense")) == 0


def test_a_device_too_small_is_refused_before_work_starts(tmp_path, monkeypatch):
    root, output = prepared(tmp_path), tmp_path / "layers/layer_1.safetensors"
    layer = LayerSettings(method="armor", block_size=16)
    needed = peak_bytes((128, 64), 4, layer.for_module("model.layers.1.mlp.gate_proj"))
    card_of(monkeypatch, needed - 1)
    with pytest.raises(ArmorError, match=r"gate_proj: 128 x 64 needs about .* GB, cuda:0 has .* choose a larger GPU"):
        factorize_layer(*opened(root), 1, root / "calibration/layer_1.safetensors", layer, output, "cuda:0")
    assert not output.parent.exists()
