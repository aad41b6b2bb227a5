"""`benchmarks.linears` and `benchmarks.ridge`: each method leads by what it makes small; a ridge is told by itself."""

import pytest
import torch
import typer
from typer.testing import CliRunner

from armor.core.factorization import Factorization
from armor.core.pattern import DENSE
from armor.execution.files import read_json
from armor.format.statistics import read_statistics
from benchmarks.linears import MEASURES, METHODS, errors, main
from benchmarks.ridge import main as ridge_main
from tests.training.trained import ready


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("model"), layers=1)


def test_zeros_miss_everything_and_the_weight_itself_nothing(root):
    inputs = read_statistics(root / "calibration/layer_0.safetensors")["model.layers.0.self_attn.q_proj"]
    weight = torch.randn(32, 64)
    for scale, wanted in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.25)):
        dense = Factorization(weight * scale, torch.ones_like(weight, dtype=torch.bool), DENSE)
        assert errors(weight, inputs, dense) == pytest.approx(dict.fromkeys(MEASURES, wanted), abs=1e-6)


def test_every_method_is_ahead_by_what_it_makes_small(root, tmp_path):
    app, output = typer.Typer(), tmp_path / "linears.json"
    app.command()(main)
    given = [str(root / part) for part in ("source", "calibration/calibration.json")]
    given += ["--layer", "0", "--size", "16", "--iterations", "30", "--output", str(output)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    linears = read_json(output)["linears"]
    assert len(linears) == 7
    for found in linears.values():
        assert set(found) == set(METHODS)
        assert found["armor"]["proxy"] < found["nowag"]["proxy"]
        assert found["armor_gram"]["output"] <= found["armor"]["output"]
        assert found["sparsegpt"]["output"] < found["nowag"]["output"]
        assert found["basil"]["output"] < found["sparsegpt"]["output"]
        assert found["oats"]["weighed"] < found["nowag"]["weighed"]
    assert done.output.count(" proxy |") == 7


def test_every_ridge_is_told_by_itself(root, tmp_path):
    app, output = typer.Typer(), tmp_path / "ridge.json"
    app.command()(ridge_main)
    given = [str(root / part) for part in ("source", "calibration/calibration.json")]
    given += ["--size", "16", "--iterations", "30", "--output", str(output), "--linear"]
    done = CliRunner().invoke(app, [*given, "0.mlp.down_proj", "--linear", "0.mlp.up_proj"])
    assert done.exit_code == 0, done.output
    for found in read_json(output)["ridges"].values():
        none, *ridges = (each["proxy_loss"] for each in found.values())
        assert none < 1
        assert all(loss != none for loss in ridges)
        assert all(each["worst_condition_of_b"] >= 1 for each in found.values())
    assert "the model has no" in str(CliRunner().invoke(app, [*given, "0.mlp.sideways"]).exception)
