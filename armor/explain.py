"""`armor explain`: what made a result, and whether and why it would run again now, from files alone.

A record says what made it (`armor.execution.provenance`). Held against what the configuration, the code and the files
before it say now, that gives the reasons to run again, of the result itself and of all that it is made from, as the
params and inputs of the workflow's rules make Snakemake find them. A rule that was rewritten, or a file's time, only
Snakemake sees, so `snakemake --dry-run` has the last word. Versions of packages, threads and device are said, and make
nothing run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from armor.config import Config, Settings
from armor.errors import ArmorError
from armor.execution.files import read_json, sha256
from armor.execution.fingerprint import code_hash
from armor.execution.machine import versions
from armor.execution.provenance import CHECKSUMS, PROVENANCE, model_fingerprint, ranges
from armor.reading import parse_settings
from armor.status import RUN, Job, jobs

__all__ = ["Reruns", "describe", "newer_versions", "record_of", "results_of"]


EVALUATIONS = ("evaluate", "tasks", "benchmark")


def record_of(path: Path) -> Path:
    """The JSON that says what made `path`: a record, the factors or statistics beside one, a checkpoint, the report.

    Raises ArmorError if there is none.
    """
    if not path.exists():
        raise ArmorError(f"{path}: no such file or folder; expected a result of the pipeline")
    if not path.is_dir() and (path.parent / CHECKSUMS).is_file():
        path = path.parent  # one of a checkpoint's files
    if path.is_dir():
        candidates = [path / file for file in (PROVENANCE, "summary.json", "checkpoint.json", "calibration.json")]
        if (path / CHECKSUMS).is_file():
            candidates.insert(0, path.with_name(f"{path.name}.json"))
    else:
        here = [] if path.suffix == ".json" else [path.parent / "calibration.json", path.parent / "summary.json"]
        candidates = [path.with_suffix(".json"), *here]
    for file in candidates:
        if file.is_file() and {"stage", "settings"} & read_json(file).keys():
            return file
    hint = "expected a result of the pipeline (factors, calibration.json, checkpoint, evaluation, benchmark, report)"
    if path.is_dir() and (files := sorted(file.name for file in path.glob("*.json"))):
        hint = f"name one of its files: {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}"
    raise ArmorError(f"{path}: nothing here says what made it; {hint}")


def results_of(record: Path) -> Path | None:
    """The results folder that `record` lies in, told by its run.json; None outside of one."""
    return next((folder for folder in record.absolute().parents if (folder / RUN).is_file()), None)


def describe(record: Path) -> list[str]:
    """What made the result that `record` speaks of, one thing a line."""
    value = read_json(record)
    machine = value.get("machine", {})
    inputs = value.get("inputs") or {"model": value.get("fingerprint")}
    layers = [name for name in inputs if name.startswith("layer ")]
    rows = [("record", str(record)), ("stage", value.get("stage")), ("code", value.get("code"))]
    rows += [("input", f"{name} {inputs[name] or 'unknown'}") for name in inputs if name not in layers]
    rows += [("input", f"factors of {len(layers)} layers")] if layers else []
    rows += [("settings", _text(value["settings"]))] if value.get("settings") else []
    for part in value.get("factors", ()):
        rows += [("layers", ranges(part["layers"])), ("  settings", _text(part["settings"]))]
        rows += [("  code", part["code"]), ("  versions", _text(part["versions"]))]
    rows += [(key, machine.get(key)) for key in ("device", "processor", "threads")]
    rows += [("versions", _text(machine["versions"]))] if machine else []
    rows += [("seconds", f"{value['seconds']:,.1f}")] if "seconds" in value else []
    rows += [("peak memory", f"{value['peak_memory_bytes'] / 1e6:,.0f} MB")] if "peak_memory_bytes" in value else []
    return [f"{name:<12} {said}" for name, said in rows if said is not None]


def newer_versions(record: Path) -> list[str]:
    """The packages whose versions are others here than where the result was made, one line each."""
    made = read_json(record).get("machine", {}).get("versions", {})
    return [f"{name} {made[name]} then, {now} here" for name, now in versions().items() if made.get(name, now) != now]


class Reruns:
    """Why the jobs of `config` would run again, those of the results folder `results`; unset: the last run's config."""

    def __init__(self, results: Path, config: Config | None = None) -> None:
        self.results = results
        self.config = config or parse_settings(Config, read_json(results / RUN)["config"], str(results / RUN))
        self._known: dict[Job, list[str]] = {}

    @cached_property
    def jobs(self) -> dict[tuple[str, ...], Job]:
        """Every job, by stage and names, in the order of the stages."""
        return {(job.stage, *job.names): job for job in jobs(self.config, self.results)}

    def job_of(self, record: Path) -> Job | None:
        """The job that writes `record`; None if the configuration asks for none such."""
        return next((job for job in self.jobs.values() if _record(job).absolute() == record.absolute()), None)

    def reasons(self, job: Job) -> list[str]:
        """Why `job` would run again; none if it would not."""
        if job not in self._known:
            self._known[job] = [*self._own(job), *self._of_others(job)]
        return self._known[job]

    def _own(self, job: Job) -> Iterator[str]:
        absent = [path for path in (*job.outputs, _record(job)) if not path.is_file()]
        if absent:
            yield f"{absent[0]} is not there"
            return
        value = read_json(_record(job))
        if job.stage not in ("fetch", "inspect"):  # theirs is not recorded: what follows compares what they say
            if "stage" not in value:
                yield "it was made by another release, which noted no provenance"
                return
            if (now := code_hash(value["stage"])) != value["code"]:
                yield f"the code of {value['stage']} has changed ({value['code']}, now {now})"
        if (settings := self._settings(job)) is not None:
            then, now = (_flat(s) for s in (value["settings"], settings))
            for key in sorted(then.keys() | now.keys()):
                if then.get(key) != now.get(key):
                    yield f"setting {key}: {then.get(key, 'unset')}, now {now.get(key, 'unset')}"
        then = value.get("inputs", {})
        for name, found in self._inputs(job):
            if then.get(name) != found:
                yield f"input {name}: its fingerprint is another"

    def _of_others(self, job: Job) -> Iterator[str]:
        """A line for each stage that goes before, if a job of it runs again."""
        again: dict[str, list[Job]] = {}
        for other in self._before(job):
            if self.reasons(other):
                again.setdefault(other.stage, []).append(other)
        for found in again.values():
            more = f", and {len(found) - 1} more of its stage" if len(found) > 1 else ""
            yield f"{found[0]}{more} would run again: {self.reasons(found[0])[0]}"

    def _before(self, job: Job) -> list[Job]:
        """The jobs whose outputs `job` reads."""
        model, recipe = (*job.names, "", "")[:2]
        dense = job.stage in EVALUATIONS and self.config.recipes[recipe].method == "dense"
        source, topology = (self.jobs.get((stage, model)) for stage in ("fetch", "inspect"))
        match job.stage:
            case "inspect":
                found = [source]
            case "calibrate":
                found = [source, topology]
            case "factorize":
                found = [source, topology, self.jobs["calibrate", model, self.config.calibration_of(recipe)]]
            case "assemble":
                layers = [other for key, other in self.jobs.items() if key[:3] == ("factorize", model, recipe)]
                found = [source, topology, *layers]
            case "evaluate" | "tasks" | "benchmark":
                packed = [] if dense else [self.jobs["assemble", model, recipe]]
                found = packed if job.stage == "tasks" and packed else [source, *packed]
            case "report":
                found = [other for other in self.jobs.values() if other.stage not in ("fetch", "inspect", "report")]
            case _:
                found = []
        return [other for other in found if other is not None]

    def _settings(self, job: Job) -> dict | None:
        """The settings that the rule passes to `job` now; None for a stage without."""
        model, name, *_ = (*job.names, "", "")
        asked: Settings
        match job.stage:
            case "fetch":
                return self.config.models[model].model_dump(mode="json", exclude_defaults=True)
            case "calibrate":
                asked = self.config.calibrations[name]
            case "factorize":
                asked = self.config.layer_settings(name, int(job.names[2].removeprefix("layer ")))
            case "evaluate" | "tasks":
                asked = self.config.evaluations[job.names[2]]
            case "benchmark":
                asked = self.config.benchmarks[job.names[2]]
            case "report":
                asked = self.config.report_settings()
            case _:
                return None
        return asked.model_dump(mode="json")

    def _inputs(self, job: Job) -> Iterator[tuple[str, str | None]]:
        """The fingerprints of what `job` reads, as they are now; nothing of files that are not there."""
        before = [other for other in self._before(job) if _record(other).is_file()]
        for other in before:
            file = _record(other)
            if job.stage == "report":
                if other.stage != "factorize":
                    yield file.relative_to(self.results).as_posix(), sha256(file)
            elif job.stage == "benchmark":
                yield {"fetch": "dense", "assemble": "compressed"}[other.stage], model_fingerprint(file)
            elif job.stage == "evaluate" and len(before) == 2:  # beside the dense model
                yield {"fetch": "dense", "assemble": "model"}[other.stage], model_fingerprint(file)
            elif other.stage in ("fetch", "assemble"):
                if job.stage != "inspect":
                    yield "model", model_fingerprint(file)
            elif other.stage == "calibrate":
                statistics = f"{job.names[2].replace(' ', '_')}.safetensors"
                yield "statistics", read_json(file)["files"].get(statistics, {}).get("sha256")
            elif other.stage == "factorize":
                yield other.names[2], read_json(file)["sha256"]


def _record(job: Job) -> Path:
    """The JSON of `job` that says what made its outputs."""
    if job.stage == "report":
        return job.outputs[0].with_name("summary.json")
    return next(path for path in job.outputs if path.suffix == ".json")


def _flat(value: object, key: str = "") -> dict[str, object]:
    """Settings as one level, keys joined by dots; what is unset is left out."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, inner in items for k, v in _flat(inner, f"{key}.{name}".lstrip(".")).items()}
    return {} if value is None else {key: value}


def _text(settings: dict) -> str:
    """On one line, also where a setting holds line breaks."""
    return ", ".join(f"{key}: {value}".replace("\n", r"\n") for key, value in sorted(_flat(settings).items()))
