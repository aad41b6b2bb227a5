"""What is done, running, failed or missing in a results folder, from its files alone: while a run goes on, and after.

A run of the workflow notes in results/run.json its configuration and its command, and locks that file as long as it
lives. So a second run on the same results stops at once. A killed one leaves nothing that has to be unlocked.
`armor.run.jobs` has what the configuration asks for: the outputs that prove a job done, and its log. The log tells more
of a job that is not done. It ends with an error (failed), it is of the run that goes on (running), or neither: what the
job made was deleted since (missing), or it did not end (stopped: killed, as a rule, or out of memory). Snakemake writes
what a job cost to a benchmark file when it ends. The job's memory is in its record too. Whether what is done is up to
date is for `armor.run.explain` to say.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shlex
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from armor.config.reading import parse_settings
from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.execution.files import part_of, try_lock
from armor.execution.table import text_table
from armor.format.layout import RESULTS, RUN, Results
from armor.format.names import beside
from armor.format.records.base import Made
from armor.format.records.run import RunRecord
from armor.run.jobs import Job, jobs, jobs_of

__all__ = [
    "ERROR",
    "STATES",
    "Cost",
    "Status",
    "cost",
    "last_config",
    "read_status",
    "start_run",
    "summary",
]

ERROR = "armor: error: "
"""How the line begins with which a failed `armor` command ends."""
STATES = ("done", "running", "failed", "stopped", "missing")


@dataclass(frozen=True)
class Cost:
    """Seconds that a job took, the most resident memory its processes held, and when it ended (since the epoch)."""

    seconds: float
    peak_memory_bytes: int
    ended: float


def start_run(results: Path, config: Config, command: Sequence[str]) -> int:
    """Note that this process, started as `command`, works on `results` until it ends; the lock's descriptor.

    Raises ArmorError if another run does.
    """
    results.mkdir(parents=True, exist_ok=True)
    file = results / RUN
    descriptor = try_lock(file)
    if descriptor is None:
        other = RunRecord.read(file)
        raise ArmorError(
            f"{results.absolute()}: another run is at work here (process {other.process} on {other.host}); wait "
            "for its end, or choose another folder with --directory"
        )
    record = RunRecord(
        process=os.getpid(),
        host=socket.gethostname(),
        command_line=tuple(command),
        typed_in=_shells_folder(),
        config=config.model_dump(mode="json", exclude_unset=True),
    )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (record.model_dump_json(indent=1) + "\n").encode())
    return descriptor


@dataclass(frozen=True)
class Status:
    """The state of every job, the last line of the log of those that are not done, and the last run's command."""

    results: Path
    states: dict[Job, str]
    lines: dict[Job, str]
    command: tuple[str, ...]
    folder: str
    """Where the command was typed."""

    def table(self) -> str:
        """The jobs by stage, model and recipe, counted by state."""
        groups: dict[tuple[str, str], Counter] = {}
        for job, state in self.states.items():
            groups.setdefault((job.stage, " ".join(job.names[:2])), Counter())[state] += 1
        rows = [(*group, *(str(counts[state] or "") for state in STATES)) for group, counts in groups.items()]
        return text_table(rows, ("stage", "of", *STATES), align="ll")

    def details(self) -> list[str]:
        """Of every job that runs, where it is; of every one that failed or was stopped, the cause, and how to go on."""
        text = []
        for job, state in self.states.items():
            if state == "running":
                text.append(f"{job}: {self.lines[job]}")
            elif state in ("failed", "stopped"):
                why = self.lines[job] if state == "failed" else "stopped without a word: killed, or out of memory"
                # A layer alone does not have the states made that it is refined on: what sums up all layers does. The
                # record of the states may be there without them.
                made = Job("refined", job.names[:2], job.results) if job.stage == "refine" else job
                file = beside(job.record) if job.stage == "states" else made.outputs[0]
                target = file.absolute().relative_to(self.results.absolute().parent)
                again = shlex.join(["snakemake", str(target), *self.command[1:]])
                if self.folder != _shells_folder():
                    again = f"cd {shlex.quote(self.folder)} && {again}"
                text.append(f"{job}: {why}\n  log:   {job.log}\n  again: {again}")
        return text


