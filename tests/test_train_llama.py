"""The script that trains the small Llama: killed, it goes on with the same bytes."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.train_llama import tokenizer_of, train
from tests.killed import SAVED, killed_everywhere
from tests.tiny import tiny_text


def test_killed_after_a_save_it_ends_as_if_undisturbed(tmp_path):
    tokenizer = tokenizer_of([tiny_text()], 300)
    tokens = torch.tensor(tokenizer(tiny_text()).input_ids)
    assert tokenizer.decode(tokens) == tiny_text()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

    def work(folder):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=16, **sizes))
        train(model, tokens, folder, steps=5, sequences=2, every=2)

    killed_everywhere(work, tmp_path, SAVED)
