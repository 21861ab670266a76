"""Finding the distiller's state in a checkpoint that the Trainer resumes from."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .distiller import PREFIX

SIDE_FILE = "distiller.safetensors"
"""Distiller state beside a checkpoint whose model file does not hold it (adapters)."""


def resumed_folder() -> Path | None:
    """The checkpoint that the Trainer's loop above is resuming from."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop":
            folder = frame.f_locals.get("resume_from_checkpoint")
            return Path(folder) if isinstance(folder, str | Path) else None
        frame = frame.f_back  # type: ignore[assignment]  # None at the top ends the loop
    return None


def read_state(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as tensors:
        keys = [key for key in tensors.keys() if file.name == SIDE_FILE or key.startswith(PREFIX)]  # noqa: SIM118
        return {key.removeprefix(PREFIX): tensors.get_tensor(key) for key in keys}


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The distiller's entries of a checkpoint: beside its model file, or in it, sharded or not."""
    found: dict[str, Tensor] = {}
    for file in (folder / SIDE_FILE, *sorted(folder.glob("model*.safetensors"))):
        found |= read_state(file) if file.exists() else {}
    return found
