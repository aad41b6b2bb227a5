"""How long a unit of each kind of work takes on this machine: one decoder layer, one linear, a file, a process.

Weights may be zeros (`armor.format.holes`): products of matrices take as long with them. The fastest of a few runs
counts, so that what else the machine does meanwhile is left out as far as it can be.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from armor.config.layers import ModuleSettings
from armor.config.quantization import QuantizeSettings
from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.packing import pack_mask
from armor.core.pattern import top_n_mask
from armor.evaluate.logits import comparison, token_losses
from armor.execution.files import sha256
from armor.factorize.quantize import quantize_weights
from armor.format.checkpoint import PackedLinear
from armor.format.records.topology import Linear
from armor.format.statistics import Statistics
from armor.plan.subject import Subject
from armor.plan.work import Forward, Gram, Head, Kind, Read, Round, Solve, Start, Step, Train
from armor.runtime.calls import Call, State, observe
from armor.runtime.filling import load_outside, read_layer, unload_outside
from armor.runtime.linear import ArmorLinear, know_each_other
from armor.runtime.skeleton import open_skeleton, tensors_of
from armor.training.trainable import training_arithmetic

__all__ = ["bandwidth", "rates"]

ROWS = 64  # that go through the head at a time
ENTRIES = 1 << 21  # of the weight that is compressed
EARLY = 20  # iterations of the solver in which all is computed every time
MORE = 8
MORE_BESIDE_GRAM = 40  # so that they take longer than what the Gram matrix takes differs from run to run
FEW = 256  # columns
BYTES = 1 << 26
REPEATS = 3


def rates(subjects: Mapping[str, Subject], kinds: Iterable[Kind]) -> dict[Kind, float]:
    """Seconds for a unit of each of `kinds`."""
    timer = _Timer(subjects)
    return {kind: timer.seconds(kind) for kind in kinds}


def bandwidth() -> float:
    """The bytes a second that all threads together read from memory: a sum over 256 MB."""
    data = torch.ones(BYTES)
    return data.nbytes / _timed(data.sum)


def _timed(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds: the fastest of a few runs, after one that pays for buffers and threads."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


class _Timer:
    """What is timed of the `subjects`, by name."""

    def __init__(self, subjects: Mapping[str, Subject]) -> None:
        self.subjects = subjects
        self.opened = cache(self._opened)

    def seconds(self, kind: Kind) -> float:
        """Of one unit of `kind`."""
        match kind:
            case Start():
                code = "import armor.model.inspect" if kind.whole else "import armor.command.cli"
                return _timed(lambda: subprocess.run([sys.executable, "-c", code], check=True), repeats=1)
            case Read():
                return _file()
            case Forward():
                layer, state, call = self.opened(kind.model, kind.dtype, kind.length, kind.recipe)
                return _timed(lambda: _run(layer, state, call)) / kind.length
            case Step():
                layer, state, call = self.opened(kind.model, kind.dtype, 1, kind.recipe)
                return _timed(lambda: _run(layer, state, call))
            case Train():
                layer, state, call = self.opened(kind.model, "float32", kind.length, None)
                return _timed(lambda: _back(layer, state, call)) / kind.length
            case Head():
                return self._head(kind)
            case Solve():
                return self._solve(kind)
            case Gram():
                return self._gram(kind)
            case Round():
                return self._round(kind)

    def _opened(self, model: str, dtype: str, length: int, recipe: str | None) -> tuple[nn.Module, State, Call]:
        """The last decoder layer, packed by `recipe` if there is one, and what it is called with."""
        subject, wanted = self.subjects[model], getattr(torch, dtype)
        skeleton = open_skeleton(subject.folder, wanted)
        shards = tensors_of(skeleton, subject.folder)
        load_outside(skeleton, shards)
        hidden, calls = observe(skeleton, torch.arange(length).remainder(subject.vocabulary)[None])
        unload_outside(skeleton)
        chosen = subject.topology.layers[-1]
        layer = read_layer(skeleton, chosen.index, shards)
        for linear in chosen.linears if recipe else ():
            layout = subject.packed[recipe or ""].modules.get(linear.name)
            if layout is not None:
                own = skeleton.inside(chosen.index, linear.name)
                dense: Any = layer.get_submodule(own)
                layer.set_submodule(own, _packed(layout, wanted, dense.bias is not None))
        know_each_other(layer)
        call = calls[chosen.index]
        return layer, call.empty(torch.randn_like(hidden)), call

    def _head(self, kind: Head) -> float:
        subject, dtype = self.subjects[kind.model], getattr(torch, kind.dtype)
        head = torch.zeros(subject.vocabulary, subject.topology.hidden_size, dtype=dtype)
        states, tokens = torch.randn(ROWS, head.shape[1], dtype=dtype), torch.zeros(ROWS, dtype=torch.int64)

        def work() -> None:
            logits = F.linear(states, head)
            token_losses(logits, tokens)
            if kind.compared:
                comparison(logits, logits)

        return _timed(work) / ROWS

    def _solve(self, kind: Solve) -> float:
        """Of one weight: a part of the largest linear, in one thread, as a layer's job has it.

        The search beside a Gram matrix is timed with few columns, for which that matrix takes little time.
        """
        settings, wanted = kind.settings, kind.settings.solver.iterations
        has_gram = settings.takes("gram")
        largest = max(self._linears(), key=lambda linear: linear.out_features * linear.in_features)
        columns = min(largest.in_features, FEW if has_gram else ENTRIES // 128)
        rows = min(largest.out_features, max(ENTRIES // columns // 128 * 128, 128))

        def seconds(iterations: int) -> float:
            return _compressed(settings.replace(solver=settings.solver.replace(iterations=iterations)), rows, columns)

        once = seconds(1)
        if not settings.takes("solver") or wanted <= EARLY + MORE:
            taken = min(seconds(wanted) for _ in range(REPEATS))
            return max(taken - (once if has_gram else 0.0), 0.0) / (rows * columns)
        more = MORE_BESIDE_GRAM if has_gram else MORE
        first, last = seconds(EARLY), seconds(EARLY + more)
        slope = max(0.0, last - first) / more  # on a busy machine the longer run may have been the faster one
        return max(first - (once if has_gram else 0.0) + (wanted - EARLY) * slope, 0.0) / (rows * columns)

    def _gram(self, kind: Gram) -> float:
        """Of one weight, with a Gram matrix of this size."""
        most = max((linear.out_features for linear in self._linears() if linear.in_features >= kind.columns), default=1)
        entries = ENTRIES // 4 if kind.settings.takes("solver") else ENTRIES
        rows = min(most, max(entries // kind.columns // 128 * 128, 128))
        return min(_compressed(kind.settings, rows, kind.columns) for _ in range(2)) / (rows * kind.columns)

    def _round(self, kind: Round) -> float:
        """Of one weight: a random one, with a Gram matrix of this size or without."""
        rows = max(ENTRIES // 4 // kind.columns // 128 * 128, 128)
        left = right = None
        if kind.blocks:
            rows = -(-rows // kind.blocks[0]) * kind.blocks[0]
            left, right = map(blockdiag.identity, (rows, kind.columns), kind.blocks)
        weight = torch.randn((rows, kind.columns), generator=torch.Generator().manual_seed(0))
        mask = top_n_mask(weight.abs(), kind.pattern)
        factors = Factorization(weight * mask, mask, kind.pattern, left, right)
        of_input = Statistics(torch.ones(kind.columns), torch.eye(kind.columns) if kind.gram else None, 1)
        asked = QuantizeSettings(core=kind.core)

        def work() -> None:
            quantize_weights([weight], of_input, {"": factors}, asked, trained=False, to_output=kind.gram)

        return _in_one_thread(work) / weight.numel()

    def _linears(self) -> list[Linear]:
        """Those of each model's last decoder layer."""
        return [linear for subject in self.subjects.values() for linear in subject.topology.layers[-1].linears]


