"""`armor explain`: what made a result, and whether and why it would run again now, from files alone.

A record says what made it (`armor.format.provenance`). That is compared with what the configuration, the code and the
files before it say now. The differences are the reasons to run again, of the result itself and of all that it is made
from. Snakemake finds the same ones by the params and inputs of the workflow's rules. Some things only Snakemake sees: a
rule that was rewritten, a file's time, the code of fetch and inspect, a text whose path counts from another folder. So
`snakemake --dry-run` has the last word. Versions of packages, threads and device are said, and make nothing run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.execution.files import sha256
from armor.execution.machine import versions
from armor.execution.table import text_table
from armor.format.layout import CALIBRATION, FACTORS, RUN, SUMMARY
from armor.format.names import beside, layer_file, record_beside, record_of_folder
from armor.format.provenance import CHECKSUMS, PROVENANCE, combined, model_fingerprint, ranges, text_files
from armor.format.records.base import Input, Machine, Made, Origin
from armor.format.records.budget import BudgetRecord, PricesRecord
from armor.format.records.calibration import CalibrationRecord
from armor.format.records.checkpoint import CheckpointRecord, ProvenanceRecord
from armor.format.records.layer import LayerRecord
from armor.format.records.report import ReportRecord
from armor.format.records.sensitivity import SensitivityRecord
from armor.format.records.source import SourceRecord
from armor.format.records.states import StatesRecord
from armor.format.records.tune import TuneRecord
from armor.run.jobs import Job, jobs
from armor.run.stages import STAGES
from armor.run.status import last_config

__all__ = ["Reruns", "describe", "newer_versions", "record_of", "results_of"]


Noted = dict[str, str | None]
"""Fingerprints by name, as `MadeBy.inputs` has them."""


def _nothing(made: Job, name: str, layer: str | None) -> Noted:
    """Of what changes no more than the source does, as the topology."""
    return {}


def _statistics(made: Job, name: str, layer: str | None) -> Noted:
    """Those of a decoder layer, or of all."""
    record = CalibrationRecord.read(made.record)
    if layer is None:
        return {Input.STATISTICS: record.statistics_fingerprint}
    file = record.files.get(layer_file(made.record.parent, layer).name)
    return {Input.STATISTICS: file and file.sha256}


def _factors(made: Job, name: str, layer: str | None) -> Noted:
    return {Input.LAYER.format(made.names[-1]): LayerRecord.read(made.record).sha256}


def _tuned(made: Job, name: str, layer: str | None) -> Noted:
    """The factors of all decoder layers, or of one."""
    found = {str(index): sha256 for index, sha256 in enumerate(TuneRecord.read(made.record).sha256)}
    return {Input.LAYER.format(index): sha256 for index, sha256 in found.items() if layer in (None, index)}


NOTED: dict[str, Callable[[Job, str, str | None], Noted]] = {
    "fetch": lambda made, name, layer: {name: SourceRecord.read(made.record).fingerprint},
    "inspect": _nothing,
    "calibrate": _statistics,
    "sensitivity": lambda made, name, layer: {name: SensitivityRecord.read(made.record).sha256},
    "budget": lambda made, name, layer: {name: BudgetRecord.read(made.record).content()},
    "experts": lambda made, name, layer: {Input.EXPERTS.format(made.names[3]): LayerRecord.read(made.record).sha256},
    "factorize": _factors,
    "states": lambda made, name, layer: {name: StatesRecord.read(made.record).text_fingerprint},
    "refine": _factors,
    "tune": _tuned,
    "quantize": _factors,
    "assemble": lambda made, name, layer: {name: model_fingerprint(made.record)},
    "predict": _nothing,
}
"""What a job notes of another one's result, which it calls `name`; `layer` is its own. By the stage of the other."""
TOGETHER: dict[str, Callable[[Path], str]] = {
    Input.BEFORE: lambda file: LayerRecord.read(file).sha256,
    Input.PRICES: lambda file: PricesRecord.read(file).content(),
}
"""Inputs of which a record has one fingerprint for all layers, and how that of a layer is read."""


