"""benchmark/{name}.json, of a benchmark with an engine: a model and its compressed forms behind its server, in turn."""

from __future__ import annotations

from typing import ClassVar, Literal

from armor.core.typed import Typed
from armor.format.records.base import Made
from armor.format.records.benchmark import Runs

__all__ = ["Load", "Served", "ServingRecord"]


class Load(Typed):
    """What a server did for so many clients. A round's times are the medians over its requests."""

    requests_per_second: Runs
    """Requests that were answered, of all clients together."""
    tokens_per_second: Runs
    """New tokens, of all clients together."""
    first_token_milliseconds: Runs
    """Milliseconds from the request to its first token."""
    token_milliseconds: Runs
    """Milliseconds for each token after the first."""
    speedup: Runs | None
    """Tokens per second by those of the dense model, round by round; null for itself."""


class Served(Typed):
    """One model behind the server."""

    bytes_on_disk: int
    """The safetensors files."""
    start_seconds: Runs
    """Until the server answered, imports and compilation included."""
    memory_bytes: Runs
    """The bytes that the server's processes held on the host after the loads: libraries, weights, cache. Pages that
    several processes share count once."""
    clients: dict[str, Load]
    """By the number of clients."""


class ServingRecord(Made):
    """`{model}/benchmark/{benchmark}.json`, by `armor benchmark` with an engine: speed behind a server, in turn."""

    AGAIN: ClassVar[str] = "run armor benchmark again"

    format_version: Literal[2] = 2
    benchmark: str
    """The benchmark's name."""
    engine: dict[str, str]
    """The versions that served: vllm, armor, torch."""
    dense: Served
    """The dense model."""
    recipes: dict[str, Served]
    """The compressed models by recipe."""
