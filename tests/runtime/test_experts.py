"""Mixtures of experts, compressed expert by expert: the whole way, under the names of the checkpoints on the Hub."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from armor.assemble.export import export
from armor.assemble.verify import verify
from armor.config.quantization import QuantizeSettings
from armor.config.recipes import LayerSettings
from armor.format.shards import Shards
from armor.runtime import cpu
from armor.runtime.experts import Expert, Experts
from armor.runtime.fused import fused_experts, unfuse
from armor.runtime.linear import ArmorLinear
from armor.runtime.load import load_model
from armor.runtime.skeleton import open_skeleton, stored_tensors
from armor.runtime.streaming import stacks_experts, stream_model
from benchmarks.families import small_config
from tests.packed import SETTINGS, factors_of, opened, packed, quantized
from tests.tiny import MIXTURES

TOKENS = torch.arange(24)[None] * 5 % 256


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_is_compressed_expert_by_expert_under_the_names_of_its_checkpoint(tmp_path, family):
    root = packed(tmp_path, family)
    _, topology = opened(root)
    names = [linear.name for linear in topology.linears()]
    stored = set(Shards(root / "source").names())
    is_fused = family in ("granitemoe", "gpt_oss", "llama4_text")
    assert stacks_experts(root / "source") == (not is_fused) and not stacks_experts(root / "checkpoint")
    if not is_fused:
        assert {f"{name}.weight" for name in names} <= stored
    assert sum(".experts." in name for name in names) == 3 * 4 * (1 if family == "deepseek_v3" else 2)

    model = load_model(root / "checkpoint")
    assert not fused_experts(model)
    assert sum(isinstance(module, ArmorLinear) for module in model.modules()) == len(names)
    verify(root / "checkpoint", root / "source")
    export(root / "checkpoint", root / "dense")
    plain = AutoModelForCausalLM.from_pretrained(root / "dense").eval()  # with the experts fused again
    assert fused_experts(plain) and set(Shards(root / "dense").names()) == stored
    with torch.inference_mode():
        expected = plain(TOKENS).logits
        assert close(model(TOKENS).logits, expected)
        assert close(next(stream_model(root / "checkpoint").logits([TOKENS])), expected)
        cache = model(TOKENS[:, :-1], use_cache=True).past_key_values
        assert close(model(TOKENS[:, -1:], past_key_values=cache).logits[:, -1], expected[:, -1])

        model.save_pretrained(root / "saved")
        assert set(Shards(root / "saved").names()) == set(Shards(root / "checkpoint").names())
        assert close(load_model(root / "saved")(TOKENS).logits, model(TOKENS).logits)
        verify(root / "saved")

        source = AutoModelForCausalLM.from_pretrained(root / "source").eval()
        assert close(next(stream_model(root / "source").logits([TOKENS])), source(TOKENS).logits)
        unfuse(source)
        assert close(source(TOKENS).logits, next(stream_model(root / "source").logits([TOKENS])))


def test_experts_that_are_stored_turned_are_read_as_transformers_reads_them(tmp_path):
    config = small_config("qwen3_vl_moe")
    config.text_config.moe_intermediate_size = 48  # with 32 gate and up are square, and nothing tells how they lie
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {name: tensor.mT.contiguous() for name, tensor in tensors.items() if ".experts." in name}
    save_file(tensors | turned, tmp_path / "model.safetensors", {"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    stored = stored_tensors(open_skeleton(tmp_path, torch.float32), tmp_path)
    for path in unfuse(model):
        for name, weight in model.get_submodule(path).named_parameters(prefix=path):
            assert torch.equal(stored.read(name), weight)


@pytest.mark.parametrize("has_integers", [False, True])
def test_few_tokens_go_through_all_packed_experts_at_once_as_they_go_through_each(tmp_path, has_integers):
    settings = SETTINGS.model_copy(update={"share_right": True})
    root = packed(tmp_path, "gpt_oss", settings, layers=1)  # with biases, interleaved
    model = load_model(quantized(root, QuantizeSettings()) if has_integers else root / "checkpoint")
    (experts,) = (module for module in model.modules() if isinstance(module, Experts))
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.tensor([[0, 2], [2, 1], [2, 0], [4, 4], [4, 1]])  # 4: no expert
    seen = []
    with torch.inference_mode():
        with register_module_forward_hook(lambda module, _, y: seen.append(module)):
            at_once = experts(x, index, weights)
        assert not any(isinstance(module, Expert) for module in seen) or not cpu.is_grouped(x, [1])
        seen.clear()
        for _, expert in experts.experts():
            expert.register_forward_hook(lambda _, inputs, y: seen.append(len(y)))  # it must be called then
        assert close(experts(x, index, weights), at_once)
    assert seen == [2, 2, 3] and not at_once[3].any()


def test_a_pattern_chooses_experts_or_one_expert_and_leaves_the_others_dense(tmp_path):
    one = {"modules": "model.layers.1.block_sparse_moe.experts.3.*", "method": "nowag"}
    settings = LayerSettings(method="dense", overrides=[{"modules": "*.experts.0.*", "method": "magnitude"}, one])
    root = packed(tmp_path, "mixtral", settings)
    found = {name.rpartition(".")[0] for name in factors_of(root)}
    layers = [f"model.layers.{k}.block_sparse_moe.experts" for k in range(2)]
    assert found == {f"{layers[0]}.0", f"{layers[1]}.0", f"{layers[1]}.3"}
    model, dense = load_model(root / "checkpoint"), export(root / "checkpoint", root / "dense")
    assert dense.multiplied_out == 9
    plain = AutoModelForCausalLM.from_pretrained(root / "dense").eval()
    with torch.inference_mode():
        assert close(model(TOKENS).logits, plain(TOKENS).logits)
