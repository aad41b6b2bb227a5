"""A method is one file: dropped into armor/methods it is known to the configuration, the workflow and the report."""

import csv
import shutil

from armor.format.records.layer import LayerRecord
from tests.workflow.conftest import LAYERS, Run

TOY = '''"""Toy keeps the weights at one end of every group, whatever they are."""

from __future__ import annotations

from typing import Literal

from armor.core.pattern import PatternLike
from armor.core.typed import Typed
from armor.methods import method


class Settings(Typed):
    """What toy alone takes."""

    end: Literal["left", "right"] = "left"
    """Which end of a group stays."""


def _peak_bytes(shape, itemsize, *, pattern, settings):
    return 16 * shape[0] * shape[1]


@method("One end", source="nobody, never", memory=_peak_bytes)
def toy(weight, importance, *, pattern: PatternLike = "2:4", settings: Settings = Settings()):
    """Keep the n leftmost or rightmost of every group of weight (out, in)."""
    import torch

    from armor.methods.solver.pruning import prune

    sign = -1 if settings.end == "left" else 1
    return prune(weight, importance, pattern, lambda _, w: sign * torch.arange(w.shape[1]).expand(w.shape))
'''


def test_a_new_file_is_a_new_method(clone, tmp_path):
    """From a copy of the code, for a method that is put into this process would not show that a file is enough."""
    (clone.repository / "armor/methods/toy.py").write_text(TOY)
    shutil.copytree(clone.folder, tmp_path / "run")
    recipes = {"leftmost": {"method": "toy"}, "rightmost": {"method": "toy", "toy": {"end": "right"}}}
    config = clone.edited(recipes=clone.config["recipes"] | recipes)
    run = Run(tmp_path / "run", config, clone.repository)
    done = run.snakemake("--", "results/report/index.html")
    assert done.returncode == 0, done.stderr + done.stdout
    rows = list(csv.DictReader((run.folder / "results/report/summary.csv").open()))
    assert [row["method"] for row in rows] == ["dense", "nowag", "armor", "toy", "toy"]
    assert 1 < float(rows[3]["perplexity"]) != float(rows[4]["perplexity"]) > 1
    assert "One end" in (run.folder / "results/report/index.html").read_text()
    # Its own settings are in the params and the records of its recipes, and checked as others are.
    assert run.would_run(run.edited(recipes__leftmost__toy={"end": "right"}))["factorize"] == LAYERS
    made = LayerRecord.read(run.folder / "results/tiny/rightmost/layers/layer_0.json").made_by
    assert made.settings["toy"] == {"end": "right"}
    run.command(config=run.edited(recipes__leftmost__toy={"end": "top"}))
    assert (
        "recipes.leftmost.toy.end: 'top' is unknown; there is left, right" in run.armor("check", "config.yaml").stderr
    )
    # Its code is in the hash of its own recipes, and of no other's.
    file = clone.repository / "armor/methods/toy.py"
    file.write_text(file.read_text().replace("-1 if", "-2 if"))
    assert run.would_run()["factorize"] == 2 * LAYERS
