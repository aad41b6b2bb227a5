"""Results in a bucket of a real S3 server on this machine (moto's), and jobs that share no file system (Kubernetes)."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.cluster.kubernetes import kubernetes
from tests.tiny import tiny_model
from tests.workflow.conftest import REPOSITORY

BUCKET = "s3://armor/runs/tiny"
RESULTS = "runs/tiny/results/"
COPIES = f".snakemake/storage/{BUCKET.replace('://', '/')}"
SERVE = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""
KEYS = {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "me", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "secret"}


@dataclass(frozen=True)
class Bucket:
    """An S3 server at `endpoint`, and a configuration to run with results in it."""

    endpoint: str
    config: Path

    def snakemake(self, folder: Path, *arguments: str, **environment: str) -> str:
        """Run the workflow in `folder`, which gets the rules and the configuration; what it said."""
        if not folder.exists() or not any(folder.iterdir()):
            for name in ("workflow", "profiles", "config", "envs"):
                shutil.copytree(REPOSITORY / name, folder / name)
            shutil.copy(REPOSITORY / "Snakefile", folder)
        shutil.copy(self.config, folder / "my.yaml")
        command = [sys.executable, "-m", "snakemake", "--configfile", "my.yaml"]
        command += ["--storage-s3-endpoint-url", self.endpoint, "--default-storage-prefix", BUCKET, *arguments]
        env = os.environ | KEYS | {"PYTHONPATH": str(REPOSITORY)} | environment
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stderr + done.stdout

    def client(self):
        import boto3

        keys = {"aws_access_key_id": "me", "aws_secret_access_key": "secret"}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def objects(self) -> dict[str, int]:
        """The bytes of all objects by name within the run's results."""
        found = self.client().get_paginator("list_objects_v2").paginate(Bucket="armor", Prefix=RESULTS)
        return {o["Key"].removeprefix(RESULTS): o["Size"] for page in found for o in page["Contents"]}

    def read(self, name: str) -> dict:
        """A record within the run's results."""
        return json.loads(self.client().get_object(Bucket="armor", Key=RESULTS + name)["Body"].read())


def jobs_of(said: str) -> set[str]:
    """The jobs that Snakemake announced."""
    return set(re.findall(r"^ *Job \d+: (.+)$", said, re.MULTILINE))


def rule_of(job: dict) -> str:
    """The rule of a Kubernetes job, by its command."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return re.search(r"--target-jobs '?(\w+)", container["args"][1])[1]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory, text):
    pytest.importorskip("snakemake_storage_plugin_s3", reason="results in a bucket need snakemake-storage-plugin-s3")
    pytest.importorskip("moto", reason="moto serves S3 for this test")
    folder = tmp_path_factory.mktemp("storage")
    sample = {"sequences": 4, "sequence_length": 32}
    config = {
        "models": {"tiny": {"folder": str(tiny_model(folder / "tiny", layers=2))}},
        "calibrations": {"words": {"text": {"files": [str(text / "calibration.txt")]}, **sample}},
        "recipes": {"armor": {"block_size": 8, "solver": {"iterations": 3}}},
        "evaluations": {"words": {"text": {"files": [str(text / "evaluation.txt")]}, **sample}},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", SERVE], text=True, **pipes)
    try:
        yield Bucket(f"http://127.0.0.1:{int(server.stdout.readline())}", folder / "my.yaml")
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def run(bucket, tmp_path_factory):
    """The folder of the first run, with the profile."""
    folder = tmp_path_factory.mktemp("first")
    bucket.snakemake(folder, "--profile", "profiles/s3", "--cores", "2")
    return folder


@pytest.mark.gate
def test_the_bucket_has_all_results_and_a_second_run_does_nothing(bucket, run):
    found = bucket.objects()
    record = json.loads((run / COPIES / "results/tiny/armor/checkpoint.json").read_text())
    for name, file in record["files"].items():
        assert found[f"tiny/armor/checkpoint/{name}"] == file["bytes"]
    assert {"tiny/calibration/words/layer_1.safetensors", "tiny/armor/layers/layer_1.safetensors"} <= found.keys()
    assert {"report/index.html", "tiny/armor/evaluation/words.json", "logs/fetch/tiny.log"} <= found.keys()
    assert not (run / "results").exists()
    assert "Nothing to be done" in bucket.snakemake(run, "--profile", "profiles/s3", "--cores", "2")


def test_another_machine_goes_on_from_what_the_bucket_has(bucket, run, tmp_path):
    """Without copies, and without the profile that keeps them: a job finds all that it reads, for it was declared."""
    there = ("--default-storage-provider", "s3", "--cores", "2")
    assert "Nothing to be done" in bucket.snakemake(tmp_path / "a", *there)
    edited = bucket.config.with_name("edited.yaml")
    edited.write_text(bucket.config.read_text().replace("iterations: 3", "iterations: 4"))
    told = jobs_of(Bucket(bucket.endpoint, edited).snakemake(tmp_path / "b", "--dry-run", *there))
    assert "factorize tiny armor layer 1" in told and not {job for job in told if job.startswith("calibrate")}
    said = bucket.snakemake(tmp_path / "c", *there, "--forcerun", "assemble")
    assert {"assemble tiny armor", "evaluate tiny armor words"} <= jobs_of(said)
    assert not list((tmp_path / "c").rglob("*.safetensors"))
    here = json.loads((run / COPIES / "results/tiny/armor/checkpoint.json").read_text())
    assert bucket.read("tiny/armor/checkpoint.json")["files"] == here["files"]


def test_pods_ask_for_what_a_rule_states_and_share_nothing_but_the_bucket(bucket, run, tmp_path):
    pytest.importorskip("snakemake_executor_plugin_kubernetes", reason="Kubernetes needs its executor plugin")
    profile = ("--profile", "profiles/kubernetes", "--container-image", "registry/armor:1")
    with kubernetes(tmp_path / "pods") as (environment, jobs):
        asked = ("--forcerun", "factorize", "--", "results/tiny/armor/checkpoint.json")
        said = bucket.snakemake(tmp_path / "driver", *profile, *asked, **environment)
    assert {"factorize tiny armor layer 1", "assemble tiny armor"} <= jobs_of(said)
    pods = {rule_of(job): job["spec"]["template"]["spec"] for job in jobs}
    assert pods.keys() == {"factorize", "assemble"}
    for rule, (cores, memory, gpus) in {"factorize": (1, 16000, 1), "assemble": (1, 16000, 0)}.items():
        (container,) = pods[rule]["containers"]
        asked = {"memory": f"{memory}M", "ephemeral-storage": "100000M", "nvidia.com/gpu": str(gpus)}
        assert container["image"] == "registry/armor:1"
        assert container["resources"]["requests"] == {"cpu": f"{950 * cores}m"} | asked
        assert container["resources"]["limits"] == {"cpu": f"{1000 * cores}m"} | asked
        assert {variable["name"] for variable in container["env"]} >= KEYS.keys()
