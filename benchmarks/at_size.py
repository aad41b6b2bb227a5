"""The whole workflow on models of size with random weights: memory and time of each stage, held against a limit.

llama-1.1b has TinyLlama's shapes, layer-1.1b one decoder layer of them, layer-70b one of Llama-3-70B's. moe-2b is a
mixture of 64 experts in each of 12 layers. layer-deepseek-v3 is one layer of DeepSeek-V3's shapes, 256 experts and
23 GB. All are bfloat16, with a byte-level tokenizer, written shard by shard to a temporary folder. Each is compressed
by one recipe (blocks of 64) on one core, with a few short texts: memory depends on shapes alone. The peak of a stage is
that of its largest job. The limit of evaluate is the packed model and 2 GB.

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

import typer
import yaml

from armor.config.run import Config
from armor.format.layout import Results
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.topology import Topology
from armor.run.jobs import jobs
from armor.run.status import cost
from benchmarks.models import PUBLISHED, build
from benchmarks.record import rounded, store
from tests.tiny import tiny_text

REPOSITORY = Path(__file__).resolve().parents[1]
OUTPUT = Path(__file__).with_suffix(".json")
GB = 10**9
MODELS: dict[str, dict] = {
    "llama-1.1b": PUBLISHED["llama-1.1b"],
    "layer-1.1b": PUBLISHED["llama-1.1b"] | {"num_hidden_layers": 1, "vocab_size": 512},
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


def run(folder: Path, name: str, method: str, iterations: int, refine: int, only: list[str]) -> dict:
    """Take the model through the workflow in `folder`, or `only` through these stages.

    Returns "rows", the peak and the seconds of each stage and of all of it, and what is to be said beside them.
    """
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
    rows = []
    for stage, peak in peaks.items():
        limit_gb = {"limit_gb": rounded(limits[stage] / GB)} if stage in limits else {}
        rows.append({"stage": stage, "peak_gb": rounded(peak / GB)} | limit_gb | {"seconds": spent[stage]})
    whole = {"stage": "all", "seconds": round(seconds, 1), "model_gb": rounded(size / GB)}
    if packed is not None:
        whole |= {"checkpoint_gb": rounded(packed.checkpoint_bytes / GB)}
        whole |= {"bits_per_weight": rounded(packed.bits_per_weight)}
    asked = {"method": method, "iterations": iterations, "refine_steps": refine}
    return asked | {"parameters": Topology.read(paths.topology(name)).parameters, "rows": [*rows, whole]}


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
    above = []
    for name in models:
        with tempfile.TemporaryDirectory(prefix="at-size-") as folder:
            found = run(Path(folder), name, method, iterations, refine, only or [])
        for row in found["rows"][:-1]:
            print(f"{name:12}{row['stage']:12}{row['peak_gb']:6.2f} GB{row['seconds']:8.1f} s")
            if row["peak_gb"] > row.get("limit_gb", row["peak_gb"]):
                above.append(f"{name}: {row['stage']}")
        store(output, name, **found)
    if above:
        raise SystemExit(f"above the limit: {', '.join(above)}")


if __name__ == "__main__":
    typer.run(main)
