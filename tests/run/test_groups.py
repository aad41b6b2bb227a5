"""Groups of experts: chosen from shapes and settings alone, as large as a job has room for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from armor.config.layers import LayerSettings
from armor.format.records.topology import DecoderLayer, Linear
from armor.run.groups import JOB_BYTES, _bytes, expert_groups

ARMOR = LayerSettings()


def layer(experts: int, hidden: int, width: int) -> DecoderLayer:
    """A decoder layer in bfloat16 with attention and, if it has `experts`, a mixture."""
    common = {"dtype": "bfloat16", "bias": False, "shard": "model.safetensors"}
    prefix = "model.layers.0"
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    for expert in range(experts):
        own = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        shapes |= {f"mlp.experts.{expert}.{name}": shape for name, shape in own.items()}
    linears = [
        Linear(name=f"{prefix}.{name}", out_features=rows, in_features=columns, input_group=i, **common)
        for i, (name, (rows, columns)) in enumerate(shapes.items())
    ]
    return DecoderLayer(index=0, prefix=prefix, linears=tuple(linears))


@pytest.mark.parametrize("shape", [(0, 28672, 8192), (8, 64, 32), (128, 2048, 768), (8, 4096, 14336)])
def test_a_dense_layer_and_a_small_mixture_are_one_job(shape):
    """Qwen3-30B-A3B and Mixtral 8x7B among them."""
    assert expert_groups(layer(*shape), ARMOR, None) == []


@pytest.mark.parametrize("settings", [ARMOR, LayerSettings(method="sparsegpt")], ids=["armor", "sparsegpt"])
def test_a_large_mixture_is_cut_into_groups_that_fit(settings):
    """The layers of DeepSeek-V3."""
    large = layer(256, 7168, 2048)
    groups = expert_groups(large, settings, None)
    assert len(groups) > 1 and groups[0].startswith("0-") and groups[-1].endswith("-255")
    numbers = [tuple(map(int, group.split("-"))) for group in groups]
    assert all(before[1] + 1 == after[0] for before, after in zip(numbers, numbers[1:], strict=False))
    assert max(sum(_bytes(large.group(group).linears, settings)) for group in groups) <= JOB_BYTES
    sizes = [last - first + 1 for first, last in numbers]
    assert max(sizes) - min(sizes) <= len(groups)
    one_more = large.group(f"0-{max(sizes) * len(groups) // (len(groups) - 1)}")
    assert sum(_bytes(one_more.linears, settings)) > JOB_BYTES  # fewer groups would not do


def test_the_settings_name_the_size():
    mixture = layer(8, 64, 32)
    assert expert_groups(mixture, ARMOR, 3) == ["0-2", "3-5", "6-7"]
    assert expert_groups(mixture, ARMOR, 8) == expert_groups(mixture, ARMOR, 100) == []
    assert expert_groups(layer(0, 64, 32), ARMOR, 3) == []


def test_the_workflow_chooses_without_torch_and_a_method_of_an_override_counts():
    """Snakemake asks for the groups while it plans, in every process that it starts."""
    code = """
import sys
from armor.config.layers import LayerSettings, Override
from armor.run.groups import expert_groups
from tests.run.test_groups import layer

large = layer(128, 4096, 1536)
counts = {name: len(expert_groups(large, LayerSettings(method=name), None)) for name in ("armor", "sparsegpt", "gptq")}
assert all(counts.values())
sparse = LayerSettings(overrides=[Override(modules="*.experts.*", method="sparsegpt")])
assert len(expert_groups(large, sparse, None)) > counts["armor"]
sys.exit(any(module in sys.modules for module in ("torch", "transformers")))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
