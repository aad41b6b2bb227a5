"""A method is one file: dropped into armor/methods it is known to the configuration, the workflow and the report."""

import csv
import shutil

from tests.workflow.conftest import LAYERS, Run

TOY = '''"""Toy keeps the leftmost weights of every group, whatever they are."""

from __future__ import annotations

from armor.core.pattern import PatternLike
from armor.methods import method


@method("Leftmost", source="nobody, never", memory=lambda shape, itemsize, *, pattern: 16 * shape[0] * shape[1])
def toy(weight, importance, *, pattern: PatternLike = "2:4"):
    """Keep the n leftmost of every group of weight (out, in)."""
    import torch

    from armor.methods.solver.pruning import prune

    return prune(weight, importance, pattern, lambda _, w: -torch.arange(w.shape[1]).expand(w.shape))
'''


def test_a_new_file_is_a_new_method(clone, tmp_path):
    (clone.repository / "armor/methods/toy.py").write_text(TOY)
    assert len(TOY.splitlines()) <= 40
    shutil.copytree(clone.folder, tmp_path / "run")
    run = Run(tmp_path / "run", clone.edited(recipes__leftmost={"method": "toy"}), clone.repository)
    assert run.would_run() == {"factorize": LAYERS, "assemble": 1, "evaluate": 1, "benchmark": 1, "report": 1}
    done = run.snakemake("--", "results/report/index.html")
    assert done.returncode == 0, done.stderr + done.stdout
    checked = run.armor("check", "config.yaml")
    assert checked.returncode == 0 and "4 pairs of model and recipe" in checked.stdout, checked.stderr
    rows = list(csv.DictReader((run.folder / "results/report/summary.csv").open()))
    assert [row["method"] for row in rows] == ["dense", "nowag", "armor", "toy"] and float(rows[3]["perplexity"]) > 1
    assert "Leftmost" in (run.folder / "results/report/index.html").read_text()
    assert "| `toy` | Leftmost |" in run.armor("schema", "--methods").stdout
    # Its code is in the hash of its own recipe, and of no other's.
    file = clone.repository / "armor/methods/toy.py"
    file.write_text(file.read_text().replace("-torch.arange", "torch.arange"))
    assert run.would_run()["factorize"] == 3
