"""Sources in FP8 and MXFP4: what is read is what transformers makes of them; the whole way is that of dense ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from armor.assemble.export import export
from armor.assemble.verify import verify
from armor.assemble.writer import assemble
from armor.core.errors import ArmorError
from armor.format.scaled import GROUP, VALUES, fp8
from armor.model.fetch import check_folder
from armor.model.source import open_source
from armor.runtime.fused import unfuse
from armor.runtime.load import load_model
from armor.runtime.skeleton import open_skeleton, tensors_of
from armor.runtime.streaming import stream_model
from tests.packed import edit_tensors, factorized, opened, prepared
from tests.tiny import tiny_model

BLOCK = (16, 16)
TOKENS = torch.arange(24)[None] * 5 % 256


def written(folder: Path, quantization: dict, tensors: dict[str, Tensor]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def to_fp8(folder: Path) -> None:
    """As DeepSeek's and Qwen's: all linears of the decoder layers but the router."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight") or name.endswith("_a_proj_with_mqa.weight"):
            rows, columns = (size // block for size, block in zip(tensor.shape, BLOCK, strict=True))
            blocks = tensor.float().view(rows, BLOCK[0], columns, BLOCK[1])
            scales = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scales[:, None, :, None]).view_as(tensor).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
        else:
            tensors[name] = tensor
    written(folder, {"quant_method": "fp8", "weight_block_size": BLOCK, "activation_scheme": "dynamic"}, tensors)


def to_mxfp4(folder: Path) -> None:
    """As gpt-oss: the matrices of the experts."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("experts.gate_up_proj") and not name.endswith("experts.down_proj"):
            tensors[name] = tensor
            continue
        groups = tensor.float().transpose(1, 2).unflatten(-1, (-1, GROUP))  # (experts, out, groups, 32)
        exponents = (groups.abs().amax(-1, keepdim=True) / VALUES[-1]).log2().ceil()
        table = torch.tensor([*VALUES, *(-value for value in VALUES)])
        codes = (groups / exponents.exp2())[..., None].sub(table).abs().argmin(-1).byte()
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = (exponents[..., 0] + 127).byte()
    written(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, tensors)


KINDS = {
    "qwen3_moe": (to_fp8, FineGrainedFP8Config(dequantize=True, weight_block_size=BLOCK)),
    "deepseek_v3": (to_fp8, FineGrainedFP8Config(dequantize=True, weight_block_size=BLOCK)),
    "gpt_oss": (to_mxfp4, Mxfp4Config(dequantize=True)),
}


@pytest.mark.parametrize("family", KINDS)
def test_what_is_read_is_what_transformers_makes_of_it(tmp_path, family):
    quantize, how = KINDS[family]
    quantize(folder := tiny_model(tmp_path, family, layers=2, dtype=torch.bfloat16))
    check_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    unfuse(model)
    found, expected = tensors_of(open_skeleton(folder, torch.bfloat16), folder), model.state_dict()
    assert {*found.names()} == {*expected} and open_source(folder).dtype == "bfloat16"
    for name in found.names():
        assert found.shape(name) == expected[name].shape
        assert torch.equal(found.read(name), expected[name]), name
        assert torch.equal(found.read(name, torch.float32), expected[name].float()), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_whole_way_from_numbers_with_scales(tmp_path, family, caplog):
    root = prepared(tmp_path, family, change=KINDS[family][0], dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "armor"):
        record = assemble(*opened(root), factorized(root), root / "checkpoint.json")
    bits = {"qwen3_moe": 8 + 32 / 256, "gpt_oss": 4 + 8 / 32}[family]
    assert bits <= record.dense_bits_per_weight < record.bits_per_weight
    assert "the checkpoint is not smaller" in caplog.text
    verify(root / "checkpoint", root / "source")
    export(root / "checkpoint", root / "dense", "float32")
    plain, packed = AutoModelForCausalLM.from_pretrained(root / "dense"), load_model(root / "checkpoint", "float32")
    with torch.inference_mode():
        expected = plain(TOKENS).logits
        assert (packed(TOKENS).logits - expected).norm() <= 1e-4 * expected.norm()
        expected = load_model(root / "source").float()(TOKENS).logits
        streamed = next(stream_model(root / "source", "float32").logits([TOKENS]))
        assert (streamed - expected).norm() <= 1e-4 * expected.norm()


def test_blocks_may_reach_over_the_edge_and_a_scale_may_be_one_for_all():
    numbers, scales = torch.randn(130, 200).to(torch.float8_e4m3fn), torch.rand(2, 2) + 1
    expected = numbers.float()
    expected[:128, :128] *= scales[0, 0]
    expected[:128, 128:] *= scales[0, 1]
    expected[128:, :128] *= scales[1, 0]
    expected[128:, 128:] *= scales[1, 1]
    assert torch.equal(fp8(numbers, scales, (128, 128)), expected)
    assert torch.equal(fp8(numbers, scales[0, :1], (128, 128)), numbers.float() * scales[0, 0])


def test_scales_that_are_missing_are_one_clear_line(tmp_path):
    to_fp8(folder := tiny_model(tmp_path, "qwen3", layers=1))
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    with pytest.raises(ArmorError, match=rf"{name}: .*{name}_scale_inv missing; expected FP8 matrices"):
        check_folder(folder)
