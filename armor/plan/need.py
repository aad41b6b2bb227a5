"""What a job takes, and what all stages' formulas build it from: a process, a model's passes, the plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from armor.config.layers import ModuleSettings
from armor.config.measures import EvaluationSettings
from armor.config.run import Config
from armor.config.sample import Sample
from armor.config.sources import CalibrationSettings
from armor.core.errors import ArmorError
from armor.format.records.topology import DecoderLayer, Linear
from armor.format.shards import dtype_name
from armor.plan.machine import Card, Host
from armor.plan.subject import Subject
from armor.plan.work import Forward, Head, Start, Work

__all__ = [
    "BESIDE_CUDA",
    "ByLength",
    "FORKED",
    "IN_WHOLE",
    "PROCESS",
    "START",
    "TEXT_TOKENS",
    "Memory",
    "Need",
    "Plan",
    "compiled",
    "forward",
    "head",
    "memory_of",
    "products",
]

PROCESS = 490 * 10**6
"""Bytes of a process that has loaded torch, transformers and this package (docs/TRIED.md)."""
FORKED = 385 * 10**6
"""Bytes of one that began as a fork of such a process, as jobs do where there is no GPU."""
BESIDE_CUDA = 1500 * 10**6
"""Bytes on the host of a process that computes on a card: CUDA's own libraries. Assumed."""
TEXT_TOKENS = 300_000
"""Tokens that a text is taken to have where the configuration does not say how many are used; WikiText-2's test has
about as many."""
START = Work(Start(), 1)
IN_WHOLE = Work(Start(whole=True), 1)


class Memory(NamedTuple):
    """Of a job at its peak, in bytes: on the host without a GPU; on the host while a card computes; on the card."""

    host: int
    beside: int
    card: int = 0


SHORTEST = 16
"""Tokens of a sequence; below it nothing is proposed."""
PRODUCTS = 120 * 10**6
"""Bytes of the products that oneDNN keeps, at most 1,024 of them."""


@dataclass(frozen=True)
class ByLength:
    """Memory that a shorter sequence makes smaller: the setting of its length, that length, what any length takes."""

    key: str
    length: int
    memory: Callable[[int], Memory]

    def remedy(self, fits: Callable[[Memory], bool]) -> str:
        """The longest half, quarter and so on that `fits`, or that none does."""
        shorter = self.length // 2
        while shorter > SHORTEST and not fits(self.memory(shorter)):
            shorter //= 2
        if shorter and fits(self.memory(shorter)):
            return f"lower {self.key} to {shorter}"
        return f"take a larger machine, for with {self.key} of {shorter} it is still too small"


@dataclass(frozen=True)
class Need:
    """What a job takes. `kept` bytes stay in the results, `scratch` bytes are on disk only while they are needed."""

    memory: Memory
    kept: int = 0
    scratch: int = 0
    work: tuple[Work, ...] = ()
    remedy: str = ""
    """What to set where the memory is too small, if it is not the length of a sequence."""
    by_length: ByLength | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a configuration: what its models are, and the machine and card that it is for."""

    config: Config
    subjects: dict[str, Subject]
    host: Host
    card: Card
    notes: dict[str, None] = field(default_factory=dict)
    """What was assumed, each line once."""

    @property
    def card_memory(self) -> int:
        """That of this machine's card, else of the card that is planned for."""
        return self.host.gpu or self.card.memory

    def note(self, line: str) -> None:
        """Say once that something was assumed."""
        self.notes[line] = None

    def tokens(
        self, subject: Subject, asked: CalibrationSettings | EvaluationSettings | Sample, where: str
    ) -> tuple[int, int]:
        """Sequences and tokens in each. Raises ArmorError where the model does not say how long they may be."""
        known, sequences = subject.topology.context_length, asked.sequences
        length = asked.sequence_length or known
        if length is None:
            raise ArmorError(f"{where}: {subject.name} names no context length; set sequence_length")
        if known is not None and length > known:
            raise ArmorError(f"{where}.sequence_length: found {length}, but {subject.name} has a context of {known}")
        if sequences is None:
            self.note(f"{where}: sequences is not set; a text of {TEXT_TOKENS:,} tokens is assumed")
            sequences = math.ceil(TEXT_TOKENS / length)
        return sequences, length

    def asked(self, recipe: str, layer: DecoderLayer) -> dict[Linear, list[ModuleSettings]]:
        """The settings that each linear of a layer may be compressed with."""
        settings = self.config.layer_settings(recipe, layer.index)
        own = {linear: settings.for_module(linear.name) for linear in layer.linears}
        choices = {linear: settings.choices(linear.name) for linear in layer.linears}
        return {linear: [choice.apply(own[linear]) for choice in choices[linear]] for linear in layer.linears}


def compiled(subject: Subject, dtype: torch.dtype) -> int:
    """What oneDNN keeps of the products that it compiles: one for each number of tokens that an expert is sent."""
    return PRODUCTS if subject.topology.has_experts() and dtype == torch.bfloat16 else 0


def memory_of(on_host: int, computing: int, before: int = 0) -> Memory:
    """Of a job: `on_host` whatever computes, `computing` where it computes, `before` on the host, and gone by then."""
    host, beside = on_host + max(before, computing), max(on_host, before)
    return Memory(FORKED + host, PROCESS + BESIDE_CUDA + beside, computing)


def products(subject: Subject, tokens: float) -> float:
    """The floating-point operations of the linears of one decoder layer, in the mean."""
    return 2 * tokens * subject.topology.linear_parameters / max(len(subject.topology.layers), 1)


def forward(subject: Subject, dtype: torch.dtype, sequences: int, length: int, recipe: str | None = None) -> Work:
    """Sequences through all decoder layers."""
    layers = len(subject.topology.layers)
    tokens = sequences * length
    attention = 4.0 * tokens * length * subject.topology.hidden_size
    operations = layers * (products(subject, tokens) + attention)
    moved = 30.0 * layers * tokens * subject.topology.hidden_size * dtype.itemsize
    kind = Forward(subject.name, dtype_name(dtype), length, recipe)
    return Work(kind, tokens * layers, operations, dtype == torch.float32, moved)


def head(subject: Subject, dtype: torch.dtype, tokens: int, compared: bool) -> Work:
    """The predictions of `tokens` tokens; `compared` with those of the dense model."""
    size = subject.vocabulary
    operations = 2.0 * tokens * size * subject.topology.hidden_size
    kind = Head(subject.name, dtype_name(dtype), compared)
    return Work(kind, tokens, operations, dtype == torch.float32, (60.0 if compared else 30.0) * tokens * size)
