"""What a Trainer logged while it trained: its `trainer_state.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import files
from .errors import ForeignFileError

FILE = "trainer_state.json"


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders in a folder, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,18}", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def find(folder: Path) -> Path | None:
    """The Trainer's state in a model folder, or in the newest checkpoint of it."""
    if files.is_file(folder / FILE):
        return folder / FILE
    return next((path / FILE for path in checkpoints(folder) if files.is_file(path / FILE)), None)


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of the log, in the order in which they were made; values may be NaN or infinite.

    Raises:
        ForeignFileError: if the file is missing, malformed, or no Trainer's state.
    """
    log = files.read_json(path, finite=False).get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise ForeignFileError(path, "has no log_history.", f"Give the {FILE} that the Trainer wrote.")
    return log
