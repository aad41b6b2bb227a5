"""Every stage that computes, on a device that is not the host: what is not moved there is an error, as on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import armor
import armor.training.tune as whole
from armor.calibrate.capture import calibrate
from armor.config.layers import LayerSettings
from armor.config.quantization import QuantizeSettings
from armor.config.sample import SensitivityJob
from armor.config.sources import CalibrationSettings
from armor.factorize.layer import factorize_layer
from armor.factorize.quantize import quantize_layer
from armor.format.names import layer_file
from armor.format.records.layer import LayerRecord
from armor.methods import METHODS
from armor.methods.solver.settings import SolverSettings
from armor.training.sensitivity import measure_sensitivity
from armor.training.states import make_states
from tests.card import CARD, put_in
from tests.packed import opened
from tests.training.trained import LENGTH, TRAINING, ready, refined, sample
from tests.training.trained import tuned as tune_all

SOLVER: dict[str, Any] = {"block_size": 16, "solver": SolverSettings(iterations=2)}
SMALL = {"rank": {"rank": 4}, "block_size": SOLVER}
FEW = TRAINING | {"steps": 3, "warm_up": 1}
OTHERS = "*.[gouqv]*_proj"
"""All linears but two, a wide and a narrow one: rounding goes column by column, and each is slow on that device."""
KEYS_OF_THE_SECOND: dict[str, Any] = {
    "num_kv_shared_layers": 2,
    "layer_types": ["full_attention"] * 4,
    "intermediate_size": [128] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small model, and in its folder `shared` one whose layers take the keys of earlier ones."""
    folder = ready(tmp_path_factory.mktemp("model"))
    ready(folder / "shared", "gemma3n_text", LayerSettings(method="nowag"), layers=4, **KEYS_OF_THE_SECOND)
    return folder


def sums(folder: Path) -> list[float]:
    """What tells the tensors of a folder from others."""
    return [
        float(t.double().square().sum())
        for file in sorted(folder.rglob("*.safetensors"))
        for t in load_file(file).values()
    ]


def losses(record: LayerRecord) -> list[float]:
    return [linear.loss for linear in record.modules.values()]


def captured(root, output, device):
    asked = CalibrationSettings(text=sample(root).text, sequences=4, sequence_length=LENGTH, gram=True)
    calibrate(*opened(root), asked, output / "calibration.json", device)
    return sums(output)


def found(method, root, output, device):
    of_method = LayerSettings(method=method)
    more = {key: value for name, own in SMALL.items() if of_method.takes(name) for key, value in own.items()}
    settings, statistics = LayerSettings(method=method, **more), layer_file(root / "calibration", 0)
    return losses(factorize_layer(*opened(root), 0, statistics, settings, output / "layer_0.safetensors", device))


def rounded(root, output, device):
    settings = QuantizeSettings(core="int4", blocks="int8", group=16, overrides=[{"modules": OTHERS, "leave": True}])
    factors, statistics = (layer_file(root / name, 0) for name in ("layers", "calibration"))
    return losses(
        quantize_layer(*opened(root), 0, factors, statistics, settings, output / "layer_0.safetensors", device)
    )


def states(root, output, device):
    make_states(*opened(root), sample(root), output / "states.json", device)
    return sums(output)


def sensitivity(root, output, device):
    measure_sensitivity(*opened(root), SensitivityJob(sample=sample(root), seed=0), output / "found.json", device)
    return sums(output)


def refine(root, output, device):
    trained = [refined(root, k, output, device=device, inputs="compressed", **FEW).training[-1] for k in range(2)]
    return [loss for done in trained for loss in (done.start_loss, done.loss)]


def tuned(root, output, device):
    done = tune_all(root, output, device=device, **FEW).training
    return [done.start_loss, done.loss]


def tuned_over_two(root, output, device):
    """Layers that take the keys of earlier ones, some there and some on the host, each run again for its gradient."""
    fits = {"leased": lambda _: [device, "cpu"], "tune_bytes": lambda *_, **__: ([0, 0, 0, 1], 0), "ROOMY": -1.0}
    with patch.multiple(whole, **fits):
        return tuned(root / "shared", output, device)


def in_memory(root, output, device):
    """All of it in one process; what the model then says."""
    model = AutoModelForCausalLM.from_pretrained(root / "source", dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(root / "source")
    recipe = SOLVER | {"keep_dense": [OTHERS], "refine": FEW, "tune": FEW}
    armor.compress(model, tokenizer, (root / "text.txt").read_text(), recipe, sequences=4, sequence_length=LENGTH)
    with torch.no_grad():
        return [model(torch.arange(LENGTH)[None].to(device), use_cache=False).logits.double().square().sum().item()]


STAGES = {
    "calibrate": captured,
    **{name: partial(found, name) for name in METHODS if name != "dense"},
    "quantize": rounded,
    "states": states,
    "sensitivity": sensitivity,
    "refine": refine,
    "tune": tuned,
    "tune, two devices": tuned_over_two,
    "in memory": in_memory,
}


@pytest.fixture(scope="module")
def there(root, tmp_path_factory):
    """What every stage finds there, or its error; in a process of its own, for torch asks for devices only once.

    Each operation goes through Python there, so it takes its time. Only so is a tensor that stays behind an error.
    """
    output = tmp_path_factory.mktemp("there")
    command = [sys.executable, "-m", __name__, str(root), str(output)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    return json.loads((output / "found.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_computes_where_it_is_asked_to(stage, root, there, tmp_path):
    assert there[stage] == pytest.approx(STAGES[stage](root, tmp_path, "cpu"), rel=0.02)


def test_what_stays_behind_is_an_error(there):
    assert "tensors of two devices" in there["left"]


def left(*_):
    torch.ones(3).to(CARD) + torch.ones(3)


def main(root: Path, output: Path) -> None:
    put_in()
    found: dict[str, Any] = {}
    for name, stage in {**STAGES, "left": left}.items():
        try:
            found[name] = stage(root, output / name, CARD)
        except Exception:
            found[name] = traceback.format_exc()
    (output / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
