"""Shards: every tensor as safetensors has it; whatever is damaged is named before a tensor is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from armor.core.errors import ArmorError
from armor.format.shards import PIECE, SINGLE, Shards
from tests.tiny import tiny_model


def folder_with(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / SINGLE)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (3, 5), (0, 4)])
def test_reads_what_was_saved(tmp_path, dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    shards = Shards(folder_with(tmp_path, {"first": torch.zeros(3), "x": tensor}))
    read = shards.read("x")
    assert read.dtype == dtype and torch.equal(read, tensor)
    assert shards.shape("x") == tuple(shape) and shards.dtype("x") == str(dtype).removeprefix("torch.")
    assert shards.file_of("x") == SINGLE and shards.names() == ["first", "x"]


@pytest.mark.parametrize("elements", [1, PIECE // 2 - 1, PIECE // 2, PIECE // 2 + 1, PIECE + 3])
def test_conversion_in_pieces_is_conversion(tmp_path, elements):
    tensor = (torch.arange(elements) % 251).bfloat16()  # half as many as a piece has bytes
    read = Shards(folder_with(tmp_path, {"x": tensor})).read("x", torch.float32)
    assert read.dtype == torch.float32 and torch.equal(read, tensor.float())


def test_several_shards_are_one_model(tmp_path):
    tiny_model(tmp_path / "one")
    tiny_model(tmp_path / "many", max_shard_size="100KB")
    one, many = Shards(tmp_path / "one"), Shards(tmp_path / "many")
    assert len(many.files) > 2 and one.names() == many.names()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())
    name = one.names()[-1]
    assert name in load_file(tmp_path / "many" / many.file_of(name))


def test_matrices_are_turned_and_joined(tmp_path):
    a, b, c = torch.randn(2, 3, 1), torch.randn(4, 3, 1), torch.randn(5, 7).bfloat16()
    shards = Shards(folder_with(tmp_path, {"a": a, "b": b, "c": c}))
    whole = shards.joined({"ab": ["a", "b"]}, 0)
    assert whole.shape("ab") == (6, 3, 1) and torch.equal(whole.read("ab"), torch.cat([a, b]))
    assert whole.bytes_of("ab") == 72 and "ab" not in shards
    turned = shards.turned(["c"])
    assert turned.shape("c") == (7, 5) and torch.equal(turned.read("c", torch.float32), c.T.float())
    assert torch.equal(shards.read("c"), c)


DAMAGE = {
    "truncated": lambda data, header: data[:-3],
    "empty": lambda data, header: b"",
    "too long": lambda data, header: data + b"x",
    "corrupt header": lambda data, header: data[:8] + b"\xff" * header + data[8 + header :],
    "other shape": lambda data, header: data.replace(b"[2,3]", b"[2,4]"),
    "unknown dtype": lambda data, header: data.replace(b'"F32"', b'"F99"'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_one_clear_line(tmp_path, kind):
    file = folder_with(tmp_path, {"x": torch.zeros(2, 3)}) / SINGLE
    data = file.read_bytes()
    file.write_bytes(DAMAGE[kind](data, int.from_bytes(data[:8], "little")))
    with pytest.raises(ArmorError) as caught:
        Shards(tmp_path)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_tensor_or_model_is_named(tmp_path):
    with pytest.raises(ArmorError, match="holds neither"):
        Shards(tmp_path)
    with pytest.raises(ArmorError, match="no tensor y"):
        Shards(folder_with(tmp_path, {"x": torch.zeros(1)})).read("y")


def test_the_main_dtype_is_that_of_most_bytes(tmp_path):
    tensors = {"w": torch.zeros(64).bfloat16(), "norm": torch.zeros(2), "mask": torch.zeros(999, dtype=torch.uint8)}
    tensors["layer.core_values"] = torch.zeros(8, 99).to(torch.float8_e4m3fn)  # of a quantized checkpoint
    assert Shards(folder_with(tmp_path, tensors)).main_dtype() == "bfloat16"
