"""armor explain: every result leads to the record that says what made it, and a difference is named."""

from __future__ import annotations

import os

import pytest

from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.execution.files import write_json
from armor.format.records.checkpoint import CheckpointRecord
from armor.run.explain import Reruns, describe, record_of, results_of
from armor.run.status import start_run
from tests.forks import armor
from tests.packed import SETTINGS, packed

CONFIG = Config.model_validate(
    {
        "models": {"tiny": {"folder": "tiny"}},
        "calibrations": {"words": {"text": {"files": ["words.txt"]}}},
        "recipes": {"armor": SETTINGS.model_dump(exclude={"seed", "overrides", "over"})},
    }
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A results folder with one model under one recipe; its calibration is made up and has no record."""
    results = tmp_path_factory.mktemp("run") / "results"
    packed(results / "tiny")
    (results / "tiny/armor").mkdir()
    for name in ("layers", "checkpoint", "checkpoint.json"):
        (results / "tiny" / name).rename(results / "tiny/armor" / name)
    return results


@pytest.mark.parametrize(
    ("file", "record"),
    [
        ("layers/layer_1.safetensors", "layers/layer_1.json"),
        ("layers/layer_1.json", "layers/layer_1.json"),
        ("checkpoint/", "checkpoint.json"),
        ("checkpoint/model.safetensors", "checkpoint.json"),
    ],
)
def test_a_file_leads_to_its_record(root, file, record):
    assert record_of(root / "tiny/armor" / file) == root / "tiny/armor" / record


def test_a_checkpoint_that_was_copied_elsewhere_still_says_what_made_it(root, tmp_path):
    (root / "tiny/armor/checkpoint").rename(tmp_path / "mine")
    try:
        record = record_of(tmp_path / "mine")
        assert record == tmp_path / "mine/provenance.json" and results_of(record) is None
        said = "\n".join(describe(record))
    finally:
        (tmp_path / "mine").rename(root / "tiny/armor/checkpoint")
    here = CheckpointRecord.read(root / "tiny/armor/checkpoint.json")
    assert "layers          0 to 1" in said and "solver.iterations: 2" in said and here.fingerprint in said
    assert "threads" not in said and str(root) not in said  # the same bytes on any machine


def test_a_file_of_no_stage_is_refused(root, tmp_path):
    write_json(tmp_path / "other.json", {"a": 1})
    for file in (tmp_path / "other.json", tmp_path, root / "tiny/model.json"):
        with pytest.raises(ArmorError, match="nothing here says what made it"):
            record_of(file)
    with pytest.raises(ArmorError, match="name one of its files: layer_0.json, layer_1.json"):
        record_of(root / "tiny/armor/layers")


def test_the_command_says_it_in_lines(root):
    os.close(start_run(root, CONFIG, ["snakemake"]))
    said = armor("explain", root / "tiny/armor/checkpoint", folder=root).stdout
    words = [line.split() for line in said.splitlines()]
    assert ["stage", "armor.assemble.writer"] in words and ["input", "factors", "of", "2", "layers"] in words
    assert "assemble tiny armor would run again:\n  " in said  # there is no source.json


def test_a_setting_that_differs_is_named(root):
    wider = CONFIG.model_dump(mode="json", exclude_unset=True)
    wider["recipes"]["armor"]["block_size"] = 8
    reruns = Reruns(root, Config.model_validate(wider))
    job = next(job for job in reruns.jobs if job.stage == "factorize")
    assert "setting block_size: 16, now 8" in reruns.reasons(job)
