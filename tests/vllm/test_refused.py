"""What vLLM must not serve it does not: one line says why, whoever starts it."""

import subprocess
import sys

import pytest
from vllm import LLM

import armor.serve
from armor.serve.plugin import Refused
from tests.packed import DEFECTS, SETTINGS, packed
from tests.vllm.served import SHAPE


@pytest.mark.parametrize("defect", ["NaN", "truncated", "a version to come", "mask not 2:4"])
def test_a_broken_checkpoint(checkpoint, defect):
    apply, named = DEFECTS[defect]
    apply(checkpoint)
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(Refused) as error:
        LLM(str(checkpoint))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in named)


def test_the_config_of_another_model(checkpoint):
    (checkpoint / "checksums.json").unlink()
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 256'))
    with pytest.raises(Refused, match="128") as error:
        LLM(str(checkpoint))
    assert "\n" not in str(error.value)


def test_a_byte_that_was_flipped_ends_a_server_with_an_error(checkpoint):
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "differs from its hash in checksums.json" in done.stderr.strip().splitlines()[-1]


def test_ranks_that_would_cut_a_block(tmp_path, capfd):
    settings = SETTINGS.model_copy(update={"block_size": 64})
    folder = packed(tmp_path, settings=settings, **SHAPE) / "checkpoint"
    with pytest.raises(Exception, match="."):
        LLM(str(folder), tensor_parallel_size=2, max_model_len=128, distributed_executor_backend="mp")
    said = "".join(capfd.readouterr())
    assert "k_proj: 2 ranks would cut a block of A of 64 output channels; expected a tensor parallel size of 1 " in said


def test_another_version_of_vllm_is_one_line_and_nothing_is_registered(caplog, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    armor.serve.register()
    said = "armor: error: vLLM 0.99.1 is installed, expected 0.32.*; packed checkpoints are not served"
    assert caplog.messages == [said]
