"""Tiny packed checkpoints of every family, vLLM on them, and how far what it says is from transformers in float32."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import armor.hf  # noqa: F401  teaches transformers the format
from armor.format.checkpoint import modules_of
from tests.packed import SETTINGS, edit_tensors, packed
from tests.tiny import VOCABULARY

BOUND = 1e-5
"""How far log-probabilities may be from those of transformers, both in float32."""
BOUNDS = {"Granite MoE": 2e-5}
"""Of families that need another: 1.1e-5 on a CPU with AMX, for the exported model 6.9e-6."""
HEADS = {"head_dim": 32}  # vLLM's attention on a CPU takes heads of 32 channels and more
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA_3 |= {"original_max_position_embeddings": 64}
WRAPPED = SHAPE | HEADS | {"num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": VOCABULARY}
IMAGES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES |= {"image_size": 28, "patch_size": 14}


def bare(folder: Path) -> None:
    """Give a GPT-2 the names that the published ones have, without that of the base model."""
    edit_tensors(folder, lambda own: [own.update({n.removeprefix("transformer."): own.pop(n)}) for n in [*own]])


FAMILIES: dict[str, tuple[str, dict]] = {
    "Llama": ("llama", {}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA_3}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Mistral": ("mistral", HEADS),
    "Qwen2": ("qwen2", {"use_sliding_window": False}),
    "Qwen3": ("qwen3", HEADS),
    "Gemma 2": ("gemma2", {**HEADS, "query_pre_attn_scalar": 32}),
    "Gemma 3": ("gemma3_text", {**HEADS, "query_pre_attn_scalar": 32}),
    "Phi-3": ("phi3", {}),
    "Phi-4 mini": ("phi3", {"tie_word_embeddings": True, "rope_parameters": ROPE | {"partial_rotary_factor": 0.75}}),
    "Granite": ("granite", {"embedding_multiplier": 1.5, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "GLM-4": ("glm4", HEADS),
    "OLMo 2": ("olmo2", {}),
    "Mixtral": ("mixtral", HEADS),
    "Qwen3 MoE": ("qwen3_moe", {**HEADS, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "OLMoE": ("olmoe", HEADS),
    "Qwen2 MoE": ("qwen2_moe", EXPERTS | {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 64}),
    "Granite MoE": ("granitemoe", {}),
    "GLM-4 MoE": (
        "glm4_moe",
        {**HEADS, **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
        | {"routed_scaling_factor": 2.5},
    ),
    "ERNIE 4.5": ("ernie4_5_moe", EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}),
    "Gemma": ("gemma", HEADS),
    "Gemma 3 with images": (
        "gemma3",
        {"text_config": WRAPPED | {"query_pre_attn_scalar": 32, "initializer_range": 0.1}, "vision_config": IMAGES}
        | {"mm_tokens_per_image": 1, "image_token_index": 260, "boi_token_index": 258, "eoi_token_index": 259},
    ),
    "Command R": ("cohere", {"logit_scale": 1.0}),
    "EXAONE 4": ("exaone4", HEADS),
    "Falcon": ("falcon", {"multi_query": True, "ffn_hidden_size": 512}),
    "GPT-2": ("gpt2", {"n_inner": 256, "change": bare}),
    "OLMo 3": ("olmo3", {"settings": SETTINGS.model_copy(update={"share_right": True})}),
    "OPT": ("opt", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "Phi-2": ("phi", {}),
    "StarCoder2": ("starcoder2", {}),
}
"""The families by name: transformers' name, and what their configuration has of its own."""
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}  # as vLLM wants
LATENT |= EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT["num_key_value_heads"] = 4


