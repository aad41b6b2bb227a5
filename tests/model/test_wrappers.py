"""Models of images and text: the text model is compressed, the rest is kept, and their own class loads them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

import armor.hf  # noqa: F401
from armor.assemble.export import export
from armor.format.shards import Shards
from armor.runtime.linear import ArmorLinear
from armor.runtime.load import load_model
from armor.runtime.streaming import stream_model
from tests.packed import opened, packed

TOKENS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = packed(tmp_path_factory.mktemp("wrapper"), "qwen2_5_vl", layers=1)
    export(root / "checkpoint", root / "dense")
    return root


def test_linears_are_those_of_the_text_model_and_the_rest_is_kept_byte_for_byte(root):
    linears = [linear.name for linear in opened(root)[1].linears()]
    assert len(linears) == 7 and all(".layers." in name and "visual" not in name for name in linears)
    source, made = Shards(root / "source"), Shards(root / "checkpoint")
    others = {*source.names()} - {f"{name}.weight" for name in linears}
    assert any("visual" in name for name in others)
    for name in others:
        assert source.dtype(name) == made.dtype(name) and torch.equal(source.read(name), made.read(name)), name
    assert "import AutoModelForImageTextToText, AutoTokenizer" in (root / "checkpoint/README.md").read_text()


@torch.no_grad()
def test_its_own_class_loads_it_and_writes_what_the_dense_product_writes(root):
    model, dense = (AutoModelForImageTextToText.from_pretrained(root / name) for name in ("checkpoint", "dense"))
    assert type(model) is type(dense) is type(load_model(root / "checkpoint")) is Qwen2_5_VLForConditionalGeneration
    compressed = [name for name, module in model.named_modules() if isinstance(module, ArmorLinear)]
    assert len(compressed) == 7 and all(name.startswith("model.language_model.layers.") for name in compressed)
    expected = dense(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    (streamed,) = stream_model(root / "checkpoint", "float32").logits([TOKENS])
    torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=1e-5)
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    mine, theirs = (m.get_image_features(pixels, torch.tensor([[1, 4, 4]])).pooler_output for m in (model, dense))
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
