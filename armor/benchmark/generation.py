"""A model beside its dense self: bytes, memory, load time, speed of reading and of writing, and what it writes.

Speeds of different processes at different hours do not compare, so both models live in one process and decode in turn,
round by round, the order alternating; medians and quartiles over the rounds are reported. Decoding is transformers' own
greedy `generate` with a cache, for one sequence and for batches. A round gives both speeds: reading lasts from the
beginning of the pass over the prompt to the first new token, writing from there to the last one; a longer prompt tells
more of the first, and costs every round. Beside them stands what theory gives: a token's arithmetic is little, its
weights are read from memory once, so the ratio of the bytes of these is the speed-up of two kernels that are equally
near to the memory's speed. `armor.benchmark.linears` has the speed by shape.

Where the compressed model has blocks, a third side takes its turn in every round: the core S alone, the same loaded
model with every A and B taken off meanwhile. What it writes is nonsense and nobody reads it; the speed tells what the
blocks cost. Its bytes follow from the format. Its memory and its time to load are not measured: there is no file to
load it from.

Memory is the opposite case: what one model leaves behind the next one reuses, so each is loaded alone in a fresh
process, where resident memory after loading and one pass (weights that are only mapped become resident then), minus
that before, is its own; the peak is that of loading, of a prompt of the largest batch and of a token after it. What
both write after a few prompts is kept too: it shows a person what was lost, which a perplexity only measures, and it
proves nothing.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from armor.benchmark.linears import core_alone, linear_speeds, wrapped
from armor.benchmark.timing import mark, ratios, seconds_between, summary
from armor.config.measures import BenchmarkSettings
from armor.core.errors import ArmorError
from armor.execution.files import read_json, write_json
from armor.execution.log import log, progress
from armor.execution.machine import peak_memory_bytes, resident_memory_bytes, set_threads
from armor.format.checkpoint import modules_of
from armor.format.provenance import made_by
from armor.format.shards import Shards
from armor.runtime.load import load_model, load_tokenizer, weights_bytes

__all__ = ["benchmark", "bytes_per_token", "generation_speed", "greedy_text", "measure_loading"]

FEWEST = 8  # new tokens of each sequence in a batch, below which their times say little


class _Clock:
    """A streamer for `generate` that notes when the prompt is taken and when each token arrives on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def put(self, tokens: Tensor) -> None:
        self.marks.append(mark(self.device))

    def end(self) -> None:
        pass


@torch.inference_mode()
def generation_speed(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    """Tokens per second of `prefill` and of greedy `decode` after a prompt (batch, T), all sequences together.

    The batch·T tokens of the prompt in the time to the first new token; the other new ones in the time from then on.
    """
    clock = _Clock(model.device)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, use_cache=True, pad_token_id=0
    )
    model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy, streamer=clock)
    start, first, *_, last = clock.marks
    written = len(prompt) * (len(clock.marks) - 2)
    return {"prefill": prompt.numel() / seconds_between(start, first), "decode": written / seconds_between(first, last)}


@torch.inference_mode()
def greedy_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """What the model writes after `prompt`, greedily: up to `new_tokens` tokens, or to the end of the text."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    end = model.generation_config.eos_token_id
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=end)
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
    return tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


def _prompt(model: PreTrainedModel, batch_size: int, tokens: int) -> Tensor:
    """Random tokens (batch_size, tokens), the same for every model with this vocabulary; speed is that of any text."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch_size, tokens), generator=generator).to(model.device)


def _load_alone(folder: str, settings: BenchmarkSettings, device: str, threads: int) -> dict:
    """Runs in a process of its own: seconds to load a model and the bytes that it occupies then."""
    set_threads(threads)
    on_card = device.startswith("cuda")
    gc.collect()  # else the imports' garbage is collected while the model loads, or not, as chance will: 0.2 s
    before = resident_memory_bytes()
    start = time.perf_counter()
    model = load_model(folder, settings.dtype, device)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(input_ids=_prompt(model, 1, 1), use_cache=False)
    resident = torch.cuda.memory_allocated(device) if on_card else resident_memory_bytes() - before
    generation_speed(model, _prompt(model, max(settings.batch_sizes), settings.prompt_tokens), 2)
    peak = peak_memory_bytes(device) - (0 if on_card else before)
    return {"resident_bytes": resident, "peak_bytes": peak, "load_seconds": seconds}


