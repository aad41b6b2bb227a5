"""`armor serve`: a sound checkpoint and the server's own options reach the server; what is broken starts nothing."""

import json
import logging
import shlex
import shutil
import sys
from importlib.util import find_spec

import pytest
from transformers.utils.import_utils import is_serve_available

from armor.serve import VERSIONS
from armor.serve.engine import PYTHON
from armor.serve.server import CACHE, NOT_OF_EXPERTS, environment
from tests.forks import fork
from tests.packed import DEFECTS, SETTINGS, edit_config, packed

SERVER = f"import json, os, sys; print(json.dumps([*sys.argv, os.environ.get('{CACHE}')])); sys.exit(7)"


def serve(folder, *arguments, engine=None):
    """`armor serve` in `folder`, with the modules in the folder `engine` installed."""

    def work():
        from armor.command import cli

        logging.getLogger().handlers.clear()
        if engine:
            sys.path.insert(0, str(engine))
        sys.argv = ["armor", "serve", *map(str, arguments)]
        cli.main()

    return fork(work, folder, {"PYTHONPATH": ":".join(map(str, filter(None, (engine, *sys.path))))})


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """A folder with a vLLM whose server prints its arguments and the size of its cache, and ends with exit code 7."""
    folder = tmp_path_factory.mktemp("engine")
    (folder / "vllm/entrypoints/openai").mkdir(parents=True)
    (folder / "vllm/entrypoints/openai/api_server.py").write_text(SERVER)
    say_version(folder, f"{VERSIONS[0]}.0")
    return folder


def say_version(folder, version):
    """Let the vLLM in `folder` be of that version."""
    about = folder / "vllm-0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (about / "top_level.txt").write_text("vllm\n")


def test_the_server_gets_the_folder_and_all_options_that_are_its_own(root, vllm):
    options = ["--tensor-parallel-size", "2", "--enable-lora"]
    done = serve(root, "checkpoint", "--port", "8100", "--served-model-name=mine", *options, engine=vllm)
    *told, started = done.stdout.splitlines()
    assert done.returncode == 7, done.stderr
    named = ["--model", "checkpoint", "--served-model-name", "mine", "--host", "127.0.0.1", "--port", "8100"]
    assert json.loads(started)[1:] == [*named, *options, "4"]
    words = shlex.split(told[-1])
    assert words[:2] == ["curl", "http://127.0.0.1:8100/v1/completions"]
    assert json.loads(words[-1])["model"] == "mine"


def test_the_cache_is_what_the_user_says(monkeypatch):
    for options in (["--gpu_memory_utilization=0.5"], ["--kv-cache-memory-bytes", "1G"]):
        assert CACHE not in environment(options)
    monkeypatch.setenv(CACHE, "40")
    assert environment([])[CACHE] == "40"


def test_without_a_name_the_model_is_called_as_its_folder(root, vllm):
    words = shlex.split(serve(root, "checkpoint", engine=vllm).stdout.splitlines()[-2])
    assert json.loads(words[-1])["model"] == "checkpoint"


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("defect", ["missing mask", "NaN in a norm", "truncated"])
def test_a_broken_checkpoint_is_one_line_and_starts_nothing(checkpoint, vllm, defect, checksums):
    DEFECTS[defect][0](checkpoint)
    if not checksums:
        (checkpoint / "checksums.json").unlink()
    done = serve(checkpoint.parent, checkpoint, engine=vllm)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("armor: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-9]), lambda file: file.unlink()])
def test_half_a_tokenizer_and_none_are_one_line(checkpoint, vllm, damage):
    damage(checkpoint / "tokenizer.json")
    done = serve(checkpoint.parent, "checkpoint", engine=vllm)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "tokenizer.json" in done.stderr


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of the checkpoint of a mixture with packed experts."""
    return packed(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


@pytest.mark.parametrize("option", [*NOT_OF_EXPERTS, "--enable_lora=true"])
def test_what_packed_experts_cannot_do_is_one_line_and_starts_nothing(option, vllm, mixture):
    done = serve(mixture, "checkpoint", option, engine=vllm)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"{option}: checkpoint: model.layers." in done.stderr and "experts.0." in done.stderr


def test_ranks_that_would_cut_a_block_are_one_line_and_start_nothing(vllm, tmp_path):
    """Keys of two heads of 16 channels, in one block."""
    packed(tmp_path, settings=SETTINGS.model_copy(update={"block_size": 32}))
    done = serve(tmp_path, "checkpoint", "-tp", "2", engine=vllm)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    said = "--tensor-parallel-size 2: checkpoint: model.layers.0.self_attn.k_proj: 2 ranks would cut a block of A of 32"
    assert f"{said} output channels; expected a tensor parallel size of 1 " in done.stderr


def test_a_family_that_vllm_was_not_tested_with_is_one_line_and_starts_nothing(vllm, tmp_path):
    packed(tmp_path, "gpt_oss")
    done = serve(tmp_path, "checkpoint", engine=vllm)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "armor: error: checkpoint/config.json: model_type gpt_oss: not tested packed in vLLM" in done.stderr


def test_a_package_in_the_working_folder_is_not_the_one_that_serves(root, vllm, tmp_path):
    shutil.copytree(root / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise SystemExit('the one in the folder')")
    done = serve(tmp_path, "checkpoint", engine=vllm)
    assert done.returncode == 7, done.stderr


def test_a_later_version_and_half_a_copy_and_a_hub_name_are_one_line(checkpoint, vllm):
    found = [serve(checkpoint.parent, "meta-llama/Llama-3.2-1B", engine=vllm)]
    (checkpoint / "checksums.json").unlink()
    edit_config(checkpoint, lambda config: config.update(format_version=9))
    found.append(serve(checkpoint.parent, "checkpoint", engine=vllm))
    (checkpoint / "model.safetensors").unlink()
    edit_config(checkpoint, lambda config: config.update(format_version=1))
    found.append(serve(checkpoint.parent, "checkpoint", engine=vllm))
    said = ["not a folder on this machine", "format_version 9, expected", "holds neither model.safetensors nor"]
    for done, part in zip(found, said, strict=True):
        assert done.returncode == 1 and done.stdout == "" and part in done.stderr and done.stderr.count("\n") == 1


def test_another_vllm_is_one_line_and_starts_nothing(root, vllm, tmp_path):
    other = shutil.copytree(vllm, tmp_path / "engine")
    say_version(other, "0.99.1")
    done = serve(root, "checkpoint", engine=other)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"found vLLM 0.99.1, expected {VERSIONS[0]}; install that" in done.stderr


def test_a_python_that_is_not_there_is_one_line(root, monkeypatch):
    monkeypatch.setenv(PYTHON, "/nowhere/python")
    done = serve(root, "checkpoint")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "ARMOR_VLLM: /nowhere/python: found no Python that runs" in done.stderr


def test_without_any_server_one_line_says_what_to_install(root):
    if find_spec("vllm") or is_serve_available():
        pytest.skip("a server is installed")
    done = serve(root, "checkpoint")
    assert done.returncode == 1 and "docs/SERVING.md" in done.stderr and done.stderr.count("\n") == 1
