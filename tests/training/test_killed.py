"""Refine and tune, killed at every write as the kernel kills: the same command goes on, with the same bytes, and leaves
nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from armor.config.training import TuneJob, TuneSettings
from armor.training.tune import tune
from tests.killed import HALF, POINTS, SAVED, WRITTEN, killed_everywhere
from tests.packed import opened, quantized
from tests.training.trained import TRAINING, ready, refined, sample


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    root = ready(tmp_path_factory.mktemp("model"))
    job = TuneJob(tune=TuneSettings(**TRAINING | {"rate": 3e-3}), sample=sample(root))
    statistics = root / "calibration/calibration.json"
    quantized(root)

    def chain(folder: Path) -> None:
        """Both layers, each on what those before make of the text; one whose job ended is not done again."""
        for layer in range(2):
            ended = folder.with_name(f"{folder.name}_{layer}")  # as Snakemake knows
            if not ended.exists():
                refined(root, layer, folder, inputs="compressed")
                ended.touch()

    return {
        "refine": lambda folder: refined(root, 1, folder),
        "refine integers": lambda folder: refined(root, 1, folder, "quantized/quantized"),
        "refine a chain": chain,
        "tune": lambda folder: tune(*opened(root), root / "layers", statistics, job, folder / "tuned.json"),
    }


ONE_EACH = [("refine integers", HALF), ("refine a chain", WRITTEN), ("tune", SAVED)]
"""All keep their steps by the same code, so the other points of time are those of refine."""


@pytest.mark.parametrize(("stage", "point"), [*(("refine", point) for point in POINTS), *ONE_EACH])
def test_killed_anywhere_it_ends_as_if_undisturbed(stages, tmp_path, stage, point):
    assert killed_everywhere(stages[stage], tmp_path, point)
