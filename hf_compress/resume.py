"""Finding the distiller's state in a checkpoint that the Trainer resumes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import files, foreign
from .distiller import PREFIX
from .errors import ResumeError
from .taps import unwrap

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
    with files.safetensors(file) as tensors:
        keys = [key for key in tensors.keys() if file.name == SIDE_FILE or key.startswith(PREFIX)]  # noqa: SIM118
        return {key.removeprefix(PREFIX): tensors.get_tensor(key) for key in keys}


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The distiller's entries of a checkpoint: beside its model file, or in it, sharded or not."""
    found: dict[str, Tensor] = {}
    for file in (folder / SIDE_FILE, *sorted(folder.glob("model*.safetensors"))):
        found |= read_state(file) if file.exists() else {}
    return found


def reload_renamed(student: nn.Module, folder: Path) -> bool:
    """Loads a checkpoint's weights by the model's own loader where its files name them otherwise than the model does.

    transformers writes some architectures (ViT among them) under their older names and renames when it loads a folder;
    a Trainer that resumes looks for the newer names, finds none, and goes on with the weights that it began with.

    Returns:
        whether that was so, and has been put right.

    Raises:
        ResumeError: if the checkpoint has no weights for a part of the model.
    """
    model: Any = unwrap(student)
    parts = sorted(folder.glob("model*.safetensors"))
    if model is not student or not parts or not hasattr(model, "from_pretrained"):
        return False
    written: set[str] = set()
    for file in parts:
        with files.safetensors(file) as tensors:
            written |= set(tensors.keys())
    own = {key for key in model.state_dict() if not key.startswith(PREFIX)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if own - written <= tied:
        return False
    made: Any = type(model)
    with foreign.refusing(folder, "to resume from", "Resume from another checkpoint."):
        loaded, report = made.from_pretrained(folder, output_loading_info=True, **foreign.SAFE)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ResumeError(
            f"checkpoint {folder.name} has no weights for {missing[:3]} ({len(missing)} in all). Resume from another."
        )
    model.load_state_dict(loaded.state_dict(), strict=False)
    return True
