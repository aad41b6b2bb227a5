"""`benchmarks.dialogs`: the model is asked by its own chat template, and what it does not end is no question."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from armor.core.errors import ArmorError
from benchmarks.dialogs import QUESTION, dialogs, template_of
from tests.tiny import tiny_tokenizer

TEMPLATE = "[system]Be kind.[end]{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}[end]{% endfor %}"
QUESTIONS = [(" Why is the sky blue?\n", "stop"), ("And then", "stop"), ("A question without an end", "length")]


class Writer(BaseHTTPRequestHandler):
    """A server that writes QUESTIONS, by the seed, and after each of them an answer without an end."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        text, reason = QUESTIONS[asked["seed"] - 7] if asked["max_tokens"] == QUESTION else ("For", "length")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode())


def test_a_dialog_is_a_question_that_ends_and_an_answer(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    with pytest.raises(ArmorError, match=f"{tmp_path}: its tokenizer has no chat template; expected a chat model"):
        template_of(tokenizer, tmp_path)
    tokenizer.chat_template = TEMPLATE
    template = template_of(tokenizer, tmp_path)
    assert template == ("[system]Be kind.[end][user]", "[end][assistant]", "[end]")
    with ThreadingHTTPServer(("127.0.0.1", 0), Writer) as writer:
        writer.asked = []
        threading.Thread(target=writer.serve_forever, daemon=True).start()
        found = dialogs(f"http://127.0.0.1:{writer.server_port}", template, 3, seed=7)
        writer.shutdown()
    assert found == ["[system]Be kind.[end][user]Why is the sky blue?[end][assistant]For"]
    assert [asked["prompt"] for asked in writer.asked][:3] == [template.head] * 3 and len(writer.asked) == 4
    assert {asked["temperature"] for asked in writer.asked} == {1.0}