def record_of(path: Path) -> Path:
    """The JSON that says what made `path`: a record, the factors or statistics beside one, a checkpoint, the report.

    Raises ArmorError if there is none.
    """
    if not path.exists():
        raise ArmorError(f"{path}: no such file or folder; expected a result of the pipeline")
    if not path.is_dir() and (path.parent / CHECKSUMS).is_file():
        path = path.parent  # one of a checkpoint's files
    if path.is_dir():
        candidates = [path / file for file in (PROVENANCE, SUMMARY, CALIBRATION)]
        if (path / CHECKSUMS).is_file():
            candidates.insert(0, record_of_folder(path))
    else:
        here = [] if path.suffix == ".json" else [path.parent / CALIBRATION, path.parent / SUMMARY]
        candidates = [record_beside(path), *here]
    for file in candidates:
        if file.is_file() and (Origin.within(file) or SourceRecord.within(file)):
            return file
    hint = (
        "expected a result of the pipeline: factors, statistics, a checkpoint, an evaluation, a benchmark, the report"
    )
    if path.is_dir() and (files := sorted(file.name for file in path.glob("*.json"))):
        hint = f"name one of its files: {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}"
    raise ArmorError(f"{path}: nothing here says what made it; {hint}")


def results_of(record: Path) -> Path | None:
    """The results folder that `record` lies in, told by the run's file; None outside of one."""
    return next((folder for folder in record.absolute().parents if (folder / RUN).is_file()), None)


def describe(record: Path) -> list[str]:
    """What made the result that `record` speaks of, one thing a line."""
    rows: list[tuple[str, object]] = [("record", str(record))]
    if origin := Origin.within(record):
        made = origin.made_by
        layers = made.layers()
        rows += [("stage", made.stage), ("code", made.code)]
        rows += [("input", f"{name} {found or 'unknown'}") for name, found in made.inputs.items() if name not in layers]
        rows += [("input", f"factors of {len(layers)} layers")] if layers else []
        rows += [("settings", _text(made.settings))] if made.settings else []
    elif source := SourceRecord.within(record):
        rows.append(("settings", _text(source.settings)))
    checkpoint = CheckpointRecord.within(record) or ProvenanceRecord.within(record)
    for part in checkpoint.factors if checkpoint else ():
        rows += [("layers", ranges(part.layers)), ("layer settings", _text(part.settings))]
        rows += [("layer code", part.code), ("layer versions", _text(part.versions))]
    if machine := _machine(record):
        rows += [("device", machine.device), ("processor", machine.processor), ("threads", machine.threads)]
        rows.append(("versions", _text(machine.versions)))
    if cost := Made.within(record):
        rows += [("seconds", f"{cost.seconds:,.1f}"), ("peak memory", f"{cost.peak_memory_bytes / 1e6:,.0f} MB")]
    return text_table([(name, str(said)) for name, said in rows], align="ll").splitlines()


def _machine(record: Path) -> Machine | None:
    """What the result was made on; None where `record` does not say it."""
    found = Made.within(record) or ReportRecord.within(record)
    return found and found.machine


def newer_versions(record: Path) -> list[str]:
    """The packages whose versions are others here than where the result was made, one line each."""
    machine = _machine(record)
    made = machine.versions if machine else {}
    return [f"{name} {made[name]} then, {now} here" for name, now in versions().items() if made.get(name, now) != now]


