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
from armor.serve.check import check
from armor.serve.engine import PYTHON
from armor.serve.server import CACHE, environment
from tests.forks import fork
from tests.packed import DEFECTS, SETTINGS, packed

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


def half(name):
    """Cut a file of the checkpoint off."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def gone(name):
    return lambda folder: (folder / name).unlink()


def unhashed(change):
    def both(folder):
        (folder / "checksums.json").unlink()
        change(folder)

    return both


BROKEN = {
    "missing mask": (DEFECTS["missing mask"][0], ""),
    "NaN without checksums": (unhashed(DEFECTS["NaN in a norm"][0]), "model.norm.weight"),
    "truncated": (half("model.safetensors"), "model.safetensors"),
    "no tokenizer": (gone("tokenizer.json"), "tokenizer.json"),
    "a later version": (unhashed(DEFECTS["a version to come"][0]), "format_version"),
    "no weights": (unhashed(gone("model.safetensors")), "holds neither model.safetensors nor"),
}


def refused(done, said):
    """Whether it was one line that has `said` in it, and nothing started."""
    return (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and said in done.stderr


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_checkpoint_is_one_line_and_starts_nothing(checkpoint, vllm, defect):
    change, said = BROKEN[defect]
    change(checkpoint)
    assert refused(serve(checkpoint.parent, "checkpoint", engine=vllm), said)


def test_what_the_server_cannot_do_is_one_line_and_starts_nothing(root, vllm, tmp_path):
    assert refused(serve(root, "meta-llama/Llama-3.2-1B", engine=vllm), "not a folder on this machine")
    packed(tmp_path / "mixture", "qwen3_moe")
    done = serve(tmp_path / "mixture", "checkpoint", "--enable-lora", engine=vllm)
    assert refused(done, "--enable-lora: checkpoint: model.layers.") and "experts.0." in done.stderr
    packed(tmp_path / "blocks", settings=SETTINGS.model_copy(update={"block_size": 32}))  # keys: 2 heads of 16
    said = "--tensor-parallel-size 2: checkpoint: model.layers.0.self_attn.k_proj: 2 ranks would cut a block of A of 32"
    assert refused(serve(tmp_path / "blocks", "checkpoint", "-tp", "2", engine=vllm), said)
    packed(tmp_path / "family", "gpt_oss")
    said = "armor: error: checkpoint/config.json: model_type gpt_oss: not tested packed in vLLM"
    assert refused(serve(tmp_path / "family", "checkpoint", engine=vllm), said)
    assert check(tmp_path / "family/checkpoint", "transformers")  # the other server takes it


def test_another_engine_or_none_is_one_line(root, vllm, tmp_path, monkeypatch):
    other = shutil.copytree(vllm, tmp_path / "engine")
    say_version(other, "0.99.1")
    said = f"found vLLM 0.99.1, expected {VERSIONS[0]}; install that"
    assert refused(serve(root, "checkpoint", engine=other), said)
    if not (find_spec("vllm") or is_serve_available()):
        assert refused(serve(root, "checkpoint"), "docs/SERVING.md")
    monkeypatch.setenv(PYTHON, "/nowhere/python")
    assert refused(serve(root, "checkpoint"), "ARMOR_VLLM: /nowhere/python: found no Python that runs")


def test_a_package_in_the_working_folder_is_not_the_one_that_serves(root, vllm, tmp_path):
    shutil.copytree(root / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise SystemExit('the one in the folder')")
    done = serve(tmp_path, "checkpoint", engine=vllm)
    assert done.returncode == 7, done.stderr
