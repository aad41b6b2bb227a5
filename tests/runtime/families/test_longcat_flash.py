"""LongCat-Flash: experts that hand a token on as it is are none of the modules."""

import torch
from transformers import AutoModelForCausalLM

from armor.runtime.families.longcat_flash import LongcatFlashExperts
from armor.runtime.fused import unfuse
from benchmarks.families import small_config

TOKENS = torch.arange(24)[None] * 5 % 256


def test_the_logits_are_those_of_the_fused_module():
    config = small_config("longcat_flash")
    config.zero_expert_num = 12  # beside 4 real ones
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        expected = model(TOKENS).logits
        for path in unfuse(model):
            experts = model.get_submodule(path)
            assert isinstance(experts, LongcatFlashExperts) and len([*experts.experts()]) == 4
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
