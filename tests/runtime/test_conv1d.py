"""GPT-2: linears that are stored as (in, out), the whole way, under the names of its checkpoint on the Hub."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

from armor.assemble.export import export
from armor.assemble.verify import verify
from armor.format.shards import Shards
from armor.model.tensors import recorded_tensors
from armor.runtime.linear import ArmorLinear
from armor.runtime.load import load_model
from armor.runtime.streaming import stream_model
from tests.packed import SETTINGS, edit_tensors, factors_of, opened, packed

TOKENS = torch.arange(24)[None] * 5 % 256
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 128}
KEPT = "h.1.attn.c_proj"  # square: its shape does not tell which side is which


def as_on_the_hub(folder):
    """The names of a base model, and the mask that was once saved too."""

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    edit_tensors(folder, rename)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    dense = {"modules": KEPT, "method": "dense"}
    settings = SETTINGS.model_copy(update={"overrides": type(SETTINGS)(overrides=[dense]).overrides})
    return packed(tmp_path_factory.mktemp("gpt2"), "gpt2", settings, change=as_on_the_hub, **GPT2)


def test_the_way_of_a_checkpoint(root, tmp_path):
    _, topology = opened(root)
    names = [linear.name for linear in topology.linears()]
    assert names[:4] == [f"h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert topology.layers[1].prefix == "h.1" and topology.linears()[0].out_features == 3 * 64
    source = Shards(root / "source")
    seen = recorded_tensors(root / "source", names[:1])
    assert torch.equal(seen.read("h.0.attn.c_attn.weight"), source.read("h.0.attn.c_attn.weight").T)
    assert torch.equal(seen.read("h.0.mlp.c_fc.weight"), source.read("h.0.mlp.c_fc.weight"))

    verify(root / "checkpoint", root / "source")
    export(root / "checkpoint", tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()  # Conv1D, as transformers has it
    assert set(Shards(tmp_path / "dense").names()) == set(source.names())
    for name, factors in factors_of(root).items():
        torch.testing.assert_close(plain.transformer.get_submodule(name).weight.T, factors.reconstruct())
    assert torch.equal(plain.transformer.get_submodule(KEPT).weight, source.read(f"{KEPT}.weight"))

    model = load_model(root / "checkpoint")
    assert sum(isinstance(module, ArmorLinear) for module in model.modules()) == len(names) - 1
    assert isinstance(model.transformer.get_submodule(KEPT), Conv1D)
    assert close(logits(model), logits(plain))
    for folder, expected in ((root / "checkpoint", plain), (root / "source", load_model(root / "source"))):
        assert close(next(stream_model(folder).logits([TOKENS])), logits(expected))

    model.save_pretrained(tmp_path / "saved")
    verify(tmp_path / "saved")
    assert close(logits(load_model(tmp_path / "saved")), logits(model))
    GPT2ForSequenceClassification.from_pretrained(root / "checkpoint", num_labels=2)
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))
