"""A model beside its dense self: bytes, bits per weight, resident memory, load time, decode speed, and what it writes.

Speeds of different processes at different hours do not compare, so both models live in one process and decode in turn,
round by round, the order alternating; medians and quartiles over the rounds are reported. Decoding is transformers' own
greedy `generate` with a cache, one sequence at a time; the clock runs from the first new token to the last, so the
prompt is not in it. Memory is the opposite case: what one model leaves behind the next one reuses, so each is loaded
alone in a fresh process, where resident memory after loading and one pass (weights that are only mapped become
resident then), minus that before, is its own. What both write after a few prompts is kept too: it shows a person what
was lost, which a perplexity only measures, and it proves nothing.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from armor.config import BenchmarkSettings
from armor.errors import ArmorError
from armor.execution.files import read_json, write_json
from armor.execution.log import log, progress
from armor.execution.machine import peak_memory_bytes, resident_memory_bytes, set_threads
from armor.execution.provenance import made_by
from armor.model.shards import Shards
from armor.runtime.load import load_model, load_tokenizer

__all__ = ["benchmark", "decode_speed", "greedy_text", "measure_loading"]


class _Clock:
    """A streamer for `generate` that notes when each token arrives on the host, so a card has been waited for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def decode_speed(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> float:
    """Tokens per second of greedy decoding after `prompt` (1, T): (new_tokens − 1) / time from first to last."""
    clock = _Clock()
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, use_cache=True, pad_token_id=0
    )
    model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy, streamer=clock)
    first, last = clock.times[1], clock.times[-1]  # times[0] is the prompt
    return (len(clock.times) - 2) / (last - first)


@torch.inference_mode()
def greedy_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """What the model writes after `prompt`, greedily: up to `new_tokens` tokens, or to the end of the text."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    end = model.generation_config.eos_token_id
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=end)
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
    return tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


def _prompt(model: PreTrainedModel, tokens: int) -> Tensor:
    """Random tokens (1, tokens), the same for every model with this vocabulary; the text does not change the speed."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, tokens), generator=generator).to(model.device)


def _load_alone(folder: str, dtype: str, device: str, threads: int) -> dict:
    """Runs in a process of its own: seconds to load a model and the bytes that it occupies then."""
    set_threads(threads)
    on_card = device.startswith("cuda")
    gc.collect()  # else the imports' garbage is collected while the model loads, or not, as chance will: 0.2 s
    before = resident_memory_bytes()
    start = time.perf_counter()
    model = load_model(folder, dtype, device)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(input_ids=_prompt(model, 1), use_cache=False)
    resident = torch.cuda.memory_allocated(device) if on_card else resident_memory_bytes() - before
    return {"resident_bytes": resident, "load_seconds": seconds}


def measure_loading(folder: Path | str, dtype: str = "auto", device: str = "cpu") -> dict:
    """Load a model in a fresh process: resident_bytes (on the host, or allocated on the card) and load_seconds.

    Raises ArmorError if the model cannot be loaded or the process dies.
    """
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        try:
            return process.submit(_load_alone, str(folder), dtype, device, torch.get_num_threads()).result()
        except BrokenProcessPool:
            raise ArmorError(f"{folder}: the process that loaded this model died; give it more memory") from None


def _on_disk(folder: Path) -> dict:
    """bytes_on_disk of the shards, and bits_per_weight: what one weight of the decoder's linears takes there.

    A packed checkpoint's comes from its checkpoint.json; it is None where that is not beside the folder.
    """
    shards = Shards(folder)
    record = folder.parent / "checkpoint.json"
    if "quantization_config" not in read_json(folder / "config.json"):
        bits = 8.0 * getattr(torch, shards.main_dtype()).itemsize
    else:
        bits = read_json(record)["bits_per_weight"] if record.is_file() else None
    return {"bytes_on_disk": sum((folder / file).stat().st_size for file in shards.files), "bits_per_weight": bits}


def _summary(runs: list[float]) -> dict:
    quartiles = statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else runs * 3
    return {"median": statistics.median(runs), "quartiles": [quartiles[0], quartiles[2]], "runs": runs}


def _speedup(runs: dict[str, list[float]]) -> float:
    """How many times as fast as dense: the median over the rounds, so that what else ran falls on both sides."""
    return statistics.median(ours / dense for ours, dense in zip(runs["compressed"], runs["dense"], strict=True))


def benchmark(
    source: Path | str,
    checkpoint: Path | str | None,
    settings: BenchmarkSettings,
    output: Path | str,
    device: str = "cpu",
    fingerprints: dict[str, str | None] | None = None,
) -> dict:
    """Measure the dense model in `source` and, unless None, the compressed one in `checkpoint`; write {case}.json.

    Both are Hugging Face folders, `output` is the file to write. Each side holds bytes_on_disk, bits_per_weight,
    resident_bytes, load_seconds and decode_tokens_per_second (median, quartiles, runs); decode_speedup is the median
    ratio of a round; `samples` holds what each side writes after the prompts; `fingerprints`, the models' by side, are
    noted. Raises ArmorError for a folder that is not a model.
    """
    start = time.perf_counter()
    output = Path(output)
    folders = {"dense": Path(source)} | ({"compressed": Path(checkpoint)} if checkpoint is not None else {})
    disk = {side: _on_disk(folder) for side, folder in folders.items()}  # first, for it finds what is not a model
    tokenizer = load_tokenizer(source) if settings.prompts else None
    loading = {side: measure_loading(folder, settings.dtype, device) for side, folder in folders.items()}
    models = {side: load_model(folder, settings.dtype, device) for side, folder in folders.items()}
    prompt = _prompt(models["dense"], settings.prompt_tokens)
    for model in models.values():  # the first pass pays for buffers, threads and caches
        decode_speed(model, prompt, 2)
    runs: dict[str, list[float]] = {side: [] for side in models}
    for index in progress(range(settings.repeats), "decode", unit="round"):
        for side in list(models)[:: -1 if index % 2 else 1]:
            runs[side].append(decode_speed(models[side], prompt, settings.new_tokens))
    samples = [
        {"prompt": text}
        | {side: greedy_text(model, tokenizer, text, settings.new_tokens) for side, model in models.items()}
        for text in settings.prompts
    ]
    sides = {
        side: {
            **disk[side],
            **loading[side],
            "decode_tokens_per_second": _summary(runs[side]),
        }
        for side in folders
    }
    for side, measured in sides.items():
        speed = measured["decode_tokens_per_second"]["median"]
        log.info("%s: %.1f tokens/s, %.0f MB resident", side, speed, measured["resident_bytes"] / 1e6)
    result = {
        "format_version": 1,
        "case": output.stem,
        "recipe": "dense" if checkpoint is None else folders["compressed"].resolve().parent.name,
        "dense": sides["dense"],
        "compressed": sides.get("compressed"),
        "decode_speedup": _speedup(runs) if checkpoint is not None else None,
        "samples": samples,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory_bytes(device),
        **made_by(__name__, settings.model_dump(mode="json"), fingerprints or {}, device),
    }
    write_json(output, result)
    return result
