"""What runs again after an edit: that, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from tests.killed import results_of
from tests.workflow.conftest import LAYERS, REPOSITORY, Run

OTHER_TEXT = REPOSITORY / "README.md"

AFTER_FACTORS = {"assemble": 1, "evaluate": 1, "report": 1}
ONE_RECIPE = {"factorize": LAYERS} | AFTER_FACTORS
EVALUATION = {"predict": 1, "evaluate": 3, "report": 1}


def recipes(count):
    """Everything from factorization on, for `count` recipes; one report shows them all."""
    return {rule: jobs if rule == "report" else jobs * count for rule, jobs in ONE_RECIPE.items()}


def explained(run, config):
    """Jobs by rule that `armor explain` has a reason for, by the code of the run's repository."""

    def work():
        from armor.config.run import Config  # here: that of the fork
        from armor.run.explain import Reruns

        print(json.dumps(Reruns(run.folder / "results", Config.model_validate(config)).counts()))

    done = run.forked(work)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_to_do(run):
    assert run.would_run() == explained(run, run.config) == {}


SETTINGS_EDITED = {
    "block size of one recipe": ({"recipes__armor__block_size": 4}, ONE_RECIPE),
    "override of one layer": (
        {"recipes__armor__overrides": [{"layers": [1], "block_size": 4}]},
        {"factorize": 1} | AFTER_FACTORS,
    ),
    "calibration length": ({"calibrations__words__sequence_length": 16}, {"calibrate": 1} | recipes(2)),
    "evaluation text": ({"evaluations__words__text": {"files": [str(OTHER_TEXT)]}}, EVALUATION),
    "seed": ({"seed": 1}, recipes(2)),
}


@pytest.mark.parametrize("edit", SETTINGS_EDITED)
def test_an_edit_of_the_configuration_reruns_what_it_touches(run, edit):
    changes, expected = SETTINGS_EDITED[edit]
    edited = run.edited(**changes)
    assert run.would_run(edited) == expected
    assert explained(run, edited) == expected


def test_a_text_that_is_edited_in_place_reruns_what_is_made_of_it(run):
    file = Path(run.config["calibrations"]["words"]["text"]["files"][0])
    before = file.read_bytes()
    try:
        file.write_bytes(before + b" more")
        assert run.would_run() == explained(run, run.config) == {"calibrate": 1} | recipes(2)
        file.unlink()  # its results stay what they are
        assert run.would_run() == explained(run, run.config) == {}
    finally:
        file.write_bytes(before)
    assert run.would_run() == explained(run, run.config) == {}


STATEMENT = ("\n\n\ndef ", "\n\nEDITED = 1\n\n\ndef ")
CODE_EDITED = {
    "report code": ("report/page.py", *STATEMENT, {"report": 1}),
    "the optimiser's code": ("methods/solver/annealed.py", *STATEMENT, ONE_RECIPE),
    "capture code": ("calibrate/capture.py", *STATEMENT, {"calibrate": 1} | recipes(2)),
    "a comment in the solver": ("methods/solver/annealed.py", "\n\n\ndef ", "\n\n# A comment.\n\n\ndef ", {}),
}


@pytest.mark.parametrize("edit", CODE_EDITED)
def test_an_edit_of_the_code_reruns_the_stages_that_execute_it(clone, edit):
    file, old, new, expected = CODE_EDITED[edit]
    path = clone.repository / "armor" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert clone.would_run() == explained(clone, clone.config) == expected


def test_other_threads_and_resources_rerun_nothing(run):
    threads = [f"{rule}=3" for rule in ("calibrate", "factorize", "evaluate")]
    assert run.would_run(None, "--set-threads", *threads, "--set-resources", "factorize:mem_mb=9000") == {}


def test_a_deleted_layer_is_made_again_with_the_same_bytes(run, tmp_path):
    again = run.copied(tmp_path / "run")
    names = ("layers/layer_1.safetensors", "checkpoint/model.safetensors")
    (again.folder / "results/tiny/armor" / names[0]).unlink()
    assert again.would_run() == {"factorize": 1} | AFTER_FACTORS
    done = again.snakemake()
    assert done.returncode == 0, done.stderr
    assert again.would_run() == explained(again, again.config) == {}
    for name in names:
        mine, theirs = (x.folder / "results/tiny/armor" / name for x in (run, again))
        assert mine.read_bytes() == theirs.read_bytes(), name


def test_another_clone_in_another_folder_makes_the_same_bytes(run, clone, tmp_path):
    other = Run(tmp_path / "elsewhere", run.config, clone.repository)
    other.folder.mkdir()
    done = other.snakemake("--", "results/tiny/armor/checkpoint.json")
    assert done.returncode == 0, done.stderr
    found, expected = (results_of(x.folder / "results") for x in (other, run))
    assert found == {name: expected[name] for name in found}
    for name in ("calibration/words/layer_0.safetensors", "armor/layers/layer_0.json", "armor/checkpoint/README.md"):
        assert f"tiny/{name}" in found


def test_results_that_were_copied_without_snakemakes_notes_are_asked_by_their_records(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns(".snakemake"))
    again = Run(tmp_path / "run", run.config)
    assert again.would_run() == {}
    assert again.would_run(again.edited(recipes__armor__block_size=4)) == ONE_RECIPE
    assert again.would_run(again.edited(calibrations__words__sequence_length=16)) == {"calibrate": 1} | recipes(2)
    said = again.armor("status", "--config", "config.yaml").stdout.splitlines()[-1]
    assert "of those that are done would run again: armor explain" in said
