"""Statistics of what the experts of a mixture are fed: the tokens that the router sends, blended with all tokens.

What matters to the model is an expert's output times the weight that the router gives it. So a token counts with the
square of its weight: the mean of x² is Σ w²x² / Σ w². An expert that saw few tokens knows this mean badly. It is
blended with the mean over a sample of all tokens, which the expert is run on beside:

    (n · routed + PRIOR · all) / (n + PRIOR),   n = (Σ w²)² / Σ w⁴

n is the number of tokens of equal weight that say as much. So an expert with many tokens has its own statistics, and
one that saw none has those of all tokens. The price is SAMPLE tokens of each sequence through every expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from armor.format.statistics import Accumulator, Statistics
from armor.runtime.experts import Expert, Experts

__all__ = ["PRIOR", "SAMPLE", "Routed", "blended", "on_sample", "run_on_all"]

PRIOR = 64  # tokens
SAMPLE = 16  # tokens of a sequence, evenly spaced


class Routed:
    """The sums of one input of an expert: over the tokens that were sent to it, and over a sample of all."""

    def __init__(self, expert: Expert, new: Callable[[], Accumulator]) -> None:
        self.expert, self.sent, self.all = expert, new(), new()

    def add(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook of a linear, before its forward."""
        if self.expert.weights is None:
            self.all.add(args[0])
        else:
            self.sent.add(args[0], self.expert.weights)

    def finite(self) -> bool:
        """Whether no NaN and no infinity was added."""
        return self.sent.finite() and self.all.finite()

    def statistics(self) -> Statistics:
        """The blend so far, on the CPU."""
        return blended(self.sent, self.all)


def blended(sent: Accumulator, everyone: Accumulator) -> Statistics:
    """The statistics of an input from the tokens that were sent, and all tokens for where these are few."""
    rest = everyone.statistics()
    if not sent.weight:
        return Statistics(rest.importance, rest.gram, sent.tokens)
    own, n = sent.statistics(), sent.effective_tokens()
    share = n / (n + PRIOR)
    gram = None if own.gram is None or rest.gram is None else own.gram.lerp(rest.gram, 1 - share)
    return Statistics(own.importance.lerp(rest.importance, 1 - share), gram, sent.tokens)


def run_on_all(layer: nn.Module) -> list[Any]:
    """Let every expert of `layer` run on a sample of all tokens too, when its mixture is called; returns the hooks."""
    found = [module for module in layer.modules() if isinstance(module, Experts)]
    return [module.register_forward_pre_hook(_run_on_all, with_kwargs=True) for module in found]


@torch.no_grad()
def _run_on_all(mixture: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert isinstance(mixture, Experts)
    x = mixture.arguments(args, kwargs)[0]
    for _, expert in mixture.experts():
        on_sample(mixture, expert, x)


def on_sample(mixture: Experts, expert: Expert, x: Tensor) -> None:
    """Run an expert on a sample of all tokens, x (tokens, in) of a call of its mixture."""
    sample = x[torch.linspace(0, len(x) - 1, min(SAMPLE, len(x)), device=x.device).long()]
    expert(sample.to(next(expert.parameters()).device), None, mixture.between)
