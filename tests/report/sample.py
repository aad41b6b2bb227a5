"""A results folder as a run leaves it, with made-up numbers of the size that SmolLM2-135M gives; always the same."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path

from armor.execution.files import write_json
from armor.format.records.topology import DecoderLayer, Linear, Topology

__all__ = ["plan", "write_results"]

LINEARS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
PERPLEXITY = {"dense": 22.75, "magnitude": 1179.0, "wanda": 128.0, "nowag": 113.2, "armor": 30.96}
KL = {"magnitude": 4.31, "wanda": 1.76, "nowag": 1.63, "armor": 0.352}
TOP1 = {"magnitude": 0.112, "wanda": 0.395, "nowag": 0.408, "armor": 0.701}
LOSS = {"magnitude": 0.31, "wanda": 0.071, "nowag": 0.064, "armor": 0.0135}
SECONDS = {"magnitude": 0.4, "wanda": 0.4, "nowag": 0.5, "armor": 13.5}
BYTES = {"magnitude": 176_200_000, "wanda": 176_200_000, "nowag": 176_200_000, "armor": 212_600_000}
BITS = {"magnitude": 9.0, "wanda": 9.0, "nowag": 9.0, "armor": 11.74}
SPEED = {"dense": 14.2, "magnitude": 13.1, "wanda": 13.2, "nowag": 13.1, "armor": 9.4}
PROMPTS = {"The capital of France is": "Paris", "Once upon a time, a fox": "met a crow"}
FILES = {
    "model.safetensors": {"bytes": 269_060_552, "sha256": "d" * 64},
    "tokenizer.json": {"bytes": 3_522_871, "sha256": "e" * 64},
}
MACHINE = {
    "processor": "A processor",
    "cores": 2,
    "threads": 2,
    "device": "cpu",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0"},
}


def plan(
    recipes: Iterable[str] = tuple(PERPLEXITY),
    models: Iterable[str] = ("smollm2-135m",),
    evaluations: Iterable[str] = ("wikipedia",),
    benchmarks: Iterable[str] = ("decode",),
    tasks: dict[str, list[str]] | None = None,
) -> dict:
    """The plan of the sample's recipes, as the workflow passes it."""
    return {
        "title": "ARMOR report",
        "config": {
            "models": {model: {"hub": f"someone/{model}"} for model in models},
            "recipes": {recipe: {"method": recipe.partition("-")[0], "pattern": "2:4"} for recipe in recipes},
        },
        "pairs": [
            {
                "model": model,
                "recipe": recipe,
                "method": recipe.partition("-")[0],
                "pattern": "2:4",
                "block_size": 64,
                "evaluations": list(evaluations),
                "benchmarks": list(benchmarks),
                "tasks": tasks or {},
            }
            | ({} if recipe == "dense" else {"calibration": "text"})
            for model in models
            for recipe in recipes
        ],
    }


def _block_means(rng: random.Random, perplexity: float, blocks: int = 16) -> list[float]:
    """Means that differ between blocks, for all recipes alike, and average to log(perplexity)."""
    text = random.Random("text")
    means = [text.gauss(0, 0.35) + rng.gauss(0, 0.04) for _ in range(blocks)]
    return [m - sum(means) / blocks + math.log(perplexity) for m in means]


def _common(rng: random.Random, seconds: float, memory: float) -> dict:
    return {
        "format_version": 1,
        "seconds": seconds * rng.uniform(0.9, 1.1),
        "peak_memory_bytes": int(memory * rng.uniform(0.95, 1.05)),
    }


