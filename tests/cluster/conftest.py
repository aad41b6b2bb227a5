"""The tiny workflow through a real SLURM (tests/cluster/slurm.py), or a line that says why not.

The cluster's GPUs compute nothing. So a sitecustomize.py, which every Python reads as it starts, lets the lease happen
as ever, writes down what SLURM gave and what was leased, and sends the stage to the CPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.cluster.slurm import HANGS, cluster, missing
from tests.tiny import tiny_model
from tests.workflow.conftest import REPOSITORY, text  # noqa: F401

LAYERS = 3
SITECUSTOMIZE = """
import atexit, json, os, sys, time
from armor.execution import devices

def lease(count, take=devices.lease):
    begin = {"given": os.environ.get("CUDA_VISIBLE_DEVICES"), "job": os.environ.get("SLURM_JOB_ID")}
    device = take(count)
    line = begin | {"stage": sys.argv[1], "leased": os.environ["CUDA_VISIBLE_DEVICES"], "begin": time.time()}
    def write():
        with open(os.environ["LEASES"], "a") as file:
            file.write(json.dumps(line | {"end": time.time()}) + "\\n")
    if device != "cpu":
        atexit.register(write)
    time.sleep(float(os.environ.get("LINGER", "0")))
    return "cpu"

devices.lease = lease
if "snakemake" in sys.orig_argv:
    # SLURM's plugin waits 10 s longer each time that nothing has ended, for jobs that take hours; these take seconds.
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
    RemoteExecutor.next_seconds_between_status_checks = property(lambda _: 1, lambda *_: None)
"""


@dataclass
class Cluster:
    """A running SLURM, and how to run the workflow on it."""

    environment: dict[str, str]
    started: list[subprocess.Popen] = field(default_factory=list)

    def command(self, *arguments: str) -> str:
        """What a SLURM command prints."""
        return subprocess.run(arguments, env=self.environment, check=True, capture_output=True, text=True).stdout

    def snakemake(self, folder: Path, config: dict, profile: str, *arguments: str, **environment: str) -> "Run":
        """Start Snakemake with a profile, in `folder`."""
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
        command += ["--profile", str(REPOSITORY / "profiles" / profile)]
        command += ["--directory", str(folder), "--configfile", str(folder / "config.yaml")]
        command += ["--set-threads", *ONE_THREAD, "--seconds-between-status-checks", "1", *arguments]
        log = folder / f"snakemake-{time.monotonic_ns()}.log"
        environment = self.environment | {"LEASES": str(folder / "leases"), **environment}
        with open(log, "wb") as output:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
        self.started.append(process)
        return Run(process, folder, log)


ONE_THREAD = ("calibrate=1", "evaluate=1", "benchmark=1")  # sums in one order wherever they are made


@dataclass
class Run:
    """A Snakemake that was started, its working directory and what it says."""

    process: subprocess.Popen
    folder: Path
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def finish(self, seconds: float = 6 * HANGS) -> str:
        """Wait for a good end; returns what was said."""
        assert self.process.wait(seconds) == 0, self.said()
        return self.said()

    def wait_for(self, condition, seconds: float = 6 * HANGS):
        """What `condition` returns, once it is true."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end and self.process.poll() is None, self.said()
            time.sleep(0.2)
        return found

    def leases(self) -> list[dict]:
        """What the GPU jobs that ended were given by SLURM and leased of it, in order of time."""
        lines = map(json.loads, (self.folder / "leases").read_text().splitlines())
        return sorted(lines, key=lambda line: line["begin"])

    def run_id(self) -> str:
        return re.search(r"SLURM run ID: (\S+)", self.said())[1]


@pytest.fixture(scope="session")
def slurm():
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="armor-slurm-") as name:
        folder = Path(name)
        (folder / "python").mkdir()
        (folder / "python/sitecustomize.py").write_text(SITECUSTOMIZE)
        with cluster(folder) as environment:
            environment |= {"PYTHONPATH": f"{folder / 'python'}:{REPOSITORY}"}
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            found = Cluster(environment)
            yield found
            for process in found.started:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def config(tmp_path_factory, text):  # noqa: F811
    model = tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama", layers=LAYERS)
    words = {"sequences": 4, "sequence_length": 32}
    return {
        "models": {"tiny": {"folder": str(model)}},
        "calibrations": {"words": {"text": {"files": [str(text / "calibration.txt")]}, **words}},
        "recipes": {"armor": {"block_size": 8, "solver": {"iterations": 3}}},
        "evaluations": {"words": {"text": {"files": [str(text / "evaluation.txt")]}, **words}},
        "benchmarks": {"decode": {"prompt_tokens": 4, "new_tokens": 4, "repeats": 2}},
    }


@pytest.fixture(scope="session")
def local(tmp_path_factory, config):
    """The folder of the same workflow without a cluster, up to the evaluation."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--cores", "2"]
    command += ["--directory", str(folder), "--configfile", str(folder / "config.yaml"), "--set-threads", *ONE_THREAD]
    command += ["--", "results/tiny/armor/evaluation/words.json"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder
