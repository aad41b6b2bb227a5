"""The exceptions that a user is meant to read.

The command line prints its message as a single line and exits with code 1; a traceback appears only with --debug.
A message names the file, the module, what was found, what was expected and what to do.
"""

from textwrap import shorten


class ArmorError(ValueError):
    """Bad input or a bad environment, explained in one line."""


class DoesNotFit(ArmorError):
    """A model that a device has no room for: where there is another way than to load it whole, that is tried."""


def one_line(error: Exception) -> str:
    """What a library's error says, in one line of at most 300 characters; its class if it says nothing."""
    return shorten(str(error), 300, placeholder=" ...") or type(error).__name__
