"""What Snakemake and the start of processes cost, beside the work: of a finished run, and of many jobs that do none.

    python -m benchmarks.workflow --run FOLDER     # FOLDER: where the demo was run, with results/ and .snakemake/
    python -m benchmarks.workflow --dag            # the plan of a large mixture alone

Of the finished run the files that it left say when each job ran and how long its stage worked, `seconds` in its record.
Each moment in which no job runs is Snakemake's; a moment in which k jobs run belongs by 1/k to each of them, and where
one of these is not at work yet, that part is start-up: Python, imports, opening the input, the end of the process. Both
together over the whole time is the overhead. What a stage reads and checks before its clock starts is counted as
start-up too, so that part is an upper bound; a core without a job while another has one is not counted.

The stand-ins are the workflow itself with 80 decoder layers and 4 recipes, in which `armor factorize` only sleeps: no
torch, no model. A dry run of everything, the run of the 320 layers, and a run with nothing to do are timed, in seconds
of the clock and of the processors: on a busy machine only the latter mean something.

With `--dag` a dry run of a mixture in the shape of DeepSeek-V3 is timed, 61 layers of 256 experts. The records of fetch
and inspect are written here, from the shapes alone: none of the weights is anywhere.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from armor.config.run import Config
from armor.execution.files import write_json
from armor.format.layout import RESULTS, Results
from armor.format.records.base import File, Made
from armor.format.records.source import SourceRecord
from armor.format.records.topology import DecoderLayer, Linear, Topology
from armor.run.jobs import Job, jobs
from armor.run.status import cost
from benchmarks.record import rounded, store
from tests.records import calibration_record, topology_record

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = 4
EXPERTS, HIDDEN, WIDTH = 256, 7168, 2048
COMMON = {"dtype": "bfloat16", "bias": False, "shard": "model.safetensors"}
STAND_IN = """
import os, sys, time, types

def factorize_layer(source, topology, layer, statistics, settings, output, device, *others):
    time.sleep(float(os.environ["STAND_IN_SECONDS"]))
    output.write_text("")
    output.with_suffix(".json").write_text("{}")

sys.modules["armor.format.statistics"] = types.SimpleNamespace(
    listed_statistics=None, statistics_of=lambda calibration, layer: ""
)
sys.modules["armor.factorize.layer"] = types.SimpleNamespace(factorize_layer=factorize_layer)
sys.modules["armor.model.source"] = types.SimpleNamespace(open_source=str)
"""


def spans(results: Path, config: Config) -> Iterator[tuple[float, float, float]]:
    """When each finished job began, began to work, and ended, in seconds since the epoch."""
    for job in jobs(config, str(results)):
        measured = cost(job)
        if measured is None:
            continue
        begin = measured.ended - measured.seconds
        yield begin, measured.ended - min(measured.seconds, worked(job, measured.seconds)), measured.ended


def worked(job: Job, seconds: float) -> float:
    """The seconds that the stage says it worked; all of the job's where its record does not say."""
    made = Made.within(job.record)
    return made.seconds if made else seconds


def shares(found: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds in which no job runs, between the first and the last, and seconds that belong to the start of jobs."""
    idle = starting = 0.0
    moments = sorted({moment for span in found for moment in span})
    for begin, end in zip(moments, moments[1:], strict=False):
        running = [span for span in found if span[0] <= begin < span[2]]
        if running:
            starting += (end - begin) * sum(begin < work for _, work, _ in running) / len(running)
        else:
            idle += end - begin
    return idle, starting


def finished(folder: Path, config: Config) -> dict:
    """The overhead of the run that left its files in `folder`."""
    log = max((folder / ".snakemake/log").glob("*.snakemake.log"))
    hours, minutes, seconds = re.findall(r"^Elapsed time: (\d+):(\d+):([\d.]+)$", log.read_text(), re.MULTILINE)[-1]
    wall = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    found = list(spans(folder / "results", config))
    idle, starting = shares(found)
    idle += wall - (max(end for *_, end in found) - min(begin for begin, *_ in found))  # before and after all jobs
    return {
        "jobs": len(found),
        "wall_seconds": rounded(wall),
        "snakemake_seconds": rounded(idle),
        "start_up_seconds": rounded(starting),
        "snakemake_share": rounded(idle / wall),
        "overhead_share": rounded((idle + starting) / wall),
    }


def snakemake(folder: Path, config: Path, *arguments: str, **variables: str) -> tuple[dict[str, float], str]:
    """Run Snakemake in `folder`: seconds of the clock and of the processors, and what it said."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
    command += ["--directory", str(folder), "--configfile", str(config), *arguments]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=os.environ | variables, cwd=REPOSITORY, capture_output=True, text=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_seconds": rounded(wall), "processor_seconds": rounded(processors)}, done.stdout + done.stderr


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


def dag(place: Path, layers: int) -> dict:
    """A dry run of `layers` decoder layers of a large mixture, in the folder `place`."""
    own, paths = tuple(map(layer, range(layers))), Results(str(place / RESULTS))
    weights = sum(linear.out_features * linear.in_features for one in own for linear in one.linears)
    config = {
        "models": {"large": {"folder": str(place)}},
        "calibrations": {"c4": {"text": {"files": [str(place / "c4.txt")]}}},
        "recipes": {"armor": {"block_size": 128}},
    }
    (place / "my.yaml").write_text(yaml.safe_dump(config))
    source = {"path": str(place), "fingerprint": "0" * 64, "dtype": "bfloat16", "files": {}, "hub": None}
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
        layers=own,
    ).write(paths.topology("large"))
    timed, said = snakemake(place, place / "my.yaml", "--cores", "1", "--dry-run")
    table = re.search(r"^job +count\n.*?^total +(\d+)$", said, re.MULTILINE | re.DOTALL)
    if not table:
        raise SystemExit(said)
    return {"layers": layers, "experts": EXPERTS, "jobs": int(table[1]), "dry_run": timed}


