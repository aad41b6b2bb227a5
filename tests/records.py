"""Records as a stage would write them, with made-up values for all that a test does not name."""

from __future__ import annotations

from armor.format.records.base import Machine, MadeBy
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.layer import LayerRecord, LinearRecord
from armor.format.records.topology import DecoderLayer, Linear, Topology

__all__ = ["MACHINE", "calibration_record", "layer_record", "linear", "linear_record", "topology_record"]

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0"}
MACHINE = Machine(processor="A processor", cores=2, threads=2, device="cpu", versions=VERSIONS)
MADE_BY = MadeBy(stage="armor.stage", code="c0de", settings={"seed": 0}, inputs={})
MADE = {"made_by": MADE_BY, "machine": MACHINE, "seconds": 1.5, "peak_memory_bytes": 700_000_000}


def calibration_record(**values) -> CalibrationRecord:
    given = {
        "fingerprint": "f" * 64,
        "text_fingerprint": "a" * 64,
        "statistics_fingerprint": "b" * 64,
        "sequences": 4,
        "length": 32,
        "tokens": 128,
        "dtype": "bfloat16",
        "device": "cpu",
        "files": {},
        "hidden_states_bytes": 8_192,
        "spilled_bytes": 0,
        "tokens_per_second": 85.3,
    }
    return CalibrationRecord(**MADE | given | values)


def linear_record(**values) -> LinearRecord:
    given = {
        "method": "nowag",
        "pattern": "2:4",
        "block_sizes": None,
        "start_loss": 0.0,
        "loss": 0.0,
        "trace": (),
        "seed": 0,
        "device": "cpu",
        "seconds": 0.5,
        "peak_memory_bytes": 700_000_000,
        "note": None,
    }
    return LinearRecord(**given | values)


def layer_record(**values) -> LayerRecord:
    given = {"layer": 0, "fingerprint": "f" * 64, "sha256": "d" * 64, "statistics_fingerprint": None, "modules": {}}
    return LayerRecord(**MADE | given | values)


def linear(name: str, out_features: int, in_features: int, input_group: int = 0) -> Linear:
    shape = {"out_features": out_features, "in_features": in_features, "input_group": input_group}
    return Linear(name=f"model.layers.0.{name}", dtype="bfloat16", bias=False, shard="model.safetensors", **shape)


def topology_record(layers: int = 2, linears: tuple[Linear, ...] = (), **values) -> Topology:
    """Each of the decoder layers has the same `linears`."""
    decoder = tuple(DecoderLayer(index=i, prefix=f"model.layers.{i}", linears=linears) for i in range(layers))
    given = {
        "model_type": "llama",
        "fingerprint": "f" * 64,
        "dtype": "float32",
        "context_length": None,
        "hidden_size": 64,
        "parameters": 0,
        "linear_parameters": 0,
        "decoder_parameters": 0,
        "tied_embeddings": False,
        "layers": decoder,
    }
    return Topology(**given | values)
