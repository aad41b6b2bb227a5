"""A model beside its compressed selves: bytes, memory, load time, speed of reading and of writing, and what they write.

Speeds of different processes at different hours do not compare. So all models live in one process and decode in turn,
round by round, in alternating order. Medians and quartiles over the rounds are reported. Where they do not fit into the
memory together, each compressed one takes turns with the dense model alone. Decoding is transformers' own greedy
`generate` with a cache, for one sequence and for batches. A round gives both speeds. Reading lasts from the beginning
of the pass over the prompt to the first new token, writing from there to the last one. A longer prompt tells more of
the first, and costs every round. Beside them stands what theory gives. A token takes little arithmetic, and its weights
are read from memory once. So the ratio of their bytes is the speed-up of two kernels that are equally near to the
memory's speed. `armor.benchmark.linears` has the speed by shape.

Where a compressed model has blocks, one more side takes its turn in every round: the core S alone. It is the same
loaded model with every A and B taken off meanwhile. What it writes is nonsense and nobody reads it; the speed tells
what the blocks cost. Its bytes follow from the format. Its memory and its time to load are not measured: there is no
file to load it from.

Memory is the opposite case: what one model leaves behind the next one reuses, so each is loaded alone in a fresh
process (`armor.benchmark.loading`). What all write after a few prompts is kept too. It shows a person what was lost,
which a perplexity only measures. It proves nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from armor.benchmark.linears import core_alone, expands, linear_speeds, wrapped
from armor.benchmark.loading import Loading, measure_loading
from armor.benchmark.rounds import ratios, summary
from armor.benchmark.speed import generation_speed, random_prompt, written_after
from armor.config.measures import BenchmarkSettings
from armor.core.errors import ArmorError
from armor.execution.files import read_json
from armor.execution.log import log, progress
from armor.execution.machine import USABLE, current_machine, device_memory_bytes, host_memory_bytes, peak_memory_bytes
from armor.format.checkpoint import modules_of
from armor.format.names import record_of_folder
from armor.format.provenance import made_by
from armor.format.records.base import Input
from armor.format.records.benchmark import BenchmarkRecord, Continuation, CoreSide, Phases, Runs, Side
from armor.format.records.checkpoint import CheckpointRecord
from armor.format.scaled import is_scaled
from armor.format.shards import Shards, dtype_name
from armor.runtime.folder import load_tokenizer
from armor.runtime.load import load_model, weights_bytes

__all__ = ["DENSE", "benchmark", "bytes_on_disk", "bytes_per_token", "core_on_disk", "greedy_text"]

DENSE = Input.DENSE
"""What the dense model is called among the recipes."""
FEWEST = 8  # new tokens of each sequence in a batch, below which their times say little

Speeds = dict[int, dict[str, list[float]]]
"""Tokens per second of every round, by batch size and phase."""
Turn = tuple[str, bool]
"""Whose turn it is: a model by its name, whole or (True) its core alone."""


def greedy_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    """What the model writes after `prompt`, greedily: up to `new_tokens` tokens, or to the end of the text."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    end = model.generation_config.eos_token_id
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=end)
    written = written_after(model, tokens, greedy)
    return str(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))


def bytes_per_token(folder: Path | str, model: PreTrainedModel) -> int:
    """The bytes of weights that a decoding step reads of the model in `folder`, loaded as `model`, from its headers.

    That is all but a table of embeddings that is not the head too: of that a token reads a row. Experts count as if
    each were asked.
    """
    table, head = (embeddings.weight for embeddings in _embeddings(model))
    dtype = dtype_name(model.dtype)
    return weights_bytes(folder, dtype) - (0 if head is table else table.numel() * table.element_size())


def _embeddings(model: PreTrainedModel) -> tuple[Any, Any]:
    """The table of the input's embeddings and the head, which transformers types as less than they are."""
    inputs: Any = model.get_input_embeddings
    outputs: Any = model.get_output_embeddings
    return inputs(), outputs()


def bytes_on_disk(folder: Path) -> tuple[int, float | None]:
    """The bytes of the shards, and the bits that a weight of the decoder's linears takes there.

    A packed checkpoint's bits come from its record; they are None where that is not beside the folder.
    """
    shards = Shards(folder)
    found = read_json(folder / "config.json").get("quantization_config")
    if found is None or is_scaled(found):
        bits = shards.main_bits()
    else:
        record = CheckpointRecord.read_if_there(record_of_folder(folder))
        bits = record and record.bits_per_weight
    return sum((folder / file).stat().st_size for file in shards.files), bits


