"""Perplexity, KL divergence and overfitting by the number of sequences, of config/examples/smollm2-sequences.yaml.

    python -m benchmarks.sequences runs/sequences/results/smollm2-135m

A recipe's name is what it is, a hyphen and its number of sequences. Of what refine and tune trained there is the last
loss on the sequences that they trained on, by that on held-out ones, the mean over layers: 1 where nothing was learned
by heart. Writes benchmarks/sequences.json and .svg.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated

import altair as alt
import typer
import vl_convert

from armor.execution.files import write_json
from armor.format.records.evaluation import EvaluationRecord
from armor.format.records.layer import LayerRecord

OUTPUT = Path(__file__).with_suffix(".json")


def share(recipe: Path) -> float | None:
    """The loss on what a recipe was trained on, by that on held-out sequences; None where nothing was trained."""
    layers = [LayerRecord.read(file) for file in recipe.glob("*/layer_*.json")]
    last = [layer.training[-1].looks[-1] for layer in layers if layer.training]
    shares = [look.train_loss / look.held_out_loss for look in last if look.train_loss is not None]
    return fmean(shares) if shares else None


def main(
    results: Annotated[Path, typer.Argument(help="The folder of the model.")],
    evaluation: Annotated[str, typer.Option(help="Its name.")] = "wikitext2",
    output: Path = OUTPUT,
) -> None:
    rows = []
    for file in sorted(results.glob(f"*-*/evaluation/{evaluation}.json")):
        what, _, sequences = file.parents[1].name.rpartition("-")
        record = EvaluationRecord.read(file)
        assert record.against_dense is not None
        kl = record.against_dense.kl.value
        row = {"recipe": what, "sequences": int(sequences), "perplexity": record.value, "kl": kl}
        rows.append(row | {"share": share(file.parents[1])})
    rows.sort(key=lambda row: (row["recipe"], row["sequences"]))
    write_json(output, rows)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("sequences:Q", scale=alt.Scale(type="log", base=2), title="sequences"),
        color=alt.Color("recipe:N", title=None),
    )
    panels = [
        base.mark_line(point=True)
        .encode(y=alt.Y(f"{key}:Q", title=title, scale=alt.Scale(zero=False)))
        .properties(width=240, height=240)
        for key, title in (
            ("perplexity", "perplexity"),
            ("kl", "KL divergence from dense, nats"),
            ("share", "loss on trained by held-out sequences"),
        )
    ]
    svg = vl_convert.vegalite_to_svg(alt.hconcat(*panels).to_json(), vl_version=alt.SCHEMA_VERSION.rpartition(".")[0])
    output.with_suffix(".svg").write_text(svg)
    for row in rows:
        learned = row["share"]
        by_heart = "" if learned is None else f"{learned:.2f}"
        print(f"{row['recipe']:>8} {row['sequences']:>4}  {row['perplexity']:.2f}  {row['kl']:.4f}  {by_heart}")


if __name__ == "__main__":
    typer.run(main)
