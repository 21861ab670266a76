"""Environments with the packages that are compared with, as `ci/peers` makes them, and functions that run in one.

`python -m hf_compress_evaluation.bench._peers FILE` calls what is pickled on its standard input and pickles what it
gives into the file.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_compress.errors import ConfigurationError

FOLDER = "HF_COMPRESS_PEERS"
"""Environment variable: where the environments are, if not where `ci/peers` makes them."""


def python_of(peer: str) -> Path:
    """Python of the environment with that package.

    Raises:
        ConfigurationError: if there is none.
    """
    usual = Path(tempfile.gettempdir()) / f"hf-compress-peers-{os.getuid()}"
    python = Path(os.environ.get(FOLDER, usual)) / peer / "bin" / "python"
    if not python.exists():
        raise ConfigurationError(
            f"there is no environment with {peer} ({python}): run `ci/peers {peer}` first, or name the folder of all "
            f"in {FOLDER}."
        )
    return python


def plain() -> dict[str, str]:
    """This process's environment variables without what would bring its packages into the other environment."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run_in(peer: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What a function of a module gives in the peer's environment, in a process of its own.

    Raises:
        ConfigurationError: if there is no environment, or the function fails in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        command: list[str | Path] = [python_of(peer), "-m", __name__, result]
        asked = pickle.dumps((function, given, named))
        done = subprocess.run(command, input=asked, capture_output=True, env=plain())
        if done.returncode:
            told = done.stderr.decode(errors="replace").strip()[-1500:]
            raise ConfigurationError(f"it failed in the environment with {peer}; `ci/peers {peer}` mends it:\n{told}")
        return pickle.loads(result.read_bytes())


def versions_of(peer: str, names: Sequence[str]) -> dict[str, str]:
    """Of packages in the peer's environment."""
    code = f"from importlib.metadata import version; print(*map(version, {[*names]!r}))"
    done = subprocess.run([python_of(peer), "-c", code], capture_output=True, text=True, env=plain(), check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


if __name__ == "__main__":
    asked, given, named = pickle.load(sys.stdin.buffer)
    Path(sys.argv[1]).write_bytes(pickle.dumps(asked(*given, **named)))