class Reruns:
    """Why the jobs of `config` would run again, those of the results folder `results`; unset: the last run's config.

    `is_there` says of an output whether it is there, if it need not be in the folder to be.
    """

    def __init__(
        self, results: Path, config: Config | None = None, is_there: Callable[[Path], bool] = Path.is_file
    ) -> None:
        self.results = results
        self.config = config or last_config(results)
        self._is_there = is_there
        self._alone: dict[Job, list[str]] = {}
        self._earlier: dict[Job, dict[Job, None]] = {}

    @cached_property
    def jobs(self) -> list[Job]:
        """Every job, in the order of the stages."""
        return list(jobs(self.config, str(self.results)))

    def job_of(self, record: Path) -> Job | None:
        """The job that writes `record`; None if the configuration asks for none such."""
        record = record.absolute()
        own = next((job for job in self.jobs if job.record.absolute() == record), None)
        tuned = (job for job in self.jobs if job.stage == "tune" and beside(job.record).absolute() == record.parent)
        return own or next(tuned, None)

    def reasons(self, job: Job) -> list[str]:
        """Why `job` would run again; none if it would not."""
        return [*self.own(job), *self._of_others(job)]

    def counts(self) -> dict[str, int]:
        """How many jobs of each stage would run again; stages without any are left out."""
        return dict(Counter(job.stage for job in self.jobs if self.reasons(job)))

    def own(self, job: Job) -> list[str]:
        """The reasons that are its own, and not of a job before it."""
        if job not in self._alone:
            found = self._alone[job] = []
            try:
                found.extend(self._own(job))  # what comes before an error stays in it
            except ArmorError as refused:  # a record of another version
                found.append(str(refused))
        return self._alone[job]

    def _own(self, job: Job) -> Iterator[str]:
        absent = [path for path in job.outputs if not self._is_there(path)]
        if absent:
            yield f"{absent[0]} is not there"
            return
        if job.stage == "inspect":  # what follows compares what it says
            return
        if job.stage == "fetch":
            then = SourceRecord.read(job.record).settings
        else:
            if (origin := Origin.within(job.record)) is None:
                yield "it was made by another release, which noted no provenance"
                return
            made = origin.made_by
            then = made.settings
            if (now := job.code(self.config)) != made.code:
                yield f"the code that {job.stage} executes has changed ({made.code}, now {now})"
            for name, found in (dict.fromkeys(made.experts()) | dict(self._inputs(job))).items():
                if made.inputs.get(name) != found:
                    yield f"input {name}: its fingerprint is another"
            files = text_files(job.settings(self.config))
            if files is not None and made.inputs.get(Input.TEXT_FILES) != files:
                yield f"input {Input.TEXT_FILES}: their fingerprint is another"
        if (settings := job.settings(self.config)) is not None:
            asked = settings.model_dump(mode="json", exclude_defaults=job.stage == "fetch")
            before, after = _flat(then), _flat(asked)
            for key in sorted(before.keys() | after.keys()):
                if before.get(key) != after.get(key):
                    yield f"setting {key}: {before.get(key, 'unset')}, now {after.get(key, 'unset')}"

    def _of_others(self, job: Job) -> Iterator[str]:
        """What makes a job before this one run again, said once for all jobs of a stage that it does so to."""
        groups: dict[tuple[str, ...], list[Job]] = {}
        for other in self._before(job):
            for reason in self.own(other):
                names = other.names[:2] if STAGES[other.stage].by_layer else other.names
                groups.setdefault((other.stage, *names, reason), []).append(other)
        for (*_, reason), found in groups.items():
            more = f", and {len(found) - 1} more of its stage" if len(found) > 1 else ""
            yield f"{found[0]}{more}: {reason}"

    def _before(self, job: Job) -> dict[Job, None]:
        """Every job that this one is made from, near or far, each once."""
        if job not in self._earlier:
            found: dict[Job, None] = {}
            for _, other in job.before(self.config):
                found |= self._before(other) | {other: None}
            self._earlier[job] = found
        return self._earlier[job]

    def _inputs(self, job: Job) -> Iterator[tuple[str, str | None]]:
        """The fingerprints of what `job` reads, as they are now; nothing of files that are not there."""
        layer = job.names[2] if STAGES[job.stage].by_layer else None
        together: dict[str, list[str]] = {}
        for name, other in job.before(self.config):
            if not other.record.is_file():
                continue
            if name in TOGETHER:
                together.setdefault(name, []).append(TOGETHER[name](other.record))
            elif job.stage != "report":
                yield from NOTED[other.stage](other, name, layer).items()
            elif other.stage not in FACTORS:  # a checkpoint stands for its layers
                yield other.record.relative_to(self.results).as_posix(), sha256(other.record)
        yield from ((name, combined(found)) for name, found in together.items())


def _flat(value: object, key: str = "") -> dict[str, object]:
    """Settings as one level, keys joined by dots; what is unset is left out."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, inner in items for k, v in _flat(inner, f"{key}.{name}".lstrip(".")).items()}
    return {} if value is None else {key: value}


def _text(settings: dict) -> str:
    """On one line, also where a setting holds line breaks."""
    return ", ".join(f"{key}: {value}".replace("\n", r"\n") for key, value in sorted(_flat(settings).items()))
