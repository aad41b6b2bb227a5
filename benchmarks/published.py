"""`armor plan` for large models by their published configurations, without their weights.

A folder is made for each: config.json as published, and safetensors files with real headers and holes for data, split
as such models are. Names are those on the hub: of mixtures each expert's own, of DeepSeek-V3 in FP8 with its scales.

    python -m benchmarks.published                  # all of them
    python -m benchmarks.published llama-3-70b

The JSON has what the plan says, and the processor seconds and the memory that it takes.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from armor.execution.files import read_json, write_json
from armor.format.holes import Hole, write_holes
from armor.format.shards import DTYPES, INDEX
from tests.tiny import tiny_tokenizer

MODELS: dict[str, dict] = {
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
MODELS["llama-3-8b"] = MODELS["llama-3-70b"] | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SHARD = 5_000_000_000
SCALED = 128  # rows and columns that share a scale


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


def build(folder: Path, config: dict) -> None:
    """Write the folder of a model: its configuration, a tokenizer, its headers."""
    folder.mkdir()
    write_json(folder / "config.json", {"dtype": "bfloat16", **config})
    tiny_tokenizer(folder)
    shards: list[dict[str, Hole]] = [{}]
    filled = 0
    for name, hole in tensors(config):
        if filled + hole.bytes > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = hole
        filled += hole.bytes
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_holes(folder / file, shard)
    write_json(folder / INDEX, {"weight_map": {name: file for file, shard in files.items() for name in shard}})


def plan(folder: Path, name: str) -> dict:
    """What `armor plan` says of the usual recipes for the model in `folder`, and what that takes."""
    text = {"dataset": "allenai/c4", "subset": "en", "streaming": True}
    config = {
        "models": {name: {"folder": str(folder / name)}},
        "calibrations": {"c4": {"text": text, "sequences": 128, "sequence_length": 4096}},
        "recipes": {
            "dense": {"method": "dense"},
            "nowag": {"method": "nowag"},
            "armor": {"block_size": 128},
            "refined": {"base": "armor", "refine": {"sequence_length": 2048}},
            "tuned": {"base": "refined", "tune": {"sequence_length": 2048}},
        },
        "evaluations": {"c4": {"text": text | {"split": "validation"}, "sequences": 64, "sequence_length": 4096}},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "armor", "plan", str(file)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    errors = "".join(line for line in done.stderr.splitlines(True) if line.startswith("armor: error"))
    return {
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_bytes": after.ru_maxrss * 1024,  # of the largest so far
        "says": [line.replace(f"{folder}/", "") for line in (done.stdout + errors).splitlines()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*MODELS], help=", ".join(MODELS))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    result = read_json(options.output) if options.output.is_file() else {}
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="published-") as folder:
            build(Path(folder) / name, MODELS[name])
            result[name] = plan(Path(folder), name)
        print(*result[name]["says"], "", sep="\n")
        write_json(options.output, result)


if __name__ == "__main__":
    main()