def core_on_disk(folder: Path) -> tuple[int, float | None]:
    """What `bytes_on_disk` of a packed checkpoint would be without A and B; headers of files stay as they are.

    Raises ArmorError where config.json lists no packed linears.
    """
    shards, (size, bits) = Shards(folder), bytes_on_disk(folder)
    modules = modules_of(read_json(folder / "config.json").get("quantization_config"))
    suffixes = ("left", "left_scales", "right", "right_scales")
    wrappers = [f"{name}.{suffix}" for name in modules for suffix in suffixes]
    saved = sum(shards.bytes_of(name) for name in wrappers if name in shards)
    if bits is not None:  # the mean over all linears of the decoder, those too that stay dense
        kept = CheckpointRecord.read(record_of_folder(folder)).kept_dense
        weights = sum(math.prod(shards.shape(f"{name}.weight")) for name in kept)
        weights += sum(layout.out_features * layout.in_features for layout in modules.values())
        bits -= 8 * saved / weights
    return size - saved, bits


def _groups(loading: Mapping[str, Loading], device: str) -> list[tuple[str, ...]]:
    """The recipes that take turns with the dense model: all, or one at a time where memory has no room for all.

    Room is needed for what each holds, and once for the most that one takes beyond that.
    """
    recipes = tuple(name for name in loading if name != DENSE)
    needed = sum(own.resident_bytes for own in loading.values())
    needed += max(own.peak_bytes - own.resident_bytes for own in loading.values())
    available = device_memory_bytes(device) or host_memory_bytes()
    if len(recipes) < 2 or needed <= USABLE * available:
        return [recipes]
    sizes = f"about {needed / 1e9:.3g} GB, {device} has {available / 1e9:.3g} GB"
    log.info("all models together need %s: each recipe takes turns with the dense model alone", sizes)
    return [(name,) for name in recipes]