def measure_loading(folder: Path | str, settings: BenchmarkSettings, device: str = "cpu") -> dict:
    """Load a model in a fresh process: resident_bytes and peak_bytes (on the host, or the card's), load_seconds.

    Raises ArmorError if the model cannot be loaded or the process dies.
    """
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        try:
            return process.submit(_load_alone, str(folder), settings, device, torch.get_num_threads()).result()
        except BrokenProcessPool:
            raise ArmorError(f"{folder}: the process that loaded this model died; give it more memory") from None


def bytes_per_token(folder: Path | str, model: PreTrainedModel) -> int:
    """The bytes of weights that a decoding step reads of the model in `folder`, loaded as `model`, from its headers.

    That is all but a table of embeddings that is not the head too: of that a token reads a row. Experts count as if
    each were asked.
    """
    table = model.get_input_embeddings().weight
    is_head = model.get_output_embeddings().weight is table
    dtype = str(model.dtype).removeprefix("torch.")
    return weights_bytes(folder, dtype) - (0 if is_head else table.numel() * table.element_size())


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


def _core_on_disk(folder: Path, whole: dict) -> dict:
    """What `whole`, the `_on_disk` of a packed checkpoint, would be without A and B; headers of files stay as they are.

    Raises ArmorError where config.json lists no packed linears.
    """
    shards = Shards(folder)
    modules = modules_of(read_json(folder / "config.json").get("quantization_config"))
    wrappers = [f"{name}.{suffix}" for name in modules for suffix in ("left", "right")]
    saved = sum(shards.bytes_of(name) for name in wrappers if name in shards)
    bits = whole["bits_per_weight"]
    if bits is not None:  # the mean over all linears of the decoder, those too that stay dense
        kept = read_json(folder.parent / "checkpoint.json")["kept_dense"]
        weights = sum(math.prod(shards.shape(f"{name}.weight")) for name in kept)
        weights += sum(layout.out_features * layout.in_features for layout in modules.values())
        bits -= 8 * saved / weights
    return {"bytes_on_disk": whole["bytes_on_disk"] - saved, "bits_per_weight": bits}


