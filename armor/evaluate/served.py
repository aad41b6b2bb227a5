"""lm-eval's model behind vLLM's server: vLLM reads many questions at once, and writes many answers.

The tokens are those that lm-eval gives transformers' models, but for what is longer than the context: the server keeps
a token for an answer. There a question loses one more of its first tokens, or two, and windows of a text are two
shorter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import TemplateAPI
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from psutil import Process
from transformers import PreTrainedTokenizerBase

from armor.config.measures import EvaluationSettings
from armor.core.errors import ArmorError, one_line
from armor.execution.log import progress
from armor.format.shards import dtype_name
from armor.runtime.load import loaded_dtype
from armor.serve.engine import check_engine
from armor.serve.running import memory_bytes, server

__all__ = ["CODE", "ServedLM", "check_engine", "served"]

CODE = (__name__, "armor.serve.plugin")
"""The modules whose code a result depends on besides; the last runs in vLLM's environment."""

NAME = "model"
"""What the server calls the model."""
CLIENTS = 1024
"""How many questions are asked at once: as many as vLLM answers side by side on the largest cards."""
Completions: Any = LocalCompletionsAPI
Transformers: Any = HFLM
"""lm-eval's decorators hide what they are from a type checker."""


class ServedLM(Completions):
    """lm-eval's model, with vLLM's server at `url` behind it, whose `context` is in tokens; `process` is the server."""

    def __init__(self, url: str, context: int, folder: Path, tokenizer: PreTrainedTokenizerBase, process: Process):
        super().__init__(
            base_url=f"{url}/v1/completions",
            model=NAME,
            tokenizer_backend="huggingface",
            tokenizer=str(folder),
            num_concurrent=CLIENTS,
            max_length=context,
        )
        self.tokenizer, self._process, self._folder = tokenizer, process, folder
        self.add_bos_token = None  # as the tokenizer has it

    def memory_bytes(self) -> int:
        """What the server's processes hold on the host."""
        return memory_bytes(self._process)

    def tok_encode(self, string: str | Sequence[str], **options: Any) -> list[int] | list[list[int]]:
        """The tokens of a text, or of each of several, as lm-eval has them for a model of transformers."""
        if isinstance(string, str):
            return Transformers.tok_encode(self, string, **options)
        return [Transformers.tok_encode(self, one, **options) for one in string]

    async def get_batched_requests(
        self, requests: list, cache_keys: list, *, ctxlens: list[int] | None = None, **options: Any
    ) -> list[list[Any]]:
        """The answers to all requests, each a list of one. Raises ClientError for the first without an answer."""
        rows = zip(requests, cache_keys, ctxlens or [0] * len(requests), strict=True)
        session = ClientSession(connector=TCPConnector(limit=CLIENTS), timeout=ClientTimeout(total=None))
        limit = asyncio.Semaphore(CLIENTS)
        try:
            async with session, asyncio.TaskGroup() as group:
                asked = [
                    group.create_task(self.amodel_call(session, limit, [one], cache_keys=[key], ctxlens=[n], **options))
                    for one, key, n in rows
                ]
                return [await one for one in progress(asked, "answers", unit="answer")]
        except* ClientError as found:
            first: BaseException = found
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
        raise first

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        longest = max(options.get("max_gen_toks", self._max_gen_toks) for _, options in map(_asked, requests))
        if longest >= self.max_length:
            raise ArmorError(
                f"{self._folder}: answers of {longest} tokens are asked for in a context of {self.max_length + 1}; "
                "lower the task's max_gen_toks, or raise --max-model-len"
            )
        return super().generate_until(requests, disable_tqdm or not sys.stderr.isatty())


def _asked(request: Instance) -> tuple[Any, ...]:
    return request.args


@contextlib.contextmanager
def served(folder: Path, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings) -> Iterator[ServedLM]:
    """The model in `folder` for lm-eval, behind a server that ends with the context. Raises ArmorError where vLLM does
    not serve it, and where the server does not answer."""
    logging.getLogger(TemplateAPI.__module__).setLevel(logging.WARNING)  # what the server says of a request
    dtype = dtype_name(loaded_dtype(folder, settings.dtype))  # by itself vLLM computes in half of float32
    with server(folder, NAME, ["--dtype", dtype, *(settings.options or ())]) as running:
        try:
            yield ServedLM(running.url, running.context(), folder, tokenizer, running.process)
        except (ClientError, URLError) as error:
            raise ArmorError(f"{folder}: vLLM's server: {one_line(error)}; more is in the log") from error
