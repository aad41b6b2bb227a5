"""A tensor parallel size that would cut a block is told from layouts and the model's configuration, and no other is."""

import pytest
from transformers import FalconConfig, LlamaConfig, MixtralConfig, Phi3Config

from armor.core.errors import ArmorError
from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.serve.ranks import check_ranks, ranks_asked

HIDDEN, INNER, HEAD = 256, 512, 32
SHAPE = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 8, "num_hidden_layers": 1}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def layout(out, columns, block):
    return PackedLinear(out, columns, Pattern(2, 4), block, block)


def refused(config, linears, ranks):
    """Whether some block of `linears` would be cut, and what is said of it."""
    try:
        check_ranks(config, linears, ranks)
    except ArmorError as error:
        return str(error)
    return None


def cut_at(length, pieces, block):
    """Whether equal pieces of so many channels end within a block."""
    return any(end % block for end in range(0, length, length // pieces))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_heads_of_keys_and_values_are_shared_and_all_else_is_divided_evenly(ranks, heads, block):
    config, keys = LlamaConfig(**SHAPE, num_key_value_heads=heads), heads * HEAD
    expected = {
        f"{ATTENTION}.q_proj": (HIDDEN, HIDDEN, cut_at(HIDDEN, ranks, block)),
        f"{ATTENTION}.o_proj": (HIDDEN, HIDDEN, cut_at(HIDDEN, ranks, block)),
        f"{MLP}.gate_proj": (INNER, HIDDEN, cut_at(INNER, ranks, block)),
        f"{MLP}.down_proj": (HIDDEN, INNER, cut_at(INNER, ranks, block)),
    }
    if keys >= block:
        expected[f"{ATTENTION}.k_proj"] = (keys, HIDDEN, cut_at(keys, min(ranks, heads), block))
    for name, (out, columns, is_cut) in expected.items():
        said = refused(config, {name: layout(out, columns, block)}, ranks)
        assert (said is not None) == is_cut, (name, said)
        assert not said or said.startswith(f"{name}: {ranks} ranks would cut a block of ")


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_linears_that_are_one_on_disk_are_divided_each_for_itself(ranks, block):
    keys = 4 * HEAD
    config = Phi3Config(**SHAPE, num_key_value_heads=4, pad_token_id=0)
    ends = {start for start in range(0, HIDDEN, HIDDEN // ranks)}
    ends |= {HIDDEN + start for start in range(0, 2 * keys, keys // min(ranks, 4))}
    said = refused(config, {f"{ATTENTION}.qkv_proj": layout(HIDDEN + 2 * keys, HIDDEN, block)}, ranks)
    assert (said is not None) == any(end % block for end in ends)
    said = refused(config, {f"{MLP}.gate_up_proj": layout(2 * INNER, HIDDEN, block)}, ranks)
    assert (said is not None) == cut_at(INNER, ranks, block)


def test_experts_are_divided_within_each_by_the_names_of_checkpoints():
    config = MixtralConfig(**SHAPE, num_key_value_heads=8)
    expert = "model.layers.0.block_sparse_moe.experts.3"
    for leaf, shape in {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}.items():
        assert refused(config, {f"{expert}.{leaf}": layout(*shape, 128)}, 4) is None
        assert f"{expert}.{leaf}: 8 ranks" in refused(config, {f"{expert}.{leaf}": layout(*shape, 128)}, 8)


def test_what_is_uncertain_is_left_to_vllm():
    for config, name, ranks in (
        (FalconConfig(hidden_size=HIDDEN, num_attention_heads=8), f"{MLP}.up_proj", 8),  # has no plan
        (LlamaConfig(**SHAPE), f"{ATTENTION}.q_proj", 3),  # heads that vLLM cannot divide
    ):
        assert refused(config, {name: layout(HIDDEN, HIDDEN, 256)}, ranks) is None


def test_the_size_is_read_as_vllm_reads_it():
    assert ranks_asked(["--dtype", "float32", "-tp", "2", "--enable-lora"]) == 2
    assert ranks_asked(["--tensor-parallel-size=4", "-n", "1"]) == 4
    assert ranks_asked(["--tensor_parallel_size", "2", "-tp=8"]) == 8  # the last one counts
    for options in ([], ["-tp"], ["-tp", "two"], ["-tp", "2", "--model-impl", "transformers"], ["-pp", "2"]):
        assert ranks_asked(options) == 1
