"""The n-th write below a folder fails, whoever makes it: Python, safetensors, torch or onnx.

A library of a few lines is preloaded into one process that has imported everything; children of it are armed with n.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import datasets
import torch

SOURCE = Path(__file__).parent / "faults" / "failing_writes.c"
SPARE = 120.0


@dataclass(frozen=True)
class Ended:
    """How an operation ended whose n-th write was to fail."""

    fired: bool
    said: str
    """The error with its notes; empty: none came."""


def _child(pipe: Connection, operation: Callable[[Path], None], folder: str, n: int) -> None:
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    library.fault_arm(ctypes.c_long(n), folder.encode())
    said = ""
    try:
        operation(Path(folder))
    except BaseException as error:
        said = "".join(traceback.format_exception_only(error))
    fired = bool(library.fault_fired())
    library.fault_arm(ctypes.c_long(-1), b"")
    pipe.send((fired, said))
    pipe.close()
    os._exit(0)


class FailingWrites:
    """Runs operations, which must be functions of a module, with a fault in them."""

    def __init__(self, library: Path) -> None:
        compiler = shutil.which("cc")
        assert compiler is not None, "a C compiler is needed: cc"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        self.context = multiprocessing.get_context("forkserver")
        self.server = forkserver.ForkServer()
        self.server.set_forkserver_preload(["written"])
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        with mock.patch.dict(os.environ, environment):
            self.server.ensure_running()

    def close(self) -> None:
        """Ends the process that the children come from."""
        self.server._stop()  # type: ignore[attr-defined]  # the library's own tests end it so

    def run(self, operation: Callable[[Path], None], folder: Path, n: int) -> Ended:
        """The operation in a child, whose n-th write below the folder fails; 0: none does."""
        here, there = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(there, operation, str(folder), n))
        with (
            mock.patch.object(forkserver, "_forkserver", self.server),
            mock.patch.object(forkserver, "connect_to_new_process", self.server.connect_to_new_process),
        ):
            process.start()
        there.close()
        assert here.poll(SPARE), f"write {n}: the child did not end"
        fired, said = here.recv()
        process.join()
        return Ended(fired, said)
