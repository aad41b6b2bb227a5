"""Text that a chat model writes itself: questions, as it has learnt them, and its answers to them.

    ARMOR_VLLM=.venv-vllm/bin/python python -m benchmarks.dialogs runs/refine/results/smollm2-135m/source dialogs.jsonl

The model is given the beginning of its chat template, up to where a user would write, and writes on: first the
question, then the answer (Magpie, Xu et al. 2024, arXiv 2406.08464). So to calibrate and to train on there is text as
the model meets it in use, and no data set is needed. The file is JSON lines, a dialog each: `text: {files:
[dialogs.jsonl]}`. vLLM writes it (docs/SERVING.md). The same seed writes the same questions on the same machine, but
for what depends on how requests fall together.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from aiohttp import ClientSession, ClientTimeout, TCPConnector

from armor.core.errors import ArmorError
from armor.execution.files import atomic_path
from armor.format.shards import dtype_name
from armor.runtime.folder import load_tokenizer
from armor.runtime.load import loaded_dtype
from armor.serve.running import server

NAME = "model"
SAMPLING = {"temperature": 1.0, "top_p": 0.95, "skip_special_tokens": False, "add_special_tokens": False}
QUESTION, ANSWER = 256, 768
"""The most tokens of each."""
SHORTEST = 10
"""Characters of a question that is kept."""
WHOLE = ["--no-enable-chunked-prefill", "--max-model-len", "2048"]
"""No prompt is read in parts, for on a CPU vLLM 0.32 breaks down where one with a seed is. Without that a step of the
server has room for all of its context, so that is no longer than a dialog needs."""


class Template(NamedTuple):
    """What a chat template writes before a question, between it and the answer, and after that."""

    head: str
    middle: str
    end: str


def template_of(tokenizer: Any, folder: Path) -> Template:
    """The three parts, by what the template makes of two marks. Raises ArmorError if the tokenizer has no template."""
    if not tokenizer.chat_template:
        raise ArmorError(f"{folder}: its tokenizer has no chat template; expected a chat model")
    marks = "<question>", "<answer>"
    turns = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant"), marks, strict=True)]
    head, _, rest = tokenizer.apply_chat_template(turns, tokenize=False).partition(marks[0])
    middle, _, end = rest.partition(marks[1])
    return Template(head, middle, end)


async def written(url: str, prompts: list[str], tokens: int, seed: int) -> list[tuple[str, bool]]:
    """What the server writes after each of `prompts`, and whether it came to an end within `tokens`."""

    async def one(number: int, prompt: str) -> tuple[str, bool]:
        asked = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "seed": seed + number, **SAMPLING}
        async with client.post(f"{url}/v1/completions", json=asked) as answer:
            answer.raise_for_status()
            choice = (await answer.json())["choices"][0]
            return choice["text"], choice["finish_reason"] == "stop"

    async with ClientSession(connector=TCPConnector(limit=256), timeout=ClientTimeout(total=None)) as client:
        return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))


def dialogs(url: str, template: Template, count: int, seed: int) -> list[str]:
    """Up to `count` dialogs: those whose question came to an end, and has SHORTEST characters."""
    asked = asyncio.run(written(url, [template.head] * count, QUESTION, seed))
    questions = [text.strip() for text, ended in asked if ended]
    beginnings = [f"{template.head}{text}{template.middle}" for text in questions if len(text) >= SHORTEST]
    answers = asyncio.run(written(url, beginnings, ANSWER, seed))
    return [
        f"{before}{text}{template.end if ended else ''}"
        for before, (text, ended) in zip(beginnings, answers, strict=True)
    ]


def main(
    model: Annotated[Path, typer.Argument(help="The dense model's folder.")],
    output: Annotated[Path, typer.Argument(help="The file to write, JSON lines.")],
    count: Annotated[int, typer.Option("--count", help="How many questions to begin.", min=1)] = 480,
    seed: Annotated[int, typer.Option("--seed", help="The first request's; the others' follow.")] = 0,
    options: Annotated[list[str] | None, typer.Option("--option", help="Of vLLM's server; may be given again.")] = None,
) -> None:
    """Write the dialogs, and print how many and how long they are."""
    tokenizer = load_tokenizer(model)
    template = template_of(tokenizer, model)
    dtype = dtype_name(loaded_dtype(model))
    with server(model, NAME, ["--dtype", dtype, *WHOLE, *(options or [])]) as running:
        found = dialogs(running.url, template, count, seed)
    with atomic_path(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found)
    tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in found)
    print(f"{output}: {len(found)} dialogs of {count}, {tokens} tokens")


if __name__ == "__main__":
    typer.run(main)
