"""`armor serve`: an OpenAI-compatible server on a checkpoint, by vLLM, or by transformers where there is no vLLM.

vLLM may have an environment of its own (`armor.serve.engine`). The checkpoint is checked here first, so that a broken
one is one line instead of a server's traceback. Then the server takes the place of this process: signals, exit code and
output are its own.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from armor.core.errors import ArmorError
from armor.serve.engine import PYTHON, check_engine, python_of_engine

if TYPE_CHECKING:
    from armor.format.checkpoint import PackedLinear

__all__ = ["CACHE", "command", "environment", "serve", "vllm_command"]

CACHE = "VLLM_CPU_KVCACHE_SPACE"
"""The environment's variable with the GiB of vLLM's cache of keys and values on a CPU."""
CACHE_OPTIONS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")  # which the variable would overrule

NOT_OF_EXPERTS = ("--enable-lora", "--enable-expert-parallel", "-ep")
"""What vLLM does with experts, but not with compressed ones."""

TRANSFORMERS = "import armor.hf; from transformers.cli.transformers import main; main()"


def vllm_command(folder: Path, name: str, host: str, port: int, options: Sequence[str]) -> list[str]:
    """The command by which vLLM serves `folder` as model `name` on `host` and `port`; `options` are its own."""
    # Not `vllm serve`, which asks for a distribution of that name; builds for CPUs have another.
    start = [python_of_engine(), "-P", "-m", "vllm.entrypoints.openai.api_server"]  # not an armor/ in this folder
    named = ["--model", str(folder), "--served-model-name", name]
    return [*start, *named, "--host", host, "--port", str(port), *options]


def command(folder: Path, name: str, host: str, port: int, options: Sequence[str]) -> list[str]:
    """The command that serves `folder` as model `name` on `host` and `port`; `options` are the server's own.

    Raises ArmorError where neither vLLM nor what transformers' server needs is installed, for a vLLM that does not know
    this release, and for a name that transformers' server cannot give.
    """
    if os.environ.get(PYTHON) or find_spec("vllm"):
        check_engine()
        return vllm_command(folder, name, host, port, options)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ArmorError("no server is installed; install vLLM as docs/SERVING.md says, or transformers[serving]")
    if name != str(folder):
        raise ArmorError(
            f"--served-model-name {name}: goes with vLLM; transformers' server calls a model by its folder"
        )
    return [sys.executable, "-c", TRANSFORMERS, "serve", str(folder), "--host", host, "--port", str(port), *options]


def _spelled(option: str) -> str:
    """The name of an option as vLLM reads it: without its value, and `_` as `-`."""
    return option.partition("=")[0].replace("_", "-")


def environment(options: Sequence[str]) -> dict[str, str]:
    """The environment of vLLM's server: a cache of 4 GiB on a CPU, where neither the user's nor `options` say another.

    vLLM itself would take nine tenths of the memory, and does not start where so much is not free.
    """
    asked = any(_spelled(option) in CACHE_OPTIONS for option in options)
    return dict(os.environ) if asked else {CACHE: "4"} | os.environ


def _check_options(folder: Path, linears: Mapping[str, PackedLinear], options: Sequence[str]) -> None:
    """Raises ArmorError where `options` ask vLLM for what it cannot do with these compressed linears."""
    from armor.runtime.folder import read_config
    from armor.serve.ranks import check_ranks, ranks_asked

    experts = sorted(name for name in linears if ".experts." in name)
    if experts and (asked := next((option for option in options if _spelled(option) in NOT_OF_EXPERTS), None)):
        raise ArmorError(
            f"{asked}: {folder}: {experts[0]} is compressed, and packed experts cannot do that; leave it out"
        )
    if (ranks := ranks_asked(options)) > 1:
        try:
            check_ranks(read_config(folder), linears, ranks)
        except ArmorError as error:
            raise ArmorError(f"--tensor-parallel-size {ranks}: {folder}: {error}") from None


def serve(folder: Path, name: str, host: str, port: int, options: Sequence[str]) -> None:
    """Check the checkpoint in `folder`, say how to ask it, and become its server; does not return.

    Raises ArmorError for a checkpoint that is broken, for options of vLLM that it cannot do, or where no server is
    installed.
    """
    words = command(folder, name, host, port, options)
    from armor.serve.check import check

    engine = "vLLM" if "-m" in words else "transformers"
    linears = check(folder, engine)
    if engine == "vLLM":
        _check_options(folder, linears, options)
    body = json.dumps({"model": name, "prompt": "The city of Paris", "max_tokens": 30})
    url = f"http://{host}:{port}/v1"
    print(f"{folder}: sound, {len(linears)} compressed linears; {engine} serves it")
    print(f"{url} answers once the log says that startup is complete:")
    print(f"  curl {url}/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}", flush=True)
    os.execve(words[0], words, environment(options))
