"""`armor chat`: talk to a checkpoint in the terminal, beside the dense model where one is given.

Every model keeps its own side of the talk. Answers are greedy, so that what differs is what the models say and not the
dice. Each line of numbers counts the new tokens of one answer and the time they took, the prompt's included.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from armor.runtime.folder import load_tokenizer
from armor.runtime.load import load_model

__all__ = ["Speaker", "chat"]


@dataclass
class Speaker:
    """A model, its tokenizer, and what was said to it and by it so far."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    said: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, folder: Path) -> Speaker:
        """The model in `folder`. Raises ArmorError where it, or its tokenizer, cannot be loaded."""
        return cls(name, load_model(folder), load_tokenizer(folder))

    def prompt(self) -> torch.Tensor:
        """The tokens (1, length) of the talk so far: by the chat template, or plain text where there is none."""
        if self.tokenizer.chat_template:
            options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            found: Any = self.tokenizer.apply_chat_template(self.said, **options)
            return found["input_ids"]
        text = "\n".join(turn["content"] for turn in self.said)
        return self.tokenizer(text, return_tensors="pt").input_ids

    def answer(self, question: str, new_tokens: int) -> float:
        """Print the answer to `question` as it comes, at most `new_tokens` tokens; returns tokens per second."""
        self.said.append({"role": "user", "content": question})
        tokens = self.prompt()
        ends = self.model.generation_config.eos_token_id
        greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=ends)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate: Any = self.model.generate
        begin = time.perf_counter()
        written = generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy, streamer=streamer)
        seconds = time.perf_counter() - begin
        new = written[0, tokens.shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        self.said.append({"role": "assistant", "content": str(text)})
        return len(new) / seconds


def chat(speakers: list[Speaker], questions: Iterable[str], new_tokens: int) -> None:
    """Let every speaker answer every question, one line each; blank lines are passed over."""
    for question in filter(None, map(str.strip, questions)):
        for speaker in speakers:
            print(f"[{speaker.name}]")
            speed = speaker.answer(question, new_tokens)
            print(f"[{speaker.name}: {speed:.1f} tokens/s]\n", flush=True)