def _turn_speed(models: Mapping[str, PreTrainedModel], turn: Turn, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    """`generation_speed` of one of `models`, or of its core alone."""
    name, alone = turn
    if not alone:
        return generation_speed(models[name], prompt, new_tokens)
    with core_alone(models[name]) as model:
        return generation_speed(model, prompt, new_tokens)


def _generation_speeds(models: Mapping[str, PreTrainedModel], settings: BenchmarkSettings) -> dict[Turn, Speeds]:
    """Tokens per second of `models` in turn, all rounds of them; cores alone too where there are blocks."""
    turns: list[Turn] = [(name, False) for name in models]
    turns += [(name, True) for name, model in models.items() if name != DENSE and wrapped(model)]
    sizes = sorted(settings.batch_sizes)
    prompts = {size: random_prompt(models[DENSE], size, settings.prompt_tokens) for size in sizes}
    for prompt in prompts.values():  # the first pass pays for buffers, threads and caches
        for turn in turns:
            _turn_speed(models, turn, prompt, 2)
    runs: dict[Turn, Speeds] = {turn: {size: {"prefill": [], "decode": []} for size in prompts} for turn in turns}
    for index in progress(range(settings.repeats), "decode", unit="round"):
        for size, prompt in prompts.items():
            new_tokens = max(settings.new_tokens // size, min(settings.new_tokens, FEWEST))
            for turn in turns[:: -1 if index % 2 else 1]:
                for phase, speed in _turn_speed(models, turn, prompt, new_tokens).items():
                    runs[turn][size][phase].append(speed)
    return runs


def _by_batch(function: Callable[..., Runs], *runs: Speeds) -> dict[str, Phases]:
    """`function` of the rounds of each batch size and phase."""
    return {
        str(size): Phases(**{phase: function(*(own[size][phase] for own in runs)) for phase in runs[0][size]})
        for size in runs[0]
    }


def _core(folder: Path, model: PreTrainedModel, own: Speeds, dense: Speeds, dense_bytes: int) -> CoreSide:
    """The packed `model` in `folder` without A and B, beside the dense one."""
    size, bits = core_on_disk(folder)
    tensors = [t for linear in wrapped(model) for t in (linear.left, linear.right) if t is not None]  # each B once
    read = bytes_per_token(folder, model) - sum(t.numel() * t.element_size() for t in tensors)
    return CoreSide(
        bytes_on_disk=size,
        bits_per_weight=bits,
        bytes_per_token=read,
        tokens_per_second=_by_batch(summary, own),
        speedup=_by_batch(ratios, own, dense),
        theoretical_speedup=dense_bytes / read,
    )


def _side(
    folder: Path,
    loading: Loading,
    model: PreTrainedModel,
    own: Speeds,
    dense: tuple[PreTrainedModel, int, Speeds] | None = None,
    core: Speeds | None = None,
) -> Side:
    """What was measured of one model; beside `dense`, its model, bytes per token and speeds of the same rounds."""
    size, bits = bytes_on_disk(folder)
    read = bytes_per_token(folder, model)
    return Side(
        bytes_on_disk=size,
        bits_per_weight=bits,
        resident_bytes=loading.resident_bytes,
        peak_bytes=loading.peak_bytes,
        load_seconds=loading.seconds,
        bytes_per_token=read,
        expanded=expands(model),
        tokens_per_second=_by_batch(summary, own),
        speedup=dense and _by_batch(ratios, own, dense[2]),
        theoretical_speedup=dense and dense[1] / read,
        core=None if core is None or dense is None else _core(folder, model, core, dense[2], dense[1]),
        linears=tuple(linear_speeds(dense[0], model)) if dense is not None else (),
    )


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: BenchmarkSettings) -> list[str]:
    """What the model writes after each prompt; without prompts there is no tokenizer."""
    if tokenizer is None:
        return []
    return [greedy_text(model, tokenizer, text, settings.new_tokens) for text in settings.prompts]


def _together(parts: Sequence[Speeds]) -> Speeds:
    """The rounds of several groups, one after the other."""
    return {
        size: {phase: [speed for part in parts for speed in part[size][phase]] for phase in phases}
        for size, phases in parts[0].items()
    }


def benchmark(
    source: Path | str,
    checkpoints: Mapping[str, Path],
    settings: BenchmarkSettings,
    output: Path | str,
    device: str = "cpu",
    fingerprints: Mapping[str, str | None] | None = None,
) -> BenchmarkRecord:
    """Measure the dense model in `source` and the compressed ones in `checkpoints`, by recipe; write `output`.

    All are Hugging Face folders; `fingerprints`, by recipe and "dense", are noted. Raises ArmorError for a folder that
    is not a model, for a recipe called dense, and for a device with too little memory.
    """
    start = time.perf_counter()
    output = Path(output)
    if DENSE in checkpoints:
        raise ArmorError(f"{checkpoints[DENSE]}: {DENSE} is what the dense model is called here; rename this recipe")
    folders = {DENSE: Path(source)} | {name: Path(folder) for name, folder in checkpoints.items()}
    for folder in folders.values():  # first, for it finds what is not a model
        bytes_on_disk(folder)
    tokenizer = load_tokenizer(source) if settings.prompts else None
    texts: dict[str, list[str]] = {}
    sides: dict[str, Side] = {}
    rounds: list[Speeds] = []
    try:
        loading = {name: measure_loading(folder, settings, device) for name, folder in folders.items()}
        dense = load_model(source, settings.dtype, device)
        read = bytes_per_token(source, dense)
        groups = _groups(loading, device)
        for group in groups:
            models = {DENSE: dense} | {name: load_model(folders[name], settings.dtype, device) for name in group}
            runs = _generation_speeds(models, settings)
            rounds.append(runs[DENSE, False])
            for name in group:
                beside = dense, read, runs[DENSE, False]
                own, core = runs[name, False], runs.get((name, True))
                sides[name] = _side(folders[name], loading[name], models[name], own, beside, core)
            for name in models.keys() - texts.keys():
                texts[name] = _texts(models[name], tokenizer, settings)
            del models
    except torch.OutOfMemoryError as error:
        raise ArmorError(
            f"{' and '.join(map(str, folders.values()))}: out of memory on {device} with batches of up to "
            f"{max(settings.batch_sizes)} sequences; lower batch_sizes or prompt_tokens, or take a larger GPU"
        ) from error
    whole = _side(folders[DENSE], loading[DENSE], dense, _together(rounds))
    for name, side in {DENSE: whole, **sides}.items():
        speeds = [f"{phases.decode.median:.1f}" for phases in side.tokens_per_second.values()]
        log.info("%s: %s tokens/s, %.0f MB resident", name, ", ".join(speeds), side.resident_bytes / 1e6)
    record = BenchmarkRecord(
        benchmark=output.stem,
        dense=whole,
        recipes=sides,
        turns=tuple(group for group in groups if group),
        samples=tuple(
            Continuation(prompt=prompt, texts={name: texts[name][index] for name in folders})
            for index, prompt in enumerate(settings.prompts)
        ),
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory_bytes(device),
        made_by=made_by(__name__, settings, dict(fingerprints or {})),
        machine=current_machine(device),
    )
    record.write(output)
    return record