def publish(folder: Path) -> None:
    """Give a Phi MoE the name that published ones have: vLLM knows that one only, transformers another."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["PhiMoEForCausalLM"]}))


APART: dict[str, tuple[str, dict]] = {
    "DeepSeek-V2": ("deepseek_v2", LATENT | {"q_lora_rank": None}),
    "DeepSeek-V3": ("deepseek_v3", LATENT | {"q_lora_rank": 64, "topk_method": "noaux_tc"}),
    "Phi MoE": (
        "phimoe",
        HEADS | {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True, "change": publish},
    ),
}
"""Those of which vLLM says something else than transformers of a dense model too."""
RANK = 8  # of an adapter
PROMPTS = [list(range(1, 60)), list(range(100, 107)), list(range(60, 1, -1))]


def checkpoint(root: Path, family: str) -> Path:
    """A packed checkpoint of a tiny random model of `family`, made in `root` if it is not there."""
    kind, config = (FAMILIES | APART)[family]
    if not (root / "checkpoint").exists():
        packed(root, kind, **(SHAPE | config))
    return root / "checkpoint"


@contextlib.contextmanager
def served(folder: Path, **options) -> Iterator[LLM]:
    """vLLM on the checkpoint in `folder`, in float32; `options` are its own."""
    eager: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
    if "vision_config" in (folder / "config.json").read_text():
        eager["limit_mm_per_prompt"] = {"image": 0}  # text alone, for there is no processor of images
    if "kv_lora_rank" in (folder / "config.json").read_text():
        eager["attention_backend"] = "CPU_MLA"  # the other, which vLLM prefers on a CPU with AMX, has no float32
    llm = LLM(str(folder), **(eager | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def loaded(folder: Path) -> Any:
    """transformers' model of a checkpoint, as `expected` asks it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def adapted(folder: Path, adapter: Path) -> Any:
    """The model of the checkpoint in `folder` with a random LoRA adapter on all compressed linears, which is saved."""
    from peft import LoraConfig, get_peft_model

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    targets = sorted({name.rpartition(".")[2] for name in modules_of(config)})
    torch.manual_seed(0)
    model = get_peft_model(loaded(folder), LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(adapter)
    return model


@torch.no_grad()
def expected(folder: Path, model: Any = None) -> list[tuple[list[int], Tensor]]:
    """What transformers says in float32, by the checkpoint in `folder` or by `model`: for every prompt its tokens and
    eight more, greedily, and the log-probabilities (length, vocabulary) after each. Its attention is the eager one:
    the others leave out the soft caps of Gemma 2.

    Ask before vLLM runs: it changes transformers' classes where it has no model of its own.
    """
    model = model or loaded(folder)
    found = []
    for prompt in PROMPTS:
        tokens = model.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=8, max_new_tokens=8)
        found.append((tokens[0].tolist(), torch.log_softmax(model(tokens).logits[0].double(), dim=-1)))
    return found


def answers(llm: LLM, prompts: bool = True, **generate: Any) -> list[tuple[list[int], list[dict[int, float]]]]:
    """What vLLM says: for every prompt eight more tokens, greedily, and the log-probabilities of the five likeliest for
    each, before which are, with `prompts`, those of the prompt's own tokens. Without, vLLM may read its cache of
    prefixes. `generate` is vLLM's own."""
    scored = 0 if prompts else None
    sampling = SamplingParams(max_tokens=8, min_tokens=8, temperature=0, logprobs=5, prompt_logprobs=scored)
    asked: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found = []
    for request in llm.generate(asked, sampling, use_tqdm=False, **generate):
        answer = request.outputs[0]
        scores = [*(request.prompt_logprobs or [None] * len(request.prompt_token_ids)), *answer.logprobs]
        found.append((list(answer.token_ids), [{t: s.logprob for t, s in (one or {}).items()} for one in scores]))
    return found


def difference(llm: LLM, references: list[tuple[list[int], Tensor]], prompts: bool = True, **generate: Any) -> float:
    """The largest difference of a log-probability of `answers` from `references`; the answers must be the same."""
    largest = 0.0
    for prompt, (tokens, log_p), (answer, scores) in zip(
        PROMPTS, references, answers(llm, prompts, **generate), strict=True
    ):
        assert tokens == [*prompt, *answer]
        for place, found in enumerate(scores):
            for token, said in found.items():  # nothing is said of the first
                largest = max(largest, abs(said - log_p[place - 1, token].item()))
    return largest
