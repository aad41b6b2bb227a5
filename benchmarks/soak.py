"""A server of vLLM on a packed checkpoint under many clients for a long time: wrong answers, crashes, memory.

In the environment of `make test-vllm`, from the repository's root:

    .venv-vllm/bin/python -m benchmarks.soak FOLDER --minutes 30 --clients 16 --of smollm2-135m

Each client picks one kind of request after the other, by chance. Those that are wrong must be refused, and the others
answered. Greedy answers, streamed or not, must be those of transformers in the same dtype: both can be off by a tie of
two tokens, so answers that differ are counted and kept. Beside the clients, garbage comes in evenly. The memory is that
of the server's processes, looked at every two seconds. It is flat if the medians of the first and the last third of the
time differ by less than 2%; the first tenth is left out, for buffers and caches fill up then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from armor.runtime.folder import load_tokenizer
from armor.runtime.load import load_model
from armor.serve.engine import check_engine
from armor.serve.running import Server, memory_bytes, server
from benchmarks.record import store

NAME = "model"
PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, a fox",
    "The three primary colours are",
    "In 1969, the first",
    "To bake bread you need",
    "A prime number is",
    "The opposite of cold is",
)
NEW_TOKENS = 24


def greedy_answers(folder: Path, dtype: str) -> tuple[dict[str, str], dict[str, str]]:
    """What transformers writes after each prompt, and in a talk that begins with it, if the model has a template."""
    model, tokenizer = load_model(folder, dtype), load_tokenizer(folder)

    def answer(tokens: torch.Tensor) -> str:
        how = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(tokens)}
        written = model.generate(tokens, pad_token_id=0, **how)[0, tokens.shape[1] :]
        return str(tokenizer.decode(written, skip_special_tokens=True))

    def talk(prompt: str) -> torch.Tensor:
        options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        found: Any = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)
        return found["input_ids"]

    texts = {prompt: answer(tokenizer(prompt, return_tensors="pt").input_ids) for prompt in PROMPTS}
    return texts, {prompt: answer(talk(prompt)) for prompt in PROMPTS if tokenizer.chat_template}


@dataclass
class Soak:
    """The server, what it is asked, and what came of it: counts by kind, and what was wrong."""

    url: str
    answers: dict[str, str]
    talks: dict[str, str]
    context: int
    vocabulary: int
    http: httpx.AsyncClient
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0

    async def ask(self, expected: int = 200, path: str = "completions", **body: Any) -> Any:
        """The answer to a completion; a status that is not `expected` is wrong."""
        answer = await self.http.post(f"{self.url}/v1/{path}", json={"model": NAME} | body)
        if answer.status_code != expected:
            raise AssertionError(f"status {answer.status_code}, expected {expected}: {answer.text[:200]}")
        found = answer.json()
        self.tokens += found["usage"]["completion_tokens"] if expected == 200 else 0
        return found

    async def stream(self, prompt: str, stop_after: int | None = None) -> str:
        """What comes as a stream, the whole or so many parts; then the client hangs up."""
        text, parts = "", 0
        body = {"model": NAME, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
        async with self.http.stream("POST", f"{self.url}/v1/completions", json=body) as lines:
            assert lines.status_code == 200, lines.status_code
            async for line in lines.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    parts += 1
                    if parts == stop_after:
                        break
        return text

    def same(self, prompt: str, text: str, expected: str) -> None:
        """A stream holds back the bytes of a last character that is not complete."""
        assert text.rstrip("\ufffd") == expected.rstrip("\ufffd"), f"{prompt!r}: {text!r}, expected {expected!r}"

    async def greedy(self) -> None:
        prompt = self.rng.choice(PROMPTS)
        found = await self.ask(prompt=prompt, max_tokens=NEW_TOKENS, temperature=0)
        self.same(prompt, found["choices"][0]["text"], self.answers[prompt])

    async def chat(self) -> None:
        prompt = self.rng.choice(PROMPTS)
        said = [{"role": "user", "content": prompt}]
        found = await self.ask(path="chat/completions", messages=said, max_tokens=NEW_TOKENS, temperature=0)
        self.same(prompt, found["choices"][0]["message"]["content"], self.talks[prompt])

    async def streamed(self) -> None:
        prompt = self.rng.choice(PROMPTS)
        self.same(prompt, await self.stream(prompt), self.answers[prompt])

    async def hang_up(self) -> None:
        await self.stream(self.rng.choice(PROMPTS), stop_after=self.rng.randint(1, 4))

    async def length(self) -> None:
        count, new = int(2 ** self.rng.uniform(0, 8)), self.rng.randint(1, 32)
        tokens = [self.rng.randrange(self.vocabulary) for _ in range(min(count, self.context - new - 1))]
        found = await self.ask(prompt=tokens, max_tokens=new, ignore_eos=True, temperature=1)
        assert found["usage"]["completion_tokens"] == new, found["usage"]

    async def over_context(self) -> None:
        await self.ask(400, prompt=[1] * (self.context + 1), max_tokens=1)

    async def unknown_model(self) -> None:
        await self.ask(404, model="another", prompt="A", max_tokens=1)

    async def bad_json(self) -> None:
        answer = await self.http.post(f"{self.url}/v1/completions", content=b'{"model": ', headers=JSON)
        assert answer.status_code in (400, 422), answer.status_code

    async def logprobs(self) -> None:
        found = await self.ask(prompt=self.rng.choice(PROMPTS), max_tokens=4, logprobs=5, temperature=0)
        said = found["choices"][0]["logprobs"]
        for own, chosen in zip(said["top_logprobs"], said["token_logprobs"], strict=True):
            assert 1 <= len(own) <= 6 and max(*own.values(), chosen) <= 0, said  # by text, which tokens may share

    async def stop_word(self) -> None:
        found = await self.ask(prompt=self.rng.choice(PROMPTS), max_tokens=NEW_TOKENS, stop=[" the"], temperature=0)
        assert " the" not in found["choices"][0]["text"], found

    async def four(self) -> None:
        found = await self.ask(prompt=self.rng.choice(PROMPTS), max_tokens=8, n=4, temperature=1)
        assert sorted(choice["index"] for choice in found["choices"]) == [0, 1, 2, 3], found

    def kinds(self) -> list[Callable[[], Awaitable[None]]]:
        refused = [self.over_context, self.unknown_model, self.bad_json]
        return [
            self.greedy,
            *([self.chat] if self.talks else []),
            self.streamed,
            self.hang_up,
            self.length,
            self.logprobs,
            self.stop_word,
            self.four,
            *refused,
        ]

    async def try_one(self, kind: Callable[[], Awaitable[None]], name: str) -> None:
        self.done[name] += 1
        try:
            await kind()
        except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
            self.wrong.append(f"{name}: {type(error).__name__} {error}")

    async def client(self, end: float) -> None:
        while time.monotonic() < end:
            kind = self.rng.choice(self.kinds())
            await self.try_one(kind, kind.__name__)

    async def garbage(self, end: float, count: int) -> None:
        """So many requests of garbage until then: bytes, JSON of other shapes, values out of range, other paths."""
        paused = (end - time.monotonic()) / count
        for _ in range(count):
            await self.try_one(self.nonsense, "garbage")
            await asyncio.sleep(max(0.0, paused - 0.02))

    async def nonsense(self) -> None:
        noise = self.rng.randbytes(self.rng.randint(0, 2000))
        values = [None, -1, 1e308, [], {}, "x" * 3000, True, [[]], "\ud83d", 2**63]
        keys = ("prompt", "max_tokens", "temperature", "n", "logprobs", "stop", "stream", "top_p", "seed", "echo")
        body = {"model": NAME, "prompt": self.rng.choice(values), self.rng.choice(keys): self.rng.choice(values)}
        path = self.rng.choice(("completions", "completions", "chat/completions", "models/none", "nothing"))
        content = self.rng.choice((noise, json.dumps(body | {"max_tokens": self.rng.choice((1, "a", -5))}).encode()))
        answer = await self.http.post(f"{self.url}/v1/{path}", content=content, headers=JSON)
        assert answer.status_code < 500, f"status {answer.status_code} to {content[:200]!r}"


JSON = {"Content-Type": "application/json"}


async def soak(given: argparse.Namespace, running: Server, own: Soak) -> list[int]:
    """Let all clients ask until the time is over; the memory by and by."""
    begin = time.monotonic()
    end, memory = begin + 60 * given.minutes, []

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(await asyncio.to_thread(memory_bytes, running.process))
            await asyncio.sleep(2)

    await asyncio.gather(watch(), own.garbage(end, given.garbage), *(own.client(end) for _ in range(given.clients)))
    return memory


def flatness(memory: list[int]) -> dict[str, float]:
    """The medians of the first and the last third in bytes, without the first tenth, and the last by the first."""
    kept = memory[len(memory) // 10 :]
    third = max(1, len(kept) // 3)
    first, last = statistics.median(kept[:third]), statistics.median(kept[-third:])
    return {"first third": first, "last third": last, "ratio": last / first, "most": max(memory)}


async def whole(
    given: argparse.Namespace, running: Server, answers: dict[str, str], talks: dict[str, str]
) -> dict[str, Any]:
    vocabulary = json.loads((given.folder / "config.json").read_text())["vocab_size"]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        own = Soak(running.url, answers, talks, given.context, vocabulary, http)
        begin = time.monotonic()
        memory = await soak(given, running, own)
        seconds = time.monotonic() - begin
        alive = running.process.is_running() and (await http.get(f"{running.url}/health")).status_code == 200
        for prompt in PROMPTS:  # afterwards, when nothing else is asked
            found = await own.ask(prompt=prompt, max_tokens=NEW_TOKENS, temperature=0)
            own.done["greedy, alone"] += 1
            if found["choices"][0]["text"].rstrip("\ufffd") != answers[prompt].rstrip("\ufffd"):
                own.wrong.append(f"greedy, alone: {prompt!r}: {found['choices'][0]['text']!r}")
    return {
        "requests": dict(sorted(own.done.items())),
        "requests in all": sum(own.done.values()),
        "new tokens of answers that were not streamed": own.tokens,
        "wrong": len(own.wrong),
        "what was wrong": sorted(own.wrong)[:50],
        "alive at the end": alive,
        "memory in bytes": flatness(memory),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="A packed checkpoint.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--garbage", type=int, default=1000, help="Requests of garbage in all.")
    parser.add_argument("--dtype", default="float32", help="Of the server and of transformers.")
    parser.add_argument("--eager", action="store_true", help="Without torch.compile, which is vLLM's default.")
    parser.add_argument("--context", type=int, default=512, help="The longest sequence that the server takes.")
    parser.add_argument("--of", default="model", help="The name of the model.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    versions = check_engine()
    answers, talks = greedy_answers(given.folder, given.dtype)
    options = ["--dtype", given.dtype, "--max-model-len", str(given.context)]
    options += ["--enforce-eager"] if given.eager else []
    with server(given.folder, NAME, [*options, "--max-num-seqs", str(given.clients)]) as running:
        found = asyncio.run(whole(given, running, answers, talks))
    asked = {"clients": given.clients, "minutes": given.minutes, "dtype": given.dtype}
    asked |= {"eager": given.eager, "context": given.context}
    print(json.dumps(found, indent=1))
    rows = [{"requests": kind, "count": count} for kind, count in found.pop("requests").items()]
    store(given.output, given.of, rows, engine=versions, **asked, **found)
    if found["wrong"] or not found["alive at the end"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
