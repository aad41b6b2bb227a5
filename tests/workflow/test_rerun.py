"""What runs again after an edit: that, and nothing else."""

import shutil

import pytest

from tests.workflow.conftest import LAYERS, Run

AFTER_FACTORS = {"assemble": 1, "evaluate": 1, "benchmark": 1, "report": 1}
ONE_RECIPE = {"factorize": LAYERS} | AFTER_FACTORS


def recipes(count):
    """Everything from factorization on, for `count` recipes."""
    return {rule: jobs * (1 if rule == "report" else count) for rule, jobs in ONE_RECIPE.items()}


def test_nothing_to_do(run):
    assert run.would_run() == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipes__armor__block_size": 4}, ONE_RECIPE),
        ({"recipes__armor__solver": {"iterations": 4}}, ONE_RECIPE),
        ({"recipes__armor__overrides": [{"layers": [1], "block_size": 4}]}, {"factorize": 1} | AFTER_FACTORS),
        ({"recipes__armor__keep_dense": ["*.k_proj"]}, ONE_RECIPE),
        ({"recipes__wanda": {"method": "wanda"}}, ONE_RECIPE),
        ({"calibrations__words__sequences": 3}, {"calibrate": 1} | recipes(2)),
        ({"evaluations__words__sequences": 3}, {"evaluate": 3, "report": 1}),
        ({"evaluations__questions": {"tasks": ["piqa"]}}, {"tasks": 3, "report": 1}),
        ({"benchmarks__decode__repeats": 3}, {"benchmark": 3, "report": 1}),
        ({"seed": 1}, recipes(2)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_edit_of_the_configuration_reruns_what_it_touches(run, changes, expected):
    assert run.would_run(run.edited(**changes)) == expected


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("report/page.py", "\n\n\ndef ", "\n\nEDITED = 1\n\n\ndef ", {"report": 1}),
        ("factorize/solver.py", "\n\n\ndef ", "\n\nEDITED = 1\n\n\ndef ", recipes(2)),
        ("factorize/solver.py", "\n\n\ndef ", "\n\n# A comment.\n\n\ndef ", {}),
        ("calibrate/capture.py", "\n\n\ndef ", "\n\nEDITED = 1\n\n\ndef ", {"calibrate": 1} | recipes(2)),
        ("evaluate/perplexity.py", "\n\n\ndef ", "\n\nEDITED = 1\n\n\ndef ", {"evaluate": 3, "report": 1}),
        ("execution/log.py", "SECONDS_BETWEEN_LINES = 10.0", "SECONDS_BETWEEN_LINES = 5.0", {}),
    ],
)
def test_an_edit_of_the_code_reruns_the_stages_that_execute_it(clone, file, old, new, expected):
    path = clone.repository / "armor" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert clone.would_run() == expected


@pytest.mark.parametrize("suffixes", [("safetensors",), ("json", "safetensors")])
def test_one_layers_factors_deleted(run, tmp_path, suffixes):
    shutil.copytree(run.folder, tmp_path / "run")
    again = Run(tmp_path / "run", run.config)
    for suffix in suffixes:
        (again.folder / f"results/tiny/armor/layers/layer_1.{suffix}").unlink()
    assert again.would_run() == {"factorize": 1} | AFTER_FACTORS


def test_the_same_input_gives_the_same_bytes(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    again = Run(tmp_path / "run", run.config)
    names = ("layers/layer_1.safetensors", "checkpoint/model.safetensors")
    (again.folder / "results/tiny/armor" / names[0]).unlink()
    done = again.snakemake()
    assert done.returncode == 0, done.stderr
    assert again.would_run() == {}
    for name in names:
        mine, theirs = (x.folder / "results/tiny/armor" / name for x in (run, again))
        assert mine.read_bytes() == theirs.read_bytes(), name
