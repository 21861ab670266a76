"""Networks of a method with optimizers of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD

from hf_compress import testing
from hf_compress.checkpoints import MANIFEST
from hf_compress.errors import ConfigurationError, NumericalError, ResumeError
from hf_compress.networks import OPTIMIZERS, WEIGHTS, Networks
from hf_compress.objective import Inputs, Step


def test_it_steps_once_a_window_before_the_student_sees_it(tmp_path: Path) -> None:
    """(w - n)² from w = 0 with rate 0.1: w₁ = 0.2 n, whether the window is one batch or two."""
    toys.run(tmp_path, toys.WithCritic(), max_steps=2)[0].train()
    assert toys.WithCritic.seen == pytest.approx([0.8, 0.8 + 0.2 * (4 - 0.8)])

    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    toys.run(tmp_path, toys.WithCritic(), **settings)[0].train()
    assert toys.WithCritic.seen == pytest.approx([0.0, 0.4])


def test_it_is_no_part_of_the_student(tmp_path: Path) -> None:
    trainer, _ = toys.run(tmp_path, toys.WithCritic(), save_strategy="steps", save_steps=1)
    trainer.train()
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not [
        p for p in trainer.callback_handler.callbacks[1].run.networks.modules["critic"].parameters() if id(p) in known
    ]
    assert not [name for name in trainer.model.state_dict() if "critic" in name]
    assert (tmp_path / "checkpoint-1" / WEIGHTS).exists()
    assert toys.logged(trainer, "network/critic") == pytest.approx([16.0])


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    whole, _ = toys.run(tmp_path / "whole", toys.WithAdam(), max_steps=6, **settings)
    whole.train()
    seen = toys.WithAdam.seen
    second, _ = toys.run(tmp_path / "parts", toys.WithAdam(), max_steps=6, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert toys.WithAdam.seen == seen[3:]
    assert testing.weights_hash(second.model) == testing.weights_hash(whole.model)


def test_a_second_train_starts_anew(tmp_path: Path) -> None:
    trainer, _ = toys.run(tmp_path, toys.WithCritic())
    trainer.train()
    first = toys.WithCritic.seen
    trainer.train()
    assert toys.WithCritic.seen == first


@pytest.mark.parametrize("missing", [WEIGHTS, OPTIMIZERS])
def test_a_checkpoint_without_them_is_refused(tmp_path: Path, missing: str) -> None:
    trainer, _ = toys.run(tmp_path, toys.WithCritic(), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    for name in (missing, MANIFEST):
        (tmp_path / "checkpoint-1" / name).unlink()
    again, _ = toys.run(tmp_path, toys.WithCritic(), max_steps=2)
    with pytest.raises(ResumeError, match=f"checkpoint-1 has no {missing}"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    class Spoilt(toys.WithCritic):
        def network_losses(self, inputs: Inputs, step: Step) -> Mapping[str, Tensor]:
            return {"critic": step.networks["critic"].weight.sum() * math.nan}

    trainer, _ = toys.run(tmp_path, Spoilt())
    with pytest.raises(NumericalError, match="step 0: network loss 'critic'"):
        trainer.train()


def test_gradients_reach_the_networks_alone(tmp_path: Path) -> None:
    """A loss that runs through the teacher's input and the student's weights leaves both without gradients."""
    teacher, network = nn.Linear(1, 1), nn.Linear(1, 1)
    made = Networks({"n": (network, SGD(network.parameters(), lr=toys.LR))})
    made.backward({"n": teacher(network(torch.ones(1, 1))).sum()}, micros=1, step=0)
    assert teacher.weight.grad is None
    before = network.weight.detach().clone()
    network.weight.grad = torch.full((1, 1), 1e9)  # of a student's loss that ran through it
    made.step(Accelerator(cpu=True))
    torch.testing.assert_close(network.weight.detach(), before - toys.LR * teacher.weight.detach())
    assert network.weight.grad is None


def test_an_optimizer_of_another_module_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="network 'n'"):
        Networks({"n": (nn.Linear(1, 1), SGD(nn.Linear(1, 1).parameters(), lr=toys.LR))})


class Finishing(toys.Toy):
    """Counts its last words."""

    finished = 0

    def finish(self, step: Step) -> None:
        type(self).finished += 1


def test_a_run_resumed_at_its_end_has_its_last_words_too(tmp_path: Path) -> None:
    Finishing.finished = 0
    settings: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    toys.run(tmp_path, Finishing(), **settings)[0].train()
    toys.run(tmp_path, Finishing(), **settings)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Finishing.finished == 2
