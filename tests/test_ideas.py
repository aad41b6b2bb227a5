"""`benchmarks.ideas`: it trains a layer as refine does, and otherwise where an idea says so."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from armor.config.training import RefineSettings
from armor.execution.files import read_json
from armor.methods.solver.objective import condition
from armor.text.reading import read_blocks
from benchmarks.ideas import IDEAS, Bench, Idea, Lamb, MovingLinear, Muon, Soap, corrected_weight, main
from tests.training.trained import LENGTH, TRAINING, ready, refined, sample

SETTINGS = RefineSettings.model_validate({**TRAINING, "inputs": "compressed"})
LAYER = 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return ready(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture(scope="module")
def records(root):
    return [refined(root, layer, root / "refined", inputs="compressed") for layer in (0, LAYER)]


@pytest.fixture(scope="module")
def bench(root, records):
    model = LlamaForCausalLM.from_pretrained(root / "source", dtype=torch.float32).requires_grad_(False)
    tokens = read_blocks(root / "source", sample(root).text, 8, LENGTH).tokens
    with torch.no_grad():
        return Bench(model, tokens, root / "layers", root / "refined", LAYER, SETTINGS.held_out)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_without_an_idea_it_does_what_refine_does(bench, records):
    row = bench.trained("as it is", SETTINGS, Idea())
    wanted = [look.held_out_loss for look in records[LAYER].training[-1].looks]
    assert row["held_out_losses"] == pytest.approx(wanted, rel=1e-3)
    assert row["start"]["output_error"] == pytest.approx(wanted[0], rel=1e-3)
    assert row["end"]["output_error"] == pytest.approx(min(wanted), rel=1e-3)
    assert row["end"]["output_error"] < row["start"]["output_error"]
    assert row["end"]["kl"] < row["start"]["kl"]


@pytest.mark.parametrize("name", IDEAS)
def test_every_idea_is_trained_and_judged(bench, name):
    idea = IDEAS[name]
    settings = SETTINGS.replace(**{**idea.settings, "steps": 4, "sequences": 4, "batch": 2})
    row = bench.trained(name, settings, idea)
    assert len(row["held_out_losses"]) == 5
    assert all(math.isfinite(value) for value in (*row["start"].values(), *row["end"].values()))


def test_look_ahead_and_mixed_targets_are_trained_on_their_own_error(bench):
    plain, ahead, mixed = (bench.trained("", SETTINGS, idea) for idea in (Idea(), Idea(ahead=True), Idea(mixed=True)))
    assert ahead["held_out_losses"][0] == pytest.approx(plain["start"]["behind_the_next"])
    assert mixed["held_out_losses"][0] < plain["held_out_losses"][0]


def test_the_search_leaves_the_same_product_in_factors_of_worse_condition(bench):
    ready, left = (bench.start(Idea(searched=how)) for how in ("as stored", "as the search leaves them"))
    worst = [[condition(linear.factors()) or 1 for linear in layer.linears.values()] for layer in (ready, left)]
    assert max(worst[1]) > 2 * max(worst[0])
    for name, linear in ready.linears.items():
        torch.testing.assert_close(linear.weight, left.linears[name].weight, rtol=1e-3, atol=1e-5)


def test_noise_has_the_size_of_the_chains_errors_and_spares_the_other_tokens(bench):
    error = (bench.chain - bench.dense[0]).norm()
    for how in ("noise", "errors elsewhere"):
        noise = bench.fed(how) - bench.dense[0]
        assert noise.norm() == pytest.approx(error.item(), rel=0.2)
        assert not torch.allclose(noise, bench.chain - bench.dense[0], rtol=0.1)


def test_a_weight_that_makes_up_for_its_inputs_errors_lowers_the_error_of_its_output(bench):
    layer = bench.start(Idea())
    for name, (own, cross) in bench.grams(layer).items():
        weight = bench.model.get_submodule(name).weight

        def missed(other, own=own, cross=cross, weight=weight):  # of WX by what `other` makes of X̂, but for a constant
            return (other @ own * other).sum() - 2 * (weight @ cross * other).sum()

        half, whole = (corrected_weight(weight, own, cross, share) for share in (0.5, 1.0))
        assert missed(whole) < missed(half) < missed(weight)


def test_a_mask_that_moves_keeps_the_pattern_and_stops(bench):
    layer = bench.start(Idea(moves=True))
    linear = next(linear for linear in layer.linears.values() if isinstance(linear, MovingLinear))
    before = linear.weight.clone()
    linear.core_values.copy_(linear.core_values.flip(1))
    assert not torch.equal(linear.mask, linear.mask.flip(1))
    assert linear.moved() == 0  # a look moves nothing
    with torch.enable_grad():
        for _ in range(33):
            weight = linear.weight
    assert linear.moved() > 0
    assert torch.equal(linear.mask.unflatten(1, (-1, 4)).sum(-1), torch.full_like(linear.mask[:, ::4].long(), 2))
    mask = linear.mask
    linear.core_values.copy_(linear.core_values.flip(1))
    with torch.enable_grad():
        weight = linear.weight
    assert linear.mask is mask
    assert not torch.equal(weight, before)


def stepped(optimiser, start, gradients, rate=0.01):
    """What each step of an optimiser adds to one parameter."""
    parameter, found = torch.nn.Parameter(start.clone()), []
    adam = optimiser([{"params": [parameter], "lr": rate}])
    for gradient in gradients:
        before, parameter.grad = parameter.detach().clone(), gradient
        adam.step()
        found.append(parameter.detach() - before)
    return found


def test_lamb_takes_a_share_of_the_norm_in_the_direction_of_adam():
    start, gradients = torch.randn(50), torch.randn(3, 50)
    for step in stepped(Lamb, start, gradients):
        assert step.norm() == pytest.approx(0.01 * 50**0.5, rel=0.05)
    first, plain = (stepped(each, start, gradients[:1])[0] for each in (Lamb, torch.optim.Adam))
    torch.testing.assert_close(first / first.norm(), plain / plain.norm())


def test_muon_turns_blocks_by_as_much_as_adam_would():
    start, gradients = torch.randn(3, 8, 8), torch.randn(3, 3, 8, 8)
    for step, plain in zip(*(stepped(each, start, gradients) for each in (Muon, torch.optim.Adam)), strict=True):
        assert step.norm() == pytest.approx(plain.norm().item(), rel=1e-3)
        square = step @ step.mT
        torch.testing.assert_close(square / square[0, 0, 0], torch.eye(8).expand(3, 8, 8), atol=1e-3, rtol=0)


def test_soap_takes_the_same_steps_in_any_basis():
    start, gradients = torch.randn(3, 8, 8), torch.randn(12, 3, 8, 8)
    left, right = (torch.linalg.qr(torch.randn(3, 8, 8)).Q for _ in range(2))
    turned = stepped(Soap, left @ start @ right, left @ gradients @ right)
    own, plain = (torch.stack(stepped(each, start, gradients)) for each in (Soap, torch.optim.Adam))
    torch.testing.assert_close(torch.stack(turned), left @ own @ right, atol=1e-4, rtol=0)
    assert own[0].abs().max() < 1e-5 and own.square().mean() > plain.square().mean() / 2
    assert (own - plain).square().mean() > plain.square().mean() / 10


def test_the_command_adds_rows_and_names_what_it_does_not_know(root, records, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "ideas.json"
    given = [str(root / part) for part in ("source", "layers", "refined")]
    given += ["--text", str(root / "text.txt"), "--layer", str(LAYER), "--length", "16", "--steps", "2"]
    given += ["--threads", "1"]
    assert "expected some of" in CliRunner().invoke(app, [*given, "--only", "sorcery"]).output
    assert "expected one of 0 to 1" in str(CliRunner().invoke(app, [*given, "--layer", "2"]).exception)
    for name in ("look-ahead", "half of the rate"):
        done = CliRunner().invoke(app, [*given, "--only", name, "--output", str(output)])
        assert done.exit_code == 0, done.output
    (found,) = read_json(output).values()
    assert set(found) == {"half of the rate", "look-ahead"}
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["| what", "| the start", "| half of the rate", "| look-ahead"]


def test_without_the_core_the_rest_is_trained(bench):
    parameters = bench.start(IDEAS["S is not trained"]).parameters()
    assert parameters
    assert not any(name.endswith("core_values") for name in parameters)
