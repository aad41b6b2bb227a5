"""Tiny random models with a real tokenizer, made in a moment and without a network, as Hugging Face folders.

A model has a few decoder layers of hidden size 64 and the features of its family that a pipeline can trip over: shared
and separate key-value heads, query and key norms, biases, tied embeddings, fused projections, and sliding-window layers
between full ones. The tokenizer is byte-level, so every text has tokens and decodes to itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

VOCABULARY = 272  # 256 bytes, one special token, and a little room, as real models have
FAMILIES: dict[str, dict] = {
    "llama": {"attention_bias": False},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": lambda layers: ["sliding_attention", "full_attention"] * (layers // 2 + 1),
    },
    "phi3": {"pad_token_id": None},
}
MAMBA2 = {"state_size": 16, "num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1}
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MIXTURES: dict[str, dict] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**FEW_EXPERTS, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": FEW_EXPERTS,
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # stored fused
    "gpt_oss": {  # stored fused, transposed and interleaved, with biases
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": lambda layers: ["sliding_attention", "full_attention"] * (layers // 2 + 1),
    },
    "llama4_text": {  # stored fused and transposed; each expert is called with all tokens
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 128,
        "head_dim": 16,
        "attention_chunk_size": 64,
        "pad_token_id": 0,
    },
}


SHARING: dict[str, dict] = {  # three layers, the last of which take more of earlier ones than hidden states
    "gemma3n_text": {  # keys and values, by a dictionary
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention", "full_attention", "full_attention"],
        "intermediate_size": [128, 128, 128],
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
        "head_dim": 16,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "pad_token_id": 0,
    },
    "hy_v4": {  # integers: the tokens that an indexer chose
        **LATENT,
        "indexer_types": ["full", "shared", "shared"],
        "mlp_layer_types": ["dense", "dense", "dense"],
        "index_topk": 8,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
    },
    "zaya": {  # what the router thought
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "layer_types": ["hybrid", "hybrid", "hybrid"],
        "router_hidden_size": 16,
        "pad_token_id": 0,
    },
}


WRAPPERS: dict[str, dict] = {
    "qwen2_5_vl": {
        "text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    },
}


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Save a byte-level tokenizer to `folder` and return it; id 256 is <|endoftext|>, nothing is added to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=128
    )
    fast.save_pretrained(folder)
    return fast


def tiny_model(folder: Path | str, family: str = "llama", layers: int = 3, seed: int = 0, **config) -> Path:
    """Save a random model of `family` and its tokenizer to `folder`, and return `folder`.

    `config` overrides any key of the model's configuration; `dtype` (a torch dtype, float32 by default) and
    `max_shard_size` (like "100KB", to have several shards) are taken out first.
    """
    folder = Path(folder)
    dtype = config.pop("dtype", torch.float32)
    sharding = {"max_shard_size": config.pop("max_shard_size")} if "max_shard_size" in config else {}
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": None,
        **(FAMILIES | MIXTURES | SHARING).get(family, {}),
    }
    if callable(settings.get("layer_types")):
        settings["layer_types"] = settings["layer_types"](layers)[:layers]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    settings |= config
    if family in WRAPPERS:
        wrapper = WRAPPERS[family]
        settings = {"text_config": settings | wrapper["text"], "vision_config": wrapper["vision_config"]}
    made = AutoConfig.for_model(family, **settings)
    model = (AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM).from_config(made).to(dtype)
    with torch.no_grad():  # norms start as ones and biases as zeros: an error in either must show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.set_rng_state(state)
    model.save_pretrained(folder, **sharding)
    tiny_tokenizer(folder)
    return folder


def tiny_gguf(path: Path, model: Path) -> Path:
    """Save the llama model in folder `model`, with a byte-level tokenizer, as GGUF (float32) to `path`; returns it."""
    import gguf
    from safetensors.torch import load_file

    config = AutoConfig.from_pretrained(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "qx"]
    tokens += [f"<unused{index}>" for index in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1] + [3] * (config.vocab_size - 258))
    writer.add_token_merges(["q x"])  # the reader wants at least one
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(model / "model.safetensors").items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # GGUF interleaves the two halves that rotary embeddings turn
            tensor = tensor.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_text(paragraphs: int = 40) -> str:
    """Plain English-looking text, a little under 100 bytes a paragraph, the same at every call."""
    words = "the of a river city north was built by and in stone century small large old king water from near".split()
    lines = []
    for i in range(paragraphs):
        chosen = (words[(i * i + 7 * j + j * j * (i % 3)) % len(words)] for j in range(18))
        lines.append(" ".join(chosen).capitalize() + ".")
    return "\n\n".join(lines) + "\n"
