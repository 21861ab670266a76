"""A loop of a method's own, for products that no Trainer makes: progress, and state that a killed run finds again.

A method that trains a model trains it in a Trainer. One that optimises something else (images, a data set) writes its
step as a function of a state and hands it to `run`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from . import files, foreign
from .errors import ResumeError

STATE, ABOUT = "state.pt", "loop.json"

State = dict[str, Any]
"""Tensors, numbers, texts, and lists and dictionaries of them: what `torch.load(weights_only=True)` reads back."""


class Progress(Protocol):
    """Is told how far a loop is."""

    def __call__(self, done: int, of: int, values: dict[str, float]) -> None: ...


def run(
    step: Callable[[int, State], dict[str, float]],
    state: State,
    *,
    steps: int,
    settings: dict[str, Any],
    progress: Progress | None = None,
    resume_from: Path | None = None,
    save_every: int = 100,
) -> State:
    """Calls `step` for 0 … steps - 1 and keeps its state in a folder.

    Randomness must come from the state and the number of the step, so that a run that goes on equals one that was not
    stopped.

    Args:
        step: changes the state in place; returns values to show.
        state: to begin with; replaced by what the folder holds.
        steps: how many.
        settings: what decides the result; a folder of a run with others is refused.
        progress: is called after each step.
        resume_from: folder of the state, made where it is missing; None: nothing is kept.
        save_every: steps between two saves; the last one is always saved.

    Returns:
        the state after the last step.

    Raises:
        ResumeError: if the folder is of a run with other settings, or damaged.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    done = 0
    if resume_from is not None and resume_from.is_dir():
        done, state = _load(resume_from, key)
    for number in range(done, steps):
        values = step(number, state)
        if progress is not None:
            progress(number + 1, steps, values)
        if resume_from is not None and ((number + 1) % save_every == 0 or number + 1 == steps):
            _save(resume_from, key, number + 1, state)
    return state


def _save(folder: Path, key: str, done: int, state: State) -> None:
    with files.atomic_folder(folder) as part:
        torch.save(state, part / STATE)
        about = {"done": done, "settings": key, "state": files.sha256(part / STATE)}
        files.write_text(part / ABOUT, json.dumps(about))


def _load(folder: Path, key: str) -> tuple[int, State]:
    about = files.read_json(folder / ABOUT)
    if about.get("settings") != key:
        raise ResumeError(
            f"{folder.name} holds the state of a run with other settings or data. Give another folder, or the settings "
            "that it was begun with."
        )
    if not (folder / STATE).is_file() or files.sha256(folder / STATE) != about.get("state"):
        raise ResumeError(f"{folder.name}/{STATE} is missing or damaged. Remove the folder to start afresh.")
    with foreign.refusing(folder / STATE, "to go on from", "Remove the folder to start afresh."):
        state: State = torch.load(folder / STATE, weights_only=True)
        return int(about["done"]), state
