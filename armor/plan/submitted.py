"""What each job asks of a cluster with a profile of Snakemake: `armor plan my.yaml --profile profiles/slurm`.

Snakemake itself says it, in a dry run on the headers of the models. So what the profile and the rules set is what
stands here, and a rule that asks for less memory than its jobs take is found before they are killed. The dry run is a
process of its own (`python -m armor.plan.submitted ARGUMENTS`), for Snakemake ends the process that it runs in. Neither
the cluster nor the bucket of a profile is needed, and no plugin for them.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.execution.table import text_table
from armor.run.stages import CLUSTER_CORES, STAGES

__all__ = ["Submitted", "submitted", "table"]

PROFILE = "config.yaml"
ANY_CORES = 9999
"""A cluster has no limit; without a number a dry run would say what this machine allows."""


class Submitted(Typed):
    """Jobs of one stage that ask a cluster for the same."""

    stage: str
    jobs: int
    cores: int
    memory_bytes: int
    """On the host; 0 where nothing is asked."""
    minutes: int
    """The time limit; 0 where none is set."""
    gpus: int


def submitted(files: Sequence[Path], profile: str, folder: Path) -> tuple[Submitted, ...]:
    """The jobs as Snakemake would submit them with `profile`, if the run began from the models' headers in `folder`.

    The Snakefile is the one that `snakemake` finds here. Raises ArmorError with what Snakemake says.
    """
    asked = ["--dry-run", "--cores", str(ANY_CORES), "--profile", _at_home(profile, folder)]
    asked += ["--directory", str(folder)]
    asked += ["--configfile", *map(str, files)]
    done = subprocess.run([sys.executable, "-m", __name__, *asked], capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()][::-1]
        why = next((line for line in said if "rror" in line), said[0] if said else "no message")
        raise ArmorError(f"--profile {profile}: snakemake --dry-run fails here: {why}")
    counts: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            counts[line] = counts.get(line, 0) + 1
    found = [Submitted(**json.loads(line), jobs=count) for line, count in counts.items()]
    return tuple(sorted(found, key=lambda one: [*STAGES].index(one.stage)))


def _at_home(profile: str, folder: Path) -> str:
    """The profile without what says where jobs run and where results lie, in `folder`.

    A name alone is one of the folder profiles. As it is where it is no folder here, for Snakemake looks in others too.
    """
    own = Path("profiles") / profile / PROFILE
    file = own if own.is_file() and not Path(profile).is_dir() else Path(profile) / PROFILE
    if not file.is_file():
        return profile
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        away = "storage", f"{given.get('executor')}-"
    except (yaml.YAMLError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise ArmorError(f"{file}: {said}; expected the YAML of a profile of Snakemake") from None
    kept = {key: value for key, value in given.items() if key != "executor" and not any(part in key for part in away)}
    here = folder / "profile" / PROFILE
    here.parent.mkdir()
    here.write_text(yaml.safe_dump(kept), encoding="utf-8")
    return str(here.parent)


def table(found: Sequence[Submitted], profile: str) -> Iterator[str]:
    """The table that a person reads."""
    rows = [
        [
            one.stage,
            str(one.jobs),
            str(one.cores),
            f"{one.memory_bytes / 1e9:,.3g} GB" if one.memory_bytes else "–",
            f"{one.minutes // 60}:{one.minutes % 60:02} h" if one.minutes else "–",
            str(one.gpus or "–"),
        ]
        for one in found
    ]
    yield f"with {profile}:"
    yield from text_table(rows, ["stage", "jobs", "cores", "memory", "time", "GPUs"]).splitlines()


def _tell(record: logging.LogRecord) -> bool:
    """Print a JSON line for a job that Snakemake announces; of other messages nothing."""
    stage = getattr(record, "rule_name", None)
    resources = getattr(record, "resources", None)
    if stage in STAGES and resources is not None:
        cores = vars(record)["threads"]
        asked = {"stage": stage, "cores": CLUSTER_CORES if cores == ANY_CORES else cores}
        asked |= {"memory_bytes": resources.get("mem_mb", 0) * 10**6}
        asked |= {"minutes": resources.get("runtime", 0), "gpus": resources.get("gpu", 0)}
        print(json.dumps(asked))
    return True


def _main() -> None:
    import snakemake.cli
    from snakemake.logging import logger

    logger.addFilter(_tell)  # Snakemake takes all handlers away when it begins
    snakemake.cli.main(sys.argv[1:])


if __name__ == "__main__":
    _main()
