"""lm-eval's model behind vLLM's server: vLLM reads many questions at once, and writes many answers.

The tokens are those that lm-eval gives transformers' models. Where a question and its answer are longer than the
context, lm-eval cuts the question at its start, one token shorter than for transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from psutil import Process
from transformers import PreTrainedTokenizerBase

from armor.config.measures import EvaluationSettings
from armor.format.shards import dtype_name
from armor.runtime.load import loaded_dtype
from armor.serve.engine import check_engine
from armor.serve.running import memory_bytes, server

__all__ = ["CODE", "ServedLM", "check_engine", "served"]

CODE = (__name__, "armor.serve.plugin")
"""The modules whose code a result depends on besides; the last runs in vLLM's environment."""

NAME = "model"
"""What the server calls the model."""
CLIENTS = 256
"""How many questions are asked at once: as many as vLLM answers side by side."""
SECONDS = 7 * 24 * 3600
"""How long one answer may take, in a queue of so many."""
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
            timeout=SECONDS,
        )
        self.tokenizer, self._process = tokenizer, process
        self.add_bos_token = None  # as the tokenizer has it

    def memory_bytes(self) -> int:
        """What the server's processes hold on the host."""
        return memory_bytes(self._process)

    def tok_encode(self, string: str | Sequence[str], *_: Any, **options: Any) -> list[int] | list[list[int]]:
        """The tokens of a text, or of each of several, as lm-eval has them for a model of transformers."""
        if isinstance(string, str):
            return Transformers.tok_encode(self, string)
        return [Transformers.tok_encode(self, one) for one in string]


@contextlib.contextmanager
def served(folder: Path, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings) -> Iterator[ServedLM]:
    """The model in `folder` for lm-eval, behind a server that ends with the context. Raises ArmorError where vLLM does
    not serve it."""
    dtype = dtype_name(loaded_dtype(folder, settings.dtype))  # by itself vLLM computes in half of float32
    with server(folder, NAME, ["--dtype", dtype, *(settings.options or ())]) as running:
        yield ServedLM(running.url, running.context(), folder, tokenizer, running.process)
