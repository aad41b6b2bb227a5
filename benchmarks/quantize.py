"""What each step from floats to integers brings: the proxy loss of linears of one decoder layer of a finished run.

    cd results/smollm2-135m
    python -m benchmarks.quantize armor/layers calibration/wikipedia source.json --layer 12 --linear q_proj

The steps come one on top of the other: every number to the nearest, on the scale that holds the largest of its group;
searched scales; each round of the search. "Not balanced" is the last round from other factors of the same product:
columns of A and rows of B are multiplied by 2 to the power of a normal number, and S makes up for it. "Plain" is
NoWag-P's weights rounded alike. A and B are int8, S is int8 in groups of 64 and int4 of 32. Where the statistics have
Gram matrices the error of the output, relative to that of zeros, is told too, with the search for it. Adds to
benchmarks/quantize.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from armor.core.factorization import Factorization
from armor.core.integers import DTYPES, round_
from armor.core.quantization import LIMITS, NumberType, Quantization
from armor.execution.files import read_json, write_json
from armor.execution.machine import current_machine, set_threads
from armor.format.factors import read_factors
from armor.format.names import layer_file
from armor.format.shards import Shards
from armor.format.statistics import Statistics, read_statistics
from armor.methods.solver import rounding
from armor.methods.solver.integers import searched
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.output import damped, output_error
from armor.model.source import open_source

OUTPUT = Path(__file__).with_suffix(".json")
GROUPS: dict[NumberType, int] = {"int8": 64, "int4": 32}


def nearest(values: Tensor, kind: NumberType, group: int) -> tuple[Tensor, Tensor]:
    """`values` (rows, columns) as `kind` and scales (rows, groups), each just as large as its group needs."""
    rows, columns = values.shape
    w = F.pad(values, (0, -columns % group)).view(rows, -1, group)
    scales = (w.abs().amax(2) / LIMITS[kind][1]).bfloat16()
    q = round_(w / scales.float().clamp_min(1e-30)[..., None], kind)
    return q.view(rows, -1)[:, :columns].to(DTYPES[kind]), scales


def rounded_plainly(given: Factorization, kind: Quantization) -> Factorization:
    """Every number of the factors to the nearest, on the scale that holds the largest of its group."""
    core, core_scales = nearest(given.core, kind.core, kind.group)
    found = {"core": core, "core_scales": core_scales}
    for name in ("left", "right"):
        side = getattr(given, name)
        q, scales = nearest(side.reshape(-1, side.shape[2]), "int8", side.shape[2])
        found |= {name: q.view(side.shape), f"{name}_scales": scales.view(-1)}
    return replace(given, quantization=kind, **found)


def unbalanced(given: Factorization) -> Factorization:
    """The same product A·S·B of blocks whose columns and rows have norms that differ."""
    assert given.left is not None and given.right is not None
    generator = torch.Generator().manual_seed(0)
    columns, rows = (torch.randn(side.shape[:2], generator=generator).exp2() for side in (given.left, given.right))
    core = given.core / columns.view(-1, 1) / rows.view(1, -1)
    return replace(given, core=core, left=given.left * columns[:, None], right=given.right * rows[:, :, None])


def losses(weight: Tensor, inputs: Statistics, given: Factorization, core: NumberType) -> dict[str, dict[str, float]]:
    """The proxy loss of one linear, and with a Gram matrix the output's error, in floats and after each step."""
    kind = Quantization(core, "int8", given.pattern.columns_of(GROUPS[core]))
    objective = Objective.of(weight, inputs.importance)
    d, row, other = rounding.column_weights(objective), objective.row.float(), unbalanced(given)
    scaled = rounding.to_nearest(given, kind, d)
    found = {
        "plain": rounding.pruned_plainly(weight, objective, given, kind, d),
        "floats": given,
        "nearest": rounded_plainly(given, kind),
        "+ scales": scaled,
    }

    def rounds(row: Tensor, h: Tensor) -> dict[str, Factorization]:
        results = [*searched(weight, row, h, given, scaled)]
        *_, last = searched(weight, row, h, other, rounding.to_nearest(other, kind, d))
        return {f"round {number}": each for number, each in enumerate(results, 1)} | {"not balanced": last}

    by_loss = found | rounds(row, d)
    told = {"proxy loss": {name: relative_loss(weight, objective, each) for name, each in by_loss.items()}}
    if inputs.gram is not None:
        h = damped(inputs.gram).float()
        zeros = output_error(weight, h, replace(given, core=torch.zeros_like(given.core)))
        by_gram = found | {"by the loss": by_loss["round 4"]} | rounds(torch.ones_like(row), h)
        told["error"] = {name: output_error(weight, h, each) / zeros for name, each in by_gram.items()}
    return told


@torch.no_grad()
def main(
    layers: Annotated[Path, typer.Argument(help="The folder of ARMOR's factors, in floats.")],
    calibration: Annotated[Path, typer.Argument(help="The folder of their statistics.")],
    model: Annotated[Path, typer.Argument(help="source.json of the dense model.")],
    layer: Annotated[int, typer.Option("--layer", help="The number of the decoder layer.")] = 12,
    linear: Annotated[list[str] | None, typer.Option("--linear", help="The last part of its name; unset: all.")] = None,
) -> None:
    """Print a row for each linear and each type of the core."""
    set_threads(1)
    weights, inputs = Shards(open_source(model).path), read_statistics(layer_file(calibration, layer))
    record = read_json(OUTPUT) if OUTPUT.is_file() else {"machine": current_machine().model_dump(), "errors": {}}
    for name, stored in read_factors(layer_file(layers, layer))[0].items():
        if stored.left is None or stored.right is None or (linear and name.rpartition(".")[2] not in linear):
            continue
        given = replace(stored, core=stored.core.float(), left=stored.left.float(), right=stored.right.float())
        for core in GROUPS:
            told = losses(weights.read(f"{name}.weight").float(), inputs[name], given, core)
            for kind, found in told.items():
                record["errors"][f"{name}, {core}, {kind}"] = {step: round(loss, 6) for step, loss in found.items()}
                row = " | ".join(f"{step} {loss:.5f}" for step, loss in found.items())
                print(f"| {name}, {core}, {kind} | {row}", flush=True)
            write_json(OUTPUT, record)


if __name__ == "__main__":
    typer.run(main)
