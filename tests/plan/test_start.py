"""`armor init`: the file it writes passes `armor check`, fits the machine, and says what to type next."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import armor.plan.run as run
from armor.config.loading import load_config
from armor.core.errors import ArmorError
from armor.plan.machine import Host
from armor.plan.start import first_configuration
from tests.forks import armor
from tests.hub import NAME, hub, use
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]


def machine(monkeypatch, **of_host):
    """This machine, but for some of its sizes."""
    here = Host.here
    monkeypatch.setattr(run.Host, "here", lambda folder: dataclasses.replace(here(folder), **of_host))


def test_what_it_writes_passes_check_and_the_next_commands_are_said(tmp_path):
    tiny_model(tmp_path / "My Model", layers=1)
    done = armor("init", "--model", "./My Model", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1] == "  armor plan my.yaml" and lines[2].startswith("  snakemake --cores ")
    assert lines[2].endswith(f" --snakefile {REPOSITORY}/Snakefile --configfile my.yaml")  # there is none here
    checked = armor("check", "my.yaml", folder=tmp_path)
    assert checked.returncode == 0 and "2 pairs of model and recipe, 2 evaluations, 2 benchmarks" in checked.stdout
    again = armor("init", "--model", "./My Model", folder=tmp_path)
    assert again.returncode == 1 and "my.yaml: is there already; choose another name" in again.stderr


def test_it_is_cut_down_to_the_machine(tmp_path, monkeypatch):
    model = str(tiny_model(tmp_path / "model", layers=1, max_position_embeddings=256))
    machine(monkeypatch, memory=10**12, disk=10**12, gpu=None)
    (tmp_path / "roomy.yaml").write_text(first_configuration(model, tmp_path))
    roomy = load_config(tmp_path / "roomy.yaml")
    assert roomy.calibrations["c4"].sequence_length == 256 and roomy.calibrations["c4"].sequences == 128
    assert list(roomy.models) == ["model"] and roomy.benchmarks
    machine(monkeypatch, memory=10**12, disk=12_000_000, gpu=None)
    tight = yaml.safe_load(first_configuration(model, tmp_path))
    assert tight["calibrations"]["c4"]["sequence_length"] < 256
    machine(monkeypatch, memory=1000, disk=10**12, gpu=None)
    with pytest.raises(ArmorError, match=r"nothing that was tried fits this machine: .* needed on the host"):
        first_configuration(model, tmp_path)


def test_a_hub_model_and_one_gpu_need_nothing_else(tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model", layers=1, max_position_embeddings=4096)
    machine(monkeypatch, memory=10**12, disk=10**12, gpu=80 * 10**9)
    with hub(model) as (asked, endpoint):
        use(monkeypatch, endpoint, tmp_path / "cache")
        text = first_configuration(NAME, tmp_path)
    (tmp_path / "my.yaml").write_text(text)
    config = load_config(tmp_path / "my.yaml")
    assert config.models["model"].hub == NAME and config.calibrations["c4"].sequence_length == 4096
    assert asked.sent["model.safetensors"] < (model / "model.safetensors").stat().st_size
