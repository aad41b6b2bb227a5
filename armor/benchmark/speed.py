"""The speed of one loaded model: tokens per second of reading a prompt, and of writing after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from armor.benchmark.timing import Mark, mark, seconds_between

__all__ = ["generation_speed", "random_prompt", "written_after"]


class _Clock:
    """A streamer for `generate` that notes when the prompt is taken and when each token arrives on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Mark] = []

    def put(self, tokens: Tensor) -> None:
        self.marks.append(mark(self.device))

    def end(self) -> None:
        pass


def written_after(model: PreTrainedModel, prompt: Tensor, how: GenerationConfig, clock: _Clock | None = None) -> Tensor:
    """The tokens (batch, T + new) of `prompt` (batch, T), all of which count, and of what `model` writes after it."""
    generate: Any = model.generate
    return generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=how, streamer=clock)


def generation_speed(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    """Tokens per second of `prefill` and of greedy `decode` after a prompt (batch, T), all sequences together.

    The batch·T tokens of the prompt in the time to the first new token; the other new ones in the time from then on.
    """
    clock = _Clock(model.device)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, use_cache=True, pad_token_id=0
    )
    written_after(model, prompt, greedy, clock)
    start, first, *_, last = clock.marks
    written = len(prompt) * (len(clock.marks) - 2)
    return {"prefill": prompt.numel() / seconds_between(start, first), "decode": written / seconds_between(first, last)}


def random_prompt(model: PreTrainedModel, batch_size: int, tokens: int) -> Tensor:
    """Random tokens (batch_size, tokens), the same for every model with this vocabulary; speed is that of any text."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch_size, tokens), generator=generator).to(model.device)
