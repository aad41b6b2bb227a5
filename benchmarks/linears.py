"""Single linears compressed by ARMOR and by others with as many bits, and what each loses by three measures.

    M=runs/competitors/results/smollm2-135m
    python -m benchmarks.linears $M/source.json $M/calibration/wikitext2/calibration.json --layer 5 --layer 25

Blocks of --size and pairs of rank --size take equally many numbers; NoWag-P and SparseGPT have the core alone. Errors
are relative to those of a weight of zeros, on the statistics that the methods were given: the proxy loss, which ARMOR
and NoWag-P make small; the error weighed by each input's mean square, as in OATS; and the error of the output, by the
Gram matrix, as in 3BASiL, SparseGPT and ARMOR-Gram. Seconds are the time of one thread. Writes benchmarks/linears.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from armor.config.layers import ModuleSettings
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.execution.files import write_json
from armor.execution.log import progress
from armor.execution.machine import current_machine, set_threads
from armor.factorize.layer import factorize_weight, seed_of
from armor.format.shards import Shards
from armor.format.statistics import Statistics, read_statistics, statistics_of
from armor.methods.solver.objective import Objective, relative_loss
from armor.methods.solver.output import output_error
from armor.model.source import open_source

METHODS = ("nowag", "sparsegpt", "oats", "basil", "armor", "armor_gram")
MEASURES = ("proxy", "weighed", "output")
OUTPUT = Path(__file__).with_suffix(".json")


def errors(weight: Tensor, inputs: Statistics, found: Factorization) -> dict[str, float]:
    """What `found` misses of weight (out, in) by each of MEASURES, relative to a weight of zeros."""
    assert inputs.gram is not None
    zeros = Factorization(torch.zeros_like(weight), found.mask, found.pattern)
    square = (weight - found.reconstruct()).double().square() @ inputs.importance.double()
    whole = weight.double().square() @ inputs.importance.double()
    return {
        "proxy": relative_loss(weight, Objective.of(weight, inputs.importance), found),
        "weighed": float(square.sum() / whole.sum()),
        "output": output_error(weight, inputs.gram, found) / output_error(weight, inputs.gram, zeros),
    }


def compared(weight: Tensor, inputs: Statistics, settings: dict[str, Any], module: str) -> dict[str, dict[str, float]]:
    """The errors of each of METHODS on weight (out, in), and its seconds."""
    found = {}
    for method in METHODS:
        begun = time.thread_time()
        own = ModuleSettings.model_validate({"method": method, **settings})
        factors = factorize_weight(weight, inputs, own, seed_of(0, module), module)
        found[method] = {"seconds": round(time.thread_time() - begun, 2), **errors(weight, inputs, factors)}
    return found


def table(rows: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """Lines of Markdown: for each linear the errors, the least in bold."""
    yield "| linear | | " + " | ".join(METHODS) + " |"
    yield "|---|---" + "|--:" * len(METHODS) + "|"
    for name, found in rows.items():
        for measure in MEASURES:
            numbers = [f"{found[method][measure]:.5f}" for method in METHODS]
            bold = [f"**{number}**" if number == min(numbers) else number for number in numbers]
            yield f"| {name if measure == MEASURES[0] else ''} | {measure} | " + " | ".join(bold) + " |"
        yield "| | seconds | " + " | ".join(f"{found[method]['seconds']:.1f}" for method in METHODS) + " |"


def main(
    source: Annotated[Path, typer.Argument(help="source.json of the model, or its folder.")],
    calibration: Annotated[Path, typer.Argument(help="Its record, of statistics with Gram matrices.")],
    layer: Annotated[list[int], typer.Option("--layer", help="A decoder layer, from 0; may be repeated.")],
    size: Annotated[int, typer.Option("--size", help="Of blocks, and rank of pairs.")] = 64,
    iterations: Annotated[int, typer.Option("--iterations", help="Of ARMOR's solver.")] = 300,
    output: Path = OUTPUT,
) -> None:
    """Compress every linear of the layers by every method, and print a table."""
    set_threads(1)
    shards, rows = Shards(open_source(source).path), {}
    settings = {"block_size": size, "rank": size, "solver": {"iterations": iterations}}
    for number in layer:
        file = statistics_of(calibration, number)
        for module, inputs in progress(read_statistics(file).items(), f"layer {number}", unit="linears"):
            if inputs.gram is None:
                raise ArmorError(f"{calibration}: no Gram matrices; calibrate with `gram: true`")
            weight = shards.read(f"{module}.weight").float()
            shape = " × ".join(f"{length:,}" for length in weight.shape)
            name = f"{number}, {module.rpartition('.')[2].removesuffix('_proj')}, {shape}"
            rows[name] = compared(weight, inputs, settings, module)
    write_json(output, {"machine": current_machine("cpu").model_dump(), "settings": settings, "linears": rows})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    typer.run(main)
