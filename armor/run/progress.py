"""One line of progress with the time left while Snakemake runs: `armor progress -- snakemake ...`.

On a terminal Snakemake is told to be quiet. What it says all the same (errors, the summary at the end) goes above the
line. The line is made from files alone, as `armor status` is: the jobs that are done, what they cost, what is left.
Where there is no terminal Snakemake runs as ever, a line for each job. Either way its exit status is this one's.

The time left is a guess that gets better. A job that is to come costs what others of its stage and recipe cost in the
mean. If none of its stage has ended yet, it costs what the table of jobs says, times how much dearer those that have
ended were. Jobs of a single thread run side by side, the others one after the other.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.format.layout import RESULTS, RUN
from armor.format.records.run import RunRecord
from armor.run.jobs import Job, jobs
from armor.run.stages import STAGES
from armor.run.status import cost, last_config

__all__ = ["Course", "follow", "typed", "words"]

TYPICAL_ITERATION = 0.15
"""Seconds that an iteration of the solver adds to a factorize job, beside those of the table of jobs."""
LAYERS = 30
"""Decoder layers of a model that is not inspected yet."""
QUIET = ("--quiet", "all")
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass
class Course:
    """A run on the results folder `results`: how far it is. `slots` jobs of one thread run at once."""

    results: Path
    config: Config
    began: float
    """When it began, since the epoch."""
    slots: int = 1
    total: int = 0
    """Jobs, as far as they are known."""
    done: int = 0
    running: list[Job] = field(default_factory=list)
    seconds_left: float = 0.0
    share: float = 0.0
    """Of the work that is done, of that which the run has to do; 1 at the end."""
    _seen: dict[Job, float] = field(default_factory=dict)

    def look(self, now: float) -> None:
        """Read how far it is at the time `now`, since the epoch."""
        costs: dict[tuple[str, ...], list[float]] = defaultdict(list)
        left: list[Job] = []
        running: list[Job] = []
        spent = took = expected = 0.0
        self.total = self.done = 0
        for job in jobs(self.config, str(self.results)):
            count = LAYERS if job.names[-1:] == ("?",) else 1
            self.total += count
            if not all(path.is_file() for path in job.outputs):
                left += [job] * count
                if _modified(job.log) >= self.began:
                    running.append(job)
                continue
            self.done += 1
            if (found := cost(job)) is not None:
                for group in _groups(job):
                    costs[group].append(found.seconds)
                if found.ended >= self.began:
                    spent += found.seconds / self._slots(job)
                if job.stage != "fetch":  # the network's speed says nothing about this machine
                    took += found.seconds
                    expected += self._typical(job)
        dearer = took / expected if expected else 1.0
        self.running = running
        self.seconds_left = 0.0
        for job in left:
            guess = self._guess(job, costs, dearer)
            if job in running:
                guess = max(0.0, guess - (now - self._seen.setdefault(job, now)))
            self.seconds_left += guess / self._slots(job)
        self.share = spent / (spent + self.seconds_left) if spent + self.seconds_left else 1.0

    def _slots(self, job: Job) -> int:
        return self.slots if STAGES[job.stage].by_layer else 1

    def _guess(self, job: Job, costs: Mapping[tuple[str, ...], list[float]], dearer: float) -> float:
        """Seconds that a job which has not ended will take."""
        for group in _groups(job):
            if found := costs.get(group):
                return sum(found) / len(found)
        return self._typical(job) * dearer

    def _typical(self, job: Job) -> float:
        """Seconds of such a job by the table of jobs."""
        seconds = STAGES[job.stage].seconds
        if job.stage in ("experts", "factorize"):
            recipe = self.config.recipes[job.names[1]]
            if recipe.takes("solver"):
                seconds += TYPICAL_ITERATION * recipe.solver.iterations
        return seconds


def _groups(job: Job) -> list[tuple[str, ...]]:
    """The jobs that one may cost as much as, the nearest first. Layers of another recipe are not among them."""
    if job.stage in ("experts", "factorize"):
        return [(job.stage, *job.names[:2])]
    return [(job.stage, *job.names[:1], *job.names[2:]), (job.stage,)]


def words(course: Course) -> str:
    """The line beside the bar: jobs, time left, what runs."""
    left = course.seconds_left
    time_left = f"{left / 60:.0f} min left" if left >= 90 else f"{max(5, round(left / 5) * 5):.0f} s left"
    running = ", ".join(map(str, course.running[:2])) + (" ..." if len(course.running) > 2 else "")
    return "  ".join(filter(None, (f"{course.done} of {course.total} jobs", time_left, running)))


def typed(arguments: Sequence[str]) -> list[str]:
    """Snakemake's `arguments` without what `follow` added to them."""
    added = len(QUIET)
    return list(arguments[:-added] if tuple(arguments[-added:]) == QUIET else arguments)


