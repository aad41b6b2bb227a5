"""A server started by `armor serve` answers an OpenAI client, as a stream, with what transformers writes."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.vllm.served import checkpoint

MANIFEST = Path(__file__).resolve().parents[2] / "envs/serving.yaml"
SECONDS = 300  # a server that is not up by then never will be


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model"), "Qwen3")


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """A running server that calls its model "mine"; it is ready when what Kubernetes asks says so."""
    deployment = next(yaml.safe_load_all(MANIFEST.read_text()))
    path = deployment["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log"
    options = ["--port", str(port), "--served-model-name", "mine", "--dtype", "float32", "--max-model-len", "128"]
    command = [sys.executable, "-m", "armor", "serve", str(folder), *options, "--enforce-eager"]
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            try:
                if urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).status == 200:
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        assert f"http://127.0.0.1:{port}/v1" in log.read_text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def test_a_streamed_answer_is_what_transformers_writes(folder, url):
    prompt = "The city of Paris"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = model.generate(tokens, do_sample=False, max_new_tokens=12, min_new_tokens=12)[0, tokens.shape[1] :]
    ask = OpenAI(base_url=url, api_key="none", max_retries=0).completions.create
    options = {"model": "mine", "prompt": prompt, "max_tokens": 12, "temperature": 0, "extra_body": {"min_tokens": 12}}
    parts = [part.choices[0].text for part in ask(stream=True, **options)]
    assert len(parts) > 3
    assert "".join(parts) == tokenizer.decode(written, skip_special_tokens=True)
