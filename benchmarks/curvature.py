"""What a decoder layer's output is worth to the predictions, by direction: would a weighted loss of refine differ?

    python -m benchmarks.curvature runs/refine/results/smollm2-135m/source.json --text wiki.valid.raw

The curvature of the KL divergence in the output of a layer is the mean of g·gᵀ (hidden, hidden). g is a token's
gradient of the log-probability of tokens drawn from the model's own predictions (Fisher's information), here times the
token's size, for the loss of refine is relative to it. The first token, whose state is huge in many models, counts
apart: the table has its share of the trace. Of the others it has tr(C)² / tr(C²), the number of directions that a
curvature like the identity would have, then the share of the largest eigenvalue, and the largest channel by the median
one. Writes benchmarks/curvature.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from armor.config.sources import TextSettings
from armor.execution.files import write_json
from armor.execution.log import progress
from armor.execution.machine import current_machine, set_threads
from armor.model.source import open_source
from armor.text.reading import read_blocks

OUTPUT = Path(__file__).with_suffix(".json")


def curvatures(model: Any, layers: nn.ModuleList, tokens: Tensor) -> list[tuple[float, Tensor]]:
    """Of the output of each of `layers`: the first token's share of the trace, and the curvature (hidden, hidden).

    That is the mean over the other tokens (sequences, length).
    """
    outputs: dict[int, Tensor] = {}

    def keep(number: int, output: Tensor) -> None:
        output.retain_grad()
        outputs[number] = output

    hooks = [
        layer.register_forward_hook(lambda _, __, output, number=number: keep(number, output))
        for number, layer in enumerate(layers)
    ]
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    size = model.config.hidden_size
    first, sums = torch.zeros(len(layers)), torch.zeros(len(layers), size, size)
    generator = torch.Generator().manual_seed(0)
    for row in progress(tokens, "sequences", unit="sequence"):
        found = model(row[None], use_cache=False).logits[0].log_softmax(-1)
        drawn = torch.multinomial(found.detach().exp(), 1, generator=generator)
        found.gather(1, drawn).sum().backward()
        for number, output in outputs.items():
            assert output.grad is not None
            gradient = (output.grad * output.detach().norm(dim=-1, keepdim=True))[0]
            first[number] += gradient[0].square().sum()
            sums[number].addmm_(gradient[1:].T, gradient[1:])
        model.zero_grad()
    for hook in hooks:
        hook.remove()
    traces = sums.diagonal(dim1=1, dim2=2).sum(1)
    return list(zip((first / (first + traces)).tolist(), sums / tokens[:, 1:].numel(), strict=True))


def described(share: float, curvature: Tensor) -> dict[str, float]:
    """A row of the table."""
    values, diagonal = torch.linalg.eigvalsh(curvature.double()), curvature.diagonal()
    total = values.sum()
    return {
        "first_token": round(share, 4),
        "directions": round(float(total**2 / values.square().sum()), 1),
        "largest_share": round(float(values.max() / total), 4),
        "largest_channel": round(float(diagonal.max() / diagonal.median()), 2),
    }


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Lines of Markdown."""
    lines = ["| layer | first token | directions | largest eigenvalue | largest channel by the median |"]
    lines.append("|--:|--:|--:|--:|--:|")
    for layer, row in rows.items():
        shares = f"{row['first_token']:.1%} | {row['directions']:.0f} | {row['largest_share']:.1%}"
        lines.append(f"| {layer} | {shares} | {row['largest_channel']:.1f} |")
    return "\n".join(lines)


def main(
    source: Annotated[Path, typer.Argument(help="Of a Llama: its source.json or folder.")],
    text: Annotated[Path, typer.Option("--text", help="Plain text.")],
    sequences: Annotated[int, typer.Option("--sequences")] = 24,
    length: Annotated[int, typer.Option("--length", help="Tokens of a sequence.")] = 1024,
    threads: Annotated[int, typer.Option("--threads")] = 2,
    output: Path = OUTPUT,
) -> None:
    """Print a row for each decoder layer."""
    set_threads(threads)
    path = open_source(source).path
    tokens = read_blocks(path, TextSettings(files=[str(text)]), sequences, length).tokens
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = curvatures(model, model.model.layers, tokens)
    rows = {str(number): described(*each) for number, each in enumerate(found)}
    about = {"text": text.name, "sequences": sequences, "length": length}
    write_json(output, {**about, "machine": current_machine("cpu").model_dump(), "layers": rows})
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