def _compressed(settings: ModuleSettings, rows: int, columns: int) -> float:
    """Seconds of one thread to compress a random weight (rows, columns)."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    of_input = Statistics(torch.ones(columns), torch.eye(columns) if settings.takes("gram") else None, 1)
    return _in_one_thread(lambda: settings.how.run(weight, of_input, settings, 0))


def _in_one_thread(work: Callable[[], object]) -> float:
    """Seconds of the processor: what else the machine does is not in them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    try:
        work()
        return time.process_time() - start
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _packed(layout: PackedLinear, dtype: torch.dtype, bias: bool) -> ArmorLinear:
    """A packed linear of zeros."""
    layer = ArmorLinear(layout, bias, dtype=dtype)
    for tensor in layer.state_dict().values():
        tensor.zero_()
    if layer.core_mask is not None:
        layer.core_mask.copy_(pack_mask(top_n_mask(torch.zeros(1, layout.in_features), layout.pattern)))
    return layer


@torch.no_grad()
def _run(layer: nn.Module, state: State, call: Call) -> None:
    call.run(layer, state)


def _back(layer: nn.Module, state: State, call: Call) -> None:
    layer.requires_grad_(True)
    with training_arithmetic("cpu"):
        output = call.run(layer, state)[0]
    output.sum().backward()


def _file() -> float:
    """Of one byte of a file that is written, and read to be hashed; the mean of both."""
    data = bytes(BYTES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data"
        start = time.perf_counter()
        file.write_bytes(data)
        sha256(file)
        return (time.perf_counter() - start) / (2 * BYTES)
