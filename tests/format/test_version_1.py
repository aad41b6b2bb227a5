"""What is loaded of a checkpoint of version 1, as the last release that knew no other wrote it: 2:4, 4:8 with blocks,
50% without. Its tokenizer and card, which checksums.json lists too, are not kept."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import armor.hf  # noqa: F401
from armor.assemble.verify import verify

FOLDER = Path(__file__).parent / "version_1"


@torch.no_grad()
def test_it_is_sound_and_gives_the_logits_that_it_gave_then(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(FOLDER)  # held against its hashes
    assert model.config.quantization_config.format_version == 1
    expected = load_file(FOLDER.with_name("version_1_logits.safetensors"))["logits"]
    torch.testing.assert_close(model(torch.arange(1, 17)[None]).logits[0], expected, rtol=1e-5, atol=1e-5)
    shutil.copytree(FOLDER, tmp_path / "copy", ignore=shutil.ignore_patterns("checksums.json"))
    assert verify(tmp_path / "copy").compressed_count == 7
