"""vLLM on models dense and packed: bytes of weights, seconds and peak memory of loading; or families and what they can.

In the environment of `make test-vllm`, from the repository's root:

    .venv-vllm/bin/python -m benchmarks.serving memory FOLDER...     # a dense model, a checkpoint; each in a process
    .venv-vllm/bin/python -m benchmarks.serving families             # the largest difference of log-probabilities

Memory is what the process holds beyond what it held before the weights: its own (anonymous) pages, and with them the
pages of mapped files, which the system may take back. It is looked at every 5 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def resident() -> dict[str, int]:
    """Bytes that this process holds: its own, and those of mapped files."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0][3:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}


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
        peak.stopped.set()
        peak.join()
        found["peak"] = peak.most
        return model

    BaseModelLoader.load_model = measured
    begin = time.perf_counter()
    llm = LLM(str(folder), enforce_eager=True, max_model_len=256, max_num_seqs=4)
    found["seconds to start"] = round(time.perf_counter() - begin, 2)
    (held,) = llm.apply_model(lambda model: sum(p.numel() * p.itemsize for p in model.parameters()))
    shards = Shards(folder)
    on_disk = sum(map(shards.bytes_of, shards.names()))
    return {"folder": str(folder), "bytes on disk": on_disk, "bytes in memory": held} | found


def families() -> None:
    """A line for each family and each way to run it, one rank in this process and two in two others."""
    from tests.vllm.served import FAMILIES, checkpoint, difference, expected, served

    ways = {"eager": {}, "TP 2": {"tensor_parallel_size": 2}, "PP 2": {"pipeline_parallel_size": 2}}
    ways["compiled"] = {"enforce_eager": False}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            made = checkpoint(Path(folder), family)
            references = expected(made)
            for way, options in ways.items():
                try:
                    with served(made, **options) as llm:
                        said = f"{difference(llm, references):.1e}"
                except Exception as error:  # the table has a line for what does not work
                    said = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{family}\t{way}\t{said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["memory", "families", "one"])
    parser.add_argument("folders", nargs="*", type=Path)
    given = parser.parse_args()
    from tests.vllm import conftest  # noqa: F401  the environment of vLLM

    if given.what == "families":
        families()
    elif given.what == "one":
        print(json.dumps(memory(given.folders[0])))
    for folder in given.folders if given.what == "memory" else ():
        command = [sys.executable, "-m", "benchmarks.serving", "one", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
