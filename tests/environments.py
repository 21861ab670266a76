"""Environments beside the project's own, in which `ci/serving` and `ci/cards` run what a reader copies."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "ci" / "constraints.txt"
MARK = "hf-compress-installed"
"""File of an environment that says what was asked for, so that it is kept while that stays the same."""
VERSIONS = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"


def place(name: str) -> Path:
    """Where a script keeps its environments between runs, below the folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"hf-compress-{name}-{os.getuid()}"


def make(folder: Path, packages: Sequence[str], *, keep: bool = False) -> Path:
    """An environment with these packages and what they need, without pip: its Python.

    Args:
        folder: emptied first.
        packages: as pip takes them.
        keep: leaves an environment of an earlier call with the same packages, dependencies and constraints as it is.
    """
    python, mark = folder / "bin" / "python", folder / MARK
    wanted = hashlib.sha256("\n".join([*packages, _text(ROOT / "pyproject.toml"), _text(CONSTRAINTS)]).encode())
    if keep and mark.is_file() and _text(mark) == wanted.hexdigest():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    install(python, *packages)
    mark.write_text(wanted.hexdigest(), encoding="utf-8")
    return python


def install(python: Path, *arguments: str | Path) -> None:
    """`pip install` into another environment, within the project's constraints."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "-c", CONSTRAINTS]
    subprocess.run([*pip, *arguments], check=True)


def installed(python: Path) -> dict[str, str]:
    """The version of each distribution in an environment."""
    found = subprocess.run([python, "-c", VERSIONS], stdout=subprocess.PIPE, text=True, check=True)
    return dict(sorted(each.split("==") for each in found.stdout.split()))


def describe(python: Path) -> dict[str, Any]:
    """How large an environment is, in MB of 10**6 bytes, and what is in it."""
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    return {"megabytes": round(size / 1e6, 1), "packages": installed(python)}


def wheel(folder: Path, extra: str) -> Path:
    """An environment with the wheel of this checkout and one extra, kept between runs; the wheel is always built anew.

    Its dependencies are installed again only where they or the constraints have changed.
    """
    built = folder / "wheel"
    for old in built.glob("*.whl"):
        old.unlink()
    _quiet([sys.executable, "-m", "build", "--wheel", "--outdir", built, ROOT])
    (path,) = built.glob("*.whl")
    python = make(folder / extra, [f"{path}[{extra}]"], keep=True)
    install(python, "--no-deps", "--force-reinstall", path)
    return python


def optimum() -> Path:
    """The Python of the environment in which `ci/optimum` runs; it is made where it is not there."""
    done = subprocess.run([ROOT / "ci" / "peers", "optimum-onnx"], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.split()[-1])


def _quiet(command: Sequence[str | Path]) -> None:
    """Runs a command whose output matters only where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
