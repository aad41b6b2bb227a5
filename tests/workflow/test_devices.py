"""Several GPUs, one layer each: layers of a stand-in that hold their device, real leases, fake devices."""

import subprocess

import pytest

from armor.format.records.base import File
from tests.records import calibration_record, topology_record
from tests.workflow.conftest import Run

LAYERS = 8
# Read by every Python of a run. In place of the solver: hold the leased device, alone, until enough are held.
# It cannot go by a public door: a device file, an environment variable or a fake libnvidia-ml makes a device that can
# be leased, and none that torch computes on, so a job would end at its first tensor. What is here and what hands it its
# inputs are all that needs one; the rule, its resources, the command and the lease are the real ones.
STAND_IN = """
import os, sys, time, types
from pathlib import Path

def factorize_layer(source, topology, layer, statistics, settings, output, device, *others):
    held, end = Path("held", os.environ["CUDA_VISIBLE_DEVICES"]), time.monotonic() + 600
    at_once = int(os.environ["AT_ONCE"])
    held.touch(exist_ok=False)  # raises if another job holds it
    while len(os.listdir("held")) < at_once and not Path("all_at_once").exists():
        if time.monotonic() > end:
            sys.exit(f"{layer}: {at_once} devices were never busy at once")
        time.sleep(0.02)
    if len(os.listdir("held")) > at_once:
        sys.exit(f"{layer}: more than {at_once} devices are busy")
    Path("all_at_once").touch()
    held.unlink()
    output.write_text("")
    output.with_suffix(".json").write_text("{}")

# They import torch, without which a job is there at once.
sys.modules["armor.format.statistics"] = types.SimpleNamespace(
    listed_statistics=None, statistics_of=lambda calibration, layer: None
)
sys.modules["armor.factorize.layer"] = types.SimpleNamespace(factorize_layer=factorize_layer)
sys.modules["armor.model.source"] = types.SimpleNamespace(open_source=str)
"""
CONFIG = {
    "models": {"deep": {"folder": "."}},
    "calibrations": {"words": {"text": {"files": ["words.txt"]}}},
    "recipes": {"armor": {"method": "armor"}},
}


@pytest.mark.parametrize(("gpus", "at_once"), [(1, 1), (99, 4)])
def test_as_many_of_four_gpus_are_busy_at_once_as_the_run_may_have_each_with_one_job(
    gpus, at_once, tmp_path, monkeypatch
):
    """With `--resources gpu=99` Snakemake starts all jobs at once, and the lease alone holds back those beyond four.

    Nothing but a run of Snakemake shows that its resources, the processes that it starts and the lease agree.
    """
    for name in ("python", "held", "results/deep/calibration/words"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "python/sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("AT_ONCE", str(at_once))
    folder = tmp_path / "results/deep"
    (folder / "source.json").write_text("{}")
    topology_record(layers=LAYERS).write(folder / "model.json")
    files = {}
    for path in (folder / f"calibration/words/layer_{index}.safetensors" for index in range(LAYERS)):
        path.write_text("")
        files[path.name] = File.of(path)
    calibration_record(files=files).write(folder / "calibration/words/calibration.json")
    outputs = [f"results/deep/armor/layers/layer_{index}.safetensors" for index in range(LAYERS)]
    command = Run(tmp_path, CONFIG, python=tmp_path / "python").command(
        "--cores", "12", "--resources", f"gpu={gpus}", "--", *outputs
    )
    done = subprocess.run(**command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "all_at_once").exists() and all((tmp_path / output).exists() for output in outputs)
