"""The `armor` command: its work is done in a fork of the run's server, where there is one, or else here."""

from __future__ import annotations

import os
import sys

from armor.command.forkserver import run_there
from armor.core.errors import ArmorError

__all__ = ["main"]


def main() -> None:
    """Do the command of this process, and end it."""
    status = run_there()
    if status is None:
        try:
            from armor.command.cli import main
        except ArmorError as error:  # of a method's file, which is read before there is a command
            if "--debug" in sys.argv:
                raise
            sys.exit(f"armor: error: {error}")
        main()
    elif status < 0:  # the job was killed: so is its command, for whoever waits for it
        os.kill(os.getpid(), -status)
    sys.exit(status)
