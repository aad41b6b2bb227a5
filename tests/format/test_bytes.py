"""Every file of ours, pinned byte by byte: what one release wrote, the next one writes and reads.

Where a test fails, files in the field cannot be read any more: give the format a new version, or undo the change.
"""

import pytest
import torch

from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization
from armor.execution.files import write_json
from armor.format.checkpoint import PackedLinear, modules_of, quantization_config
from armor.format.checksums import sealed
from armor.format.factors import read_factors, read_others, write_factors
from armor.format.records.base import File
from armor.format.sensitivity import Sensitivity, write_sensitivities
from armor.format.states import open_states, write_states
from armor.format.statistics import Statistics, read_statistics, write_statistics


def safetensors(header, data):
    """The bytes of a file: the length of its header, the header, padded to eight bytes, the tensors."""
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header + data


def test_statistics(tmp_path):
    path = tmp_path / "layer_0.safetensors"
    own = Statistics(torch.tensor([1.0, 0.5]), torch.tensor([[1.0, 0.25], [0.25, 0.5]]), 7)
    write_statistics(path, {"a.q": own}, {"a.k": "a.q", "a.q": "a.q"}, "f0")
    header = (
        rb'{"__metadata__":{"armor":"{\"fingerprint\": \"f0\", \"format_version\": 1, '
        rb'\"inputs\": {\"a.k\": \"a.q\", \"a.q\": \"a.q\"}, \"tokens\": 7}"},'
        b'"a.q.gram":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        b'"a.q.importance":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}}'
    )
    data = b"\x00\x00\x80?\x00\x00\x80>\x00\x00\x80>\x00\x00\x00?\x00\x00\x80?\x00\x00\x00?"
    assert path.read_bytes() == safetensors(header, data)
    assert read_statistics(path)["a.k"].tokens == 7


def test_sensitivities(tmp_path):
    path = tmp_path / "words.safetensors"
    write_sensitivities(path, {"a.q": Sensitivity(torch.tensor([1.0]), torch.tensor([0.25, 0.75]))}, "f0")
    header = (
        rb'{"__metadata__":{"armor":"{\"fingerprint\": \"f0\", \"format_version\": 1}"},'
        b'"a.q.columns":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a.q.rows":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}'
    )
    assert path.read_bytes() == safetensors(header, b"\x00\x00\x80>\x00\x00@?\x00\x00\x80?")


def test_states(tmp_path):
    path = tmp_path / "layer_0.safetensors"
    like = [torch.empty(1, 1, 2, dtype=torch.bfloat16, device="meta"), torch.tensor([0])]
    with write_states(path, like, 2, "words") as writer:
        for number, row in enumerate((torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[-1.0, 0.5]]]))):
            writer.add([row, torch.tensor([5 + number])])
    header = (
        b'{"__metadata__": {"about": "words", "format_version": "2"}, '
        b'"states": {"dtype": "BF16", "shape": [2, 1, 1, 2], "data_offsets": [0, 8]}, '
        b'"carried_1": {"dtype": "I64", "shape": [2, 1], "data_offsets": [8, 24]}}'
    )
    assert path.read_bytes() == safetensors(header, b"\x80?\x00@\x80\xbf\x00?\x05" + bytes(7) + b"\x06" + bytes(7))
    states = open_states(path)
    assert states.about == "words" and [one.tolist() for one in states.row(1)] == [[[[-1.0, 0.5]]], [6]]
    path.write_bytes(path.read_bytes().replace(b'"format_version": "2"', b'"format_version": "1"'))
    with pytest.raises(ArmorError, match="format '1', expected 2; run armor states again"):
        open_states(path)


CORE = torch.tensor([[1.0, 0.0, 0.0, -2.0]])
OWN = {"core": CORE, "mask": CORE != 0, "pattern": Pattern(2, 4), "loss": 0.25, "start_loss": 0.5}
ABOUT = rb'{"__metadata__":{"armor":"{\"fingerprint\": \"f0\", \"format_version\": %d, \"layer\": 0, '
MODULES = rb"\"modules\": {\"a.q\": {\"in_features\": 4, \"loss\": 0.25, \"pattern\": \"2:4\", "


def check_factors(path, own, others, header, data, product):
    """The file has these bytes, and what is read of it is the product and the other tensors."""
    write_factors(path, {"a.q": Factorization(**OWN | own)}, {"fingerprint": "f0", "layer": 0}, others)
    assert path.read_bytes() == safetensors(header, data)
    assert read_factors(path)[0]["a.q"].reconstruct().tolist() == [product] and read_others(path) == others


