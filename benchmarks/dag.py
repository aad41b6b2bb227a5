"""How long the workflow takes to plan a large mixture: 61 layers of 256 experts, in the shape of DeepSeek-V3.

    python -m benchmarks.dag

The records of fetch and inspect are written here, from the shapes alone: none of the weights is anywhere. Then
`snakemake --dry-run` is timed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from armor.format.layout import RESULTS, Results
from armor.format.records.source import SourceRecord
from armor.format.records.topology import DecoderLayer, Linear, Topology

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS, EXPERTS, HIDDEN, WIDTH = 61, 256, 7168, 2048
COMMON = {"dtype": "bfloat16", "bias": False, "shard": "model.safetensors"}


def layer(index: int) -> DecoderLayer:
    """A decoder layer: two linears of attention, and the experts."""
    prefix = f"model.layers.{index}"
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    for expert in range(EXPERTS):
        own = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
        shapes |= {f"mlp.experts.{expert}.{name}": shape for name, shape in own.items()}
    linears = [
        Linear(name=f"{prefix}.{name}", out_features=rows, in_features=columns, input_group=i, **COMMON)
        for i, (name, (rows, columns)) in enumerate(shapes.items())
    ]
    return DecoderLayer(index=index, prefix=prefix, linears=tuple(linears))


def main() -> None:
    layers = tuple(map(layer, range(LAYERS)))
    weights = sum(linear.out_features * linear.in_features for one in layers for linear in one.linears)
    with tempfile.TemporaryDirectory(prefix="dag-") as place:
        folder, paths = Path(place), Results(f"{place}/{RESULTS}")
        config = {
            "models": {"large": {"folder": place}},
            "calibrations": {"c4": {"text": {"files": [f"{place}/c4.txt"]}}},
            "recipes": {"armor": {"block_size": 128}},
        }
        (folder / "my.yaml").write_text(yaml.safe_dump(config))
        source = {"path": place, "fingerprint": "0" * 64, "dtype": "bfloat16", "files": {}, "hub": None}
        SourceRecord(**source, settings=config["models"]["large"]).write(paths.source("large"))
        Topology(
            model_type="deepseek_v3",
            fingerprint="0" * 64,
            dtype="bfloat16",
            context_length=4096,
            hidden_size=HIDDEN,
            parameters=weights,
            linear_parameters=weights,
            decoder_parameters=weights,
            tied_embeddings=False,
            layers=layers,
        ).write(paths.topology("large"))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "1"]
        command += ["--directory", place, "--configfile", str(folder / "my.yaml"), "--dry-run"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
    said = done.stdout + done.stderr
    if done.returncode:
        sys.exit(said)
    table = re.search(r"^job +count\n.*?^total +\d+$", said, re.MULTILINE | re.DOTALL)
    print(table[0] if table else said)
    print(f"{seconds:.1f} s")


if __name__ == "__main__":
    main()
