"""A model beside its compressed selves behind vLLM's server, under the load of vLLM's own benchmark client.

A server takes what memory there is for its cache. So there is one at a time, and a turn is its whole life: it starts,
answers a load for each number of clients, and ends. All models take turns, round by round, in alternating order.
Prompts are random tokens, the same for every model. No two are alike and the cache of prefixes is off, so each of them
is read. Each answer has the same length, for the end of a text does not end it.

The memory is that of the server's processes on the host. Libraries and vLLM's cache are most of it where the model is
small, and they are the same for all. vLLM may have an environment of its own (`armor.serve.engine`).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from armor.benchmark.rounds import ratios, summary
from armor.config.measures import BenchmarkSettings
from armor.core.errors import ArmorError
from armor.execution.log import log, progress
from armor.execution.machine import current_machine
from armor.format.provenance import made_by
from armor.format.records.base import Input
from armor.format.records.serving import Load, Served, ServingRecord
from armor.format.shards import Shards
from armor.serve.engine import check_engine, python_of_engine
from armor.serve.running import ENVIRONMENT, failure, memory_bytes, server

__all__ = ["benchmark_serving"]

NAME = "model"
"""What clients call every model."""
CODE = (__name__, "armor.benchmark.client", "armor.serve.plugin")
"""The modules whose code a result depends on; the last two run in vLLM's environment."""


class Turn(NamedTuple):
    """What was seen of one server, with the client's results by the number of clients."""

    start_seconds: float
    memory_bytes: int
    loads: dict[int, dict[str, Any]]


def _load(url: str, tokenizer: Path, settings: BenchmarkSettings, clients: int) -> list[str]:
    """The arguments of vLLM's client; `clients` is the seed too, so that the loads of a server differ."""
    asked = {
        "backend": "openai",
        "base-url": url,
        "model": NAME,
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "random-input-len": settings.prompt_tokens,
        "random-output-len": settings.new_tokens,
        "num-prompts": settings.requests_of(clients),
        "max-concurrency": clients,
        "num-warmups": clients,
        "seed": clients,
        "temperature": 0,
        "percentile-metrics": "ttft,tpot",
    }
    return [word for key, value in asked.items() for word in (f"--{key}", str(value))] + ["--disable-tqdm"]


def _turn(folder: Path, tokenizer: Path, settings: BenchmarkSettings) -> Turn:
    """Start the server of `folder`, put every load on it, and end it."""
    counts = settings.client_counts()
    options = ["--dtype", settings.dtype, "--no-enable-prefix-caching", *(settings.options or ())]
    with (
        server(folder, NAME, options) as running,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
    ):
        done = subprocess.run(
            [python_of_engine(), "-P", "-m", "armor.benchmark.client"],
            input=json.dumps([_load(running.url, tokenizer, settings, count) for count in counts]),
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=ENVIRONMENT | os.environ,
        )
        if done.returncode:
            raise failure(folder, said)
        results = json.loads(done.stdout.splitlines()[-1])
        for count, result in zip(counts, results, strict=True):  # within, so that an error shows the server's log
            if result["completed"] != settings.requests_of(count):
                raise ArmorError(
                    f"{folder}: vLLM answered {result['completed']} of {settings.requests_of(count)} requests of "
                    f"{count} clients; if its log has no error, ask for fewer clients or shorter prompts"
                )
        memory = memory_bytes(running.process)
    return Turn(running.start_seconds, memory, dict(zip(counts, results, strict=True)))


def _served(folder: Path, turns: list[Turn], dense: list[Turn] | None) -> Served:
    """What was measured of one model; beside the turns of the `dense` one in the same rounds."""
    shards, loads = Shards(folder), {}
    for count in turns[0].loads:
        told = {key: [turn.loads[count][key] for turn in turns] for key in turns[0].loads[count]}
        beside = [turn.loads[count]["output_throughput"] for turn in dense or ()]
        loads[str(count)] = Load(
            requests_per_second=summary(told["request_throughput"]),
            tokens_per_second=summary(told["output_throughput"]),
            first_token_milliseconds=summary(told["median_ttft_ms"]),
            token_milliseconds=summary(told["median_tpot_ms"]),
            speedup=ratios(told["output_throughput"], beside) if beside else None,
        )
    return Served(
        bytes_on_disk=sum((shards.folder / file).stat().st_size for file in shards.files),
        start_seconds=summary([turn.start_seconds for turn in turns]),
        memory_bytes=summary([turn.memory_bytes for turn in turns]),
        clients=loads,
    )


def benchmark_serving(
    source: Path | str,
    checkpoints: Mapping[str, Path],
    settings: BenchmarkSettings,
    output: Path | str,
    device: str = "cpu",
    fingerprints: Mapping[str, str | None] | None = None,
) -> ServingRecord:
    """Serve the dense model in `source` and the compressed ones in `checkpoints`, by recipe, in turn; write `output`.

    All are Hugging Face folders; `fingerprints`, by recipe and "dense", are noted. Raises ArmorError where no vLLM is
    installed that serves packed checkpoints, for what it refuses, and for requests that it does not answer.
    """
    start, output = time.perf_counter(), Path(output)
    engine = check_engine()
    folders = {Input.DENSE: Path(source)} | {name: Path(folder) for name, folder in checkpoints.items()}
    turns: dict[str, list[Turn]] = {name: [] for name in folders}
    for index in progress(range(settings.repeats), "serve", unit="round"):
        for name in list(folders)[:: -1 if index % 2 else 1]:
            turns[name].append(_turn(folders[name], Path(source), settings))
            speeds = [f"{result['output_throughput']:.1f}" for result in turns[name][-1].loads.values()]
            log.info("%s: %s tokens/s", name, ", ".join(speeds))
    dense = turns[Input.DENSE]
    record = ServingRecord(
        benchmark=output.stem,
        engine=engine,
        dense=_served(folders[Input.DENSE], dense, None),
        recipes={name: _served(folders[name], turns[name], dense) for name in checkpoints},
        seconds=time.perf_counter() - start,
        peak_memory_bytes=max(turn.memory_bytes for own in turns.values() for turn in own),
        made_by=made_by(CODE[0], settings, dict(fingerprints or {}), CODE[1:]),
        machine=current_machine(device),
    )
    record.write(output)
    return record
