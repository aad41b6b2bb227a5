"""The front door: what `snakemake` answers, on good input and on bad."""

import base64
import csv
import json
import re
import shutil
import socket
from functools import partial

import pytest
import snakemake.cli
import yaml

from armor.config.reference import json_schema
from armor.run.status import read_status
from tests.forks import fork
from tests.workflow.conftest import LAYERS, REPOSITORY, Run


def test_the_report_has_a_row_for_each_recipe(run):
    report = run.folder / "results/report"
    rows = list(csv.DictReader((report / "summary.csv").open()))
    assert [row["recipe"] for row in rows] == ["dense", "nowag", "armor"]
    losses = {row["recipe"]: row["relative_loss"] for row in rows}
    assert float(losses["armor"]) < float(losses["nowag"])
    assert all(float(row["perplexity"]) > 1 for row in rows)
    assert (report / "index.html").stat().st_size > 10_000


def test_every_job_kept_to_its_threads(run):
    records = list(run.folder.glob("results/tiny/*/layers/layer_*.json"))
    assert len(records) == 2 * LAYERS
    assert {json.loads(file.read_text())["machine"]["threads"] for file in records} == {1}


def test_the_status_knows_every_job_of_the_workflow(run):
    found = read_status(run.folder / "results")
    assert set(found.states.values()) == {"done"} and found.details() == []
    outputs = {str(output.relative_to(run.folder)) for job in found.states for output in job.outputs}
    told = run.snakemake("--summary").stdout.splitlines()[1:]
    assert outputs | {f"results/report/summary.{suffix}" for suffix in ("csv", "json", "md", "tex")} == {
        line.split("\t")[0] for line in told
    }


SERVED = {"benchmarks.serve": {"engine": "vllm"}, "evaluations.asked": {"engine": "vllm", "tasks": ["piqa"]}}


@pytest.mark.parametrize("key", SERVED)
def test_a_run_without_its_engine_says_so_before_anything_starts(run, tmp_path, monkeypatch, key):
    monkeypatch.setenv("ARMOR_VLLM", "/no/python")
    done = Run(tmp_path, run.edited(**{key.replace(".", "__"): SERVED[key]})).snakemake()
    assert done.returncode == 1 and not (tmp_path / "results/run.json").exists()
    assert f"{key}.engine: ARMOR_VLLM: /no/python: found no Python that runs" in done.stderr


@pytest.mark.parametrize("key", SERVED)
def test_a_model_that_vllm_was_not_tested_with_is_refused_once_it_is_inspected(run, tmp_path, key):
    folder = tmp_path / "results/tiny"
    folder.mkdir(parents=True)
    shutil.copy(run.folder / "results/tiny/source.json", folder)
    told = json.loads((run.folder / "results/tiny/model.json").read_text())
    (folder / "model.json").write_text(json.dumps(told | {"model_type": "stablelm"}))
    done = Run(tmp_path, run.edited(**{key.replace(".", "__"): SERVED[key]})).snakemake("--dry-run")
    said = f"{key}.engine, model tiny: model_type stablelm: not tested packed in vLLM, expected a type of"
    assert done.returncode == 1 and said in done.stdout + done.stderr


HEAVY = """
import sys

for name in ("torch", "transformers", "datasets", "lm_eval", "altair"):
    sys.modules[name] = None  # importing it now raises
"""


def test_a_run_with_nothing_to_do_imports_nothing_heavy(run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HEAVY)
    done = Run(run.folder, run.config, python=tmp_path).snakemake()
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr, done.stderr


def test_the_catalogs_snakefile_plans_the_same_jobs(tmp_path):
    """The workflow catalog and Snakedeploy ask for workflow/Snakefile."""
    plans = []
    for name in ("Snakefile", "workflow/Snakefile"):
        command = ["--snakefile", str(REPOSITORY / name), "--dry-run", "--directory", str(tmp_path)]
        done = fork(partial(snakemake.cli.main, command), REPOSITORY)
        assert done.returncode == 0, done.stdout + done.stderr
        plans.append(re.findall(r"^Job \d+: (.*)$", done.stdout + done.stderr, re.MULTILINE))
    assert plans[0] == plans[1] and plans[0][-1] == "all results"


def test_snakemakes_own_report_holds_the_page_and_needs_no_network(run, tmp_path):
    arguments = run.command("--report", str(tmp_path / "out.html"))["args"][3:]

    def offline():
        def refuse(*_):
            raise OSError("a network was asked for")

        socket.socket.connect = socket.getaddrinfo = refuse
        snakemake.cli.main(arguments)

    done = run.forked(offline)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "out.html").read_text()
    found = json.loads(re.search(r'<script id="results">\s*var results = (.*);\n', page)[1])
    assert found.keys() == {"results/report/index.html", "results/report/summary.csv"}
    for file, result in found.items():
        assert base64.b64decode(result["data_uri"].partition("base64,")[2]) == (run.folder / file).read_bytes()
        assert "the summary in words, the figures, all tables" in " ".join(result["caption"].split())
    assert "One-shot compression of tiny by the recipes" in page and "dense, nowag, armor" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipes__armor__method": "amor"}, "recipes.armor.method: 'amor' is unknown; did you mean armor?"),
        ({"recipes__armor__keep_dense": ["*.q_porj"]}, "recipes.armor, model tiny: '*.q_porj' matches no linear"),
    ],
)
def test_a_bad_configuration_stops_before_anything_runs(run, changes, said):
    done = run.snakemake("--dry-run", config=run.edited(**changes))
    assert done.returncode != 0 and said in done.stdout + done.stderr


def test_bad_input_is_explained_and_leaves_nothing(run, tmp_path):
    fresh = Run(tmp_path, run.edited(models={"tiny": {"folder": "/no/such/model"}}))
    done = fresh.snakemake()
    explained = [line for line in (done.stdout + done.stderr).splitlines() if line.strip().startswith("armor: error:")]
    assert done.returncode != 0 and explained and "/no/such/model" in explained[0], done.stderr
    error = done.stderr[done.stderr.index("Error in rule ") :]  # when it happens, rule, log and cause are told
    assert re.search(r"^ +log: results/logs/\S+\.log ", error, re.MULTILINE) and explained[0] in error
    assert not list(tmp_path.glob("results/**/*.tmp")) and not list(tmp_path.glob("results/report/*"))


def test_the_schema_is_that_of_the_types():
    path = REPOSITORY / "workflow/schemas/config.schema.json"
    assert path.read_text() == json_schema(), "run: armor schema > workflow/schemas/config.schema.json"


def test_the_conda_environment_is_that_of_the_package():
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["pipeline"]
    environment = yaml.safe_load((REPOSITORY / "envs/armor.yaml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert sorted(pip) == sorted(wanted)
