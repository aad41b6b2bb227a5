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
from tests.packed import QUANTIZE, SETTINGS, edit_tensors, factorized, factors_of, opened, packed, prepared, quantized
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


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000], ids=["one file", "shards"])
def test_a_reader_made_from_the_page_gets_the_same_weights(tmp_path, max_shard_bytes):
    overrides = [
        Override(modules="*.down_proj", method="wanda", pattern="50%"),
        Override(modules="*.k_proj", pattern="4:8", block_size=8),
    ]
    settings = LayerSettings(**(SETTINGS.model_dump() | {"overrides": overrides}))
    root = packed(tmp_path, settings=settings, max_shard_bytes=max_shard_bytes)
    found, expected = numpy_weights(root / "checkpoint"), factors_of(root)
    assert found.keys() == expected.keys()
    for name, factors in expected.items():
        assert np.allclose(found[name], factors.reconstruct(torch.float64).numpy(), rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize(("blocks", "max_shard_bytes"), [("int8", 10**9), ("bfloat16", 100_000)])
def test_a_reader_made_from_the_page_gets_the_same_integers(tmp_path, blocks, max_shard_bytes):
    root = prepared(tmp_path)
    factorized(root)
    settings = QUANTIZE.model_copy(update={"blocks": blocks})
    folder = quantized(root, settings, max_shard_bytes=max_shard_bytes)
    found = numpy_weights(folder)
    export(folder, tmp_path / "dense")
    exported = load_file(tmp_path / "dense/model.safetensors")
    for file in sorted((root / "quantized/quantized").glob("*.safetensors")):
        for name, factors in read_factors(file)[0].items():
            assert factors.quantization is not None
            expected = factors.reconstruct(torch.float64).numpy()
            assert np.allclose(found[name], expected, rtol=1e-12, atol=1e-12), name
            assert torch.equal(exported[f"{name}.weight"], factors.reconstruct()), name


def test_a_reader_made_from_the_page_gets_the_same_dense_integers(tmp_path):
    overrides = [Override(modules="*.down_proj", method="int8"), Override(modules="*.k_proj", method="armor")]
    root = packed(tmp_path, settings=LayerSettings(method="int4", block_size=16, overrides=overrides))
    found, expected = numpy_weights(root / "checkpoint"), factors_of(root)
    assert found.keys() == expected.keys()
    export(root / "checkpoint", tmp_path / "dense")
    exported = load_file(tmp_path / "dense/model.safetensors")
    for name, factors in expected.items():
        assert np.allclose(found[name], factors.reconstruct(torch.float64).numpy(), rtol=1e-12, atol=1e-12), name
        weight = exported[f"{name}.weight"]
        assert torch.equal(weight, factors.reconstruct().to(weight.dtype)), name
    assert verify(root / "checkpoint").compressed_count == 14
    models = [AutoModelForCausalLM.from_pretrained(root / place) for place in ("checkpoint", "dense")]
    packed_logits, dense_logits = (model(torch.arange(8)[None]).logits for model in models)
    torch.testing.assert_close(packed_logits, dense_logits, rtol=1e-4, atol=1e-4)


def test_a_reader_made_from_the_page_gets_the_same_sparse_plus_low_rank(tmp_path):
    overrides = [Override(modules="*.down_proj", rank=200), Override(modules="*.k_proj", method="armor")]
    settings = LayerSettings(**SETTINGS.model_dump() | {"method": "oats", "rank": 5, "overrides": overrides})
    root = packed(tmp_path, settings=settings)
    quantized(root, QUANTIZE)
    export(root / "checkpoint", tmp_path / "dense")
    exported = load_file(tmp_path / "dense/model.safetensors")
    ranks = set()
    for folder, factors in (("layers", root / "layers"), ("quantized", root / "quantized/quantized")):
        found = numpy_weights(root / "checkpoint" if folder == "layers" else root / "quantized/checkpoint")
        assert verify(root / "checkpoint").compressed_count == len(found) == 14
        for file in sorted(factors.glob("*.safetensors")):
            for name, own in read_factors(file)[0].items():
                ranks.add(None if own.down is None else len(own.down))
                assert np.allclose(found[name], own.reconstruct(torch.float64).numpy(), rtol=1e-12, atol=1e-12), name
                if folder == "layers":
                    assert torch.equal(exported[f"{name}.weight"], own.reconstruct())
    assert ranks == {5, 64, None}
    models = [AutoModelForCausalLM.from_pretrained(root / place) for place in ("checkpoint", "dense")]
    packed_logits, dense_logits = (model(torch.arange(8)[None]).logits for model in models)
    torch.testing.assert_close(packed_logits, dense_logits, rtol=1e-4, atol=1e-4)


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


def test_the_bytes_are_pinned(tmp_path):
    folder = written(tmp_path)
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header["__metadata__"] == {"format": "pt"}
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    expected = {
        f"{q}.core_values": ("F32", [64, 32], "c519a09b2df412cb"),
        f"{q}.core_mask": ("U8", [64, 8], "37ac5a5ad8ef9bc8"),
        f"{q}.left": ("F32", [8, 8, 8], "b1397d2f531b663f"),
        f"{q}.right": ("F32", [4, 16, 16], "bd65736c266ee195"),
        f"{q}.weight": ("U8", [1], "6e340b9cffb37a98"),
        f"{up}.core_values": ("F32", [128, 32], "22cc1b07908c2050"),
        f"{up}.core_mask": ("U8", [128, 8], "2d9ad807780d7e7e"),
    }
    sums = json.loads((folder / "checksums.json").read_text())["tensors"]
    for name, (dtype, shape, digest) in expected.items():
        entry = header[name]
        begin, end = entry["data_offsets"]
        data = raw[8 + length + begin : 8 + length + end]
        assert (entry["dtype"], entry["shape"]) == (dtype, shape), name
        assert hashlib.sha256(data).hexdigest() == sums[name]
        assert sums[name][:16] == digest, name
    assert hashlib.sha256(raw).hexdigest()[:16] == "12b2819fd671ffd9"
    # The first two bytes of a mask row, and the first values of the row: columns 0, 1, 5, 7, 8, 9.
    begin = 8 + length + header[f"{q}.core_mask"]["data_offsets"][0]
    assert raw[begin : begin + 2] == bytes([0b10100011, 0b10100011])
    begin = 8 + length + header[f"{q}.core_values"]["data_offsets"][0]
    assert np.frombuffer(raw, "<f4", 6, begin).tolist() == [-1.5, -1.25, -0.25, 0.25, 0.5, 0.75]
    begin = 8 + length + header[f"{up}.core_mask"]["data_offsets"][0]
    assert raw[begin : begin + 8] == bytes([255] * 4 + [0] * 4)


@pytest.mark.parametrize(
    ("core", "dtype", "first_bytes", "digest"),
    [("int8", "I8", "fafbff010203", "504ee6fa04390037"), ("fp8", "F8_E4M3", "cccab8384044", "252ebef03ec0deea")],
)
def test_the_bytes_of_integers_are_pinned(core, dtype, first_bytes, digest, tmp_path):
    folder = written(tmp_path, core)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == 2
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    expected = {
        f"{q}.core_values": (dtype, [64, 32]),
        f"{q}.core_scales": ("BF16", [64, 2]),
        f"{q}.core_mask": ("U8", [64, 8]),
        f"{q}.left": ("I8", [8, 8, 8]),
        f"{q}.left_scales": ("BF16", [64]),
        f"{q}.right": ("I8", [4, 16, 16]),
        f"{q}.right_scales": ("BF16", [64]),
        f"{up}.core_values": ("U8", [128, 16]),
        f"{up}.core_scales": ("BF16", [128, 1]),
        f"{up}.core_mask": ("U8", [128, 8]),
    }
    own = {name for name in header if name.startswith((f"{q}.", f"{up}.")) and not name.endswith(".weight")}
    assert own == expected.keys()
    for name, (kind, shape) in expected.items():
        assert (header[name]["dtype"], header[name]["shape"]) == (kind, shape), name

    def first(name, count):
        begin = start + header[name]["data_offsets"][0]
        return raw[begin : begin + count]

    assert first(f"{q}.core_values", 6).hex() == first_bytes  # -6, -5, -1, 1, 2, 3
    assert first(f"{q}.core_scales", 4) == bytes.fromhex("c0bf a0bf")  # -1.5 and -1.25
    assert first(f"{up}.core_values", 3) == bytes.fromhex("ba dc fe")  # -6, -5; -4, -3; -2, -1: the first one low
    assert hashlib.sha256(raw).hexdigest()[:16] == digest


def test_the_configuration_is_pinned(tmp_path):
    config = json.loads((written(tmp_path) / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "armor",
        "format_version": 1,
        "groups": [
            {
                "out_features": 64,
                "in_features": 64,
                "pattern": "2:4",
                "left_block_size": 8,
                "right_block_size": 16,
                "modules": ["model.layers.0.self_attn.q_proj"],
            },
            {
                "out_features": 128,
                "in_features": 64,
                "pattern": "50%",
                "left_block_size": None,
                "right_block_size": None,
                "modules": ["model.layers.0.mlp.up_proj"],
            },
        ],
    }
