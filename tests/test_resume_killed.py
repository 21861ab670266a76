"""A training process that is killed at a random moment, and continued, is the run that was not killed.

Run as a script it is that process: it trains, resuming from the last checkpoint that is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.general.features import Features
from hf_compress_plugins.language.taid import TAID
from stub import arguments
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_compress import DistillCallback
from hf_compress.testing import collate, models, rows, weights_hash

STEPS, TASKS = 40, ("text-classification", "text-generation")


class Slowly(TrainerCallback):
    """Writes each step's number, so that the parent knows where the run is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(state.global_step, flush=True)
        time.sleep(0.02)


def _train(folder: Path, task: str) -> None:
    """Trains to the end and writes losses and weights; `folder` may hold checkpoints of a killed run."""
    student, teacher = models(task)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    trainer = Trainer(
        model=student,
        args=arguments(
            folder / "run",
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            optim="adamw_torch",
            learning_rate=3e-3,
            lr_scheduler_type="linear",
            train_sampling_strategy="random",
            save_strategy="steps",
            save_steps=1,
            save_total_limit=3,
        ),
        train_dataset=Dataset.from_list(rows(task, 24)),
        data_collator=collate,
        callbacks=[DistillCallback(teacher, [TAID(alpha=0.1, beta=0.5), Features()]), Slowly()],
    )
    trainer.train(resume_from_checkpoint=last_whole(folder / "run"))
    history = [entry for entry in trainer.state.log_history if "distill_loss" in entry]
    result = {"losses": [[e["step"], e["loss"], e["distill/taid"], e["distill/features"]] for e in history]}
    (folder / "result.json").write_text(json.dumps(result | {"weights": weights_hash(student)}))


def last_whole(folder: Path) -> str | None:
    """The last checkpoint that was written to its end: the Trainer writes its state last."""

    def whole(checkpoint: str) -> bool:
        try:
            return bool(json.loads((Path(checkpoint) / "trainer_state.json").read_text()))
        except (FileNotFoundError, ValueError):
            return False

    left = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    while left is not None and not whole(left):
        Path(left).rename(folder / f"torn-{Path(left).name}")
        left = get_last_checkpoint(str(folder))
    return left


def _start(folder: Path, task: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), task],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_run_killed_at_random_moments_ends_as_the_run_that_was_not(task: str, tmp_path: Path) -> None:
    """State in buffers (taid) and learned parts (features), SIGKILL twice, each time after a random step."""
    draw = random.Random(hashlib.sha256(task.encode()).digest())
    (tmp_path / "whole").mkdir()
    whole = _start(tmp_path / "whole", task)
    killed_at = []
    for first, last in ((4, STEPS // 2), (STEPS // 2, STEPS - 2)):
        process = _start(tmp_path, task)
        moment = draw.randint(first, last)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit() and int(line) >= moment:
                break
        time.sleep(draw.random() * 0.05)  # in the middle of a step, or of a save
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed_at.append(moment)
    steps = []
    for process in (whole, _start(tmp_path, task)):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        steps.append([int(line) for line in output.splitlines() if line.isdigit()])
    assert steps[0] == list(range(1, STEPS + 1))
    assert steps[1] == list(range(steps[1][0], STEPS + 1))
    assert steps[1][0] >= killed_at[-1], "the run started afresh"
    expected = json.loads((tmp_path / "whole" / "result.json").read_text())
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(expected["losses"]) == STEPS
    assert found["losses"] == expected["losses"], f"killed after steps {killed_at}"
    assert found["weights"] == expected["weights"], f"killed after steps {killed_at}"


if __name__ == "__main__":
    _train(Path(sys.argv[1]), sys.argv[2])
