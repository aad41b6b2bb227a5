"""Tiny models taken through inspect, factorize and assemble, and ways to break the checkpoint that comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from armor.assemble.writer import assemble
from armor.config.layers import LayerSettings
from armor.config.quantization import QuantizeOverride, QuantizeSettings
from armor.core.factorization import Factorization
from armor.factorize.layer import factorize_layer
from armor.factorize.quantize import quantize_layer
from armor.format.factors import read_factors
from armor.format.records.topology import Topology
from armor.format.statistics import Statistics, write_statistics
from armor.methods.solver.settings import SolverSettings
from armor.model.inspect import inspect
from armor.model.source import Source, open_source
from tests.tiny import tiny_model

QUANTIZE = QuantizeSettings(
    overrides=[
        QuantizeOverride(modules="*.down_proj", core="int4", group=16),
        QuantizeOverride(modules="*.[gu]*_proj", core="fp8"),
    ]
)
SETTINGS = LayerSettings(method="armor", block_size=16, solver=SolverSettings(iterations=2))


def opened(root: Path) -> tuple[Source, Topology]:
    """The source and topology of what `prepared` made in `root`."""
    return open_source(root / "source"), Topology.read(root / "model.json")


def prepared(
    root: Path, family: str = "llama", layers: int = 2, seed: int = 0, change: Callable = Path.exists, **config
) -> Path:
    """A tiny model, after `change` to its folder, with its topology and made-up statistics: source/, model.json,
    calibration/."""
    change(tiny_model(root / "source", family, layers, seed, **config))
    source = open_source(root / "source")
    topology = inspect(source, root / "model.json")
    for layer in topology.layers:
        generator = torch.Generator().manual_seed(layer.index)
        inputs, users = {}, {}
        for group in layer.groups():
            importance = torch.rand(group[0].in_features, generator=generator) + 0.1
            inputs[group[0].name] = Statistics(importance, None, 10)
            users |= {linear.name: group[0].name for linear in group}
        write_statistics(root / f"calibration/layer_{layer.index}.safetensors", inputs, users, topology.fingerprint)
    return root


def factorized(root: Path, settings: LayerSettings = SETTINGS, name: str = "layers") -> Path:
    """Factorize every layer of what `prepared` made in `root`; returns the folder of the factors."""
    source, topology = opened(root)
    for layer in topology.layers:
        statistics = root / f"calibration/layer_{layer.index}.safetensors"
        output = root / name / f"layer_{layer.index}.safetensors"
        factorize_layer(source, topology, layer.index, statistics, settings, output)
    return root / name


def packed(root: Path, family: str = "llama", settings: LayerSettings = SETTINGS, **config) -> Path:
    """A tiny model's checkpoint; returns `root`, with source/, layers/, checkpoint.json and checkpoint/ in it."""
    sharding = {"max_shard_bytes": config.pop("max_shard_bytes")} if "max_shard_bytes" in config else {}
    factors = factorized(prepared(root, family, **config), settings)
    assemble(*opened(root), factors, root / "checkpoint.json", **sharding)
    return root


def quantized(root: Path, settings: QuantizeSettings = QUANTIZE, name: str = "quantized", **sharding: int) -> Path:
    """Quantize what `factorized` left in `root`, and assemble it to `root`/{name}/checkpoint, which is returned."""
    source, topology = opened(root)
    for layer in topology.layers:
        file = f"layer_{layer.index}.safetensors"
        statistics, output = root / "calibration" / file, root / name / "quantized" / file
        own = settings.for_layer(layer.index)
        quantize_layer(source, topology, layer.index, root / "layers" / file, statistics, own, output)
    assemble(source, topology, root / name / "quantized", root / name / "checkpoint.json", **sharding)
    return root / name / "checkpoint"


def factors_of(root: Path) -> dict[str, Factorization]:
    """All factors that `packed` or `factorized` left in `root`, by module."""
    found = {}
    for file in sorted((root / "layers").glob("*.safetensors")):
        found |= read_factors(file)[0]
    return found


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors"
) -> None:
    """Rewrite one safetensors file of `folder` after `change` to its tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    """Rewrite config.json after `change` to its quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def _set(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: value(tensors[name])}))


def _poke(index: tuple[int, ...], number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = number
        return tensor

    return change


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def _config(**keys: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: config.update(keys))


def _group(**keys: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: config["groups"][0].update(keys))


def _forget_module(folder: Path) -> None:
    edit_config(folder, lambda config: config["groups"][0]["modules"].remove(config["groups"][0]["modules"][-1]))


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


# What is wrong -> how to make it so in a checkpoint of `packed` (llama, one file), and what the message must name.
DEFECTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing values": (_drop(f"{Q}.core_values"), (f"{Q}.core_values", "missing")),
    "missing mask": (_drop(f"{DOWN}.core_mask"), (f"{DOWN}.core_mask", "missing")),
    "missing tombstone": (_drop(f"{Q}.weight"), (f"{Q}.weight", "(1,)")),
    "dense weight too": (
        lambda folder: edit_tensors(folder, lambda t: t.update({f"{DOWN}.weight": torch.zeros(64, 128)})),
        (f"{DOWN}.weight", "dense weight"),
    ),
    "a linear more": (
        lambda folder: edit_tensors(folder, lambda t: t.update({"lm_head.core_mask": torch.zeros(4, 8).byte()})),
        ("lm_head.core_mask", "config.json"),
    ),
    "mask not 2:4": (_set(f"{Q}.core_mask", _poke((3, 1), 0b00110111)), (f"{Q}.core_mask", "row 3", "2:4")),
    "mask as int32": (_set(f"{Q}.core_mask", torch.Tensor.int), (f"{Q}.core_mask", "int32", "uint8")),
    "NaN": (_set(f"{DOWN}.core_values", _poke((5, 7), float("nan"))), (f"{DOWN}.core_values", "1 of", "NaN")),
    "infinity": (_set(f"{DOWN}.right", _poke((0, 0, 0), float("-inf"))), (f"{DOWN}.right", "infinite")),
    "NaN in a norm": (_set("model.norm.weight", _poke((0,), float("nan"))), ("model.norm.weight", "NaN")),
    "wrong shape": (_set(f"{Q}.left", lambda t: t[:-1]), (f"{Q}.left", "(3, 16, 16)", "(4, 16, 16)")),
    "mixed dtypes": (_set(f"{Q}.left", torch.Tensor.half), (f"{Q}.left", "float16", "float32")),
    "truncated": (_truncate, ("model.safetensors",)),
    "a version to come": (_config(format_version=3), ("config.json", "format_version", "3")),
    "an unknown key": (_config(scales=True), ("config.json", "scales")),
    "no groups": (_config(groups=[]), ("config.json", "groups")),
    "a pattern like 3:2": (_group(pattern="3:2"), ("config.json", "groups.0.pattern", "3:2")),
    "another pattern": (_group(pattern="1:4"), (f"{Q}.core_values", "(64, 16)")),
    "blocks that do not divide": (_group(left_block_size=24), ("config.json", "groups.0.left_block_size", "24")),
    "a module twice": (_group(modules=[Q, Q]), ("config.json", Q, "twice")),
    "a module that is not there": (_group(modules=["model.layers.9.mlp.up_proj"]), ("model.layers.9.mlp.up_proj",)),
    "a module left out": (_forget_module, ("not a tensor that config.json lists",)),
}
