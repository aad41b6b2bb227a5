"""The profiles `slurm` and `cluster-generic` on a real cluster: what comes out, who gets which GPU, what survives."""

import json
import re
import shutil
import time
from itertools import pairwise

import pytest

from armor.execution.files import sha256
from tests.cluster.conftest import LAYERS
from tests.cluster.slurm import HANGS

SOON = ("--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "10")
LAYER = "results/tiny/armor/layers/layer_{}.safetensors"


@pytest.fixture(scope="session")
def run(slurm, config, tmp_path_factory):
    """The whole workflow with profiles/slurm: a layer's job is cancelled, then Snakemake killed, and all run again.

    Returns the run that was killed, the one that ended, and the times of the files that were there between the two.
    """
    folder = tmp_path_factory.mktemp("slurm")
    first = slurm.snakemake(folder, config, "slurm", *SOON, LINGER="1")

    def running_layers():
        lines = slurm.command("squeue", "--noheader", "--states=RUNNING", "--format=%i %k").splitlines()
        return [line.split()[0] for line in lines if "rule_factorize" in line]

    slurm.command("scancel", first.wait_for(running_layers)[0])
    first.wait_for(lambda: "Trying to restart job" in first.said())
    first.wait_for(lambda: [line for line in first.leases() if line["stage"] == "factorize"])
    first.process.kill()
    first.process.wait()
    name = f"--name={first.run_id()}"
    slurm.command("scancel", name)  # or its jobs would go on, beside those that start next
    while slurm.command("squeue", "--noheader", name):
        time.sleep(0.2)
    finished = ("source.json", "model.json", "calibration/words/calibration.json")
    before = {path: path.stat().st_mtime_ns for path in (folder / "results/tiny" / name for name in finished)}
    slurm.snakemake(folder, config, "slurm", "--unlock").finish()
    second = slurm.snakemake(folder, config, "slurm", *SOON)
    second.finish()
    return first, second, before


@pytest.mark.gate
def test_layers_that_were_made_on_slurm_have_the_same_bytes(slurm, config, local, tmp_path):
    """Nothing but a real cluster shows that it takes the jobs as they are submitted, and gives each its GPU."""
    layers = [LAYER.format(index) for index in range(2)]
    made = slurm.snakemake(tmp_path, config, "slurm", *SOON, "--", *layers)
    made.finish()
    assert [sha256(tmp_path / layer) for layer in layers] == [sha256(local / layer) for layer in layers]
    leases = made.leases()
    assert len(leases) == 1 + len(layers) and all(line["given"] == line["leased"] for line in leases)


def test_a_cluster_that_cancels_and_is_left_makes_the_same_bytes(run, local):
    cancelled, finished, _ = run
    assert "SLURM status is: 'CANCELLED'" in cancelled.said()
    names = [file.relative_to(local) for file in sorted(local.glob("results/tiny/**/*.safetensors"))]
    assert len(names) == 2 * LAYERS + 1
    for name in names:
        assert sha256(finished.folder / name) == sha256(local / name), name
    evaluations = [folder / "results/tiny/armor/evaluation/words.json" for folder in (finished.folder, local)]
    there, here = (json.loads(file.read_text())["block_means"] for file in evaluations)
    assert there == here
    assert (finished.folder / "results/report/index.html").exists()


def test_each_layer_runs_alone_on_the_gpu_that_it_was_given(run):
    leases = run[0].leases()
    assert {line["stage"] for line in leases} >= {"calibrate", "factorize", "evaluate", "benchmark"}
    assert all(line["given"] == line["leased"] and line["leased"] in set("0123") for line in leases)
    assert len({line["job"] for line in leases}) == len(leases)
    for line in leases:
        others = [other for other in leases if other["leased"] == line["leased"] and other is not line]
        assert all(other["end"] <= line["begin"] or other["begin"] >= line["end"] for other in others)


def test_after_a_kill_what_was_finished_is_not_computed_again(run):
    _, second, before = run
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not re.search(r"^ *Job \d+: (fetch|inspect|calibrate) ", second.said(), re.MULTILINE)
    assert re.search(r"^ *Job \d+: factorize tiny ", second.said(), re.MULTILINE)
    assert not list(second.folder.glob("results/**/*.tmp"))


def test_small_layers_are_grouped_and_share_the_gpu_of_their_job(slurm, config, local, tmp_path):
    for name in ("source.json", "model.json", "calibration"):
        copy = shutil.copytree if name == "calibration" else shutil.copy2  # with their times
        (tmp_path / "results/tiny").mkdir(parents=True, exist_ok=True)
        copy(local / "results/tiny" / name, tmp_path / "results/tiny" / name)
    layers = [LAYER.format(index) for index in range(LAYERS)]
    grouped = slurm.snakemake(
        *(tmp_path, config, "cluster-generic", "--latency-wait", "10"),
        *("--groups", "factorize=layers", "--group-components", f"layers={LAYERS}"),
        *("--resources", "gpu=1", "--set-resource-scopes", "gpu=local", "--", *layers),
    )
    grouped.finish()
    leases = grouped.leases()
    assert len(leases) == LAYERS and len({line["job"] for line in leases}) == 1
    assert len({line[key] for line in leases for key in ("given", "leased")}) == 1
    assert all(one["end"] <= two["begin"] for one, two in pairwise(leases))
    for layer in layers:
        assert sha256(tmp_path / layer) == sha256(local / layer)


def test_a_job_over_its_runtime_is_told_and_leaves_nothing(slurm, config, tmp_path):
    asked = ("--set-resources", "fetch:runtime=1", "--retries", "0", "--", "results/tiny/source.json")
    run = slurm.snakemake(tmp_path, config, "cluster-generic", *asked, LINGER="3600")
    assert run.process.wait(6 * HANGS) == 1
    said = "TIMEOUT, over its runtime; give it more with --set-resources RULE:runtime="
    assert said in run.said() and "Error in rule fetch" in run.said()
    assert not list(tmp_path.glob("results/tiny/*"))
