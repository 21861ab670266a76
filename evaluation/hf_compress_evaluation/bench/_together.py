"""Processes of one group on this machine, without a launcher, which would import torch for itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def run(command: Sequence[object], processes: int = 2, *, timeout: float = 300) -> list[str]:
    """Runs `python *command` so many times, as the ranks of a group of one thread each; alone without a group.

    Args:
        command: what follows the interpreter.
        processes: at least 1.
        timeout: seconds for each.

    Returns:
        what each printed.

    Raises:
        ChildProcessError: with what they said, unless all end well.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    running = []
    for rank in map(str, range(processes)):
        place = group | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
        running.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=os.environ | own | place,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told = [one.communicate(timeout=timeout) for one in running]
    finally:
        for one in running:
            one.kill()
    if any(one.returncode for one in running):
        raise ChildProcessError("\n".join(errors[-3000:] for _, errors in told))
    return [output for output, _ in told]
