"""Decoding through the experts of a mixture: packed ones over the dense module of transformers.

The shapes are a layer's of Qwen3-30B-A3B by default, the numbers random: time depends on shapes alone. The dense module
runs by each of transformers' experts implementations that a CPU has. All take their turn in random order, each on
experts that it draws anew, so that weights come from memory and what else the machine does falls on all alike. A ratio
is the median of the ratios of the turns.

    python -m benchmarks.experts
    python -m benchmarks.experts --tokens 256 --turns 5 --output other.json
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from armor.core.pattern import Pattern
from armor.execution.machine import set_threads
from armor.format.checkpoint import PackedLinear
from armor.runtime import cpu
from armor.runtime.fused import unfuse
from armor.runtime.linear import ArmorLinear
from benchmarks.models import random_mask
from benchmarks.record import figure, store

DENSE = ("eager", "batched_mm", "grouped_mm")
OUTPUT = Path(__file__).with_suffix(".json")


def random_linear(out: int, columns: int, block: int) -> ArmorLinear:
    """A 2:4 linear between blocks of `block`, bfloat16."""
    linear = ArmorLinear(PackedLinear(out, columns, Pattern.parse("2:4"), block, block), dtype=torch.bfloat16)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=0.02)
    assert linear.core_mask is not None
    linear.core_mask.copy_(random_mask(out, columns // 8))
    return linear


def dense_experts(config: Qwen3MoeConfig) -> Qwen3MoeExperts:
    """A layer's experts as transformers has them."""
    experts = Qwen3MoeExperts(config).bfloat16()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def packed_experts(config: Qwen3MoeConfig, block: int) -> nn.Module:
    """A layer's experts as a checkpoint of ours is loaded."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    (path,) = unfuse(model)
    experts = model.get_submodule(path)
    for name, linear in list(experts.named_modules()):
        if isinstance(linear, nn.Linear):
            experts.set_submodule(name, random_linear(linear.out_features, linear.in_features, block))
    return experts


def weights_bytes(module: nn.Module) -> int:
    """All that a module holds."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@torch.inference_mode()
def measure(ways: dict[str, Callable[..., Tensor]], config: Qwen3MoeConfig, tokens: int, turns: int) -> dict:
    """Microseconds of each way, and how many times faster than each dense one the packed one is."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, turns):
        for name in random.sample(list(ways), len(ways)):
            x = torch.randn(tokens, config.hidden_size).bfloat16()
            scores = torch.randn(tokens, config.num_experts).softmax(-1).topk(config.num_experts_per_tok)
            start = time.perf_counter()
            ways[name](x, scores.indices, scores.values.bfloat16())
            if turn >= 0:  # those before only warm up
                times[name].append(time.perf_counter() - start)
    faster = {name: [a / b for a, b in zip(times[name], times["packed"], strict=True)] for name in DENSE}
    return {
        "tokens": tokens,
        "milliseconds": {name: figure([1e3 * one for one in own]) for name, own in times.items()},
        "packed_over": {name: figure(own) for name, own in faster.items()},
    }


def main(
    hidden: Annotated[int, typer.Option(help="Features of the hidden states.")] = 2048,
    inner: Annotated[int, typer.Option(help="Features inside of an expert.")] = 768,
    experts: int = 128,
    per_token: int = 8,
    block: int = 64,
    tokens: list[int] = [1, 8],  # noqa: B006  typer reads it
    turns: int = 31,
    threads: int | None = None,
    output: Path = OUTPUT,
) -> None:
    if not cpu.available():
        raise SystemExit("benchmarks/experts.py: the CPU kernel was not built; install a C compiler, then the package")
    if threads is not None:
        set_threads(threads)
    torch.manual_seed(0)
    random.seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=per_token,
        num_hidden_layers=1,
        vocab_size=8,
    )
    dense, packed = dense_experts(config), packed_experts(config, block)

    def through(implementation: str) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            config._experts_implementation = implementation
            return dense(*inputs)

        return run

    ways: dict[str, Callable[..., Tensor]] = {name: through(name) for name in DENSE} | {"packed": packed}
    rows = []
    for count in tokens:
        rows.append(measure(ways, config, count, turns))
        for name, own in rows[-1]["packed_over"].items():
            print(f"{count} tokens: {own['median']:.2f} times as fast as {name}", flush=True)
    shape = f"{experts} experts of {hidden} x {inner}, {per_token} a token, blocks of {block}"
    sizes = {"dense": weights_bytes(dense), "packed": weights_bytes(packed)}
    store(output, shape, rows, kernel=cpu.level(), bytes=sizes)


if __name__ == "__main__":
    typer.run(main)
