"""What a job runs on: threads, memory, and a description for the record."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from armor.core.errors import ArmorError
from armor.core.typed import Typed
from armor.core.version import __version__

__all__ = [
    "USABLE",
    "Machine",
    "current_machine",
    "device_memory_bytes",
    "enough_memory",
    "host_memory_bytes",
    "peak_memory_bytes",
    "resident_memory_bytes",
    "set_threads",
    "versions",
]


class Machine(Typed):
    """What a job ran on."""

    processor: str
    """The processor's name, on x86 with family and model."""
    cores: int | None
    """Cores of the machine."""
    threads: int
    """Threads that the job computed with."""
    device: str
    """cpu, or the card's name."""
    versions: dict[str, str]
    """Versions of Python, of this package and of those that it computes with."""


USABLE = 0.95
"""Of the memory that a model may be loaded into: the rest is for what no header tells."""


def set_threads(count: int) -> None:
    """Let this process compute with `count` threads and no more. Call it before torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    # A thread that waits at an OpenMP barrier must sleep, not spin: jobs side by side would starve each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Tokenizers fork a thread for every core, whatever OpenMP was told.
    os.environ["RAYON_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)


def peak_memory_bytes(device: str = "cpu") -> int:
    """The most memory this process has held so far: resident on the host, or allocated by torch on a CUDA device."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage counts what the parent held before this program replaced it
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def device_memory_bytes(device: str) -> int | None:
    """All the memory of a CUDA device; None for the host, where jobs share and swap."""
    if not str(device).startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def host_memory_bytes(root: Path = Path("/")) -> int:
    """All the memory that this process may take on the host: the machine's, or what its control groups allow.

    These are SLURM's and a container's way to set a limit, and are looked up in the file system `root`.
    """
    import psutil

    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError, StopIteration):  # no Linux, or control groups of version 1
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = root / "sys/fs/cgroup" / next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
        for file in (folder / "memory.max" for folder in (own, *own.parents)):
            if file.is_file() and (limit := file.read_text().strip()) != "max":
                limits.append(int(limit))
    return min(limits)


@contextlib.contextmanager
def enough_memory(where: str, device: str, *remedies: str) -> Iterator[None]:
    """Say in one line, an ArmorError, what ran out of the memory of `device` and what to do: `remedies`, or another."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        named = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not named and "allocate memory" not in str(error):  # torch's words on a CPU
            raise
        other = (
            "give the job more, or take fewer jobs at a time" if device == "cpu" else "compute with --gpus 0 (gpu=0)"
        )
        raise ArmorError(f"{where}: out of memory on {device}; {', or '.join([*remedies, other])}") from error


def resident_memory_bytes() -> int:
    """The host memory this process holds now."""
    import psutil

    return psutil.Process().memory_info().rss


def _processor(root: Path = Path("/")) -> str:
    """Its name, and on x86 its family and model: a virtual machine's name may say no more than "AMD EPYC"."""
    try:
        first = (root / "proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    facts = dict([part.strip() for part in line.split(":", 1)] for line in first.splitlines() if ":" in line)
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of those that it computes with."""
    packages = ("torch", "transformers", "safetensors", "numpy")
    own = {"python": platform.python_version(), "armor": __version__}
    return own | {name: version(name) for name in packages}


def current_machine(device: str = "cpu") -> Machine:
    """What this process runs on and computes with."""
    import torch

    return Machine(
        processor=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if str(device).startswith("cuda") else "cpu",
        versions=versions(),
    )
