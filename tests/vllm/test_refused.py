"""What vLLM must not serve it does not: one line says why, whoever starts it."""

import subprocess
import sys

import pytest
from vllm import LLM
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

import armor.serve
from armor.core.errors import ArmorError
from armor.format.checkpoint import QUANT_METHOD
from armor.runtime.load import read_config
from armor.serve.check import Refused, check
from armor.serve.ranks import check_ranks
from tests.packed import DEFECTS, SETTINGS, edit_config, packed
from tests.vllm.served import FAMILIES, HEADS, SHAPE, served


@pytest.mark.parametrize("defect", ["NaN", "truncated", "a version to come", "mask not 2:4"])
def test_a_broken_checkpoint(checkpoint, defect):
    apply, named = DEFECTS[defect]
    apply(checkpoint)
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(Refused) as error:
        LLM(str(checkpoint))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in named)


def _flip(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def _halve(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _halve_tokenizer(folder):
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _another_model(folder):
    (folder / "checksums.json").unlink()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 256'))


def _later_version(folder):
    (folder / "checksums.json").unlink()
    edit_config(folder, lambda config: config.update(format_version=9))


BROKEN = {
    "corrupted": (_flip, "differs from its hash in checksums.json"),
    "half copied": (_halve, "model.safetensors"),
    "without its weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "half a tokenizer": (_halve_tokenizer, "tokenizer.json"),
    "a later version": (_later_version, "format_version 9, expected 1 or 2"),
    "another model's config": (_another_model, "128"),
}


def said_by_a_server(folder):
    """The exit code of a server on `folder`, and the last line of what it said."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("defect", BROKEN)
def test_a_server_on_a_broken_checkpoint_ends_with_one_line_and_an_error(checkpoint, defect):
    apply, named = BROKEN[defect]
    apply(checkpoint)
    code, line = said_by_a_server(checkpoint)
    assert code == 1 and line.startswith("armor.serve.check.Refused: ") and named in line


def test_experts_that_the_plugin_does_not_multiply_with(tmp_path):
    folder = packed(tmp_path, "gpt_oss", **(SHAPE | HEADS)) / "checkpoint"
    said = r"model\.layers\.0\.mlp\.experts\..*: compressed, but vLLM calls the experts of this model otherwise; serve"
    with pytest.raises(Refused, match=said):
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


def test_another_version_of_vllm_is_one_line_and_nothing_is_registered(caplog, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    armor.serve.register()
    said = "armor: error: vLLM 0.99.1 is installed, expected 0.32.*; packed checkpoints are not served"
    assert caplog.messages == [said]


def test_the_plugin_registers_once_however_often_it_is_asked(caplog):
    armor.serve.register()
    armor.serve.register()
    assert QUANTIZATION_METHODS.count(QUANT_METHOD) == 1 and caplog.messages == []