def follow(command: Sequence[str]) -> int:
    """Run `command`, Snakemake with its arguments, and show how far it is; its exit status.

    Raises ArmorError if there is no such command.
    """
    quiet = sys.stderr.isatty() and sys.stdout.isatty()
    try:
        process = subprocess.Popen(
            [*command, *QUIET] if quiet else command,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
            errors="replace",
        )
    except OSError as error:
        said = f"{command[0]}: cannot be started ({error.strerror})"
        raise ArmorError(f"{said}; expected snakemake and its arguments") from error
    # Ctrl-C reaches Snakemake too, which ends its jobs first; a kill of this process is passed on.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        if process.stdout is not None:
            _show(process, process.stdout, command)
        status = process.wait()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    return 128 - status if status < 0 else status  # as a shell says it


def _show(process: subprocess.Popen, said: IO[str], command: Sequence[str]) -> None:
    """Show the line until `process` ends, and above it what it says."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    columns = BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.description}")
    course: Course | None = None
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as line:
        task = line.add_task("starting", total=1.0)

        def pass_on() -> None:
            for text in said:
                line.console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)

        reader = threading.Thread(target=pass_on, daemon=True)
        reader.start()
        while process.poll() is None:
            course = course or _course(process.pid, command)
            if course is not None:
                with contextlib.suppress(ArmorError):  # a file that is replaced in this moment; the next look finds it
                    course.look(time.time())
                line.update(task, completed=course.share, description=_fitting(words(course), console.width))
            line.refresh()
            reader.join(SECONDS_BETWEEN_LOOKS)
        reader.join()


def _fitting(text: str, width: int) -> str:
    """As much of `text` as the line has room for beside the bar."""
    room = max(10, width - 32)
    return text if len(text) <= room else text[: room - 1] + "…"


def _course(process: int, command: Sequence[str]) -> Course | None:
    """The run that `process` has begun, once it has: its file names it."""
    file = Path(_option(command, "directory", "d") or ".") / RESULTS / RUN
    try:
        if RunRecord.read(file).process != process:
            return None
        return Course(file.parent, last_config(file.parent), file.stat().st_mtime, _slots(command))
    except ArmorError:  # not there yet, or half written
        return None


def _slots(command: Sequence[str]) -> int:
    """How many jobs of one thread run at once: by GPU where there are some, else by core."""
    gpus = re.search(r"\bgpu=(\d+)", " ".join(command))
    cores = _option(command, "cores", "c") or "all"
    number = int(gpus[1]) if gpus and int(gpus[1]) else int(cores) if cores.isdigit() else os.cpu_count() or 1
    return max(1, number)


def _option(command: Sequence[str], long: str, short: str) -> str | None:
    """The value of an option of Snakemake's, in any of the ways to write it."""
    for index, word in enumerate(command):
        if word in (f"--{long}", f"-{short}"):
            return next(iter(command[index + 1 :]), None)
        if found := re.fullmatch(rf"--{long}=(.*)|-{short}(\d+)", word):
            return found[1] or found[2]
    return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
