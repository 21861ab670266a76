"""A training process that is killed: at a random moment of the clock, or while it saves.

Children are forked from one process that has imported everything, so that a kill costs a second and not ten.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from ctypes import c_int
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import toys
from prepared import PREPARED
from torch import nn
from transformers import Trainer

from hf_compress import testing
from hf_compress.checkpoints import MANIFEST

STEPS = 14
SPARE = 60.0
"""Seconds after which a child that has not ended is a failure."""
NETWORK = "a network of its own"
"""Beside the names of methods: a toy with one, as ours with networks do not run on text."""

STATES = {
    "buffer": "taid-text-generation",
    "learned part": "features-text-classification",
    "own network": NETWORK,
    "mixture": "ddk-text-generation",
}
"""A method for each kind of state."""


def trained(folder: Path, name: str) -> Trainer:
    """A Trainer of a method of the registry, that saves at every step, with dropout and shuffled rows."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "optim": "adamw_torch",
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
    }
    if name == NETWORK:
        made, _ = toys.run(folder, toys.WithAdam(), **settings)
    else:
        method, _, task = name.partition("-")
        case = replace(testing.Case(method, task), **PREPARED.get(method, {}))
        made, _ = testing.trainer(case, folder, data=testing.rows(task, 24), **settings)
    for module in made.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return made


def child(folder: str, name: str, saving: c_int) -> None:
    """Trains to the end, from the newest whole checkpoint where there is one, and writes losses and weights."""
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    made = trained(Path(folder), name)
    save = made._save_checkpoint
    on_save = made.callback_handler.on_save

    def saved(*args: Any, **kwargs: Any) -> None:
        saving.value = 1
        save(*args, **kwargs)

    def after(*args: Any, **kwargs: Any) -> Any:
        found = on_save(*args, **kwargs)
        saving.value = 0
        return found

    made._save_checkpoint = saved
    made.callback_handler.on_save = after
    begun = any(Path(folder).glob(f"checkpoint-*/{MANIFEST}"))
    made.train(resume_from_checkpoint=begun)
    logs = [entry for entry in made.state.log_history if "distill_loss" in entry or "loss" in entry]
    losses = [{k: v for k, v in entry.items() if "loss" in k or "distill" in k} for entry in logs]
    result = {"losses": losses, "weights": testing.weights_hash(made.model), "resumed": begun}
    (Path(folder) / "result.json").write_text(json.dumps(result))


class Killing:
    """Starts children and kills them."""

    def __init__(self, count: Callable[..., None]) -> None:
        self.count = count
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["killing"])
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"):
            forkserver.ensure_running()  # it finds what it is to import by its environment alone

    def start(self, folder: Path, name: str) -> tuple[Any, c_int]:
        folder.mkdir(parents=True, exist_ok=True)
        saving = self.context.Value(c_int, 0, lock=False)  # a child that is killed would keep the lock for ever
        process = self.context.Process(target=child, args=(str(folder), name, saving))
        process.start()
        return process, saving

    def result(self, folder: Path, name: str) -> dict[str, Any]:
        """Of a child that ends by itself."""
        process, _ = self.start(folder, name)
        process.join(SPARE)
        assert process.exitcode == 0, f"{name}: the child ended with {process.exitcode}"
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return found

    def kill(self, folder: Path, name: str, draw: random.Random, *, in_a_save: bool) -> None:
        """Kills a child after its next checkpoints: at a random moment, or one within a save."""
        before = {path.name for path in folder.glob("checkpoint-*")}
        process, saving = self.start(folder, name)
        enough = draw.randint(1, 3)
        deadline = time.monotonic() + SPARE
        while len({path.name for path in folder.glob("checkpoint-*")} - before) < enough:
            assert process.is_alive(), f"{name}: the child ended with {process.exitcode} before it was killed"
            assert time.monotonic() < deadline, f"{name}: no checkpoint"
            time.sleep(0.001)
        if in_a_save:
            while not saving.value and process.is_alive():
                pass
            time.sleep(draw.random() * 0.02)
        else:
            time.sleep(draw.random() * 0.1)
        end = process.kill if in_a_save else draw.choice([process.kill, process.terminate])
        end()
        process.join()
        if process.exitcode in (-signal.SIGKILL, -signal.SIGTERM):  # else it had come to its end
            self.count("killed runs", "in a save" if saving.value else "between saves")
