"""Models whose own loss needs no labels, and checkpoints that name their weights otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from stub import GradientKeeper
from torch import Tensor

from hf_compress import testing
from hf_compress.errors import ResumeError
from hf_compress.objective import Needs, Signals, Sizes, Step
from hf_compress.resume import reload_renamed

TASK = "image-feature-extraction"


class OnStates(toys.Toy):
    """Something small on the encoder's states."""

    task_weight = 1.0
    per_position = toys.Toy.__mro__[1].per_position

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(student=frozenset({"hidden:1"}), teacher=frozenset({"hidden:1"}), mean_over="examples")

    def forward(self, signals: Signals, step: Step) -> Tensor:
        return signals.student["hidden:1"].square().mean((1, 2))


def test_it_is_weighed_by_examples_whatever_the_micro_batches(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [row | {"noise": torch.rand(16, generator=draw).tolist()} for row in testing.rows(TASK)]
    found, logs = [], []
    for size, steps in ((4, 1), (1, 4), (3, 2)):
        keeper = GradientKeeper()
        settings: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer, _ = toys.run(
            tmp_path, OnStates(), TASK, data=rows, dtype=torch.float64, callbacks=(keeper,), **settings
        )
        trainer.train()
        found.append(keeper.gradients[0])
        logs.append(toys.logged(trainer, "task_loss"))
    assert logs[0] == pytest.approx(logs[1])
    assert logs[0] == pytest.approx(logs[2])
    for other in found[1:]:
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-6, atol=1e-9)


def test_a_checkpoint_under_other_names_is_loaded_by_the_model_s_own_loader(tmp_path: Path) -> None:
    saved = testing.models("image-classification")[0]
    torch.nn.init.normal_(saved.classifier.weight)
    saved.save_pretrained(tmp_path)
    student = testing.models("image-classification")[0]

    assert reload_renamed(student, tmp_path)

    assert testing.weights_hash(student) == testing.weights_hash(saved)


def test_a_checkpoint_with_the_model_s_names_is_left_to_the_trainer(tmp_path: Path) -> None:
    saved = testing.models("text-classification")[0]
    saved.save_pretrained(tmp_path)
    assert not reload_renamed(testing.models("text-classification")[0], tmp_path)
    assert not reload_renamed(testing.models("text-classification")[0], tmp_path / "nothing")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    saved = testing.models("image-classification")[0]
    saved.vit.save_pretrained(tmp_path)
    with pytest.raises(ResumeError, match="no weights for"):
        reload_renamed(testing.models("image-classification")[0], tmp_path)
