"""Refine and tune, killed as the kernel kills: the same command goes on, with the same bytes, and leaves nothing."""

from __future__ import annotations

import os

import pytest

from armor.config.training import TuneJob, TuneSettings
from armor.training.tune import tune
from tests.killed import POINTS, killed_everywhere
from tests.packed import opened, quantized
from tests.training.trained import TRAINING, ready, refined, sample

KILLS = int(os.environ.get("ARMOR_KILLS", "4"))  # of each stage at each point


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    root = ready(tmp_path_factory.mktemp("model"))
    job = TuneJob(tune=TuneSettings(**TRAINING | {"rate": 3e-3}), sample=sample(root))
    statistics, integers = root / "calibration/calibration.json", quantized(root).parent / "quantized"
    return {
        "refine": lambda folder: refined(root, 1, folder),
        "refine integers": lambda folder: refined(root, 1, folder, "quantized/quantized"),
        "tune": lambda folder: tune(*opened(root), integers, statistics, job, folder / "tuned.json"),
    }


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("stage", ["refine", "refine integers", "tune"])
def test_killed_anywhere_it_ends_as_if_undisturbed(stages, tmp_path, stage, point):
    assert killed_everywhere(stages[stage], tmp_path, point, KILLS)
