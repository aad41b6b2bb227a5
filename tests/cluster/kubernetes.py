"""What Snakemake needs of Kubernetes' API, on loopback: a job that is created runs as a process, in its own folder.

There is no image: a pod's command finds this project's Python, and a `pip` that has nothing to install.
`with kubernetes(folder) as (environment, jobs)` gives what a client needs, and the jobs as they come in.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def kubernetes(folder: Path) -> Iterator[tuple[dict[str, str], list[dict]]]:
    """The environment for a client, and the list of all jobs that were created, as their creator described them."""
    jobs: list[dict] = []
    pods: dict[str, subprocess.Popen] = {}
    secrets: dict[str, str] = {}

    def create(kind: str, body: dict) -> dict:
        if kind == "secrets":
            secrets.update({key: base64.b64decode(value).decode() for key, value in (body.get("data") or {}).items()})
        if kind == "jobs":
            jobs.append(body)
            name, (container,) = body["metadata"]["name"], body["spec"]["template"]["spec"]["containers"]
            place = folder / name
            place.mkdir(parents=True)
            own = {v["name"]: secrets[v["valueFrom"]["secretKeyRef"]["key"]] for v in container.get("env") or ()}
            with open(place / "pod.log", "w") as log:
                command = [*container["command"], *container["args"]]
                kept = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
                pods[name] = subprocess.Popen(command, cwd=place, env=kept | own, stdout=log, stderr=log)
        return body

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: dict, status: int = 200) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(create(self.path.rsplit("/", 1)[-1], body), 201)

        def do_GET(self) -> None:
            if "/pods" in self.path:
                return self.answer({"kind": "PodList", "items": []})
            name = self.path.split("/")[-2]  # .../jobs/NAME/status
            ended = pods[name].poll()
            state = {None: {"active": 1}, 0: {"succeeded": 1}}.get(ended, {"failed": 1})
            self.answer({"metadata": {"name": name}, "status": state})

        def do_DELETE(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer({"kind": "Status", "status": "Success"})

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/pip").write_text("#!/bin/sh\n")
    (folder / "bin/pip").chmod(0o755)
    config = {
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "me", "user": {"token": "none"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield {"KUBECONFIG": str(folder / "kubeconfig")}, jobs
    finally:
        server.shutdown()
        for pod in pods.values():
            pod.kill()
            pod.wait()
