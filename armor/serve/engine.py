"""Where vLLM is: in this Python's environment, or in one of its own, whose Python the variable ARMOR_VLLM names.

vLLM pins other versions of torch and transformers than the pipeline may have, so one environment seldom holds both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from armor.core.errors import ArmorError
from armor.execution.machine import versions
from armor.serve import VERSIONS

__all__ = ["PYTHON", "check_asked", "check_engine", "python_of_engine"]

PYTHON = "ARMOR_VLLM"
"""The environment's variable that names the Python of vLLM's environment."""
PROBE = """
import json
from importlib.metadata import packages_distributions, version
owners = packages_distributions()
print(json.dumps({name: version(owners[name][0]) for name in ("vllm", "armor", "torch") if name in owners}))
"""  # without an import of vLLM, which takes seconds; builds for CPUs are another distribution


def python_of_engine() -> str:
    """The Python that has vLLM, if any has."""
    return os.environ.get(PYTHON) or sys.executable


def check_engine() -> dict[str, str]:
    """The versions of vllm, armor and torch that serve.

    Raises ArmorError where there is no vLLM, where it is of a version that the plugin does not know, and where it has
    no plugin, or that of another release.
    """
    python = python_of_engine()
    try:
        found = json.loads(subprocess.run([python, "-P", "-c", PROBE], capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ArmorError(f"{PYTHON}: {python}: found no Python that runs ({error}); name that of vLLM") from None
    if "vllm" not in found:
        raise ArmorError(
            f"{python}: vLLM is not installed; install it as docs/SERVING.md says, and where it has an environment of "
            f"its own, let {PYTHON} name the Python of that"
        )
    if ".".join(found["vllm"].split(".")[:2]) not in VERSIONS:
        raise ArmorError(f"{python}: found vLLM {found['vllm']}, expected {' or '.join(VERSIONS)}; install that")
    own = versions()["armor"]
    if found.get("armor") != own:
        raise ArmorError(
            f"{python}: found armor-pipeline {found.get('armor', 'not at all')}, expected {own} beside vLLM; "
            "install it there, without dependencies"
        )
    return found


def check_asked(keys: Sequence[str]) -> None:
    """Raises ArmorError, with the first of `keys`, where these ask for an engine and `check_engine` refuses it."""
    if keys:
        try:
            check_engine()
        except ArmorError as error:
            raise ArmorError(f"{keys[0]}.engine: {error}") from None