def _side_speed(models: dict[str, PreTrainedModel], side: str, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    """`generation_speed` of a side: one of `models`, or the core of the compressed one alone."""
    if side != "core":
        return generation_speed(models[side], prompt, new_tokens)
    with core_alone(models["compressed"]) as model:
        return generation_speed(model, prompt, new_tokens)


def _generation_speeds(models: dict[str, PreTrainedModel], settings: BenchmarkSettings) -> dict:
    """Tokens per second, all rounds of them, by side (`models`, and core where there are blocks), batch and phase."""
    sides = [*models, "core"] if "compressed" in models and wrapped(models["compressed"]) else [*models]
    prompts = {size: _prompt(models["dense"], size, settings.prompt_tokens) for size in sorted(settings.batch_sizes)}
    for prompt in prompts.values():  # the first pass pays for buffers, threads and caches
        for side in sides:
            _side_speed(models, side, prompt, 2)
    runs: dict = {side: {size: {"prefill": [], "decode": []} for size in prompts} for side in sides}
    for index in progress(range(settings.repeats), "decode", unit="round"):
        for size, prompt in prompts.items():
            new_tokens = max(settings.new_tokens // size, min(settings.new_tokens, FEWEST))
            for side in sides[:: -1 if index % 2 else 1]:
                for phase, speed in _side_speed(models, side, prompt, new_tokens).items():
                    runs[side][size][phase].append(speed)
    return runs


def _by_batch(function: Callable[..., dict], *runs: dict) -> dict[str, dict[str, dict]]:
    """`function` of the rounds of each batch size and phase."""
    return {
        str(size): {phase: function(*(own[size][phase] for own in runs)) for phase in runs[0][size]} for size in runs[0]
    }


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
    resident_bytes, peak_bytes, load_seconds, bytes_per_token, and tokens_per_second by batch size and phase (prefill,
    decode): median, quartiles, runs. `speedup` has the ratios of a round in the same way, `theoretical_speedup` that of
    the bytes per token, `linears` the speed by shape; `samples` holds what each side writes after the prompts;
    `fingerprints`, the models' by side, are noted. `core` is the compressed model without A and B, None if it has none:
    bytes_on_disk, bits_per_weight and bytes_per_token by computation, tokens_per_second, and its own speedup and
    theoretical_speedup over dense; no memory and no time to load. Raises ArmorError for a folder that is not a model
    and for a device with too little memory.
    """
    start = time.perf_counter()
    output = Path(output)
    folders = {"dense": Path(source)} | ({"compressed": Path(checkpoint)} if checkpoint is not None else {})
    disk = {side: _on_disk(folder) for side, folder in folders.items()}  # first, for it finds what is not a model
    tokenizer = load_tokenizer(source) if settings.prompts else None
    try:
        loading = {side: measure_loading(folder, settings, device) for side, folder in folders.items()}
        models = {side: load_model(folder, settings.dtype, device) for side, folder in folders.items()}
        runs = _generation_speeds(models, settings)
        linears = linear_speeds(models["dense"], models["compressed"]) if checkpoint is not None else []
        samples = [
            {"prompt": text}
            | {side: greedy_text(model, tokenizer, text, settings.new_tokens) for side, model in models.items()}
            for text in settings.prompts
        ]
    except torch.OutOfMemoryError as error:
        raise ArmorError(
            f"{' and '.join(map(str, folders.values()))}: out of memory on {device} with batches of up to "
            f"{max(settings.batch_sizes)} sequences; lower batch_sizes or prompt_tokens, or take a larger GPU"
        ) from error
    sides = {
        side: {
            **disk[side],
            **loading[side],
            "bytes_per_token": bytes_per_token(folder, models[side]),
            "tokens_per_second": _by_batch(summary, runs[side]),
        }
        for side, folder in folders.items()
    }
    dense, compressed, core = sides["dense"], sides.get("compressed"), None
    for side, measured in sides.items():
        speeds = [f"{speed['decode']['median']:.1f}" for speed in measured["tokens_per_second"].values()]
        log.info("%s: %s tokens/s, %.0f MB resident", side, ", ".join(speeds), measured["resident_bytes"] / 1e6)
    if "core" in runs:
        tensors = [t for linear in wrapped(models["compressed"]) for t in (linear.left, linear.right) if t is not None]
        read = compressed["bytes_per_token"] - sum(t.numel() * t.element_size() for t in tensors)
        core = {
            **_core_on_disk(folders["compressed"], disk["compressed"]),
            "bytes_per_token": read,
            "tokens_per_second": _by_batch(summary, runs["core"]),
            "speedup": _by_batch(ratios, runs["core"], runs["dense"]),
            "theoretical_speedup": dense["bytes_per_token"] / read,
        }
    result = {
        "format_version": 2,
        "case": output.stem,
        "recipe": "dense" if checkpoint is None else folders["compressed"].resolve().parent.name,
        "dense": dense,
        "compressed": compressed,
        "speedup": compressed and _by_batch(ratios, runs["compressed"], runs["dense"]),
        "theoretical_speedup": compressed and dense["bytes_per_token"] / compressed["bytes_per_token"],
        "core": core,
        "linears": linears,
        "samples": samples,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory_bytes(device),
        **made_by(__name__, settings.model_dump(mode="json"), fingerprints or {}, device),
    }
    write_json(output, result)
    return result
