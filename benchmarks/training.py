"""What training costs: a step of refine on one decoder layer, and the loss of tune.

    python -m benchmarks.training                                                     # a layer of SmolLM2-135M
    python -m benchmarks.training --hidden 2048 --inner 5632 --heads 32 --kv-heads 4  # one of a 1.1B Llama

The layer has random weights: time and memory depend on shapes alone. Timed in turn, median of the rounds: a step of
four sequences with A·S·B multiplied out once, the same for every sequence, and the dense layer. For one sequence and
the linear from the hidden states to the inside of the MLP: forward and backward with A·S·B multiplied out first, with
three steps for every token, and dense. Of tune, for one sequence: what is kept of a prediction, and the divergence with
its gradient.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, top_n_mask
from armor.execution.machine import set_threads
from armor.training.trainable import TrainableLinear, make_trainable, multiplied_once, put_linears, training_arithmetic
from armor.training.tune import kept_predictions, kl_divergence
from benchmarks.record import figure, store

BATCH = 4
OUTPUT = Path(__file__).with_suffix(".json")


def decoder(hidden: int, inner: int, heads: int, kv_heads: int, length: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """One decoder layer of a Llama, float32, and its position embeddings."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=8,
    )
    model = LlamaForCausalLM(config).float().model
    return model.layers[0], model.rotary_emb(torch.zeros(1, length, hidden), torch.arange(length)[None])


def compressed(layer: nn.Module, block: int) -> list[TrainableLinear]:
    """Put trainable linears into `layer`, 2:4 between blocks of `block`; all its values are then trained."""
    pattern, factors = Pattern.parse("2:4"), {}
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            core, mask = linear.weight.detach(), top_n_mask(linear.weight.detach().abs(), pattern)
            sides = [torch.eye(block).repeat(size // block, 1, 1) for size in core.shape]
            factors[f"layer.{name}"] = Factorization(core * mask, mask, pattern, *sides)
    linears = put_linears(layer, lambda name: name.removeprefix("layer."), factors)
    dtypes = {f"layer.{name}": torch.float32 for name, _ in layer.named_parameters()}
    return list(make_trainable(layer, "layer", linears, dtypes, {}).linears.values())


def three_steps(linear: TrainableLinear, x: Tensor) -> Tensor:
    """What a linear makes of x (tokens, in) by B, S and A one after the other: (tokens, out)."""
    core, _ = linear._unpacked()
    assert linear.left is not None and linear.right is not None
    return blockdiag.multiply(linear.left, F.linear(blockdiag.multiply(linear.right, x), core))


def main(
    hidden: Annotated[int, typer.Option(help="Features of the hidden states.")] = 576,
    inner: Annotated[int, typer.Option(help="Features inside of the MLP.")] = 1536,
    heads: int = 9,
    kv_heads: int = 3,
    vocabulary: int = 49152,
    block: int = 64,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    rounds: int = 5,
    threads: Annotated[int | None, typer.Option("--threads")] = None,
    output: Path = OUTPUT,
) -> None:
    if threads is not None:
        set_threads(threads)
    dense, positions = decoder(hidden, inner, heads, kv_heads, length)
    layer = copy.deepcopy(dense)
    linears = compressed(layer, block)
    states, wanted = torch.randn(2, BATCH, 1, length, hidden)

    def step(module: nn.Module, once: bool) -> None:
        """Forward and backward of all sequences, as `armor.training.fit` does it."""
        with multiplied_once(linears) if once else nullcontext():
            for state, target in zip(states, wanted, strict=True):
                with training_arithmetic("cpu"):
                    made = module(state, position_embeddings=positions)
                    loss = F.mse_loss(made.float(), target)
                loss.backward()

    own_linear, dense_linear = layer.get_submodule("mlp.gate_proj"), dense.get_submodule("mlp.gate_proj")
    assert isinstance(own_linear, TrainableLinear)
    x, back = torch.randn(length, hidden, requires_grad=True), torch.randn(length, inner)

    def through(linear: Callable[[Tensor], Tensor]) -> None:
        with training_arithmetic("cpu"):
            made = linear(x)
        made.backward(back.to(made.dtype))

    logits = torch.randn(length, vocabulary) * 3
    own = (logits + torch.randn_like(logits)).requires_grad_()
    kept = kept_predictions(iter([logits]))

    def divergence() -> None:
        kl_divergence(own, kept.tokens[0], kept.log_probabilities[0]).mean().backward()

    work: dict[str, Callable[[], object]] = {
        "step, multiplied out once": lambda: step(layer, True),
        "step, multiplied out for every sequence": lambda: step(layer, False),
        "step of the dense layer": lambda: step(dense, False),
        "a linear, multiplied out": lambda: through(own_linear),
        "a linear, three steps for every token": lambda: through(lambda x: three_steps(own_linear, x)),
        "a linear, dense": lambda: through(dense_linear),
        "what is kept of a prediction": lambda: kept_predictions(iter([logits])),
        "the divergence and its gradient": divergence,
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            begun = time.perf_counter()
            run()
            if number:  # the first is to warm up
                seconds[name].append(time.perf_counter() - begun)
    shape = f"{hidden} x {inner}, {heads} and {kv_heads} heads, block {block}, {length} tokens, vocabulary {vocabulary}"
    rows = [{"work": name, "seconds": figure(times)} for name, times in seconds.items()]
    store(output, shape, rows, sequences_in_a_step=BATCH)
    for row in rows:
        print(f"{row['seconds']['median']:8.3f} s  {row['work']}")


if __name__ == "__main__":
    typer.run(main)
