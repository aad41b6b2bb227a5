"""Whether a ridge under the importances makes ARMOR's blocks easier to train: condition numbers, and what it loses.

    M=runs/refine/results/smollm2-135m
    python -m benchmarks.ridge $M/source.json $M/calibration/wikitext2/calibration.json \
        --linear 0.self_attn.q_proj --linear 18.self_attn.o_proj

A channel that hardly fires leaves its row of B almost free, and B's condition number large. The ridge is a share of the
mean importance, added to each one that the solver sees. The proxy loss is that with the true ones. Writes
benchmarks/ridge.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from armor.config.layers import ModuleSettings
from armor.core import blockdiag
from armor.core.errors import ArmorError
from armor.execution.files import write_json
from armor.execution.log import progress
from armor.execution.machine import current_machine, set_threads
from armor.factorize.layer import factorize_weight, seed_of
from armor.format.shards import Shards
from armor.format.statistics import read_statistics, statistics_of
from armor.methods.solver.objective import Objective, relative_loss
from armor.model.source import open_source

RIDGES = (0.0, 0.001, 0.01)
OUTPUT = Path(__file__).with_suffix(".json")


def main(
    source: Annotated[Path, typer.Argument(help="source.json of the model, or its folder.")],
    calibration: Annotated[Path, typer.Argument(help="The record of its statistics.")],
    linear: Annotated[
        list[str], typer.Option("--linear", help="Behind model.layers, as 0.self_attn.q_proj; may be repeated.")
    ],
    size: Annotated[int, typer.Option("--size", help="Of blocks.")] = 64,
    iterations: Annotated[int, typer.Option("--iterations", help="Of the solver.")] = 300,
    output: Path = OUTPUT,
) -> None:
    """Factorize every linear with every ridge, and print a table."""
    set_threads(1)
    shards = Shards(open_source(source).path)
    settings = ModuleSettings.model_validate({"block_size": size, "solver": {"iterations": iterations}})
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name in progress(linear, "ridge", len(linear), "linears"):
        module = f"model.layers.{name}"
        inputs = read_statistics(statistics_of(calibration, int(name.partition(".")[0])), gram=False).get(module)
        if inputs is None:
            raise ArmorError(f"--linear: the model has no {module}")
        weight, rows[name] = shards.read(f"{module}.weight").float(), {}
        for ridge in RIDGES:
            seen = replace(inputs, importance=inputs.importance + ridge * inputs.importance.mean())
            found = factorize_weight(weight, seen, settings, seed_of(0, module), module)
            assert found.right is not None
            rows[name][f"{ridge:g}"] = {
                "worst_condition_of_b": float(blockdiag.condition(found.right).max()),
                "proxy_loss": relative_loss(weight, Objective.of(weight, inputs.importance), found),
            }
    write_json(output, {"machine": current_machine("cpu").model_dump(), "size": size, "ridges": rows})
    print("| linear | " + " | ".join(f"{ridge:.1%} | " for ridge in RIDGES) + " |")
    print("|---" + "|--:" * 2 * len(RIDGES) + "|")
    for name, by_ridge in rows.items():
        cells = [f"{each['worst_condition_of_b']:,.0f} | {each['proxy_loss']:.5f}" for each in by_ridge.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
