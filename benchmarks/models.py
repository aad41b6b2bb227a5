"""Models that benchmarks are made of: published configurations, and folders with random weights or with holes.

Tensors have their names on the hub: of mixtures each expert's own, of DeepSeek-V3 in FP8 with its scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from armor.execution.files import write_json
from armor.format.holes import Hole, write_holes
from armor.format.shards import DTYPES, INDEX
from tests.tiny import tiny_tokenizer

PUBLISHED: dict[str, dict] = {
    "llama-1.1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    },
}
PUBLISHED["llama-3-8b"] = PUBLISHED["llama-3-70b"] | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SHARD, SHARD_OF_HOLES = 500_000_000, 5_000_000_000
SCALED = 128  # rows and columns that share a scale


def random_mask(out: int, count: int) -> Tensor:
    """A random 2:4 mask, packed: (out, count) uint8 for 8 * count columns."""
    pairs = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], dtype=torch.uint8)
    groups = pairs[torch.randint(6, (out, count, 2))]
    return groups[..., 0] | groups[..., 1] << 4


def tensors(config: dict) -> Iterator[tuple[str, Hole]]:
    """The tensors of a model as the hub has them."""
    kind = {key: value for key, value in config.items() if key != "quantization_config"}
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kind), dtype=torch.bfloat16)
    fp8 = "quantization_config" in config
    for name, tensor in model.state_dict().items():
        before, _, last = name.rpartition(".")
        if before.endswith(".experts") and tensor.dim() == 3:  # fused; on the hub each expert has its own
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            rows = tensor.shape[1] // len(parts)
            for expert in range(tensor.shape[0]):
                for part in parts:
                    yield from stored(f"{before}.{expert}.{part}.weight", (rows, tensor.shape[2]), fp8)
        else:
            yield from stored(name, tuple(tensor.shape), fp8)


def stored(name: str, shape: tuple[int, ...], fp8: bool) -> Iterator[tuple[str, Hole]]:
    """A tensor, in FP8 with its scales where it is a linear of a decoder layer."""
    code = "F8_E4M3" if fp8 and name.endswith("_proj.weight") or fp8 and "_a_proj" in name else "BF16"
    yield name, Hole(code, shape, math.prod(shape) * DTYPES[code][1])
    if code == "F8_E4M3":
        scales = tuple(-(-size // SCALED) for size in shape)
        yield f"{name}_scale_inv", Hole("F32", scales, 4 * math.prod(scales))


def begin(folder: Path, config: dict) -> None:
    """Make the folder of a model, with its configuration and a byte-level tokenizer."""
    folder.mkdir()
    write_json(folder / "config.json", {"dtype": "bfloat16", **config})
    tiny_tokenizer(folder)


def build(folder: Path, config: dict) -> int:
    """Write a model with random weights in bfloat16, shard by shard, its index last; the bytes of its tensors."""
    begin(folder, config)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def save() -> int:
        name = f"model-{len(set(weight_map.values())):05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        size = sum(tensor.nbytes for tensor in shard.values())
        shard.clear()
        return size

    total = 0
    for name, hole in tensors(config):
        plain = torch.ones if len(hole.shape) == 1 else torch.empty
        shard[name] = plain(tuple(hole.shape), dtype=torch.bfloat16)
        if len(hole.shape) > 1:
            shard[name].normal_(std=0.02)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            total += save()
    total += save()
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return total


def build_of_holes(folder: Path, config: dict) -> None:
    """Write a model without its weights: real headers, and holes for data, split as large models are."""
    begin(folder, config)
    shards: list[dict[str, Hole]] = [{}]
    filled = 0
    for name, hole in tensors(config):
        if filled + hole.bytes > SHARD_OF_HOLES:
            shards.append({})
            filled = 0
        shards[-1][name] = hole
        filled += hole.bytes
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_holes(folder / file, shard)
    write_json(folder / INDEX, {"weight_map": {name: file for file, shard in files.items() for name in shard}})
