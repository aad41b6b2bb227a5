"""Tiny models taken as far as training needs them: text, statistics of it, factors, the dense model's states."""

from __future__ import annotations

from pathlib import Path

from armor.calibrate.capture import calibrate
from armor.config.layers import LayerSettings
from armor.config.sample import Sample
from armor.config.sources import CalibrationSettings, TextSettings
from armor.config.training import RefineJob, RefineSettings, TuneJob, TuneSettings
from armor.factorize.layer import factorize_layer
from armor.format.records.layer import LayerRecord
from armor.format.records.tune import TuneRecord
from armor.model.inspect import inspect
from armor.model.source import open_source
from armor.training.refine import refine_layer
from armor.training.states import make_states
from armor.training.tune import tune
from tests.packed import SETTINGS, opened
from tests.tiny import tiny_model, tiny_text

__all__ = ["LENGTH", "TRAINING", "ready", "refine_job", "refined", "sample", "tuned"]

LENGTH = 48  # longer than the sliding windows
TRAINING = {"steps": 16, "batch": 2, "sequences": 6, "held_out": 2, "warm_up": 2}


def sample(root: Path, count: int = 8) -> Sample:
    return Sample(text=TextSettings(files=[str(root / "text.txt")]), sequences=count, sequence_length=LENGTH)


def ready(root: Path, family: str = "llama", settings: LayerSettings = SETTINGS, layers: int = 2, **config) -> Path:
    """source/, model.json, text.txt, calibration/, layers/ and states/ of a tiny model in `root`."""
    root.mkdir(parents=True, exist_ok=True)
    tiny_model(root / "source", family, layers, **config)
    inspect(open_source(root / "source"), root / "model.json")
    (root / "text.txt").write_text(tiny_text())
    asked = CalibrationSettings(text=sample(root).text, sequences=4, sequence_length=LENGTH, gram=True)
    calibrate(*opened(root), asked, root / "calibration/calibration.json")
    for layer in range(layers):
        file = f"layer_{layer}.safetensors"
        factorize_layer(*opened(root), layer, root / "calibration" / file, settings, root / "layers" / file)
    make_states(*opened(root), sample(root), root / "states.json")
    return root


def refine_job(root: Path, **settings) -> RefineJob:
    asked = RefineSettings(**TRAINING | settings)
    return RefineJob(refine=asked, sample=sample(root, asked.sequences + asked.held_out))


def refined(
    root: Path, layer: int, output: Path, factors: Path | str = "layers", device: str = "cpu", **settings
) -> LayerRecord:
    """Refine one layer of the folder `factors` in `root`, by default what `ready` made, into the folder `output`."""
    file = f"layer_{layer}.safetensors"
    return refine_layer(
        *opened(root),
        layer,
        root / factors / file,
        root / "states.json",
        root / "calibration" / file,
        refine_job(root, **settings),
        output / file,
        device,
    )


def tuned(root: Path, output: Path, factors: str = "layers", device: str = "cpu", **settings) -> TuneRecord:
    """Tune the folder `factors` in `root` as a whole, by default what `ready` made, into the folder `output`."""
    job = TuneJob(tune=TuneSettings(**TRAINING | {"rate": 3e-3} | settings), sample=sample(root))
    return tune(
        *opened(root), root / factors, root / "calibration/calibration.json", job, output / "tuned.json", device
    )
