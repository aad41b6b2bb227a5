"""armor explain: every result leads to the record that says what made it, and a difference is named."""

from __future__ import annotations

import json
import os

import pytest

from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.execution.files import write_json
from armor.execution.machine import versions
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.records.layer import LayerRecord
from armor.run.explain import Reruns, describe, newer_versions, record_of, results_of
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
        ("checkpoint", "checkpoint.json"),
        ("checkpoint/", "checkpoint.json"),
        ("checkpoint/model.safetensors", "checkpoint.json"),
        ("checkpoint/README.md", "checkpoint.json"),
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


def test_settings_are_one_line(root, tmp_path):
    record = LayerRecord.read(root / "tiny/armor/layers/layer_0.json")
    made = record.made_by.model_copy(update={"settings": {"separator": "\n\n"}})
    record.model_copy(update={"made_by": made}).write(tmp_path / "other.json")
    assert ["settings", r"separator: \n\n"] in [line.split(maxsplit=1) for line in describe(tmp_path / "other.json")]


def test_differences_are_named(root):
    record = root / "tiny/armor/layers/layer_0.json"
    factors = root / "tiny/armor/layers/layer_0.safetensors"

    def own(config=CONFIG):
        reruns = Reruns(root, config)
        return list(reruns._own(reruns.job_of(record)))

    assert own() == []
    wider = CONFIG.model_dump(mode="json", exclude_unset=True)
    wider["recipes"]["armor"]["block_size"] = 8
    assert own(Config.model_validate(wider)) == ["setting block_size: 16, now 8"]
    content = record.read_text()
    then = LayerRecord.read(record)
    then.model_copy(update={"made_by": then.made_by.model_copy(update={"code": "0"})}).write(record)
    assert [line.startswith("the code that factorize executes has changed (0, now ") for line in own()] == [True]
    found = json.loads(content)
    write_json(record, found | {"format_version": 0, "since": "another release"})
    assert "stage        armor.factorize.layer" in describe(record) and own() == []
    reruns = Reruns(root, CONFIG)
    assemble = next(job for job in reruns.jobs if job.stage == "assemble")
    assert [reason for reason in reruns.own(assemble) if f"{record}: format 0, expected" in reason]
    write_json(record, {key: value for key, value in found.items() if key != "made_by"})
    assert own() == ["it was made by another release, which noted no provenance"]
    then.model_copy(update={"sha256": "0"}).write(record)
    reruns = Reruns(root, CONFIG)
    assemble = next(job for job in reruns.jobs if job.stage == "assemble")
    assert "input layer 0: its fingerprint is another" in reruns.reasons(assemble)
    older = then.machine.model_copy(update={"versions": then.machine.versions | {"torch": "1.0"}})
    then.model_copy(update={"machine": older}).write(record)
    assert newer_versions(record) == [f"torch 1.0 then, {versions()['torch']} here"]
    record.write_text(content)
    factors.rename(root / "away")
    assert own() == [f"{factors} is not there"]
    (root / "away").rename(factors)


def test_the_command_says_it_in_lines(root):
    os.close(start_run(root, CONFIG, ["snakemake"]))
    said = armor("explain", root / "tiny/armor/checkpoint", folder=root).stdout
    words = [line.split() for line in said.splitlines()]
    assert ["stage", "armor.assemble.writer"] in words and ["input", "factors", "of", "2", "layers"] in words
    assert "assemble tiny armor would run again:\n  " in said  # there is no source.json
