"""What vLLM must not serve it does not: one line says why, whoever starts it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm import LLM

import armor.serve
from armor.core.errors import ArmorError
from armor.core.pattern import Pattern
from armor.format.checkpoint import PackedLinear
from armor.runtime.folder import read_config
from armor.serve.check import Refused, check
from armor.serve.plugin import ArmorConfig, ArmorLinearMethod
from armor.serve.ranks import check_ranks
from tests.packed import DEFECTS, SETTINGS, packed
from tests.vllm.served import FAMILIES, HEADS, SHAPE, served


def flip(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def unhashed(change):
    """`change`, which no hash of the checkpoint shows any more."""

    def both(folder):
        (folder / "checksums.json").unlink()
        change(folder)

    return both


WEIGHTS = "model.safetensors"
BROKEN = {
    **{
        defect: (unhashed(DEFECTS[defect][0]), DEFECTS[defect][1])
        for defect in ("NaN", "truncated", "a version to come", "mask not 2:4")
    },
    "corrupted": (flip, ("differs from its hash in checksums.json",)),
    "without its weights": (lambda folder: (folder / WEIGHTS).unlink(), (WEIGHTS,)),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_checkpoint(checkpoint, defect):
    apply, named = BROKEN[defect]
    apply(checkpoint)
    with pytest.raises(Refused) as error:
        LLM(str(checkpoint))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in named)


def test_a_server_on_a_broken_checkpoint_ends_with_one_line_and_an_error(checkpoint):
    """Started by itself, for in this process nothing shows the exit code and what comes last."""
    flip(checkpoint)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and line.startswith("armor.serve.check.Refused: ") and "checksums.json" in line


@pytest.mark.gate
def test_a_family_that_was_not_tested(tmp_path):
    folder = packed(tmp_path, "gpt_oss", **(SHAPE | HEADS)) / "checkpoint"
    with pytest.raises(Refused, match=r"config\.json: model_type gpt_oss: not tested packed in vLLM, expected a type"):
        LLM(str(folder), max_model_len=128)


def test_adapters_and_new_weights_for_compressed_experts(tmp_path):
    folder = packed(tmp_path, "qwen3_moe", **(SHAPE | FAMILIES["Qwen3 MoE"][1])) / "checkpoint"
    with pytest.raises(Refused, match=r"experts\.0\..*: compressed, and vLLM is asked for adapters"):
        LLM(str(folder), enable_lora=True, max_model_len=128)
    with served(folder) as llm, pytest.raises(Exception, match="compressed experts cannot be loaded anew in place"):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def test_ranks_that_would_cut_a_block(tmp_path, capfd):
    settings = SETTINGS.model_copy(update={"block_size": 64})
    folder = packed(tmp_path, settings=settings, **SHAPE) / "checkpoint"
    with pytest.raises(ArmorError, match=r"k_proj: 2 ranks would cut a block of A of 64 output channels") as before:
        check_ranks(read_config(folder), check(folder), 2)
    with pytest.raises(Exception, match="."):
        LLM(str(folder), tensor_parallel_size=2, max_model_len=128, distributed_executor_backend="mp")
    assert str(before.value) in "".join(capfd.readouterr())


def test_what_vllm_holds_otherwise_than_the_checkpoint():
    name = "model.layers.0.mlp.{}".format
    config = ArmorConfig({name("fc1"): PackedLinear(64, 32, Pattern(2, 4))})
    with pytest.raises(Refused, match=r"mlp\.fc1: compressed, but in vLLM part of a Identity, .* armor export"):
        config.get_quant_method(nn.Identity(), "model.layers.0.mlp")
    one = SimpleNamespace(
        prefix=name("up_proj"), tp_rank=0, tp_size=1, input_size=32, output_size=64, output_sizes=[64]
    )
    method = ArmorLinearMethod({name("up_proj"): PackedLinear(64, 64, Pattern(2, 4))})
    with pytest.raises(Refused, match=r"shape \(64, 64\), \(64, 32\) in vLLM; was config\.json edited\?"):
        method.create_weights(one, 32, [64], 32, 64, torch.float32)


def test_another_version_of_vllm_is_one_line_and_nothing_is_registered(caplog, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    armor.serve.register()
    said = "armor: error: vLLM 0.99.1 is installed, expected 0.32.*; packed checkpoints are not served"
    assert caplog.messages == [said]
