"""Decoding of whole models by recipe, in turn in one process: ARMOR in floats and integers, 2:4 alone, int8 unpruned.

    python -m benchmarks.decoding FILE DENSE CHECKPOINT... --of NAME   # folders; a checkpoint's parent gives its name
    python -m benchmarks.decoding FILE --random FOLDER                 # writes a Llama of 1.1 billion parameters, 8 GB

One sequence in bfloat16. Speed depends on shapes alone, so the numbers of the random model have nothing to do with each
other: blocks of 64, cores of int8 in groups of 128 and of int4 in groups of 32. `armor benchmark` measures. FILE is
its record with every round; the medians go to benchmarks/decoding.json.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from armor.assemble.folder import copy_others, seal, write_tensors
from armor.benchmark.generation import benchmark
from armor.config.measures import BenchmarkSettings
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization
from armor.execution.files import read_json, write_json
from armor.format.checkpoint import PackedLinear, quantization_config, tombstone
from armor.format.checksums import CHECKSUMS
from armor.format.records.benchmark import BenchmarkRecord
from armor.format.shards import INDEX, Shards
from benchmarks.models import PUBLISHED, build, random_mask
from benchmarks.record import figure, rounded, store

PAIR = Pattern(2, 4)
OUTPUT = Path(__file__).with_suffix(".json")
LAYOUTS: dict[str, Callable[[int, int], PackedLinear]] = {
    "int8": lambda out, columns: PackedLinear(
        out, columns, Pattern(1, 1), quantization=Quantization("int8", None, columns)
    ),
    "2:4": lambda out, columns: PackedLinear(out, columns, PAIR),
    "2:4-int8": lambda out, columns: PackedLinear(out, columns, PAIR, quantization=Quantization("int8", None, 128)),
    "armor": lambda out, columns: PackedLinear(out, columns, PAIR, 64, 64),
    "armor-int8": lambda out, columns: PackedLinear(out, columns, PAIR, 64, 64, Quantization("int8", "int8", 128)),
    "armor-int4": lambda out, columns: PackedLinear(out, columns, PAIR, 64, 64, Quantization("int4", "int8", 32)),
}


def random_tensors(layout: PackedLinear) -> dict[str, Tensor]:
    """What a linear of `layout`, dense or 2:4, holds, by suffix; floats in bfloat16."""
    dtypes, made = layout.dtypes(), {}
    for suffix, shape in layout.shapes().items():
        if suffix == "core_mask":
            made[suffix] = random_mask(*shape)
        elif suffix in dtypes:
            limits = (0, 256) if dtypes[suffix] == "uint8" else (-127, 128)
            made[suffix] = torch.randint(*limits, shape, dtype=getattr(torch, dtypes[suffix]))
        else:
            made[suffix] = (torch.rand(shape) * 1e-3).bfloat16()
    return made


def dense_model(folder: Path) -> Path:
    """The random Llama of 1.1 billion parameters, in `folder`/dense, written if it is not there."""
    dense = folder / "dense"
    if not (dense / INDEX).exists():  # the last file
        build(dense, PUBLISHED["llama-1.1b"])
    return dense


def random_checkpoint(dense: Path, output: Path, layout_of: Callable[[int, int], PackedLinear]) -> Path:
    """A packed checkpoint of the model in `dense` with random numbers, of linears (out, in) of that layout.

    Written to `output` if it is not there, and returned.
    """
    if (output / CHECKSUMS).exists():
        return output
    output.mkdir(exist_ok=True)
    shards, sizes = Shards(dense), {}
    modules: dict[str, PackedLinear] = {}
    for name in shards.names():
        linear = name.removesuffix(".weight")
        if linear.endswith("_proj"):
            modules[linear] = layout = layout_of(*shards.shape(name))
            for suffix, shape in layout.shapes().items():
                sizes[f"{linear}.{suffix}"] = math.prod(shape) * (1 if suffix in layout.dtypes() else 2)
        else:
            sizes[name] = shards.bytes_of(name)
    sizes[tombstone(modules)] = 1
    made: dict[str, Any] = {}  # of one linear at a time

    def read(name: str) -> Tensor:
        linear, _, suffix = name.rpartition(".")
        if name == tombstone(modules):
            return torch.zeros(1, dtype=torch.uint8)
        if linear not in modules:
            return shards.read(name)
        if name not in made:
            made.clear()
            made.update((f"{linear}.{key}", tensor) for key, tensor in random_tensors(modules[linear]).items())
        return made[name]

    sums = write_tensors(output, sizes, read, 500_000_000, "packed")
    copy_others(dense, output)
    config = read_json(dense / "config.json") | {"quantization_config": quantization_config(modules)}
    write_json(output / "config.json", config)
    seal(output, sums)
    return output


def rows(record: BenchmarkRecord) -> list[dict]:
    """The dense model and each recipe: bits, bytes for a token, tokens per second and their ratio to dense."""
    found = []
    for name, side in {"dense": record.dense, **record.recipes}.items():
        row: dict[str, Any] = {"recipe": name, "megabytes_per_token": round(side.bytes_per_token / 1e6, 1)}
        row |= {"bits_per_weight": rounded(side.bits_per_weight)} if side.bits_per_weight else {}
        for batch, speed in side.tokens_per_second.items():
            row[f"tokens_per_second_{batch}"] = figure(speed.decode.runs)
            row |= {f"over_dense_{batch}": figure(side.speedup[batch].decode.runs)} if side.speedup else {}
        found.append(row | ({"expanded": True} if side.expanded else {}))
    return found


def main(
    record: Annotated[Path, typer.Argument(metavar="FILE", help="Where the record goes.")],
    folders: Annotated[list[Path] | None, typer.Argument(help="The dense model, and packed checkpoints of it.")] = None,
    random: Annotated[Path | None, typer.Option("--random", help="A folder for the random models instead.")] = None,
    of: Annotated[str, typer.Option("--of", help="The name of the model.")] = "llama-1.1b",
    output: Path = OUTPUT,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if random:
        dense = dense_model(random)
        packed = {name: random_checkpoint(dense, random / name, layout) for name, layout in LAYOUTS.items()}
    else:
        dense, *others = folders or ()
        packed = {folder.absolute().parent.name: folder for folder in others}
    asked = BenchmarkSettings(batch_sizes=[1], dtype="bfloat16")
    found = benchmark(dense, packed, asked, record)
    for name, side in found.recipes.items():
        assert side.speedup and side.theoretical_speedup
        speed = side.speedup["1"].decode.median
        print(f"{name}: {speed:.2f} times as fast as dense; by bytes at most {side.theoretical_speedup:.2f}")
    store(output, of, rows(found), dtype=asked.dtype, prompt_tokens=asked.prompt_tokens, new_tokens=asked.new_tokens)


if __name__ == "__main__":
    typer.run(main)
