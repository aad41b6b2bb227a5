"""A server started by `armor serve` answers an OpenAI client, as a stream, with what transformers writes."""

import contextlib
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
SECONDS = 3600  # a server that is not up by then never will be


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model"), "Qwen3")


ARMOR = "from armor.command.entry import main; main()"
WITHOUT_VLLM = f"import sys; sys.modules['vllm'] = None; {ARMOR}"


@contextlib.contextmanager
def server(log, program, folder, *options):
    """The URL of `armor serve`, once what Kubernetes asks says that it is ready."""
    deployment = next(yaml.safe_load_all(MANIFEST.read_text()))
    path = deployment["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    command = [sys.executable, "-c", program, "serve", str(folder), "--port", url.rpartition(":")[2], *options]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            try:
                if urllib.request.urlopen(url + path, timeout=5).status == 200:
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        assert f"{url}/v1" in log.read_text()
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(SECONDS)


TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_streamed_answer_is_what_transformers_writes(folder, engine, tmp_path):
    prompt = "The city of Paris"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def written(text):
        tokens = tokenizer(text, return_tensors="pt").input_ids
        new = model.generate(tokens, do_sample=False, max_new_tokens=12)[0, tokens.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")

    if engine == "vllm":
        name, program = "mine", ARMOR
        options = ["--served-model-name", name, "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
        options += ["--chat-template", TEMPLATE]
    else:
        name, program, options = str(folder), WITHOUT_VLLM, ["--dtype", "float32", "--device", "cpu"]
    with server(tmp_path / "log", program, folder, *options) as url:
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        asked: dict = {"model": name, "max_tokens": 12, "temperature": 0}
        parts = [
            part.choices[0].text
            for part in client.completions.create(prompt=prompt, stream=True, **asked)
            if part.choices
        ]
        if engine == "vllm":  # transformers' server takes no template but the checkpoint's own
            said = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **asked)
            assert said.choices[0].message.content.rstrip("\ufffd") == written(f"user: {prompt}\n")
    assert len(parts) > 3
    # A character whose bytes are not all there yet is held back by a stream.
    assert "".join(parts).rstrip("\ufffd") == written(prompt)