def stand_ins(folder: Path, layers: int, work: float, cores: int) -> dict:
    """Dry run, run and no-op run of `layers` decoder layers under each of RECIPES recipes, `work` seconds a layer."""
    results = Results(str(folder / "results"))
    calibration = Path(results.calibration("deep", "words"))
    calibration.parent.mkdir(parents=True)
    (folder / "python").mkdir()
    (folder / "python/sitecustomize.py").write_text(STAND_IN)
    write_json(results.source("deep"), {})
    topology_record(layers=layers).write(results.topology("deep"))
    files = {}
    for index in range(layers):
        path = calibration.with_name(f"layer_{index}.safetensors")
        path.write_text("")
        files[path.name] = File.of(path)
    calibration_record(files=files).write(calibration)
    config = {
        "models": {"deep": {"folder": "."}},
        "calibrations": {"words": {"text": {"files": ["words.txt"]}}},
        "recipes": {f"armor-{k}": {"method": "armor", "block_size": 2**k} for k in range(3, 3 + RECIPES)},
        "evaluations": {"words": {"text": {"files": ["words.txt"]}}},
        "benchmarks": {"decode": {}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    variables = {
        "PYTHONPATH": os.pathsep.join((str(folder / "python"), str(REPOSITORY))),
        "STAND_IN_SECONDS": str(work),
    }
    only = ["--"]
    for recipe in config["recipes"]:
        only += [Results().factors("deep", recipe, index) for index in range(layers)]
    result: dict = {"layers": layers, "recipes": RECIPES, "work_seconds": work, "cores": cores}
    for name, arguments in (("dry_run", ["--dry-run"]), ("run", only), ("no_op", only)):
        Path(results.run()).unlink(missing_ok=True)  # else what was written above is taken for results of another place
        result[name], said = snakemake(folder, folder / "config.yaml", "--cores", str(cores), *arguments, **variables)
        print(f"{name}: {result[name]}", file=sys.stderr)
        expected = "Nothing to be done" if name == "no_op" else rf"factorize +{layers * RECIPES}\b"
        if not re.search(expected, said):
            raise SystemExit(f"{name}: not what was expected\n{said[-2000:]}")
    count = layers * RECIPES
    result["overhead_seconds_per_job"] = rounded((result["run"]["wall_seconds"] - work * count / cores) / count)
    return result


def table(result: dict) -> str:
    """The numbers, one a line, beside their targets."""
    lines = []
    if run := result.get("run"):
        lines += [
            f"finished run: {run['jobs']} jobs in {run['wall_seconds']:.0f} s",
            f"  no job runs (Snakemake)   {run['snakemake_seconds']:8.1f} s  {run['snakemake_share']:6.1%}",
            f"  jobs start                {run['start_up_seconds']:8.1f} s",
            f"  both                      {run['snakemake_seconds'] + run['start_up_seconds']:8.1f} s  "
            f"{run['overhead_share']:6.1%}   target 5%",
        ]
    if jobs_ := result.get("stand_ins"):
        count = jobs_["layers"] * jobs_["recipes"]
        lines.append(f"{count} stand-in jobs of {jobs_['work_seconds']:g} s on {jobs_['cores']} cores")
        for name, target in (("dry_run", "   target 6 s"), ("run", ""), ("no_op", "")):
            took = jobs_[name]
            lines.append(f"  {name:<10}{took['wall_seconds']:8.1f} s, {took['processor_seconds']:.1f} s of CPU{target}")
        lines.append(f"  overhead  {jobs_['overhead_seconds_per_job']:8.2f} s a job")
    if planned := result.get("dag"):
        took = planned["dry_run"]
        lines.append(f"dry run of {planned['jobs']} jobs: {took['wall_seconds']:.1f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the folder of a finished run; unset: stand-ins alone")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "config/config.yaml", help="that of the run")
    parser.add_argument("--dag", action="store_true", help="time the plan of a large mixture instead")
    parser.add_argument("--layers", type=int, help="of the stand-ins, 80 unless set (0: none), or of --dag, 61")
    parser.add_argument("--work", type=float, default=1.0, help="seconds that a stand-in sleeps")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory(prefix="workflow-") as folder:
        if options.run:
            config = Config.model_validate(yaml.safe_load(options.config.read_text()))
            result["run"] = finished(options.run, config)
        if options.dag:
            result["dag"] = dag(Path(folder), options.layers or 61)
        elif layers := 80 if options.layers is None else options.layers:
            result["stand_ins"] = stand_ins(Path(folder), layers, options.work, options.cores)
    for of, row in result.items():
        store(options.output, of, [row])
    print(table(result))


if __name__ == "__main__":
    main()
