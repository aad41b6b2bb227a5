"""vLLM on models dense and packed: bytes of weights in memory, seconds and peak memory of loading them; their speed.

In the environment of `make test-vllm`, from the repository's root, each model in a process of its own:

    .venv-vllm/bin/python -m benchmarks.serving FOLDER... --of NAME
    .venv-vllm/bin/python -m benchmarks.serving --random FOLDER      # writes FOLDER/dense and FOLDER/packed, 4 GB
    .venv-vllm/bin/python -m benchmarks.serving --speed FILE DENSE PACKED --of NAME    # in turn, 1 to 16 clients

The random models are a Llama of 1.1 billion parameters in bfloat16, dense and as a packed checkpoint (2:4, blocks of
64). Their numbers have nothing to do with each other: memory depends on shapes alone.

Memory is what the process holds beyond what it held before the weights: its own (anonymous) pages, and with them the
pages of mapped files, which the system may take back. It is looked at every 5 ms. Pages of weights that vLLM does not
copy come into memory with the first answer. So all are read after loading, for the last peak. "Bytes in memory" are the
model's parameters. vLLM keeps the weights of a dense model in a form of its own on a CPU, in no parameter: "own pages
after loading" tell what those take. `--speed FILE` serves behind `armor benchmark`'s server, whose record with every
round FILE is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from armor.format.records.serving import ServingRecord
from benchmarks.record import figure, store

PAGE = 4096
OUTPUT = Path(__file__).with_suffix(".json")


def random_models(folder: Path) -> list[Path]:
    """The dense and the packed random model in `folder`, written if they are not there."""
    from armor.core.pattern import Pattern
    from armor.format.checkpoint import PackedLinear
    from benchmarks.decoding import dense_model, random_checkpoint

    dense = dense_model(folder)
    packed = random_checkpoint(dense, folder / "packed", lambda *shape: PackedLinear(*shape, Pattern(2, 4), 64, 64))
    return [dense, packed]


def resident() -> dict[str, int]:
    """Bytes that this process holds: its own, and those of mapped files, on a disk or in memory (/dev/shm)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0][3:-1]: int(words[1]) * 1024 for words in lines if words[0][:3] == "Rss"}


class Peak(threading.Thread):
    """The most that the process holds beyond what it held at first, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first, self.most, self.stopped = resident(), {"own": 0, "with files": 0}, threading.Event()

    def look(self) -> None:
        now = {name: count - self.first[name] for name, count in resident().items()}
        self.most["own"] = max(self.most["own"], now["Anon"])
        self.most["with files"] = max(self.most["with files"], sum(now.values()))

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            self.look()
        self.look()


def memory(folder: Path) -> dict:
    """What loading `folder` takes in this process, of which this must be the first model."""
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from armor.format.shards import Shards

    found: dict = {}
    load = BaseModelLoader.load_model

    def measured(*arguments, **options):
        peak, begin = Peak(), time.perf_counter()
        peak.start()
        model = load(*arguments, **options)
        found["seconds to load"] = round(time.perf_counter() - begin, 2)
        peak.look()
        found["peak"] = dict(peak.most)
        found["own pages after loading"] = resident()["Anon"] - peak.first["Anon"]
        for parameter in model.parameters():
            parameter.detach().flatten().view(torch.uint8)[::PAGE].sum()
        peak.stopped.set()
        peak.join()
        found["peak, every page of a weight read"] = peak.most
        return model

    BaseModelLoader.load_model = measured
    begin = time.perf_counter()
    llm = LLM(str(folder), enforce_eager=True, max_model_len=256, max_num_seqs=4)
    found["seconds to start"] = round(time.perf_counter() - begin, 2)
    (held,) = llm.apply_model(lambda model: sum(p.numel() * p.itemsize for p in model.parameters()))
    shards = Shards(folder)
    on_disk = sum(map(shards.bytes_of, shards.names()))
    return {"folder": folder.name, "bytes on disk": on_disk, "bytes in memory": held} | found


def speed(dense: Path, packed: Path, file: Path, new_tokens: int, rounds: int) -> list[dict]:
    """Serve both in turn to 1, 4 and 16 clients, as `armor benchmark` does, with its record in `file`: rows."""
    from armor.benchmark.serving import benchmark_serving
    from armor.config.measures import BenchmarkSettings

    options = ["--max-model-len", "1024"]
    asked = {"prompt_tokens": 32, "new_tokens": new_tokens, "repeats": rounds, "options": options}
    settings = BenchmarkSettings(engine="vllm", clients=[1, 4, 16], **asked)
    return rows_of(benchmark_serving(dense, {"armor": packed}, settings, file))


def rows_of(record: ServingRecord) -> list[dict]:
    """For each number of clients and each recipe: speeds beside the dense model's."""
    rows = []
    for clients, dense in sorted(record.dense.clients.items(), key=lambda item: int(item[0])):
        for name, side in record.recipes.items():
            own = side.clients[clients]
            row: dict = {"clients": int(clients), "over_dense": figure(own.speedup.runs)}
            for key in ("tokens_per_second", "first_token_milliseconds", "token_milliseconds"):
                row[key] = {"dense": figure(getattr(dense, key).runs), name: figure(getattr(own, key).runs)}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="Models, dense or packed.")
    parser.add_argument("--random", type=Path, metavar="FOLDER", help="The random models too, which are written there.")
    parser.add_argument("--speed", type=Path, metavar="FILE", help="Serve two models instead; the record goes there.")
    parser.add_argument("--of", default="llama-1.1b", help="The name of the models.")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="Where the figures go.")
    parser.add_argument("--new-tokens", type=int, default=64, help="Of each request to a server.")
    parser.add_argument("--rounds", type=int, default=3, help="How often both models are served.")
    parser.add_argument("--here", action="store_true", help="Load the only one in this very process.")
    given = parser.parse_args()
    if given.speed:
        from armor.serve.engine import check_engine

        rows = speed(*given.folders, given.speed, given.new_tokens, given.rounds)
        store(given.output, f"{given.of}, served", rows, new_tokens=given.new_tokens, engine=check_engine())
        return
    if given.here:
        from tests.vllm import conftest  # noqa: F401  the environment of vLLM

        print(json.dumps(memory(given.folders[0])))
        return
    models = []
    for folder in [*given.folders, *(random_models(given.random) if given.random else ())]:
        command = [sys.executable, "-m", "benchmarks.serving", "--here", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        models.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(models[-1]), flush=True)
    from armor.serve.engine import check_engine

    store(given.output, f"{given.of}, memory", models, engine=check_engine())


if __name__ == "__main__":
    main()
