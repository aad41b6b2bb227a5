"""Run a server that must not outlive whoever starts it: `python -m armor.serve.watch COMMAND...`, with a pipe to read.

Nothing comes through the pipe. Its other end is closed when the starter closes it or ends, however it ends. Then the
server is asked to end, and all that is left of its processes 20 seconds later is killed: vLLM does not listen while its
engine starts. So the server has a process group of its own. What a server that ends leaves behind is killed too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

__all__ = ["watch"]

PATIENCE = 20
"""Seconds from the request to end until the end by force."""


def watch(command: Sequence[str], pipe: int = 0) -> int:
    """Run `command` until it ends or `pipe` does; the exit status, negative for a signal."""
    for number in (signal.SIGINT, signal.SIGTERM):  # to a whole group: the starter's end is what counts
        signal.signal(number, lambda *_: None)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end() -> None:
        os.read(pipe, 1)
        _tell(server, signal.SIGTERM)
        time.sleep(PATIENCE)
        _tell(server, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
    code = server.wait()
    _tell(server, signal.SIGKILL)
    return code


def _tell(server: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


if __name__ == "__main__":
    sys.exit(watch(sys.argv[1:]))
