"""docs/FORMAT.md, held to what is written: a reader made from the page alone, and the bytes of a tiny checkpoint."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import armor.hf  # noqa: F401
from armor.assemble.export import export
from armor.assemble.verify import verify
from armor.assemble.writer import assemble
from armor.config.layers import LayerSettings, Override
from armor.core.factorization import Factorization
from armor.core.integers import DTYPES
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization
from armor.execution.files import sha256
from armor.format.factors import read_factors, write_factors
from armor.format.records.base import BlockSizes
from armor.model.inspect import inspect
from armor.model.source import open_source
from tests.packed import QUANTIZE, SETTINGS, edit_tensors, factorized, opened, packed, prepared, quantized
from tests.records import layer_record, linear_record


def numbers(path):
    """The tensors of a safetensors file; BF16, which numpy has not, in float32."""
    raw = path.read_bytes()
    start, found = 8 + int.from_bytes(raw[:8], "little"), {}
    dtypes = {"U8": "u1", "I8": "i1", "F8_E4M3": "u1", "BF16": "<u2", "F32": "<f4"}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensor = np.frombuffer(raw[start + begin : start + end], dtypes[entry["dtype"]])
            if entry["dtype"] == "BF16":
                tensor = (tensor.astype("<u4") << 16).view("<f4")
            if entry["dtype"] == "F8_E4M3":
                exponent, fraction = tensor >> 3 & 15, (tensor & 7) / 8
                size = np.where(exponent, np.ldexp(1 + fraction, exponent.astype(int) - 7), np.ldexp(fraction, -6))
                tensor = np.where(tensor > 127, -size, size)
            found[name] = tensor.reshape(entry["shape"])
    return found


def numpy_core(tensors, module, rows, columns, own):
    """S, dense; `own` is what config.json says of integers."""
    values, mask = tensors[f"{module}.core_values"], tensors.get(f"{module}.core_mask")
    if own and own["core"] == "int4":
        values = np.stack((values & 15, values >> 4), 2).reshape(rows, -1).astype(int)
        values = np.where(values > 7, values - 16, values)
    core = np.zeros((rows, columns))
    for r in range(rows):
        k = 0
        for c in range(columns):
            if mask is None or mask[r, c // 8] >> (c % 8) & 1:
                scale = tensors[f"{module}.core_scales"][r, c // own["group"]] if own else 1
                core[r, c] = values[r, k] * float(scale)
                k += 1
        assert k == values.shape[1]
    return core


def numpy_weights(folder):
    """Every compressed W of a checkpoint, from nothing but JSON, safetensors, numpy and the rules of the page."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    version = config["format_version"]
    assert config["quant_method"] == "armor" and type(version) is int and version in (1, 2)
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    tensors = {}
    for file in files:
        tensors |= numbers(folder / file)

    weights = {}
    for group in config["groups"]:
        rows, columns = group["out_features"], group["in_features"]
        for module in group["modules"]:
            own = group["quantization"] if version == 2 else None
            core = numpy_core(tensors, module, rows, columns, own)
            matrices = []
            for side, size, dimension in (
                ("left", group["left_block_size"], rows),
                ("right", group["right_block_size"], columns),
            ):
                matrix = np.eye(dimension)
                if size is not None:
                    matrix[:] = 0
                    for i, block in enumerate(tensors[f"{module}.{side}"]):
                        if own and own["blocks"]:
                            block = block * tensors[f"{module}.{side}_scales"][i * size : (i + 1) * size, None]
                        matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
                matrices.append(matrix)
            weights[module] = matrices[0] @ core @ matrices[1]
            if "rank" in group:
                up, down = (tensors[f"{module}.{suffix}"].astype("<f8") for suffix in ("up", "down"))
                assert up.shape[1] == group["rank"]
                weights[module] += up @ down
    return weights


RECIPES = {
    "floats": {
        "overrides": [
            Override(modules="*.down_proj", method="wanda", pattern="50%"),
            Override(modules="*.k_proj", pattern="4:8", block_size=8),
        ]
    },
    "dense integers": {
        "method": "int4",
        "overrides": [Override(modules="*.down_proj", method="int8"), Override(modules="*.k_proj", method="armor")],
    },
    "sparse plus low rank": {
        "method": "oats",
        "rank": 5,
        "overrides": [Override(modules="*.down_proj", rank=200), Override(modules="*.k_proj", method="armor")],
    },
}


def settings_of(recipe):
    return LayerSettings(**SETTINGS.model_dump() | RECIPES[recipe])


@torch.no_grad()
def check(checkpoint, layers, dense):
    """The reader from the page and `export` give the products of the factors in `layers`. The model runs by them."""
    found, expected, exported = numpy_weights(checkpoint), {}, {}
    for file in layers.glob("*.safetensors"):
        expected |= read_factors(file)[0]
    export(checkpoint, dense)
    for file in dense.glob("*.safetensors"):
        exported |= load_file(file)
    assert found.keys() == expected.keys() and len(found) == 14
    for name, factors in expected.items():
        assert np.allclose(found[name], factors.reconstruct(torch.float64).numpy(), rtol=1e-12, atol=1e-12), name
        weight = exported[f"{name}.weight"]
        assert torch.equal(weight, factors.reconstruct().to(weight.dtype)), name
    assert verify(checkpoint).compressed_count == 14
    packed_logits, dense_logits = (
        AutoModelForCausalLM.from_pretrained(folder)(torch.arange(8)[None]).logits for folder in (checkpoint, dense)
    )
    torch.testing.assert_close(packed_logits, dense_logits, rtol=1e-4, atol=1e-4)
    return expected


