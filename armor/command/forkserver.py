"""A fork server: jobs that need not import torch, transformers and this package, which takes longer than a small layer.

`start` begins a process that imports them once and from then on only forks. The environment tells the command of a job
where the server is. The command hands over its arguments, environment, folder and standard streams (`run_there`), and
ends as the fork ends. If it is killed, it takes the fork with it. So a run goes on with the code that it began with,
and the hashes of the code in its records are those of then. Where no server listens for this Python the command does
the work itself: on a cluster, in a conda environment of the rule's own, after a kill. The price: the job is no child of
the shell, so Snakemake does not see its memory. So this is for the stages whose record tells that; the table of jobs
(`armor.run.stages`) says which. Linux only, and only where no GPU is visible: never tried with CUDA.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import importlib
import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys

__all__ = ["run_there", "start"]

VARIABLE = "ARMOR_FORK_SERVER"
"""The environment's variable with the server's secret and the commands that it does: these need not read the table."""
FIRST = ("torch", "armor.command.cli")
"""Imported first; then the entry of `factorize`, which has the most jobs, transformers, and the other entries."""


def start() -> None:
    """Start the server for all commands that this process will start, where there can be one; it ends with it."""
    from armor.execution.devices import visible_devices  # not for each command
    from armor.run.stages import STAGES

    if not (sys.platform == "linux" and hasattr(os, "pidfd_open")) or visible_devices():
        return
    os.environ[VARIABLE] = " ".join([secrets.token_hex(16), *(stage for stage, row in STAGES.items() if row.forked)])
    ends, _ = os.pipe()  # the other end is closed when this process ends, however it ends
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(_address())
        listening.listen(128)
        command = [sys.executable, "-m", __name__, str(listening.fileno())]
        # Libraries read these when they are loaded. A thread that waits at an OpenMP barrier must sleep, as in
        # armor.execution.machine; OpenBLAS, which nothing here computes with, must not have threads when it forks; a
        # job's progress bars and warnings stay out of its log, as in armor.command.cli.
        environment = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
        subprocess.Popen(command, stdin=ends, pass_fds=[listening.fileno()], env=environment)
    os.close(ends)


def run_there() -> int | None:
    """Let the server run this process's command; the exit status, negative for a signal, or None without a server."""
    _, *stages = os.environ.get(VARIABLE, "").split() or [""]
    if sys.argv[1:2] not in ([stage] for stage in stages):
        return None
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(_address())
        except OSError:
            return None
        request = json.dumps({"arguments": sys.argv, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(connection, [struct.pack("I", len(request))], [0, 1, 2])
        connection.sendall(request)
        answer = connection.recv(4)
    if not answer:
        print("armor: error: the process that watched this job was killed; run it again", file=sys.stderr)
        return 1
    return struct.unpack("i", answer)[0]


def _address() -> str:
    """Where the server of this run and this Python listens: a name without a file, so nothing can be left over."""
    file = os.stat(sys.executable)  # the same path in a container is another Python
    python = json.dumps([os.environ[VARIABLE], sys.prefix, file.st_dev, file.st_ino, os.environ.get("PYTHONPATH")])
    return f"\0armor-{hashlib.sha256(python.encode()).hexdigest()}"


def _serve(listening: socket.socket) -> None:
    """Answer commands until standard input ends, and import while there are none.

    Returns in each fork that is to do a command's work.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; Snakemake's end is what counts
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a supervisor
    modules = preloaded()
    while sys.stdin not in (ready := select.select([listening, sys.stdin], [], [], 0 if modules else None)[0]):
        if listening in ready:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                return _supervise(connection)
            connection.close()
        else:
            with contextlib.suppress(ImportError):  # the job that needs it says what is missing
                _prepare(modules.pop(0))
            gc.collect()
            gc.freeze()  # the garbage collector shall not touch, and so copy, what all forks share
    os._exit(0)


def preloaded() -> list[str]:
    """What the server imports, in this order; jobs that come meanwhile do not wait for all."""
    from armor.run.stages import STAGES

    entries = [row.entry for stage, row in STAGES.items() if row.forked and stage != "factorize"]
    return [*FIRST, STAGES["factorize"].entry, "transformers", "transformers.modeling_utils", *entries]


def _prepare(module: str) -> None:
    importlib.import_module(module)
    if module.startswith("armor.") and module not in FIRST:
        from armor.execution.fingerprint import code_hash

        code_hash(module)  # remembered: it is that of the code that was imported


def _supervise(connection: socket.socket) -> None:
    """Fork the job, and tell its command how it ended; or end it when its command was killed. Returns in the job."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    head, streams, *_ = socket.recv_fds(connection, 4, 3)
    if user != os.getuid() or len(head) != 4:
        os._exit(1)
    with connection.makefile("rb") as file:
        request = json.loads(file.read(struct.unpack("I", head)[0]))
    job = os.fork()
    if job == 0:
        connection.close()
        return _become(request, streams)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    ended = os.pidfd_open(job)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(job, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(struct.pack("i", status))
    os._exit(0)


def _become(request: dict, streams: list[int]) -> None:
    """Make this process what the command's own would be."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    from armor.command.cli import main

    try:
        main()
    except SystemExit as end:  # without Python's own end, which frees every object of all modules
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)
