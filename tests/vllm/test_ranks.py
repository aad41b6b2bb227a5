"""What is said of ranks before vLLM starts is what vLLM itself does."""

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import QKVParallelLinear

from armor.core.errors import ArmorError
from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.runtime.folder import read_config
from armor.serve.check import Refused, check
from armor.serve.plugin import ArmorLinearMethod
from armor.serve.ranks import check_ranks
from tests.vllm.served import FAMILIES, checkpoint

HEAD, QUERIES = 16, 8
OWN = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def apart():
    """A process in which vLLM has not changed transformers' classes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def check_two_ranks(root: Path, family: str) -> None:
    folder = checkpoint(root, family)
    check_ranks(read_config(folder), check(folder), 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_refused_that_vllm_serves_on_two_ranks(family, tmp_path, apart):
    apart.submit(check_two_ranks, tmp_path, family).result()


def on_each_rank(keys, ranks):
    """vLLM's linear for q, k and v on each of `ranks` ranks, without a process group, and its output channels."""
    for rank in range(ranks):
        layer = QKVParallelLinear.__new__(QKVParallelLinear)
        nn.Module.__init__(layer)
        own = SimpleNamespace(tp_rank=rank, tp_size=ranks, total_num_heads=QUERIES, total_num_kv_heads=keys)
        vars(layer).update(vars(own), head_size=HEAD, v_head_size=HEAD, input_size=64, prefix=f"{rank}")
        shared = max(1, keys // ranks)
        yield layer, [QUERIES // ranks * HEAD, shared * HEAD, shared * HEAD]


@pytest.mark.parametrize(("keys", "ranks"), itertools.product([1, 2, 4, 8], [2, 4, 8]))
@pytest.mark.parametrize("block", [16, 32, 64])
def test_the_plugin_refuses_the_same_keys_and_values(keys, ranks, block):
    sizes = {"q_proj": QUERIES, "k_proj": keys, "v_proj": keys}
    blocks = {leaf: block if HEAD * count >= block else None for leaf, count in sizes.items()}
    layouts = {
        f"{OWN}.{leaf}": PackedLinear(HEAD * count, 64, Pattern(2, 4), blocks[leaf], None)
        for leaf, count in sizes.items()
    }
    config = LlamaConfig(hidden_size=QUERIES * HEAD, num_attention_heads=QUERIES, num_key_value_heads=keys)
    said, refused = [], []
    try:
        check_ranks(config, layouts, ranks)
    except ArmorError as error:
        said.append(str(error))
    for layer, own in on_each_rank(keys, ranks):
        try:
            with set_current_vllm_config(VllmConfig()):
                ArmorLinearMethod(layouts).create_weights(layer, 64, own, 64, sum(own) * ranks, torch.float32)
        except Refused as error:
            refused.append(str(error))
    assert said == refused[:1]
