"""Refined, tuned and budgeted recipes in the workflow: who shares what, what runs again."""

from collections import Counter

import pytest

from armor.config.run import Config
from armor.execution.files import part_of
from armor.format.records.layer import LayerRecord
from armor.run.explain import Reruns
from tests.killed import POINTS, left_over, results_of
from tests.workflow.conftest import LAYERS, Run
from tests.workflow.test_faults import killed

TRAINED = ("refined", "chained", "tuned", "both", "integers")
OVER = [{"block_size": 4}, {"block_size": 8}, {"method": "dense"}]
TARGETS = [
    *(f"results/tiny/{recipe}/checkpoint.json" for recipe in (*TRAINED, "pruned", "bits")),
    *(
        f"results/tiny/{recipe}/refined/layer_{layer}.safetensors"
        for recipe in ("refined", "chained", "both", "pruned")
        for layer in range(LAYERS)
    ),
]


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A run of recipes that start from one another, up to their checkpoints; what is due is asked of all at once."""
    more = tmp_path_factory.mktemp("text") / "more.txt"
    more.write_text("a text of a few words. " * 20)
    mixed = {"text": {"mixture": [config["calibrations"]["words"]["text"], {"files": [str(more)]}]}}
    calibrations = config["calibrations"] | {"mixed": mixed | {"sequences": 4, "sequence_length": 32}}
    armor = config["recipes"]["armor"] | {"calibration": "words"}
    training = {"steps": 4, "batch": 2, "sequences": 3, "held_out": 1, "warm_up": 1}
    recipes = {
        "armor": armor,
        "refined": {"base": "armor", "refine": dict(training)},
        "chained": {"base": "armor", "refine": training | {"inputs": "compressed"}},
        "tuned": {"base": "refined", "tune": training | {"calibration": "mixed"}},
        "both": {"base": "armor", "refine": dict(training), "quantize": {}, "tune": dict(training)},
        "integers": {"base": "tuned", "quantize": {"overrides": [{"layers": [1], "core": "int4"}]}},
        "pruned": {"method": "nowag", "calibration": "words", "refine": dict(training)},
        "bits": armor | {"budget": {"bits": 24, "over": OVER, "sequences": 2}},
    }
    changes = {"calibrations": calibrations, "recipes": recipes}
    run = Run(tmp_path_factory.mktemp("trained"), {**config, **changes})
    done = run.snakemake("--", *TARGETS)
    assert done.returncode == 0, done.stderr + done.stdout
    return run


def asked(run, config=None):
    return run.would_run(config, "--", *TARGETS)


def explained(run, config):
    reruns = Reruns(run.folder / "results", Config.model_validate(config))
    stages = ("sensitivity", "price", "budget", "factorize", "refine", "tune", "quantize")
    return dict(Counter(job.stage for job in reruns.jobs if job.stage in stages and reruns.reasons(job)))


def test_recipes_that_start_from_one_another_share_factors_and_states(trained):
    tiny = trained.folder / "results/tiny"
    assert not any((tiny / recipe / "layers").exists() for recipe in TRAINED) and (tiny / "armor/layers").is_dir()
    assert [path.name for path in (tiny / "states").iterdir()] == ["words-4x32.json"]  # the states are gone
    assert left_over(trained.folder / "results") == []
    chains = {
        "refined/refined": ["refine"],
        "chained/refined": ["refine"],
        "tuned/tuned": ["refine", "tune"],
        "both/tuned": ["refine", "tune"],
        "integers/quantized": ["refine", "tune"],
        "pruned/refined": ["refine"],
    }
    for folder, stages in chains.items():
        record = LayerRecord.read(tiny / folder / "layer_1.json")
        assert [done.stage for done in record.training] == stages
    assert asked(trained) == explained(trained, trained.config) == {}


EDITS = {
    "a rate": (
        {"recipes__refined__refine__rate": 1e-3},
        {"states": 1, "refine": LAYERS, "refined": 4, "tune": 1, "quantize": LAYERS, "assemble": 3},
    ),
    "of the integers of a layer": (
        {"recipes__integers__quantize__overrides": [{"layers": [1], "core": "int8"}]},
        {"quantize": 1, "assemble": 1},
    ),
    "a budget": (
        {"recipes__bits__budget__bits": 22},
        {"budget": 1, "factorize": LAYERS, "assemble": 1},
    ),
    "more text of a budget": (
        {"recipes__bits__budget__sequences": 3},
        {"sensitivity": 1, "price": LAYERS, "budget": 1, "factorize": LAYERS, "assemble": 1},
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_reruns_what_it_touches(trained, edit):
    changes, expected = EDITS[edit]
    edited = trained.edited(**changes)
    assert asked(trained, edited) == expected
    others = ("states", "refined", "assemble")
    assert explained(trained, edited) == {key: n for key, n in expected.items() if key not in others}


def test_a_budget_edited_by_hand_is_factorized_as_it_says(trained, tmp_path):
    again = trained.copied(tmp_path / "run")
    file = again.folder / "results/tiny/bits/budget.json"
    name = "model.layers.1.mlp.up_proj"
    (line,) = [line for line in file.read_text().splitlines() if f'"{name}"' in line]
    file.write_text(
        file.read_text().replace(line, f'"{name}": {{"choice": {{"pattern": "1:4"}}, "bits": 0, "predicted_kl": 0}},')
    )
    expected = {"factorize": LAYERS, "assemble": 1}
    assert asked(again) == expected and explained(again, again.config) == {"factorize": LAYERS}
    done = again.snakemake("--", *TARGETS)
    assert done.returncode == 0, done.stderr
    assert LayerRecord.read(file.parent / "layers/layer_1.json").modules[name].pattern == "1:4"
    assert asked(again) == explained(again, again.config) == {}


def test_one_layer_again_leaves_the_others(trained, tmp_path):
    """It runs what is due to its end: a dry run would not show that the bytes are those of the first run."""
    again = trained.copied(tmp_path / "run")
    (again.folder / "results/tiny/pruned/refined/layer_1.safetensors").unlink()
    assert asked(again) == {"states": 1, "refine": 1, "refined": 4, "assemble": 1}
    (again.folder / "results/tiny/chained/refined/layer_0.safetensors").unlink()  # layer 1 is refined on what it gives
    assert asked(again) == {"states": 1, "refine": 1 + LAYERS, "refined": 4, "assemble": 2}
    done = again.snakemake("--", *TARGETS)
    assert done.returncode == 0, done.stderr
    assert results_of(again.folder / "results/tiny") == results_of(trained.folder / "results/tiny")


def test_states_that_failed_or_were_killed_leave_the_layers_that_are_done(trained, tmp_path):
    again = trained.copied(tmp_path / "run")
    tiny = again.folder / "results/tiny"
    (tiny / "pruned/refined/layer_1.safetensors").unlink()
    due = {"states": 1, "refine": 1, "refined": 4, "assemble": 1}
    in_the_way = part_of(tiny / "states/words-4x32.json")
    in_the_way.write_text("")
    failed = again.snakemake("--", *TARGETS)
    assert failed.returncode and asked(again) == due
    assert "states tiny words-4x32: " in failed.stderr
    assert "again: snakemake results/tiny/states/words-4x32 " in failed.stderr
    in_the_way.unlink()
    assert killed(again, POINTS[0], 2, "/states/", TARGETS) and asked(again) == due
    assert "states tiny words-4x32: stopped" in again.armor("status").stdout
    done = again.snakemake("--", "results/tiny/states/words-4x32")  # made, and kept for the layer
    assert done.returncode == 0 and (tiny / "states/words-4x32").is_dir(), done.stderr
    assert asked(again) == {"refine": 1, "refined": 1, "assemble": 1}
    done = again.snakemake("--", *TARGETS)
    assert done.returncode == 0 and not (tiny / "states/words-4x32").exists(), done.stderr
    assert asked(again) == {} and results_of(tiny) == results_of(trained.folder / "results/tiny")
