"""What a model takes when it is loaded alone: memory and seconds, in a fresh process.

A model's own memory is what is resident after loading and one pass, minus what was before. In that pass weights that
are only mapped become resident. The peak is that of loading, of a prompt of the largest batch and of a token after it.
The process is a fork of one that has imported the libraries once for all models, without CUDA, which starts in the
fork. In a fork the pages of the libraries' own files become resident again as they are used: these do not count.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch

from armor.benchmark.speed import generation_speed, random_prompt
from armor.config.measures import BenchmarkSettings
from armor.core.errors import ArmorError
from armor.execution.machine import peak_memory_bytes, resident_memory_bytes, set_threads
from armor.runtime.load import load_model

__all__ = ["Loading", "measure_loading"]


class Loading(NamedTuple):
    """Bytes on the host, or on the card, after loading and at the peak; seconds to load."""

    resident_bytes: int
    peak_bytes: int
    seconds: float


def measure_loading(folder: Path | str, settings: BenchmarkSettings, device: str = "cpu") -> Loading:
    """Load a model in a fresh process. Raises ArmorError if it cannot be loaded or the process dies."""
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        try:
            return process.submit(_load_alone, str(folder), settings, device, torch.get_num_threads()).result()
        except BrokenProcessPool:
            raise ArmorError(f"{folder}: the process that loaded this model died; give it more memory") from None


def _load_alone(folder: str, settings: BenchmarkSettings, device: str, threads: int) -> Loading:
    """Runs in a process of its own."""
    set_threads(threads)
    on_card = device.startswith("cuda")
    gc.collect()  # else the imports' garbage is collected while the model loads, or not, as chance will
    libraries = _other_files_bytes(folder)
    before = resident_memory_bytes()
    start = time.perf_counter()
    model = load_model(folder, settings.dtype, device)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(input_ids=random_prompt(model, 1, 1), use_cache=False)
    if on_card:
        resident = torch.cuda.memory_allocated(device)
    else:
        resident = resident_memory_bytes() - before - (_other_files_bytes(folder) - libraries)
    generation_speed(model, random_prompt(model, max(settings.batch_sizes), settings.prompt_tokens), 2)
    peak = peak_memory_bytes(device)
    if not on_card:
        peak -= before + _other_files_bytes(folder) - libraries
    return Loading(resident, peak, seconds)


def _other_files_bytes(folder: str) -> int:
    """The bytes of this process's resident pages of files outside of `folder`, those that were not written to.

    From /proc/self/smaps; 0 where there is none.
    """
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    inside = {str(file.resolve()) for file in Path(folder).iterdir()}
    total, outside = 0, False
    for line in lines:
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):  # a mapping begins: addresses, permissions, offset, device, inode, path
            path = values[4] if len(values) > 4 else ""
            outside = path.startswith("/") and path not in inside
        elif outside and key in ("Rss:", "Anonymous:"):
            total += (1 if key == "Rss:" else -1) * int(values[0]) * 1024
    return total