def test_factors(tmp_path):
    header = (
        ABOUT % 1 + MODULES + rb'\"start_loss\": 0.5}}}"},'
        b'"a.q.core_values":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"a.q.left":{"dtype":"F32","shape":[1,1,1],"data_offsets":[8,12]},'
        b'"a.q.core_mask":{"dtype":"U8","shape":[1,1],"data_offsets":[12,13]}}'
    )
    data = b"\x00\x00\x80?\x00\x00\x00\xc0\x00\x00@@\x09"
    own = {"left": torch.tensor([[[3.0]]])}
    check_factors(tmp_path / "layer_0.safetensors", own, {}, header, data, [3.0, 0.0, 0.0, -6.0])


def test_factors_with_other_tensors_have_a_version_of_their_own(tmp_path):
    header = (
        ABOUT % 2 + MODULES + rb'\"start_loss\": 0.5}}, \"others\": [\"a.norm.weight\"]}"},'
        b'"a.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a.q.core_values":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]},'
        b'"a.q.core_mask":{"dtype":"U8","shape":[1,1],"data_offsets":[12,13]}}'
    )
    data = b"\x00\x00\x00@\x00\x00\x80?\x00\x00\x00\xc0\x09"
    others = {"a.norm.weight": torch.tensor([2.0])}
    check_factors(tmp_path / "layer_0.safetensors", {}, others, header, data, [1.0, 0.0, 0.0, -2.0])


def test_factors_of_integers_have_a_version_of_their_own(tmp_path):
    header = (
        ABOUT % 3 + MODULES + rb"\"quantization\": {\"blocks\": \"int8\", \"core\": \"int4\", \"group\": 4}, "
        rb'\"start_loss\": 0.5}}}"},'
        b'"a.q.core_scales":{"dtype":"BF16","shape":[1,1],"data_offsets":[0,2]},'
        b'"a.q.left_scales":{"dtype":"BF16","shape":[1],"data_offsets":[2,4]},'
        b'"a.q.left":{"dtype":"I8","shape":[1,1,1],"data_offsets":[4,5]},'
        b'"a.q.core_mask":{"dtype":"U8","shape":[1,1],"data_offsets":[5,6]},'
        b'"a.q.core_values":{"dtype":"U8","shape":[1,1],"data_offsets":[6,7]}}'
    )
    own = {
        "core": CORE.to(torch.int8),
        "left": torch.tensor([[[127]]], dtype=torch.int8),
        "quantization": Quantization("int4", "int8", 4),
        "core_scales": torch.tensor([[0.5]], dtype=torch.bfloat16),
        "left_scales": torch.tensor([2.0], dtype=torch.bfloat16),
    }
    data = b"\x00\x3f\x00\x40\x7f\x09\xe1"
    check_factors(tmp_path / "layer_0.safetensors", own, {}, header, data, [127.0, 0.0, 0.0, -254.0])


def test_the_config_of_a_checkpoint_with_integers_and_a_low_rank_pair(tmp_path):
    modules = {"a.q": PackedLinear(8, 4, Pattern(2, 4), 2, None, Quantization("int8", None, 4), rank=3)}
    write_json(tmp_path / "config.json", quantization_config(modules))
    assert (tmp_path / "config.json").read_bytes() == (
        b'{\n "format_version": 2,\n "groups": [\n  {\n   "in_features": 4,\n   "left_block_size": 2,\n'
        b'   "modules": [\n    "a.q"\n   ],\n   "out_features": 8,\n   "pattern": "2:4",\n   "quantization": {\n'
        b'    "blocks": null,\n    "core": "int8",\n    "group": 4\n   },\n   "rank": 3,\n'
        b'   "right_block_size": null\n  }\n ],\n "quant_method": "armor"\n}\n'
    )
    assert modules_of(quantization_config(modules)) == modules


def test_checksums(tmp_path):
    sums = sealed({"config.json": File(bytes=3, sha256="a0")}, {"a.q.core_mask": "b0"})
    write_json(tmp_path / "checksums.json", sums)
    assert (tmp_path / "checksums.json").read_bytes() == (
        b'{\n "files": {\n  "config.json": {\n   "bytes": 3,\n   "sha256": "a0"\n  }\n },\n "format_version": 1,\n '
        b'"sha256": "fb2844a29bb1c92460e671a2993553d26da9a6437ad3c20546239d17540942f5",\n '
        b'"tensors": {\n  "a.q.core_mask": "b0"\n }\n}\n'
    )