@pytest.mark.parametrize(("recipe", "max_shard_bytes"), [*zip(RECIPES, [10**9] * 3, strict=True), ("floats", 100_000)])
def test_a_reader_made_from_the_page_gets_the_same_weights(tmp_path, recipe, max_shard_bytes):
    root = packed(tmp_path, settings=settings_of(recipe), max_shard_bytes=max_shard_bytes)
    check(root / "checkpoint", root / "layers", tmp_path / "dense")


@pytest.mark.parametrize(
    ("recipe", "blocks", "max_shard_bytes"),
    [("floats", "bfloat16", 100_000), ("sparse plus low rank", "int8", 10**9)],
)
def test_a_reader_made_from_the_page_gets_the_same_integers(tmp_path, recipe, blocks, max_shard_bytes):
    root = prepared(tmp_path)
    factorized(root, settings_of(recipe))
    settings = QUANTIZE.model_copy(update={"blocks": blocks})
    folder = quantized(root, settings, max_shard_bytes=max_shard_bytes)
    expected = check(folder, root / "quantized/quantized", tmp_path / "dense")
    assert all(own.quantization is not None for own in expected.values())


def grid(*shape):
    """Small numbers that every float dtype holds exactly, made without a random generator."""
    return (torch.arange(torch.Size(shape).numel()).reshape(shape) % 13 - 6) / 4


def as_integers(factors, kind):
    """`factors` made of `grid`, times 4, with made-up scales."""
    out, columns = factors.core.shape
    parts = {"core": factors.core, "left": factors.left, "right": factors.right}
    whole = {name: None if part is None else part.mul(4).to(torch.int8) for name, part in parts.items()}
    whole["core"] = whole["core"].to(DTYPES[kind.core])
    counts = {"core": (out, columns // kind.group), "left": (out,), "right": (columns,)}
    scales = {f"{name}_scales": grid(*counts[name]).bfloat16() for name, part in whole.items() if part is not None}
    return replace(factors, **whole, **scales, quantization=kind)


def written(root, core=None):
    """A checkpoint of factors made by hand: 2:4 with both wrappers for q_proj, 50% without for up_proj.

    With `core` that is the type of q_proj's, whose blocks are int8, and the core of up_proj is int4.
    """
    prepared(root, layers=1)
    edit_tensors(root / "source", lambda tensors: tensors.update({n: grid(*t.shape) for n, t in tensors.items()}))
    inspect(open_source(root / "source"), root / "model.json")
    source, topology = opened(root)
    mask = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1]).bool().repeat(64, 8)
    half = torch.tensor([1, 0]).bool().repeat_interleave(32).expand(128, 64).contiguous()
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    factors = {
        q: Factorization(grid(64, 64) * mask, mask, Pattern(2, 4), grid(8, 8, 8), grid(4, 16, 16), 0.25, 0.5),
        up: Factorization(grid(128, 64) * half, half, Pattern(50, 0), None, None, 0.5, 0.5),
    }
    if core:
        factors = {
            q: as_integers(factors[q], Quantization(core, "int8", 32)),
            up: as_integers(factors[up], Quantization("int4", None, 64)),
        }
    file = root / "layers/layer_0.safetensors"
    write_factors(file, factors, {"fingerprint": topology.fingerprint, "layer": 0})
    modules = {linear.name: linear_record(method="dense", pattern=None) for linear in topology.layers[0].linears}
    modules[q] = linear_record(method="armor", block_sizes=BlockSizes(left=8, right=16), loss=0.25)
    modules[up] = linear_record(method="wanda", pattern="50%", loss=0.5)
    record = layer_record(fingerprint=topology.fingerprint, sha256=sha256(file), modules=modules)
    record.write(root / "layers/layer_0.json")
    assemble(source, topology, root / "layers", root / "checkpoint.json")
    return root / "checkpoint"


VALUES = {
    None: np.array([-1.5, -1.25, -0.25, 0.25, 0.5, 0.75], "<f4").tobytes(),
    "int8": bytes.fromhex("fafbff010203"),  # four times as much
    "fp8": bytes.fromhex("cccab8384044"),
}


@pytest.mark.parametrize(
    ("core", "version", "digest"),
    [(None, 1, "12b2819fd671ffd9"), ("int8", 2, "504ee6fa04390037"), ("fp8", 2, "252ebef03ec0deea")],
)
def test_the_bytes_are_pinned(tmp_path, core, version, digest):
    folder = written(tmp_path, core)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == version
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert header["__metadata__"] == {"format": "pt"}

    def begins(name, expected):
        begin = start + header[name]["data_offsets"][0]
        return raw[begin : begin + len(expected)] == expected

    q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    assert begins(f"{q}.core_mask", bytes([0b10100011, 0b10100011]))  # columns 0, 1, 5, 7, 8, 9
    assert begins(f"{q}.core_values", VALUES[core])
    assert begins(f"{up}.core_mask", bytes([255] * 4 + [0] * 4))
    if core:
        assert begins(f"{q}.core_scales", bytes.fromhex("c0bf a0bf"))  # -1.5 and -1.25
        assert begins(f"{up}.core_values", bytes.fromhex("ba dc fe"))  # -6, -5; -4, -3; -2, -1: the first one low
    assert hashlib.sha256(raw).hexdigest()[:16] == digest
