"""The whole workflow on models of size with random weights: memory and time of each stage, held against a limit.

llama-1.1b has TinyLlama's shapes, layer-1.1b one decoder layer of them, layer-70b one of Llama-3-70B's. moe-2b is a
mixture of 64 experts in each of 12 layers. layer-deepseek-v3 is one layer of DeepSeek-V3's shapes, 256 experts and
23 GB. All are bfloat16, with a byte-level tokenizer, written shard by shard to a temporary folder. Each is compressed
by one recipe (blocks of 64) on one core, with a few short texts: memory depends on shapes alone. The peak of a stage is
that of its largest job. The limit of evaluate is the packed model and 2 GB. Writes benchmarks/at_size.json.

    python -m benchmarks.at_size llama-1.1b          # 7 GB on disk
    python -m benchmarks.at_size layer-70b moe-2b --iterations 10
    python -m benchmarks.at_size layer-1.1b --refine 16   # and refined, on 128 sequences of 1,024 tokens
    python -m benchmarks.at_size layer-deepseek-v3 --only calibrate --only predict    # 23 GB on disk
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from safetensors.torch import save_file

from armor.config.run import Config
from armor.execution.files import read_json, write_json
from armor.execution.machine import current_machine
from armor.format.layout import Results
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.topology import Topology
from armor.format.shards import INDEX
from armor.run.jobs import jobs
from armor.run.status import cost
from benchmarks.calibrate_memory import CONFIG
from benchmarks.published import MODELS as PUBLISHED
from benchmarks.published import tensors
from tests.tiny import tiny_text, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
OUTPUT = Path(__file__).with_suffix(".json")
SHARD = 500_000_000
GB = 10**9
MODELS: dict[str, dict] = {
    "llama-1.1b": {"model_type": "llama", **CONFIG},
    "layer-1.1b": {"model_type": "llama", **CONFIG, "num_hidden_layers": 1, "vocab_size": 512},
    "layer-70b": PUBLISHED["llama-3-70b"] | {"num_hidden_layers": 1, "vocab_size": 512},
    "layer-deepseek-v3": {k: v for k, v in PUBLISHED["deepseek-v3"].items() if k != "quantization_config"}
    | {"num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 512},
    "moe-2b": PUBLISHED["qwen3-235b-a22b"]
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_experts": 64,
        "vocab_size": 32000,
    },
}
LIMITS = {"llama-1.1b": 3 * GB, "layer-1.1b": 3 * GB, "layer-70b": None, "layer-deepseek-v3": None, "moe-2b": 4 * GB}


def build(folder: Path, config: dict) -> int:
    """Write a model with random weights to `folder`; returns the bytes of its tensors."""
    folder.mkdir()
    write_json(folder / "config.json", {"dtype": "bfloat16", **config})
    tiny_tokenizer(folder)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def save() -> int:
        name = f"model-{len(set(weight_map.values())):05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        size = sum(tensor.nbytes for tensor in shard.values())
        shard.clear()
        return size

    total = 0
    for name, hole in tensors(config):
        shape = tuple(hole.shape)
        plain = torch.ones if len(shape) == 1 else torch.empty
        shard[name] = plain(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            shard[name].normal_(std=0.02)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            total += save()
    total += save()
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return total


def run(folder: Path, name: str, method: str, iterations: int, refine: int, only: list[str]) -> dict:
    """Take the model through the workflow in `folder`, or `only` through these stages; bytes and seconds by stage."""
    size = build(folder / "model", MODELS[name])
    texts = {"calibration": 60_000 if refine else 2000, "evaluation": 2000}
    for part, paragraphs in texts.items():
        (folder / f"{part}.txt").write_text(tiny_text(paragraphs))
    short = {"sequences": 2, "sequence_length": 256}
    text = {part: {"text": {"files": [str(folder / f"{part}.txt")]}} | short for part in texts}
    recipe: dict = {"method": method, "block_size": 64, "solver": {"iterations": iterations}}
    if refine:
        recipe["refine"] = {"steps": refine, "sequence_length": 1024}
    config = {
        "models": {name: {"folder": str(folder / "model")}},
        "calibrations": {"words": text["calibration"]},
        "recipes": {method: recipe},
        "evaluations": {"words": text["evaluation"]},
    }
    file = folder / "my.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "1"]
    command += ["--directory", str(folder), "--configfile", str(file)]
    if only:
        wanted = [job for job in jobs(Config.model_validate(config), "results") if job.stage in only]
        command += ["--", *(str(job.record) for job in wanted)]
    begin = time.monotonic()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    seconds = time.monotonic() - begin
    results = folder / "results"
    peaks: dict[str, int] = {}
    spent: dict[str, float] = {}
    for job in jobs(Config.model_validate(config), str(results)):
        if measured := cost(job):
            peaks[job.stage] = max(peaks.get(job.stage, 0), measured.peak_memory_bytes)
            spent[job.stage] = round(spent.get(job.stage, 0.0) + measured.seconds, 1)
    paths = Results(str(results))
    packed = None if only else CheckpointRecord.read(Path(paths.checkpoint(name, method)))
    limit = LIMITS[name]
    limits = {stage: limit for stage in peaks if limit}
    if packed is not None and limit:
        limits["evaluate"] = packed.checkpoint_bytes + 2 * GB
    return {
        "parameters": Topology.read(paths.topology(name)).parameters,
        "model_bytes": size,
        "checkpoint_bytes": packed and packed.checkpoint_bytes,
        "bits_per_weight": packed and packed.bits_per_weight,
        "method": method,
        "iterations": iterations,
        "refine_steps": refine,
        "peak_memory_bytes": peaks,
        "limit_bytes": limits,
        "above": [stage for stage in limits if peaks[stage] > limits[stage]],
        "seconds_by_stage": spent,
        "seconds": round(seconds, 1),
        "machine": current_machine().model_dump(),
    }


def main(
    models: Annotated[list[str], typer.Argument(help=", ".join(MODELS))],
    method: Annotated[str, typer.Option("--method")] = "armor",
    iterations: Annotated[int, typer.Option("--iterations", help="Of the solver of armor.")] = 1,
    refine: Annotated[int, typer.Option("--refine", help="Steps that each layer is trained; 0 for none.")] = 0,
    only: Annotated[list[str] | None, typer.Option("--only", help="A stage, in place of the whole.")] = None,
    output: Path = OUTPUT,
) -> None:
    if unknown := sorted({*models} - {*MODELS}):
        raise SystemExit(f"benchmarks/at_size.py: no model {unknown[0]}; expected {', '.join(MODELS)}")
    found = read_json(output) if output.is_file() else {}
    for name in models:
        with tempfile.TemporaryDirectory(prefix="at-size-") as folder:
            found[name] = run(Path(folder), name, method, iterations, refine, only or [])
        for stage, peak in found[name]["peak_memory_bytes"].items():
            print(f"{name:12}{stage:12}{peak / GB:6.2f} GB{found[name]['seconds_by_stage'][stage]:8.1f} s")
        write_json(output, found)
    if above := [f"{name}: {stage}" for name in models for stage in found[name]["above"]]:
        raise SystemExit(f"above the limit: {', '.join(above)}")


if __name__ == "__main__":
    typer.run(main)
