"""Runs programs where neither torch nor transformers can be imported, and compares what they found.

Usage: bare.py FOLDER...   each with program.py and expected.npz, which holds variables of the program by name

Prints one line of JSON: for each folder's name the largest difference. Nothing but numpy is needed here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4


def main(folders: list[str]) -> None:
    for name in ("torch", "transformers"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        sys.exit(f"{name} can be imported, so the programs are not shown to do without it")
    print(json.dumps({folder.name: difference(folder) for folder in map(Path.resolve, map(Path, folders))}))


def difference(folder: Path) -> float:
    """The largest difference between numbers; AssertionError beyond `TOLERANCE`, or where a text differs."""
    os.chdir(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = runpy.run_path("program.py")
    assert said.getvalue().strip(), "it prints nothing"
    expected = np.load("expected.npz")
    largest = 0.0
    for name in expected.files:
        ours, theirs = np.asarray(found[name]), expected[name]
        assert ours.shape == theirs.shape, (folder.name, name, ours.shape, theirs.shape)
        if theirs.dtype.kind != "f":
            assert (ours == theirs).all(), (folder.name, name, ours, theirs)
        else:
            largest = max(largest, float(np.abs(ours - theirs).max()))
            assert largest <= TOLERANCE, (folder.name, name, largest)
    return largest


if __name__ == "__main__":
    main(sys.argv[1:])
