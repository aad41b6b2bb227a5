"""Experts that transformers calls otherwise: logits are those of the fused module.

Llama 4 calls its experts with a copy of all tokens for each, of which most rows are zeros. LongCat-Flash has experts
that hand a token on as it is, and are none of the modules.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from armor.runtime.families.llama4 import Llama4Experts
from armor.runtime.families.longcat_flash import LongcatFlashExperts
from armor.runtime.fused import unfuse
from benchmarks.families import small_config

TOKENS = torch.arange(1, 25)[None] * 5  # not the padding, whose embedding is zeros


@pytest.mark.parametrize(("family", "kind"), [("llama4_text", Llama4Experts), ("longcat_flash", LongcatFlashExperts)])
def test_the_logits_are_those_of_the_fused_module(family, kind):
    config = small_config(family)
    config.zero_expert_num = 12  # beside 4 real ones
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        expected = model(TOKENS).logits
        for path in unfuse(model):
            experts = model.get_submodule(path)
            assert isinstance(experts, kind) and len([*experts.experts()]) == 4
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
