"""What `armor plan` says against what a finished run took: memory and seconds by stage, bytes by checkpoint.

    python -m benchmarks.plan config/examples/demo-quick.yaml --run FOLDER    # the folder of its --directory
    python -m benchmarks.plan my.yaml --run FOLDER --measure                  # seconds too

Memory is that in the records; fetch, inspect and report have none. Seconds are those of Snakemake's measurements,
summed over the jobs. Of a run that did not end, the stages count that did.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from armor.config.loading import load_config
from armor.execution.files import read_json
from armor.format.layout import RESULTS, Results
from armor.format.names import beside
from armor.format.records.base import Made
from armor.run.jobs import jobs
from armor.run.stages import STAGES
from armor.run.status import cost
from benchmarks.record import rounded, store

MEMORY, BYTES, SECONDS = 1.25, 1.01, 1.5
"""How far the plan may be off, as a ratio in either direction."""


def taken(configuration: Path, run: Path) -> tuple[dict[str, dict], dict[str, int]]:
    """By stage and names what the jobs of a run took; by model and recipe the bytes of the safetensors.

    Memory is null where no record says it.
    """
    config, results = load_config(configuration), run / RESULTS
    found: dict[str, dict] = {}
    for job in jobs(config, str(results)):
        names = job.names[:2] if STAGES[job.stage].by_layer else job.names
        spent = cost(job)
        if spent is not None:
            own = found.setdefault(" ".join((job.stage, *names)), {"jobs": 0, "seconds": 0.0, "memory_bytes": None})
            made = [Made.within(path) for path in job.outputs if path.suffix == ".json" and path.is_file()]
            peaks = [record.peak_memory_bytes for record in made if record]
            own["jobs"] += 1
            own["seconds"] += spent.seconds
            own["memory_bytes"] = max(filter(None, [*peaks, own["memory_bytes"]]), default=None)
    paths = Results(str(results))
    checkpoints = {
        f"{model} {recipe}": beside(paths.checkpoint(model, recipe))
        for model, recipe in config.pairs()
        if Path(paths.checkpoint(model, recipe)).is_file()
    }
    return found, {n: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for n, folder in checkpoints.items()}


def off(planned: float, real: float) -> float:
    """How far a plan is off: the ratio that is at least 1."""
    return rounded(max(planned / real, real / planned))


def compare(plan: dict, stages: dict[str, dict], sizes: dict[str, int]) -> list[dict]:
    """The plan beside what was taken, planned first: stages all of whose jobs ran, checkpoints, and all of it."""
    rows = []
    for stage in plan["stages"]:
        name = " ".join(filter(None, (stage["stage"], stage["of"])))
        own = stages.get(name)
        if own is not None and own["jobs"] == stage["jobs"]:
            row: dict = {"stage": name, "seconds": [stage["seconds"] and rounded(stage["seconds"]), own["seconds"]]}
            if own["memory_bytes"]:
                planned, real = stage["host_bytes"], own["memory_bytes"]
                row |= {"memory_mb": [round(planned / 1e6), round(real / 1e6)], "memory_off": off(planned, real)}
            rows.append(row)
    worst: dict = {"stage": "all", "memory_off": max(row.get("memory_off", 1.0) for row in rows)}
    if plan["elapsed_seconds"] is not None:
        planned, real = (sum(row["seconds"][side] for row in rows) for side in (0, 1))
        worst |= {"seconds": [rounded(planned), rounded(real)], "seconds_off": off(planned, real)}
    for one in plan["recipes"]:
        if real := sizes.get(name := f"{one['model']} {one['recipe']}"):
            rows.append({"checkpoint": name, "bytes": [one["weights_bytes"], real]})
            worst["bytes_off"] = max(off(*rows[-1]["bytes"]), worst.get("bytes_off", 1.0))
    return [*rows, worst]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="the folder of the finished run")
    parser.add_argument("--measure", action="store_true", help="time this machine too")
    parser.add_argument("--plan", type=Path, help="what `armor plan --json` printed; unset: plan now")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    stages, sizes = taken(options.configuration, options.run)
    if options.plan:
        plan = read_json(options.plan)
    else:
        command = [sys.executable, "-m", "armor", "plan", str(options.configuration), "--json"]
        made = options.output.with_suffix(".tmp")
        with open(made, "wb") as file:
            subprocess.run([*command, *(["--measure"] if options.measure else [])], stdout=file, check=True)
        plan = read_json(made)
        made.unlink()
    rows = compare(plan, stages, sizes)
    store(options.output, options.configuration.name, rows)
    for row in rows:
        sizes_said = [f"{size:>8,}" for size in row.get("memory_mb", ())]
        said = [f"{seconds:>9.1f} s" for seconds in row.get("seconds", ()) if seconds is not None]
        if "stage" in row:
            print(f"{row['stage']:<40}", *sizes_said, *(["MB"] if sizes_said else [" " * 20]), *said)
    worst = rows[-1]
    print(f"memory: off by {worst['memory_off']} at worst, aim {MEMORY}")
    print(f"bytes: off by {worst.get('bytes_off')} at worst, aim {BYTES}")
    if "seconds" in worst:
        planned, real = worst["seconds"]
        print(f"seconds: {planned:.0f} planned, {real:.0f} taken, off by {worst['seconds_off']}, aim {SECONDS}")


if __name__ == "__main__":
    main()
