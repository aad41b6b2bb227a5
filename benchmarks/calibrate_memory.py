"""Peak memory of `armor calibrate` on a randomly initialised Llama of 1.1 billion parameters in bfloat16.

The model (TinyLlama's dimensions) is written shard by shard to a temporary folder of 2.2 GB, with a byte-level
tokenizer; `armor calibrate` runs on it in a process of its own, whose peak resident memory the system reports. It is
held against what streaming promises: the embeddings, two decoder layers, the hidden states that are allowed in memory,
and 700 MB for Python, torch and activations.

    python -m benchmarks.calibrate_memory            # from the repository's root; about 3 minutes on 2 cores
    python -m benchmarks.calibrate_memory --threads 2 --output memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from armor.execution.files import read_json, write_json
from armor.format.shards import INDEX
from tests.tiny import tiny_text, tiny_tokenizer

CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SEQUENCES, LENGTH = 8, 512
HIDDEN_STATES_GB = 0.01  # less than there are, so that some go to disk
SLACK = 700_000_000


def linear(rows: int, columns: int) -> torch.Tensor:
    """A random weight (rows, columns) bfloat16."""
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02)


def build(folder: Path) -> tuple[int, int]:
    """Write the model; returns the bytes of its embeddings and of one decoder layer."""
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    tiny_tokenizer(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    shapes = {f"self_attn.{n}_proj": (m, hidden) for n, m in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden))}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    weight_map, total = {}, config.num_hidden_layers + 2

    def save(number: int, tensors: dict[str, torch.Tensor]) -> int:
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    embeddings = save(1, {"model.embed_tokens.weight": linear(config.vocab_size, hidden)})
    for k in range(config.num_hidden_layers):
        layer = {f"model.layers.{k}.{name}.weight": linear(*shape) for name, shape in shapes.items()}
        layer |= {f"model.layers.{k}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        layer_bytes = save(k + 2, layer)
    save(total, {"model.norm.weight": ones, "lm_head.weight": linear(config.vocab_size, hidden)})
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return embeddings, layer_bytes


def armor(*arguments: object) -> int:
    """Run `armor ...` in a process of its own; its peak resident memory in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "armor.command.cli", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"armor {arguments[0]} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(folder: Path, threads: int) -> dict:
    """Build the model in `folder`, calibrate it, and compare the peak with the bound; all in bytes."""
    model = folder / "model"
    embeddings, layer = build(model)
    (folder / "text.txt").write_text(tiny_text(1000))
    text = {"files": [str(folder / "text.txt")]}
    settings = {"sequences": SEQUENCES, "sequence_length": LENGTH, "hidden_states_memory_gb": HIDDEN_STATES_GB}
    armor("inspect", "--source", model, "--output", folder / "model.json")
    calibrate = ["--source", model, "--topology", folder / "model.json", "--threads", threads]
    calibrate += ["--settings", json.dumps(settings | {"text": text}), "--output", folder / "out" / "calibration.json"]
    peak = armor("calibrate", *calibrate)
    record = read_json(folder / "out" / "calibration.json")
    allowed = int(HIDDEN_STATES_GB * 1e9)
    bound = embeddings + 2 * layer + allowed + SLACK
    return {
        "parameters": read_json(folder / "model.json")["parameters"],
        "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "settings": settings,
        "embeddings_bytes": embeddings,
        "decoder_layer_bytes": layer,
        "hidden_states_allowed_bytes": allowed,
        "slack_bytes": SLACK,
        "bound_bytes": bound,
        "peak_memory_bytes": peak,
        "within_bound": peak <= bound,
        **{key: record[key] for key in ("dtype", "spilled_bytes", "seconds", "tokens_per_second", "machine")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="calibrate-memory-") as folder:
        result = measure(Path(folder), options.threads)
    write_json(options.output, result)
    print(json.dumps(result, indent=1, sort_keys=True))
    if not result["within_bound"]:
        raise SystemExit("the peak is above the bound")


if __name__ == "__main__":
    main()
