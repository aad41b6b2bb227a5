"""Llama 4: its experts are called with a copy of all tokens for each, of which most rows are zeros."""

import torch
from transformers import AutoModelForCausalLM

from armor.runtime.families.llama4 import Llama4Experts
from armor.runtime.fused import unfuse
from benchmarks.families import small_config

TOKENS = torch.arange(1, 25)[None] * 5  # not the padding, whose embedding is zeros


def test_the_logits_are_those_of_the_fused_module_and_every_token_goes_to_its_experts():
    config = small_config("llama4_text")
    model = AutoModelForCausalLM.from_config(config).eval()
    seen = []

    def sent(module, args, _):
        assert isinstance(module, Llama4Experts)
        rows = module.routes(args, {}).rows.tolist()
        seen.append(sorted(row % TOKENS.numel() for row in rows))

    with torch.inference_mode():
        expected = model(TOKENS).logits
        for path in unfuse(model):
            model.get_submodule(path).register_forward_hook(sent)
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)
    assert seen and all(rows == sorted([*range(TOKENS.numel())] * config.num_experts_per_tok) for rows in seen)
