"""The `armor` command: all sub-commands, and one line for whatever goes wrong."""

from __future__ import annotations

import atexit
import gc
import sys
import traceback

import armor.command.stages
import armor.command.tools  # noqa: F401  both register their sub-commands
from armor.command.common import app
from armor.core.errors import ArmorError
from armor.run.status import ERROR


def _line(error: Exception) -> str:
    """What is wrong, in one line; an OSError of Python's own begins with a number, and ends with the file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    """The `armor` command: an error's last line says what is wrong; a traceback before it only if nobody foresaw it."""
    # Python ends with a search for garbage among all that torch's modules hold, though all goes with the process.
    atexit.register(gc.freeze)
    try:
        app(standalone_mode=True, prog_name="armor")
    except Exception as error:
        foreseen = isinstance(error, ArmorError | OSError | MemoryError)
        if getattr(app, "debug", False) or not foreseen:
            traceback.print_exc()
        print(f"{ERROR}{'' if foreseen else f'{type(error).__name__}: '}{_line(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
