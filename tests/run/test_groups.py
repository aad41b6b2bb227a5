"""Groups of experts: chosen from shapes and settings alone, as large as a job has room for."""

from __future__ import annotations

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


def test_a_dense_layer_and_a_small_mixture_are_one_job():
    """Qwen3-30B-A3B's among them."""
    assert all(expert_groups(layer(*shape), ARMOR, None) == [] for shape in ((0, 28672, 8192), (128, 2048, 768)))


def test_a_large_mixture_is_cut_into_as_few_groups_as_fit():
    """The layers of DeepSeek-V3."""
    large = layer(256, 7168, 2048)
    groups = expert_groups(large, ARMOR, None)
    numbers = [tuple(map(int, group.split("-"))) for group in groups]
    assert len(groups) > 1 and numbers[0][0] == 0 and numbers[-1][1] == 255
    assert all(before[1] + 1 == after[0] for before, after in zip(numbers, numbers[1:], strict=False))
    assert max(sum(_bytes(large.group(group).linears, ARMOR)) for group in groups) <= JOB_BYTES
    one_more = large.group(f"0-{256 // (len(groups) - 1)}")
    assert sum(_bytes(one_more.linears, ARMOR)) > JOB_BYTES


def test_the_settings_name_the_size():
    mixture = layer(8, 64, 32)
    assert expert_groups(mixture, ARMOR, 3) == ["0-2", "3-5", "6-7"]
    assert expert_groups(mixture, ARMOR, 8) == expert_groups(mixture, ARMOR, 100) == []
    assert expert_groups(layer(0, 64, 32), ARMOR, 3) == []