def read_status(results: Path, config: Config | None = None, running: bool | None = None) -> Status:
    """The state of every job of `config`, or of the last run's configuration; `running`: whether that is going on.

    `results` may be the folder above, that of --directory. Raises ArmorError if there was no run and no `config` is
    given.
    """
    if not (results / RUN).is_file() and (results / RESULTS / RUN).is_file():
        results = results / RESULTS
    file = results / RUN
    last = RunRecord.read_if_there(file)
    if config is None:
        if last is None:
            raise ArmorError(f"{file}: no such file, so no run was started here; name another folder, or give --config")
        config = parse_settings(Config, last.config, str(file))
    if running is None:
        lock = try_lock(file) if last else None
        running = last is not None and lock is None
        if lock is not None:
            os.close(lock)
    states, lines = {}, {}
    for job in jobs(config, str(results)):
        lines[job] = _last_line(job.log)
        if lines[job].startswith(ERROR):
            states[job], lines[job] = "failed", lines[job].removeprefix(ERROR)
        elif all(output.is_file() for output in job.outputs) and not part_of(job.record).exists():
            states[job] = "done"  # else what is there was made by an earlier run
        elif not job.log.is_file() or (_ended(job) and not part_of(job.record).exists()):
            states[job] = "missing"
        elif running and job.log.stat().st_mtime >= file.stat().st_mtime:
            states[job] = "running"
        else:
            states[job] = "stopped"
    command, folder = (last.command_line, last.typed_in) if last else (("snakemake",), _shells_folder())
    return Status(results, states, lines, command, folder)


def _ended(job: Job) -> bool:
    """Whether it ended well when it last ran: only then Snakemake measures it."""
    return job.measured.is_file() and job.measured.stat().st_mtime >= job.log.stat().st_mtime


def last_config(results: Path) -> Config:
    """The configuration of the last run on `results`. Raises ArmorError if there was none."""
    return parse_settings(Config, RunRecord.read(results / RUN).config, str(results / RUN))


def summary(results: Path, config: Config) -> list[str]:
    """What the run that ends now did: by stage, the jobs that ran and those that it reused, seconds, memory."""
    began = (results / RUN).stat().st_mtime
    rows = []
    stages: dict[str, list[Job]] = {}
    for job in jobs(config, str(results)):
        if all(output.is_file() for output in job.outputs):
            stages.setdefault(job.stage, []).append(job)
    for stage, done in stages.items():
        costs = [found for job in done if (found := cost(job)) and found.ended >= began]
        seconds = f"{sum(c.seconds for c in costs):,.1f}" if costs else ""
        peak = f"{max(c.peak_memory_bytes for c in costs) / 1e6:,.0f} MB" if costs else ""
        rows.append((stage, str(len(costs) or ""), str(len(done) - len(costs) or ""), seconds, peak))
    table = text_table(rows, ("stage", "ran", "reused", "seconds", "peak memory"))
    return [*table.splitlines(), f"{time.time() - began:,.0f} s from the start to the end", *_left(results, config)]


def _left(results: Path, config: Config) -> list[str]:
    """The hidden states of the configuration's models that no recipe asks for: an interrupted run left them, say."""
    states = list(jobs_of(config, "states", Results(str(results))))
    asked = {path for job in states for path in (beside(job.record), part_of(job.record))}
    folders = [Results(".").states(model, "*").removesuffix(".json") for model in config.models]
    there = [path for folder in folders for path in results.glob(folder) if path.is_dir()]
    return [
        f"{path}: hidden states that nothing here asks for, {size / 1e9:.3g} GB; delete them if no other run needs them"
        for path in sorted(path for path in there if path not in asked)
        if (size := sum(file.stat().st_size for file in path.rglob("*")))
    ]


def cost(job: Job) -> Cost | None:
    """What `job` took when it last succeeded, as Snakemake measured it; None if it did not yet.

    Snakemake does not see the memory of a job that ran in the fork server; the job's record tells it.
    """
    file = job.measured
    if not file.is_file():
        return None
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    if not rows or None in rows[-1].values():  # a kill cut it short
        return None
    row = rows[-1]
    peak = 0 if row["max_rss"] in ("NA", "-") else int(float(row["max_rss"]) * 2**20)  # too short to be looked at
    for path in job.outputs:
        if path.suffix == ".json":
            with contextlib.suppress(ArmorError):  # gone or damaged: that is for the stages that read it to say
                made = Made.within(path)
                peak = max(peak, made.peak_memory_bytes if made else 0)
    return Cost(float(row["s"]), peak, file.stat().st_mtime)


def _shells_folder() -> str:
    """Where a command is typed, which is not where it works if it has Snakemake's --directory."""
    return os.environ.get("PWD", os.getcwd())


def _last_line(log: Path) -> str:
    """The last line of a log that is not empty; none if there is no log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
