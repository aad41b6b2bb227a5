"""Several GPUs, one layer each: layers of a stand-in that only takes its time, leases that are real, fake devices."""

import json
from itertools import pairwise

import pytest

from armor.execution.files import sha256
from armor.format.records.topology import DecoderLayer, Topology
from tests.workflow.conftest import Run

LAYERS = 12
# Read by every Python of a run. In place of the solver: hold the leased device, and note from when to when.
STAND_IN = """
import json, os, sys, time, types

def factorize_layer(source, topology, layer, statistics, settings, output, device):
    begin = time.time()
    time.sleep(float(os.environ["SECONDS"]))
    output.write_text("")
    output.with_suffix(".json").write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], begin, time.time()]))

sys.modules["armor.factorize.layer"] = types.SimpleNamespace(factorize_layer=factorize_layer)
sys.modules["armor.model.source"] = types.SimpleNamespace(open_source=str)
"""


CONFIG = {
    "models": {"deep": {"folder": "."}},
    "calibrations": {"words": {"text": {"files": ["words.txt"]}}},
    "recipes": {"armor": {"method": "armor"}},
}


@pytest.fixture
def layers(tmp_path, monkeypatch):
    """A function that runs `count` layers of a model for `seconds` each, and returns (device, begin, end) of all."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python/sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    folder = tmp_path / "results/deep"
    (folder / "calibration/words").mkdir(parents=True)
    decoder = tuple(DecoderLayer(index, f"model.layers.{index}", ()) for index in range(LAYERS))
    topology = Topology("llama", "0", "float32", None, 64, 0, 0, False, decoder)
    (folder / "source.json").write_text("{}")
    (folder / "model.json").write_text(json.dumps(topology.to_json()))
    files = {}
    for path in (folder / f"calibration/words/layer_{index}.safetensors" for index in range(LAYERS)):
        path.write_text("")
        files[path.name] = {"bytes": 0, "sha256": sha256(path)}
    (folder / "calibration/words/calibration.json").write_text(json.dumps({"files": files}))

    def start(gpus: int, count: int, seconds: float) -> list[tuple[str, float, float]]:
        monkeypatch.setenv("SECONDS", str(seconds))
        files = [f"results/deep/armor/layers/layer_{index}.safetensors" for index in range(count)]
        fake = Run(tmp_path, CONFIG, python=tmp_path / "python")
        done = fake.snakemake("--cores", "12", "--resources", f"gpu={gpus}", "--", *files)
        assert done.returncode == 0, done.stdout + done.stderr
        return [tuple(json.loads((tmp_path / file).with_suffix(".json").read_text())) for file in files]

    return start


def test_four_gpus_are_busy_until_the_end(layers):
    seconds = 24  # a start takes a second or two, on a busy machine three, and must not count
    held = layers(4, LAYERS, seconds)
    began, ended = min(begin for _, begin, _ in held), max(end for *_, end in held)
    assert ended - began <= 1.15 * seconds * LAYERS / 4
    by_device = {device: sorted((b, e) for d, b, e in held if d == device) for device, *_ in held}
    assert by_device.keys() == set("0123")
    for spans in by_device.values():
        assert len(spans) == LAYERS / 4  # to the end
        assert all(one[1] <= two[0] for one, two in pairwise(spans))  # one at a time


def test_with_one_gpu_one_layer_at_a_time(layers):
    spans = sorted((begin, end) for _, begin, end in layers(1, 3, 0.3))
    assert all(one[1] <= two[0] for one, two in pairwise(spans))


def test_without_a_limit_the_lease_holds_back_what_snakemake_starts(layers):
    held = layers(99, 6, 1)
    for device, begin, end in held:
        others = [span for span in held if span[0] == device and span != (device, begin, end)]
        assert all(e <= begin or b >= end for _, b, e in others)
