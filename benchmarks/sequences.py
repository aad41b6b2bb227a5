"""Perplexity and KL divergence over the number of sequences, of a run of config/examples/smollm2-sequences.yaml.

    python -m benchmarks.sequences runs/sequences/results/smollm2-135m

A recipe's name is what it is, a hyphen and its number of sequences. Writes benchmarks/sequences.json and .svg.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import altair as alt
import typer
import vl_convert

from armor.execution.files import write_json
from armor.format.records.evaluation import EvaluationRecord

OUTPUT = Path(__file__).with_suffix(".json")


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
        rows.append({"recipe": what, "sequences": int(sequences), "perplexity": record.value, "kl": kl})
    rows.sort(key=lambda row: (row["recipe"], row["sequences"]))
    write_json(output, rows)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("sequences:Q", scale=alt.Scale(type="log", base=2), title="sequences"),
        color=alt.Color("recipe:N", title=None),
    )
    panels = [
        base.mark_line(point=True)
        .encode(y=alt.Y(f"{key}:Q", title=title, scale=alt.Scale(zero=False)))
        .properties(width=320, height=240)
        for key, title in (("perplexity", "perplexity"), ("kl", "KL divergence from dense, nats"))
    ]
    svg = vl_convert.vegalite_to_svg(alt.hconcat(*panels).to_json(), vl_version=alt.SCHEMA_VERSION.rpartition(".")[0])
    output.with_suffix(".svg").write_text(svg)
    for row in rows:
        print(f"{row['recipe']:>8} {row['sequences']:>4}  {row['perplexity']:.2f}  {row['kl']:.4f}")


if __name__ == "__main__":
    typer.run(main)