def _layer(rng: random.Random, layer: int, method: str, block_size: int) -> dict:
    modules = {}
    for name in LINEARS:
        kind = {"v_proj": 1.6, "o_proj": 1.8, "k_proj": 0.6, "q_proj": 0.5}.get(name.split(".")[1], 1.0)
        start = 0.064 * kind * (0.35 + 0.04 * layer if layer > 1 else 1.5) * rng.uniform(0.8, 1.2)
        loss = start * LOSS[method] / LOSS["nowag"] * rng.uniform(0.8, 1.2)
        trace = []
        if method == "armor":
            points = [0, 1, 2, 3, *range(10, 310, 10)]
            trace = [[i, i * 0.004, loss + (start - loss) * math.exp(-i / 40)] for i in points]
        modules[f"model.layers.{layer}.{name}"] = {
            "method": method,
            "pattern": "2:4",
            "block_size": {"left": block_size, "right": block_size} if method == "armor" else None,
            "start_loss": start,
            "loss": loss,
            "trace": trace,
            "seconds": SECONDS[method] / 7,
            "note": None,
        }
    return {**_common(rng, SECONDS[method], 7e8), "layer": layer, "modules": modules, "machine": MACHINE}


def _runs(rng: random.Random, middle: float) -> dict:
    low, median, high = sorted(middle * rng.uniform(0.97, 1.03) for _ in range(3))
    return {"median": median, "quartiles": [(low + median) / 2, (median + high) / 2], "runs": [low, median, high]}


def _ratio(median: float) -> dict:
    ends = [0.97 * median, 1.03 * median]
    return {"median": median, "quartiles": ends, "runs": ends}


def _side(rng: random.Random, what: str) -> dict:
    """One side of a benchmark: the dense model, or that of a method."""
    return {
        "bytes_on_disk": 269_060_552 if what == "dense" else BYTES[what],
        "bits_per_weight": 16.0 if what == "dense" else BITS[what],
        "resident_bytes": 280_000_000,
        "peak_bytes": 410_000_000,
        "load_seconds": 0.4,
        "bytes_per_token": 269_060_552 if what == "dense" else BYTES[what],
        "tokens_per_second": {
            str(batch): {"prefill": _runs(rng, 200 * batch), "decode": _runs(rng, SPEED[what] * (1 + batch) / 2)}
            for batch in (1, 4)
        },
    }


def _core(rng: random.Random) -> dict:
    """The side of a packed model without its blocks: a pruned one's, as far as it is measured."""
    side = _side(rng, "nowag")
    ratio = _runs(rng, 1.1)
    return {key: side[key] for key in ("bytes_on_disk", "bits_per_weight", "bytes_per_token", "tokens_per_second")} | {
        "speedup": {batch: {"prefill": ratio, "decode": ratio} for batch in ("1", "4")},
        "theoretical_speedup": 16 / BITS["nowag"],
    }


def _linear(out: int, columns: int, method: str) -> dict:
    """The speed of one shape of linears."""
    rng, block = random.Random(f"{out} {columns} {method}"), 64 if method == "armor" else None
    return {
        "out_features": out,
        "in_features": columns,
        "pattern": "2:4",
        "left_block_size": block,
        "right_block_size": block,
        "count": 60,
        "dense_milliseconds": _runs(rng, out * columns / 8e6),
        "milliseconds": _runs(rng, out * columns / 1.6e7),
        "speedup": _runs(rng, 2),
        "theoretical_speedup": 16 / BITS.get(method, 16),
    } | ({"core_milliseconds": _runs(rng, out * columns / 2e7), "core_speedup": _runs(rng, 2.5)} if block else {})


def _topology(layers: int) -> Topology:
    def linears(prefix: str) -> tuple[Linear, ...]:
        return tuple(
            Linear(f"{prefix}.{name}", out, columns, "bfloat16", False, "model.safetensors", group)
            for group, (name, (out, columns)) in enumerate(LINEARS.items())
        )

    prefixes = [f"model.layers.{k}" for k in range(layers)]
    made = tuple(DecoderLayer(k, prefix, linears(prefix)) for k, prefix in enumerate(prefixes))
    return Topology("llama", "0" * 64, "bfloat16", 2048, 576, 134_515_008, 106_168_320, True, made)


