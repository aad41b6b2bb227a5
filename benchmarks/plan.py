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
from armor.execution.files import read_json, write_json
from armor.execution.machine import current_machine
from armor.format.layout import RESULTS, Results
from armor.format.names import beside
from armor.format.records.base import Made
from armor.run.jobs import jobs
from armor.run.stages import STAGES
from armor.run.status import cost

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
    return round(max(planned / real, real / planned), 4)


def compare(plan: dict, stages: dict[str, dict], sizes: dict[str, int]) -> dict:
    """The plan beside what was taken, of stages all of whose jobs ran, with ratios."""
    rows = {}
    for stage in plan["stages"]:
        name = " ".join(filter(None, (stage["stage"], stage["of"])))
        own = stages.get(name)
        if own is not None and own["jobs"] == stage["jobs"]:
            rows[name] = {"seconds": [stage["seconds"], own["seconds"]]}
            if own["memory_bytes"]:
                planned, real = stage["host_bytes"], own["memory_bytes"]
                rows[name] |= {"memory_bytes": [planned, real], "memory_off": off(planned, real)}
    checkpoints = {}
    for one in plan["recipes"]:
        if real := sizes.get(f"{one['model']} {one['recipe']}"):
            checkpoints[f"{one['model']} {one['recipe']}"] = [one["weights_bytes"], real]
    result = {
        "stages": rows,
        "checkpoint_bytes": checkpoints,
        "worst_memory_off": max(row.get("memory_off", 1.0) for row in rows.values()),
        "worst_bytes_off": max((off(*pair) for pair in checkpoints.values()), default=None),
    }
    if plan["elapsed_seconds"] is not None:
        result["seconds"] = [sum(row["seconds"][side] for row in rows.values()) for side in (0, 1)]
        result["seconds_off"] = off(*result["seconds"])
    return result


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
    result = compare(plan, stages, sizes) | {
        "configuration": options.configuration.name,
        "machine": current_machine().model_dump(),
    }
    write_json(options.output, result)
    for name, row in result["stages"].items():
        sizes_said = [f"{size / 1e6:>8,.0f}" for size in row.get("memory_bytes", ())]
        said = [f"{seconds:>9.1f} s" for seconds in row["seconds"] if seconds is not None]
        print(f"{name:<40}", *sizes_said, *(["MB"] if sizes_said else [" " * 20]), *said)
    print(f"memory: off by {result['worst_memory_off']} at worst, aim {MEMORY}")
    print(f"bytes: off by {result['worst_bytes_off']} at worst, aim {BYTES}")
    if "seconds" in result:
        planned, real = result["seconds"]
        print(f"seconds: {planned:.0f} planned, {real:.0f} taken, off by {result['seconds_off']}, aim {SECONDS}")


if __name__ == "__main__":
    main()
