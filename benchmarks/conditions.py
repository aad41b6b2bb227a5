"""Condition numbers of the blocks of A and B in a results folder, by module: as stored, and balanced.

    python -m benchmarks.conditions results/smollm2-135m/armor/layers

A·S·B does not change when a column of A is divided by its norm and the row of S multiplied by it. The solver ends with
that, so that the two columns of a table are alike; of factors made before that they show what it is worth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.format.factors import read_factors
from armor.methods.solver.objective import balanced


def conditions(found: Factorization) -> dict[str, torch.Tensor]:
    """The condition numbers of the blocks of A and of B, as stored and balanced; four vectors by name."""
    a, s, b = (x.double() for x in (found.left, found.core, found.right))
    again = balanced(a, s, b)
    pairs = {"A": (a, again[0]), "B": (b, again[2])}
    return {
        f"{side}, {when}": blockdiag.condition(blocks)
        for side, both in pairs.items()
        for when, blocks in zip(("as stored", "balanced"), both, strict=True)
    }


def main(layers: Annotated[Path, typer.Argument(help="A folder with layer_{k}.safetensors.")]) -> None:
    """Print a row for each kind of linear: the median and the worst over all blocks of all layers."""
    kinds: dict[str, dict[str, list[torch.Tensor]]] = {}
    for file in sorted(layers.glob("layer_*.safetensors")):
        for name, found in read_factors(file)[0].items():
            if found.left is not None and found.right is not None:
                columns = kinds.setdefault(name.rpartition(".")[2], {})
                for column, values in conditions(found).items():
                    columns.setdefault(column, []).append(values)
    names = list(next(iter(kinds.values()), {}))
    print("| linear | " + " | ".join(f"{name}: median | worst" for name in names) + " |")
    print("|---" * (1 + 2 * len(names)) + "|")
    for kind, columns in kinds.items():
        values = [torch.cat(columns[name]) for name in names]
        print(f"| {kind} | " + " | ".join(f"{v.median():,.0f} | {v.max():,.0f}" for v in values) + " |")


if __name__ == "__main__":
    typer.run(main)
