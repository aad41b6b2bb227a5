"""What bfloat16 costs factors that are float32: perplexity, and KL divergence from the dense model, by what is rounded.

    M=runs/refine/results/smollm2-135m
    python -m benchmarks.factor_dtype $M/source.json $M/armor/layers $M/armor-tuned/tuned --evaluate wiki.test.raw

Only the stored numbers are rounded: products are float32. The dense row is the dense model with its linears' weights in
bfloat16. 16 × 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from armor.config.sources import TextSettings
from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.execution.files import write_json
from armor.execution.machine import current_machine
from armor.format.factors import read_factors, read_others
from armor.format.names import layer_files
from armor.model.source import open_source
from armor.runtime.load import load_model
from armor.text.reading import read_blocks
from benchmarks.quantize_model import scores

ROUNDED = {"nothing": (), "S": ("core",), "A, B": ("left", "right"), "all": ("core", "left", "right")}


def rounded(factors: Factorization, parts: tuple[str, ...]) -> Factorization:
    """`factors` with these parts as bfloat16 has them."""
    found = {part: getattr(factors, part) for part in parts}
    return replace(factors, **{part: x.bfloat16().float() for part, x in found.items() if x is not None})


def weights(folder: Path, parts: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """The weights (out, in) of a folder of factors with these parts rounded, and its norms and biases, by name."""
    if not (files := layer_files(folder)):
        raise ArmorError(f"{folder}: no layer_*.safetensors; name the folder of a recipe's last stage")
    for file in files:
        for name, factors in read_factors(file)[0].items():
            yield f"{name}.weight", rounded(factors, parts).reconstruct()
        yield from read_others(file).items()


@torch.inference_mode()
def main(
    model: Annotated[Path, typer.Argument(help="source.json of the dense model.")],
    folders: Annotated[list[Path], typer.Argument(help="Folders of factors in float32, each of all layers.")],
    evaluate: Annotated[Path, typer.Option("--evaluate", help="Plain text of at least 16,384 tokens.")],
) -> None:
    """Print a row for each folder and what of it is rounded; write benchmarks/factor_dtype.json."""
    source = open_source(model).path
    tokens = read_blocks(source, TextSettings(files=[str(evaluate)]), 16, 1024).tokens
    dense, compressed = load_model(source, "float32"), load_model(source, "float32")
    wanted = [dense(input_ids=block[None], use_cache=False).logits[0] for block in tokens]
    found = {}

    def judge(row: str, changed: dict[str, Tensor]) -> None:
        """Print the row of the dense model with the tensors `changed`."""
        compressed.load_state_dict(dense.state_dict() | changed)
        found[row] = scores(compressed, tokens, wanted)
        print(f"| {row} | {found[row]['perplexity']:.3f} | {found[row]['kl']:.4f} |", flush=True)

    linears = [name for name, tensor in weights(folders[0], ()) if tensor.dim() == 2]
    judge("dense, its linears", {name: dense.state_dict()[name].bfloat16().float() for name in linears})
    for folder in folders:
        for name, parts in ROUNDED.items():
            judge(f"{folder.parent.name}, {name}", dict(weights(folder, parts)))
    write_json(Path(__file__).with_suffix(".json"), {"machine": current_machine().model_dump(), "rounded": found})


if __name__ == "__main__":
    typer.run(main)
