"""A Hugging Face hub on this machine, with one model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

COMMIT = "c0" * 20
NAME = "someone/model"


class Hub(BaseHTTPRequestHandler):
    """What a client asks of the Hugging Face hub, for the one model in `folder` at the one `revision`.

    `sent` has the bytes that were sent of each file. A name that ends in -gated is of a model whose owner wants terms
    accepted.
    """

    folder: Path
    revision = "abc"
    asked: list[str]
    sent: dict[str, int]

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        place, _, name = path.rpartition("/")
        if "-gated" in path:
            self.refuse(403, "GatedRepo")
        elif path.removeprefix(f"/api/models/{NAME}") in ("", "/revision/main", f"/revision/{self.revision}"):
            files = [{"rfilename": file.name} for file in self.folder.iterdir()]
            self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode())
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            files = [{"type": "file", "path": file.name, "size": file.stat().st_size} for file in self.folder.iterdir()]
            self.answer(json.dumps([file | {"oid": "0"} for file in files]).encode())
        elif place.startswith(f"/{NAME}/resolve/") and (self.folder / name).is_file():
            self.answer((self.folder / name).read_bytes(), name)
        else:
            self.refuse(404, "RevisionNotFound" if NAME in path else "RepoNotFound")

    do_HEAD = do_GET

    def refuse(self, code, why):
        self.send_response(code)
        self.send_header("X-Error-Code", why)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content, name=""):
        etag = hashlib.sha256(content).hexdigest()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span:
            content = content[int(span[1]) : int(span[2]) + 1]
        self.send_response(206 if span else 200)
        for key, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{etag}"')):
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.sent[name] = self.sent.get(name, 0) + len(content)
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Let the hub's client of this process ask the hub at `endpoint`."""
    read_from_the_environment = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
    }
    for name, value in read_from_the_environment.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


@contextmanager
def hub(folder: Path) -> Iterator[tuple[type[Hub], str]]:
    """The hub with the model in `folder`, as someone/model at the revision abc; what it was asked, and its address."""
    handler = type("Asked", (Hub,), {"folder": folder, "asked": [], "sent": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
