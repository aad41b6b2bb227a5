"""Serving: the plugin by which vLLM runs packed checkpoints, and the commands that start a server or a chat."""

from __future__ import annotations

from armor.execution.log import log

__all__ = ["VERSIONS", "register"]

VERSIONS = ("0.32",)
"""The versions of vLLM that the plugin was tested with: their first two numbers."""


def register() -> None:
    """Teach vLLM the format of packed checkpoints: its entry point, called in each of its processes, even twice."""
    from vllm import __version__ as version  # pyright: ignore[reportMissingImports]  it has an environment of its own

    if ".".join(version.split(".")[:2]) in VERSIONS:
        import torch

        import armor.serve.plugin  # noqa: F401  registers itself

        # vLLM's attention on a CPU with AMX multiplies tiles, for which Linux must be asked, or it kills the process. A
        # dense model's first product asks, by oneDNN; a packed model's may need no tiles.
        torch.cpu._init_amx()
    else:
        known = " or ".join(f"{known}.*" for known in VERSIONS)
        log.error("armor: error: vLLM %s is installed, expected %s; packed checkpoints are not served", version, known)
