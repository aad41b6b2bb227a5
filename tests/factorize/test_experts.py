"""Groups of experts: their jobs and the layer's make what one job makes, and read no more than their own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from armor.config.layers import LayerSettings
from armor.core.errors import ArmorError
from armor.factorize.layer import factorize_layer
from armor.format.records.layer import LayerRecord
from armor.format.statistics import Statistics, read_statistics, write_statistics
from tests.killed import SAVED, killed_everywhere
from tests.packed import edit_tensors, opened, prepared

SETTINGS = LayerSettings(method="nowag")
GROUPS = ("0-2", "3-5", "6-7")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    config = {"num_experts": 8, "moe_intermediate_size": 32}
    return prepared(tmp_path_factory.mktemp("model"), "qwen3_moe", layers=1, **config)


def made(root: Path, output: Path, settings: LayerSettings = SETTINGS, **options) -> LayerRecord:
    """What a job with these options makes of layer 0."""
    statistics = options.pop("statistics", root / "calibration/layer_0.safetensors")
    return factorize_layer(*opened(root), 0, statistics, settings, output, **options)


def group(root: Path, folder: Path, experts: str, settings: LayerSettings = SETTINGS) -> Path:
    """The record of a group of experts, in `folder`."""
    made(root, folder / f"{experts}.safetensors", settings, experts=experts)
    return folder / f"{experts}.json"


@pytest.fixture(scope="module")
def groups(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    return [group(root, folder, experts) for experts in GROUPS]


@pytest.mark.parametrize("first", [0, 1])
def test_groups_and_the_rest_are_what_one_job_makes(root, groups, tmp_path, first):
    """What no group has is done by the layer's job."""
    alone = made(root, tmp_path / "alone.safetensors")
    together = made(root, tmp_path / "layer_0.safetensors", done=groups[first:])
    assert (tmp_path / "layer_0.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert list(together.modules) == list(alone.modules) and len(together.modules) == 4 + 8 * 3
    assert {name: m.loss for name, m in together.modules.items()} == {n: m.loss for n, m in alone.modules.items()}
    records = [LayerRecord.read(file) for file in groups[first:]]
    assert together.seconds > sum(record.seconds for record in records) and alone.made_by.experts() == []
    assert {name: together.made_by.inputs[name] for name in together.made_by.experts()} == {
        f"experts {experts}": record.sha256 for experts, record in zip(GROUPS[first:], records, strict=True)
    }


def test_a_group_reads_its_own_weights_and_statistics_alone(root, groups, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")

    def spoil(tensors):
        for name, tensor in tensors.items():
            if any(f".experts.{number}." in name for number in (0, 1, 2, 6, 7)):
                tensor.fill_(float("nan"))

    edit_tensors(copy / "source", spoil)
    found = read_statistics(root / "calibration/layer_0.safetensors")
    inputs = {name: replace(own, importance=own.importance.clone()) for name, own in found.items()}
    spoil({name: of_input.importance for name, of_input in inputs.items()})
    (source, topology), own = opened(root), opened(copy)[0]
    spoiled = type(own)(own.path, source.fingerprint, own.dtype)
    write_statistics(tmp_path / "statistics", inputs, {name: name for name in inputs}, topology.fingerprint)
    output = tmp_path / "3-5.safetensors"
    factorize_layer(spoiled, topology, 0, tmp_path / "statistics", SETTINGS, output, experts="3-5")
    assert output.read_bytes() == groups[1].with_suffix(".safetensors").read_bytes()


def test_groups_that_do_not_go_with_the_layer_are_refused(root, groups, tmp_path):
    with pytest.raises(ArmorError, match="experts: found '6-8', expected FIRST-LAST of the 8 experts of layer 0"):
        group(root, tmp_path, "6-8")
    first = LayerRecord.read(groups[0])
    older = shutil.copytree(groups[0].parent, tmp_path / "older") / groups[0].name
    first.replace(made_by=first.made_by.replace(code="0" * 16)).write(older)
    write_statistics(tmp_path / "s", {"x": Statistics(torch.ones(64), None, 10)}, {"x": "x"}, first.fingerprint)
    for done, options, said in (
        ([group(root, tmp_path, "0-2", LayerSettings(method="magnitude"))], {}, "made with other settings than the"),
        ([older], {}, "made with other code than the layer is; factorize these"),
        ([groups[0], group(root, tmp_path, "2-3")], {}, "experts.2.*: is in another of the files too"),
        (groups[:1], {"statistics": tmp_path / "s"}, "made with other statistics than the layer is"),
    ):
        with pytest.raises(ArmorError, match=rf"\d-\d\.\w+: .*{said}"):
            made(root, tmp_path / "layer_0.safetensors", done=done, **options)
    assert not (tmp_path / "layer_0.safetensors").exists()


def test_a_group_that_is_killed_anywhere_goes_on_where_it_was(root, tmp_path):
    assert killed_everywhere(lambda folder: group(root, folder, "3-4"), tmp_path, SAVED, kills=4)
