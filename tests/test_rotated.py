"""`benchmarks.rotated`: a turned Llama computes what it did."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rotated import Rotations, folded, turn


def test_a_turned_llama_computes_the_same():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before, gate = model(tokens).logits, model.model.layers[0].mlp.gate_proj.weight.clone()
        rotations = Rotations(32, 2, 2, 8)
        for parameter in rotations.parameters():
            parameter.normal_()
        folded(model)
        turn(model, rotations)
        after = model(tokens).logits
    torch.testing.assert_close(after, before)
    assert not torch.allclose(model.model.layers[0].mlp.gate_proj.weight, gate, atol=0.01)
    assert torch.equal(model.model.norm.weight, torch.ones(32))
