"""Runs a snippet of Python as a client of the test hub, in a process of its own.

huggingface_hub, transformers and evaluate read their endpoint when they are imported, so a process that has imported
them cannot be pointed at another hub. `HfApi(endpoint=...)` needs no child.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KEPT = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")


def environment(url: str, home: Path, token: str | None) -> dict[str, str]:
    """What a child needs to see that hub alone, with caches below `home` and no proxy."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    one = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    return (
        kept
        | one
        | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HOME": str(home)}
        | ({"HF_TOKEN": token} if token else {})
    )


def run_client(code: str, *, url: str, home: Path, token: str | None = None, timeout: float = 120.0) -> str:
    """Standard output of the snippet.

    Raises:
        AssertionError: if it fails, with everything that it printed.
        subprocess.TimeoutExpired: after `timeout` seconds.
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(url, home, token),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
