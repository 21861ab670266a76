"""Two thousand steps: nothing grows, and the model carries nothing of ours afterwards."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killing
import pytest
import torch
from killing import STATES
from transformers import TrainerCallback

STEPS = 2_000


class Watching(TrainerCallback):
    """What the process holds, every hundred steps."""

    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step % 100:
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.seen.append(
            {
                "resident": pages * os.sysconf("SC_PAGE_SIZE"),
                "files": len(os.listdir("/proc/self/fd")),
                "tensors": sum(isinstance(found, torch.Tensor) for found in gc.get_objects()),
                "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            }
        )


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_nothing_grows(state: str, fault: Callable[..., None], tmp_path: Path) -> None:
    gc.unfreeze()  # all is counted
    made = killing.trained(tmp_path, STATES[state])
    made.args.max_steps, made.args.save_steps, made.args.logging_steps = STEPS, 500, 100
    made.state.save_steps = made.state.logging_steps = 500
    keys = {key for key in made.model.state_dict() if not key.startswith("distiller.")}
    watching = Watching()
    made.add_callback(watching)

    made.train()

    fault("long runs", state)
    seen = watching.seen[2:]
    assert made.state.global_step == STEPS
    assert len(seen) >= 15
    assert seen[-1]["tensors"] <= seen[0]["tensors"] + 20
    assert seen[-1]["files"] <= seen[0]["files"] + 1
    assert {entry["hooks"] for entry in seen} == {seen[0]["hooks"]}
    assert seen[-1]["resident"] < seen[0]["resident"] + 32 * 2**20
    assert set(made.model.state_dict()) == keys
    assert not [h for m in made.model.modules() for h in m._forward_hooks.values() if "hf_compress" in h.__module__]
