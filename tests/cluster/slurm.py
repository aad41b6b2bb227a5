"""A real SLURM of one node, on loopback, with everything it writes in one folder: for tests, not for work.

`with cluster(folder) as environment` starts controller and node daemon and stops them in the end; commands such as
sbatch reach it with that environment. The node pretends to have 8 cores and 4 GPUs, which are character devices as
/dev/null is, so that SLURM hands them out and sets CUDA_VISIBLE_DEVICES. There is no authentication: nothing but
loopback must reach it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CONFIGURATION = """
ClusterName=armor
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
KillWait=2
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

HANGS = 600
"""Seconds after which a condition will not come true any more, on however busy a machine."""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} here (Debian: apt-get install slurmctld slurmd slurm-client)"
    if os.getuid() != 0:
        return "only root can start it, for it makes device files and runs a node daemon; run sudo make test-cluster"
    return None


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster whose files are in `folder`; yields the environment in which commands and Snakemake reach it."""
    for name in ("etc", "run", "log", "state", "spool", "gpu", "bin"):
        (folder / name).mkdir()
    for index in range(4):
        os.mknod(folder / f"gpu/nvidia{index}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (folder / "etc/slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=_free_ports(2)))
    (folder / "etc/gres.conf").write_text(
        f"AutoDetect=off\nNodeName=localhost Name=gpu File={folder}/gpu/nvidia[0-3]\n"
    )
    (folder / "etc/cgroup.conf").write_text("CgroupPlugin=disabled\n")
    # Snakemake's plugin takes SLURM's variables out of its jobs, and with them the way to this configuration.
    srun = folder / "bin/srun"
    srun.write_text(f'#!/bin/sh\nexec env SLURM_CONF={folder}/etc/slurm.conf {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    environment = os.environ | {
        "SLURM_CONF": f"{folder}/etc/slurm.conf",
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }
    daemons: list[subprocess.Popen] = []
    try:
        for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "localhost"]):
            with open(folder / f"log/{command[0]}.out", "wb") as output:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
                )
        _wait(lambda: "idle" in _answer(["sinfo", "--noheader", "--format=%T"], environment), HANGS, folder)
        yield environment
    finally:
        if len(daemons) == 2:
            _answer(["scancel", "--user=root"], environment)
            with contextlib.suppress(TimeoutError):
                _wait(lambda: not _answer(["squeue", "--noheader"], environment), HANGS, folder)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(HANGS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answer(command: list[str], environment: dict[str, str]) -> str:
    """What a SLURM command prints; empty if it fails or hangs, as it does before the controller is there."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10).stdout
    return ""


def _wait(condition, seconds: float, folder: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "".join(file.read_text(errors="replace")[-2000:] for file in sorted(folder.glob("log/*")))
            raise TimeoutError(f"SLURM in {folder} is not ready after {seconds} s:\n{logs}")
        time.sleep(0.2)
