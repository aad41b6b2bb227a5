"""Several GPUs, one layer each: layers of a stand-in that hold their device until told, real leases, fake devices."""

import os
import re
import subprocess
import time

import pytest

from armor.format.records.base import File
from tests.records import calibration_record, topology_record
from tests.workflow.conftest import Run

LAYERS = 8
# Read by every Python of a run. In place of the solver: hold the leased device, alone, until the test lets go of it. It
# cannot go by a public door: a device file, an environment variable or a fake libnvidia-ml makes a device that can be
# leased, and none that torch computes on, so a job would end at its first tensor. What is here and what hands it its
# inputs are all that needs one; the rule, its resources, the command and the lease are the real ones.
STAND_IN = """
import os, sys, time, types
from pathlib import Path

def factorize_layer(source, topology, layer, statistics, settings, output, device, *others):
    held = Path("held", os.environ["CUDA_VISIBLE_DEVICES"])
    with open(held, "x") as file:  # raises if another job holds it
        file.write(f"{layer} ")
    while not Path("released", str(layer)).exists():
        time.sleep(0.02)
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


class Layers:
    """A run of Snakemake over the first `count` layers with `gpus` as its resource, which the test leads."""

    def __init__(self, folder, gpus, count):
        self.folder, self.log = folder, folder / "log"
        files = [f"results/deep/armor/layers/layer_{index}.safetensors" for index in range(count)]
        command = Run(folder, CONFIG, python=folder / "python").command(
            "--cores", "12", "--resources", f"gpu={gpus}", "--", *files
        )
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(**command, stdout=log, stderr=log)

    def holding(self):
        """The layers at work, by device."""
        found = {}
        for file in (self.folder / "held").iterdir():
            try:
                found[file.name] = int(file.read_text().removesuffix(" "))
            except (FileNotFoundError, ValueError):  # let go meanwhile, or not written yet
                continue
        return found

    def announced(self):
        """How many layers Snakemake said it starts, which it says before it does."""
        return len(re.findall(r"^Job \d+: factorize ", self.log.read_text(), re.MULTILINE))

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def release(self, *layers):
        for layer in layers:
            (self.folder / "released" / str(layer)).touch()

    def end(self):
        assert self.process.wait() == 0, self.log.read_text()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a run in a folder where all that comes before factorization lies."""
    for name in ("python", "held", "released", "results/deep/calibration/words"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "python/sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    folder = tmp_path / "results/deep"
    (folder / "source.json").write_text("{}")
    topology_record(layers=LAYERS).write(folder / "model.json")
    files = {}
    for path in (folder / f"calibration/words/layer_{index}.safetensors" for index in range(LAYERS)):
        path.write_text("")
        files[path.name] = File.of(path)
    calibration_record(files=files).write(folder / "calibration/words/calibration.json")
    started = []

    def start(gpus, count):
        started.append(Layers(tmp_path, gpus, count))
        return started[-1]

    yield start
    for run in started:
        run.release(*range(LAYERS))
        run.process.wait()


def test_four_gpus_are_busy_until_the_end(start):
    run = start(4, LAYERS)
    run.wait_for(lambda: len(run.holding()) == 4)
    assert run.announced() == 4
    first = run.holding()
    for device in ("0", "3"):  # one by one, the others still hold theirs
        run.release(first[device])
        run.wait_for(lambda device=device: run.holding().get(device, first[device]) != first[device])
    second = run.holding()
    assert len(second) == 4 and all(second[device] == first[device] for device in "12")
    run.release(first["1"], first["2"])
    run.wait_for(lambda: len({*first.values(), *run.holding().values()}) == LAYERS and len(run.holding()) == 4)
    run.release(*run.holding().values())
    run.end()


def test_with_one_gpu_one_layer_at_a_time(start):
    run, threads = start(1, 6), []
    for done in range(6):
        run.wait_for(lambda done=done: len(run.holding()) == 1 and not released(run, *run.holding().values()))
        assert run.announced() == done + 1
        threads.append(len(os.listdir(f"/proc/{run.process.pid}/task")))
        run.release(*run.holding().values())
    run.end()
    assert threads[-1] <= threads[1] + 1, threads  # Snakemake has none for each job that has ended


def released(run, layer):
    return (run.folder / "released" / str(layer)).exists()


def test_without_a_limit_the_lease_holds_back_what_snakemake_starts(start):
    """Two that held one device at once would fail; see the stand-in."""
    run = start(99, 6)
    run.wait_for(lambda: len(run.holding()) == 4)
    run.wait_for(lambda: run.announced() == 6)
    run.release(*range(6))
    run.end()
