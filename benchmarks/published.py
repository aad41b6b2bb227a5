"""`armor plan` for large models by their published configurations, without their weights.

A folder is made for each: config.json as published, and safetensors files with real headers and holes for data, split
as such models are. The plan is printed; the file has its sums, and the processor seconds and memory that it takes.

    python -m benchmarks.published                  # all of them
    python -m benchmarks.published llama-3-70b
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.models import PUBLISHED, build_of_holes
from benchmarks.record import rounded, store


def plan(folder: Path, name: str) -> dict:
    """What `armor plan` says of the usual recipes for the model in `folder`, and what that takes."""
    text = {"dataset": "allenai/c4", "subset": "en", "streaming": True}
    config = {
        "models": {name: {"folder": str(folder / name)}},
        "calibrations": {"c4": {"text": text, "sequences": 128, "sequence_length": 4096}},
        "recipes": {
            "dense": {"method": "dense"},
            "nowag": {"method": "nowag"},
            "armor": {"block_size": 128},
            "refined": {"base": "armor", "refine": {"sequence_length": 2048}},
            "tuned": {"base": "refined", "tune": {"sequence_length": 2048}},
        },
        "evaluations": {"c4": {"text": text | {"split": "validation"}, "sequences": 64, "sequence_length": 4096}},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "armor", "plan", str(file)]
    subprocess.run(command, check=False)  # it fails where the model does not fit here
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = json.loads(done.stdout)
    largest = max(said["stages"], key=lambda stage: stage["host_bytes"])
    return {
        "cpu_seconds": rounded(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "peak_memory_bytes": after.ru_maxrss * 1024,  # of the largest so far
        "results_gb": rounded(said["results_bytes"] / 1e9),
        "scratch_gb": rounded(said["scratch_bytes"] / 1e9),
        "gpu_hours": rounded(said["gpu_hours"]),
        "largest_stage": f"{largest['stage']} {largest['of']}",
        "largest_stage_gb": rounded(largest["host_bytes"] / 1e9),
        "bits_per_weight": {one["recipe"]: rounded(one["bits_per_weight"]) for one in said["recipes"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*PUBLISHED], help=", ".join(PUBLISHED))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="published-") as folder:
            build_of_holes(Path(folder) / name, PUBLISHED[name])
            row = plan(Path(folder), name)
        print(f"{name}: planned in {row['cpu_seconds']} s of a processor", flush=True)
        store(options.output, name, [row])


if __name__ == "__main__":
    main()
