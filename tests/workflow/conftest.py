"""A finished run of the whole workflow on a tiny random model, and a way to ask what would run again."""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import smart_open  # noqa: F401  # as Snakemake does when it reads the Snakefile
import snakemake.cli
import yaml

from armor.command import forkserver
from armor.execution.fingerprint import code_hash
from armor.run import explain  # noqa: F401
from armor.run.stages import STAGES
from tests.forks import fork, popen
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS = 2


def all_forked() -> None:
    """Let the server do `inspect` and `report` too, which import for two seconds each."""
    from armor.run.stages import STAGES  # those of a copy of the code, where it was imported anew

    for stage in ("inspect", "report"):
        STAGES[stage] = replace(STAGES[stage], forked=True)


@cache
def server() -> str | None:
    """The name of this process's server of forks: one for all runs on this code, instead of one for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))  # a part of the server's address
        patch.setattr(subprocess, "Popen", popen)
        for stage in ("inspect", "report"):
            patch.setitem(STAGES, stage, replace(STAGES[stage], forked=True))
        forkserver.start()
    return os.environ.pop(forkserver.VARIABLE, None)


@cache
def warm() -> None:
    """Import and remember in this process what every fork of a run would import and compute again."""
    for stage in STAGES.values():
        code_hash(stage.entry)


@dataclass(frozen=True)
class Run:
    """A working directory with results, the configuration that made them, and the Snakefile to ask."""

    folder: Path
    config: dict
    repository: Path = REPOSITORY
    python: Path | None = None  # a folder that every Python of the run reads first

    def command(self, *arguments: str, config: dict | None = None) -> dict:
        """Snakemake's command line, environment and folder, as subprocess takes them."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config or self.config, sort_keys=False))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(self.repository / "Snakefile"), "--cores", "2"]
        command += ["--directory", str(self.folder), "--configfile", str(path), *arguments]
        return {"args": command, "env": self._environment(), "cwd": self.repository}

    def copied(self, folder: Path, **changes) -> "Run":
        """The same results in a folder of their own, which a test may change; `changes` as `edited` takes them."""
        shutil.copytree(self.folder, folder)
        return Run(folder, self.edited(**changes), self.repository)

    def snakemake(self, *arguments: str, config: dict | None = None) -> subprocess.CompletedProcess:
        """Run it: its main function in a fork, where that is enough. A dry run then takes half of the time."""
        command = self.command(*arguments, config=config)
        if self.python is not None:
            return subprocess.run(**command, capture_output=True, text=True)

        name = server() if self.repository == REPOSITORY else None

        def work():
            if name:
                forkserver.start = partial(os.environ.__setitem__, forkserver.VARIABLE, name)
            sys.argv = command["args"][2:]
            snakemake.cli.main(sys.argv[1:])

        return self.forked(work)

    def armor(self, *arguments: str) -> subprocess.CompletedProcess:
        """The command of this repository, in the run's folder."""

        def work():
            from armor.command import cli  # here: that of the fork

            sys.argv = ["armor", *arguments]
            cli.main()

        return self.forked(work, self.folder)

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(map(str, filter(None, (self.python, self.repository))))
        return os.environ | {"PYTHONPATH": path}

    def forked(self, work: Callable[[], object], folder: Path | None = None) -> subprocess.CompletedProcess:
        """Do `work` in a fork, on the code of this repository, in it or in `folder`."""
        warm()

        def anew() -> None:
            if self.repository != REPOSITORY:
                sys.path.insert(0, str(self.repository))
                for name in [name for name in sys.modules if name.partition(".")[0] == "armor"]:
                    del sys.modules[name]
            all_forked()
            work()

        return fork(anew, folder or self.repository, self._environment())

    def would_run(self, config: dict | None = None, *arguments: str) -> dict[str, int]:
        """Jobs by rule that a run would execute now."""
        done = self.snakemake("--dry-run", *arguments, config=config)
        assert done.returncode == 0, done.stderr + done.stdout
        text = done.stdout + done.stderr
        table = re.search(r"^job +count\n-+ +-+\n(.*?)^total", text, re.MULTILINE | re.DOTALL)
        if table is None:
            assert "Nothing to be done" in text, text
            return {}
        return {
            rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table[1], re.MULTILINE) if rule != "all"
        }

    def edited(self, **changes) -> dict:
        """The configuration with keys replaced: edited(recipes__armor__block_size=4)."""
        edited = copy.deepcopy(self.config)
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = edited
            for key in parents:
                place = place.setdefault(key, {})
            place[last] = value
        return edited


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Two files of words, one to calibrate on and one to evaluate on."""
    folder = tmp_path_factory.mktemp("text")
    words = (REPOSITORY / "LICENSE").read_text().split()
    half = len(words) // 2
    (folder / "calibration.txt").write_text(" ".join(words[:half]))
    (folder / "evaluation.txt").write_text(" ".join(words[half:]))
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory, text):
    model = tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama", layers=LAYERS)
    return {
        "models": {"tiny": {"folder": str(model)}},
        "calibrations": {
            "words": {"text": {"files": [str(text / "calibration.txt")]}, "sequences": 4, "sequence_length": 32}
        },
        "recipes": {
            "dense": {"method": "dense"},
            "nowag": {"method": "nowag"},
            "armor": {"block_size": 8, "solver": {"iterations": 3}},
        },
        "evaluations": {
            "words": {"text": {"files": [str(text / "evaluation.txt")]}, "sequences": 4, "sequence_length": 32}
        },
    }


@pytest.fixture(scope="session")
def run(tmp_path_factory, config):
    """The workflow, run once to its end."""
    run = Run(tmp_path_factory.mktemp("run"), config)
    done = run.snakemake()
    assert done.returncode == 0, done.stderr + done.stdout
    return run


@pytest.fixture
def code(tmp_path):
    """A copy of the repository's code that a test may edit: its folder."""
    for name in ("Snakefile", "workflow", "armor", "config", "envs", "profiles"):
        source = REPOSITORY / name
        target = tmp_path / "clone" / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return tmp_path / "clone"


@pytest.fixture
def clone(run, code):
    """The same results, asked through that copy."""
    return Run(run.folder, run.config, code)
