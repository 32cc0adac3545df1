"""Tests of several processes: one script run by each rank of a process group, which ends in any case."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

# On loopback: looking up this machine's own name may wait for a network that is not there.
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

_PREAMBLE = """
import datetime, faulthandler, os, sys
faulthandler.dump_traceback_later({patience}, exit=True)
import torch
torch.distributed.init_process_group(
    "gloo",
    init_method="file://" + os.environ["STORE"],
    rank=int(os.environ["RANK"]),
    world_size=int(os.environ["WORLD_SIZE"]),
    timeout=datetime.timedelta(seconds={patience}),
)
rank = torch.distributed.get_rank()
"""
# No waiting for what the interpreter does at its end: a thread of gloo's that is still there would abort the process.
_END = """
torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_ranks(script: str, world_size: int, folder: Path, timeout: float = 180, patience: float = 90) -> list[str]:
    """Run a script in ``world_size`` processes of one gloo group; it finds ``rank``, ``torch`` and ``os``.

    Args:
        script: Python; each process leaves the group after it.
        folder: the group's store and the processes' output go here.
        timeout: seconds for all of them; then they are killed and the test fails with what they said.
        patience: seconds after which a process ends itself with its stack, and a collective gives up.

    Returns:
        what each rank printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = _PREAMBLE.format(patience=patience) + textwrap.dedent(script) + _END
    environment = {**os.environ, **_LOOPBACK, "STORE": str(folder / "store"), "WORLD_SIZE": str(world_size)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    outputs = [folder / f"rank-{rank}.txt" for rank in range(world_size)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            with output.open("w") as file:
                command = [sys.executable, "-c", code]
                where = {**environment, "RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=where, stdout=file, stderr=subprocess.STDOUT))
        end = time.monotonic() + timeout
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        said = "\n".join(f"rank {rank}:\n{output.read_text()}" for rank, output in enumerate(outputs))
        raise AssertionError(f"after {timeout:.0f} s the processes have not ended; they said\n{said}") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [output.read_text() for output in outputs]
    failed = [f"rank {rank}:\n{text}" for rank, text in enumerate(texts) if processes[rank].returncode]
    assert not failed, "\n".join(failed)
    return texts
