"""`benchmarks.training`: what it times computes the same thing, and it runs."""

import torch
import typer
from typer.testing import CliRunner

from armor.execution.files import read_json
from benchmarks.training import compressed, decoder, main, three_steps


def test_three_steps_make_what_the_product_makes():
    layer, _ = decoder(64, 96, 4, 2, 8)
    for linear in compressed(layer, 16):
        for side in (linear.left, linear.right):
            assert side is not None
            torch.nn.init.normal_(side)
        x = torch.randn(8, linear.in_features)
        torch.testing.assert_close(three_steps(linear, x), linear(x), rtol=1e-4, atol=1e-3)


def test_the_command_times_every_row(tmp_path):
    app, output = typer.Typer(), tmp_path / "training.json"
    app.command()(main)
    shape = ["--hidden", "64", "--inner", "96", "--heads", "4", "--kv-heads", "2", "--vocabulary", "128"]
    done = CliRunner().invoke(
        app, [*shape, "--block", "16", "--length", "16", "--rounds", "1", "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    (run,) = read_json(output)["runs"]
    assert len(run["rows"]) == len(done.stdout.splitlines()) > 0
    assert all(row["seconds"]["median"] > 0 for row in run["rows"])
