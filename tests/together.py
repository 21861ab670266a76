"""Two processes of one group, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any


def run(*command: Any, timeout: float = 300) -> None:
    """Runs `python *command` twice, as ranks 0 and 1, each on one thread; both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | group | own | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        errors = [one.communicate(timeout=timeout)[1] for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [0, 0], "\n".join(told[-3000:] for told in errors)
