"""Refine and tune, killed as the kernel kills: the same command goes on, with the same bytes, and leaves nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from armor.config.training import TuneJob, TuneSettings
from tests.killed import left_over, results_of
from tests.training.trained import TRAINING, ready, refine_job, sample

KILLS = int(os.environ.get("ARMOR_KILLS", "2"))  # of each stage
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("model"))


def command(root, stage, output):
    common = ["--source", "source", "--model", "model.json", "--calibration", "calibration/calibration.json"]
    common += ["--factors", "layers", "--output", str(output), "--threads", "1"]
    if stage == "refine":
        settings = refine_job(root, steps=96)
        common += ["--states", "states.json", "--layer", "1"]
    else:
        settings = TuneJob(tune=TuneSettings(**TRAINING | {"steps": 48, "rate": 3e-3}), sample=sample(root))
    line = [sys.executable, "-m", "armor", stage, *common, "--settings", json.dumps(settings.model_dump(mode="json"))]
    return subprocess.Popen(line, cwd=root, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("stage", "output"), [("refine", "layer_1.safetensors"), ("tune", "tuned.json")])
def test_killed_at_any_moment_it_ends_as_if_undisturbed(root, tmp_path, stage, output):
    moments, kills, rounds = random.Random(0), 0, 0
    expected, seconds = {}, 0.0
    while kills < KILLS:
        folder, begun = tmp_path / f"run{rounds}", time.monotonic()
        folder.mkdir()
        while (process := command(root, stage, folder / output)) and rounds and kills < KILLS:
            try:
                process.communicate(timeout=moments.uniform(0.3, 1.0) * seconds)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()[-3000:]
        found = results_of(folder)
        if rounds == 0:  # undisturbed
            expected, seconds = found, time.monotonic() - begun
        assert found == expected and len(found) >= 2 and left_over(folder) == []
        rounds += 1