def write_results(root: Path, plan: dict, layers: int = 30) -> Path:
    """Write all that the stages would have written for `plan` to `root`, and return `root`."""
    for pair in plan["pairs"]:
        recipe, method, folder = pair["recipe"], pair["method"], root / pair["model"]
        rng = random.Random(f"{pair['model']} {recipe}")
        write_json(folder / "source.json", {"format_version": 1, "dtype": "bfloat16", "files": FILES})
        write_json(folder / "model.json", _topology(layers).to_json())
        for number, name in enumerate(pair["evaluations"]):
            value = PERPLEXITY[method] * (1 + 0.4 * number)
            evaluation = {
                "task": name,
                "metric": "perplexity",
                "value": value,
                "standard_error": value * 0.09,
                "tokens": 16 * 1023,
                "blocks": 16,
                "length": 1024,
                "block_means": _block_means(rng, value),
                "against_dense": None
                if method == "dense"
                else {
                    "kl": {"value": KL[method], "standard_error": KL[method] / 40},
                    "top1": {"value": TOP1[method], "standard_error": 0.004},
                },
                "settings": {"text": {"files": ["text.txt"]}, "sequence_length": 1024, "dtype": "auto"},
                "inputs": {"text": f"{number:064}"},
                "machine": MACHINE,
            }
            write_json(folder / recipe / "evaluation" / f"{name}.json", _common(rng, 62, 1.2e9) | evaluation)
        for name, tasks in pair["tasks"].items():
            score = {"metric": "acc", "value": 0.3 + TOP1.get(method, 1) / 4, "standard_error": 0.05}
            scores = {task: score | {"higher_is_better": not task.endswith("loss")} for task in tasks}
            record = {"tasks": scores, "settings": {}, "machine": MACHINE}
            write_json(folder / recipe / "evaluation" / f"{name}.json", _common(rng, 30, 9e8) | record)
        sides = {side: _side(rng, what) for side, what in {"dense": "dense", "compressed": method}.items()}
        ratio = SPEED[method] / SPEED["dense"]
        phases = {"prefill": _ratio(0.5 * ratio), "decode": _ratio(ratio)}
        measured = {
            "speedup": dict.fromkeys(("1", "4"), phases),
            "theoretical_speedup": 16 / BITS.get(method, 16),
            "core": _core(rng) if method == "armor" else None,
            "linears": [_linear(out, columns, method) for out, columns in dict.fromkeys(LINEARS.values())],
        }
        samples = [{"prompt": p, "dense": f" {w}.", "compressed": f" {w},\n{recipe}. " * 9} for p, w in PROMPTS.items()]
        if method == "dense":
            sides["compressed"] = None
            measured = {"speedup": None, "theoretical_speedup": None, "core": None, "linears": []}
            samples = [{key: text for key, text in sample.items() if key != "compressed"} for sample in samples]
        for name in pair["benchmarks"]:
            case = {"case": name, "recipe": recipe, **sides, **measured, "samples": samples, "machine": MACHINE}
            write_json(folder / recipe / "benchmark" / f"{name}.json", _common(rng, 40, 1.6e9) | case)
        if method == "dense":
            continue
        calibration = _common(random.Random(0), 75, 1.1e9) | {"machine": MACHINE}
        write_json(folder / "calibration" / "text" / "calibration.json", calibration)
        for layer in range(layers):
            record = _layer(rng, layer, method, pair["block_size"])
            write_json(folder / recipe / "layers" / f"layer_{layer}.json", record)
        checkpoint = {"bits_per_weight": BITS[method], "checkpoint_bytes": BYTES[method], "kept_dense": []}
        checkpoint["machine"] = MACHINE
        checkpoint["inputs"] = {"model": "a" * 64, "statistics": "b" * 64}
        checkpoint["factors"] = [{"layers": [*range(layers)], "code": "c" * 16, "settings": {"seed": 0}}]
        write_json(folder / recipe / "checkpoint.json", _common(rng, 4, 6e8) | checkpoint)
    return root
