"""PEFT on packed linears, through nothing but its public doors: to it an ArmorLinear is an nn.Linear."""

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import armor.hf  # noqa: F401
from armor.core.errors import ArmorError
from armor.runtime.linear import ArmorLinear
from tests.packed import packed, quantized

TOKENS = torch.arange(40).view(2, 20)


def load(root, **options):
    return AutoModelForCausalLM.from_pretrained(root / "checkpoint", **options)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def steps(model, count=5):
    """Losses of a few steps on TOKENS."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(count):
        loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """An adapter's folder, and the logits of the model it was trained on."""
    model = get_peft_model(load(root), LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = steps(model)
    assert losses[-1] < 0.9 * losses[0]
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed and all("lora_" in name for name in changed)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, logits(model)


def test_an_adapter_of_a_mixture_s_attention_is_trained_and_saved(tmp_path):
    root = packed(tmp_path, "qwen3_moe")
    model = get_peft_model(load(root), LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"))
    losses = steps(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(logits(again), logits(model))


def test_every_way_to_load_the_adapter_gives_its_logits_and_without_it_the_models(root, trained):
    folder, expected = trained
    assert not torch.allclose(expected, logits(load(root)), rtol=0.01, atol=0.01)
    assert_close(logits(PeftModel.from_pretrained(load(root), folder)), expected)
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    model = load(root)
    model.load_adapter(str(folder))
    assert_close(logits(model), expected)
    model = PeftModel.from_pretrained(load(root), folder).unload()
    assert sum(isinstance(module, ArmorLinear) for module in model.modules()) == 14
    assert_close(logits(model), logits(load(root)))


def test_merging_is_refused_in_one_line_and_changes_nothing(root, trained):
    model = PeftModel.from_pretrained(load(root), trained[0])
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ArmorError, match=r"no dense weight .* dequantize\(\)") as error:
            merge()
        assert "\n" not in str(error.value)
        assert_close(logits(model), before)
    with pytest.raises(ArmorError, match="no dense weight"):
        get_peft_model(load(root), LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))


def test_an_adapter_over_integers_is_trained_comes_off_and_is_merged(root, tmp_path):
    copied = shutil.copytree(root, tmp_path / "model")
    folder = quantized(copied)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules="all-linear", r=4))
    losses = steps(model)
    assert losses[-1] < 0.9 * losses[0]
    with model.disable_adapter():
        assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    model.save_pretrained(tmp_path / "adapter")
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    merged = PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    assert (logits(merged) - logits(model)).norm() < 1e-4 * logits(model).norm()
