"""A Llama turned so that pruning loses less, as DenoiseRotator does it, and the same model otherwise.

    M=runs/refine/results/smollm2-135m
    python -m benchmarks.rotated $M/source.json $M/calibration/wikitext2/calibration.json runs/rotated

The norms' weights move into the linears behind them. Then one orthogonal matrix turns the hidden states, and one for
each head of the values turns what attention gathers. All of them go into the weights, so nothing is left to do when the
model runs, but the head is no longer the embedding. They are learned: 2:4 should take as little as may be of the
importances, W² by the diagonal of the inverse Gram matrix, as SparseGPT has them. (Gu et al. 2025, DenoiseRotator,
arXiv 2505.23049, lower their entropy instead, turn each layer's states apart, and multiply between layers.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import AutoTokenizer, LlamaForCausalLM

from armor.core.errors import ArmorError
from armor.execution.log import progress
from armor.execution.machine import set_threads
from armor.format.statistics import read_statistics, statistics_of
from armor.model.source import open_source

RATE, WARM_UP, LAYERS_IN_A_STEP, DAMPING = 2e-3, 10, 4, 0.01


def fold(norm: Any, *linears: nn.Linear) -> None:
    """Move the weight of `norm` into the linears behind it."""
    for linear in linears:
        linear.weight.mul_(norm.weight)
    norm.weight.fill_(1)


@torch.no_grad()
def folded(model: LlamaForCausalLM) -> None:
    """The same model with norms that multiply by one, and a head of its own."""
    head, model.config.tie_word_embeddings = model.lm_head.weight.clone(), False
    model.lm_head.weight = nn.Parameter(head)
    fold(model.model.norm, model.lm_head)
    layer: Any
    for layer in model.model.layers:
        own = layer.self_attn
        fold(layer.input_layernorm, own.q_proj, own.k_proj, own.v_proj)
        fold(layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj)


class Rotations(nn.Module):
    """stream (hidden, hidden) and heads (layers, heads of values, d, d), all orthogonal; they start as identities."""

    stream: Tensor
    heads: Tensor

    def __init__(self, hidden: int, layers: int, heads: int, size: int) -> None:
        super().__init__()
        self.register_parameter("stream", nn.Parameter(torch.eye(hidden)))
        self.register_parameter("heads", nn.Parameter(torch.eye(size).repeat(layers, heads, 1, 1)))
        for name in ("stream", "heads"):
            orthogonal(self, name, orthogonal_map="cayley")
            setattr(self, name, torch.eye(getattr(self, name).shape[-1]).expand_as(getattr(self, name)))


def turned(layer: Any, stream: Tensor, values: Tensor) -> Iterator[tuple[nn.Linear, Tensor, Tensor]]:
    """Each linear of a decoder layer, its turned weight (out, in) and the rotation (in, in) of what it is fed.

    `stream` (hidden, hidden); `values` (heads of values, d, d), which several heads of queries may share.
    """
    attention, mlp = layer.self_attn, layer.mlp
    of_values = torch.block_diag(*values)
    gathered = torch.block_diag(*values.repeat_interleave(attention.num_key_value_groups, 0))
    for linear in (attention.q_proj, attention.k_proj):
        yield linear, linear.weight @ stream, stream
    yield attention.v_proj, of_values.T @ attention.v_proj.weight @ stream, stream
    yield attention.o_proj, stream.T @ attention.o_proj.weight @ gathered, gathered
    for linear in (mlp.gate_proj, mlp.up_proj):
        yield linear, linear.weight @ stream, stream
    yield mlp.down_proj, stream.T @ mlp.down_proj.weight, torch.eye(mlp.down_proj.in_features)


def lost(importances: Tensor) -> Tensor:
    """What 2:4 takes of them at least, as a share: the two smallest of every four."""
    a, b, c, d = importances.unflatten(-1, (-1, 4)).unbind(-1)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    other_low, other_high = torch.minimum(c, d), torch.maximum(c, d)
    second = torch.minimum(torch.maximum(low, other_low), torch.minimum(high, other_high))
    return (torch.minimum(low, other_low) + second).sum() / importances.sum()


@torch.no_grad()
def turn(model: LlamaForCausalLM, rotations: Rotations) -> None:
    """Put the rotations into the weights of a folded model, which computes the same then."""
    stream, values = rotations.stream.double(), rotations.heads.double()
    model.double()
    for number, layer in enumerate(model.model.layers):
        for linear, weight, _ in [*turned(layer, stream, values[number])]:
            linear.weight.copy_(weight)
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight.copy_(module.weight @ stream)
    model.float()


def inverses(model: LlamaForCausalLM, calibration: Path) -> list[dict[str, Tensor]]:
    """The inverse Gram matrix of what each linear is fed in the folded model, by layer and last part of its name.

    `model` is not folded yet, and `calibration` the record of its statistics.
    """
    layer: Any
    found = []
    for number, layer in enumerate(model.model.layers):
        own: dict[str, Tensor] = {}
        norms = {"self_attn": layer.input_layernorm.weight, "mlp": layer.post_attention_layernorm.weight}
        for name, each in read_statistics(statistics_of(calibration, number)).items():
            if each.gram is None:
                raise ArmorError(f"{calibration}: no Gram matrices; calibrate with `gram: true`")
            *_, part, linear = name.split(".")
            norm = norms[part].detach() if linear not in ("o_proj", "down_proj") else torch.ones(1)
            gram = each.gram.double() / norm[:, None] / norm
            gram.diagonal().add_(DAMPING * gram.diagonal().mean())
            own[linear] = torch.linalg.inv(gram).float()
        found.append(own)
    return found


def main(
    source: Annotated[Path, typer.Argument(help="Of a Llama: its source.json or folder.")],
    calibration: Annotated[Path, typer.Argument(help="Its record, of statistics with Gram matrices.")],
    output: Annotated[Path, typer.Argument(help="Folder for the turned model.")],
    steps: int = 100,
    threads: int = 2,
) -> None:
    set_threads(threads)
    torch.set_flush_denormal(True)
    random.seed(0)
    path = open_source(source).path
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    inverse = inverses(model, calibration)
    folded(model)
    model.requires_grad_(False)
    layers: Any = model.model.layers
    config = model.config
    rotations = Rotations(config.hidden_size, len(layers), config.num_key_value_heads, layers[0].self_attn.head_dim)

    def mean_lost(numbers: Iterable[int]) -> Tensor:
        """What 2:4 takes of the importances, the mean over all linears in the layers of these numbers."""
        stream, heads, found = rotations.stream, rotations.heads, []
        for number in numbers:
            names = {module: name.rpartition(".")[2] for name, module in layers[number].named_modules()}
            for linear, weight, turn_of in turned(layers[number], stream, heads[number]):
                diagonal = ((inverse[number][names[linear]] @ turn_of) * turn_of).sum(0)
                found.append(lost(weight.square() / diagonal))
        return torch.stack(found).mean()

    @torch.no_grad()
    def say(step: int) -> None:
        print(f"step {step}: 2:4 takes {mean_lost(range(len(layers))):.2%} of the importance", flush=True)

    say(0)
    adam = torch.optim.Adam(rotations.parameters())
    for step in progress(range(steps), "turn", steps, "step"):
        share = min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.param_groups[0]["lr"] = RATE * share
        adam.zero_grad()
        mean_lost(random.sample(range(len(layers)), LAYERS_IN_A_STEP)).backward()
        adam.step()
    say(steps)
    turn(model, rotations)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(path).save_pretrained(output)


if __name__ == "__main__":
    typer.run(main)
