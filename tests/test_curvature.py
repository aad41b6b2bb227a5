"""`benchmarks.curvature`: what it says of an error is what the error does to the predictions."""

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from armor.execution.files import read_json
from benchmarks.curvature import curvatures, described, main
from tests.tiny import tiny_model, tiny_text

LAYER, LENGTH, SIZE = 1, 32, 1e-2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), layers=3)


def divergence(model, tokens, noise):
    """The KL divergence, summed over tokens, where `noise` times their size is added to the states behind LAYER."""
    with torch.no_grad():
        wanted = model(tokens).logits.log_softmax(-1)

        def disturb(_, __, output):
            return output + noise * output.norm(dim=-1, keepdim=True)

        hook = model.model.layers[LAYER].register_forward_hook(disturb)
        found = model(tokens).logits.log_softmax(-1)
        hook.remove()
    return float((wanted.exp() * (wanted - found)).sum())


@pytest.mark.parametrize("first", [True, False])
def test_it_foretells_the_divergence_of_a_disturbed_model(source, first):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = torch.randint(model.config.vocab_size, (64, LENGTH))
    share, curvature = curvatures(model, model.model.layers, tokens)[LAYER]
    others = float(curvature.trace()) * tokens[:, 1:].numel()
    noise = SIZE * torch.randn(*tokens.shape, model.config.hidden_size)
    noise[:, 1:] *= not first
    noise[:, :1] *= first
    trace = others * share / (1 - share) if first else others
    assert divergence(model, tokens, noise) == pytest.approx(SIZE**2 / 2 * trace, rel=0.2)


def test_an_identity_has_a_direction_for_each_channel():
    row = described(0.25, 3 * torch.eye(8))
    assert row == {"first_token": 0.25, "directions": 8, "largest_share": 0.125, "largest_channel": 1}


def test_the_command_prints_a_row_for_each_layer(source, tmp_path):
    app = typer.Typer()
    app.command()(main)
    (tmp_path / "text.txt").write_text(tiny_text())
    given = [str(source), "--text", str(tmp_path / "text.txt"), "--sequences", "2", "--length", "16"]
    done = CliRunner().invoke(app, [*given, "--threads", "1", "--output", str(tmp_path / "curvature.json")])
    assert done.exit_code == 0, done.output
    assert set(read_json(tmp_path / "curvature.json")["layers"]) == {"0", "1", "2"}
    assert len(done.stdout.splitlines()) == 5
