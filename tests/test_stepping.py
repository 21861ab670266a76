"""What a method may call during a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress import testing
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Inputs, Rows, Step
from hf_compress.stepping import row_cross_entropy


class Calling(toys.Toy):
    """Calls something in its batch, and keeps what came."""

    found: list[Any]

    def __init__(self) -> None:
        super().__init__()
        type(self).found = []

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        before = [module.training for module in step.student.modules()]
        global_state = torch.get_rng_state()
        self.found.append(self.call(inputs, step))
        assert [module.training for module in step.student.modules()] == before
        assert torch.equal(torch.get_rng_state(), global_state)
        return inputs

    def call(self, inputs: Inputs, step: Step) -> Any:
        raise NotImplementedError


class Generating(Calling):
    def call(self, inputs: Inputs, step: Step) -> Tensor:
        ids, mask = inputs["input_ids"][1:2, :4], inputs["attention_mask"][1:2, :4]
        return step.generate(input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=6, pad_token_id=0)


class Evaluating(Calling):
    def call(self, inputs: Inputs, step: Step) -> tuple[Tensor, Tensor]:
        return step.evaluate(step.dataset, "student"), step.evaluate(step.dataset, "teacher")


def test_generation_draws_anew_at_each_step_and_the_same_in_each_run(tmp_path: Path) -> None:
    toys.run(tmp_path, Generating(), max_steps=3, learning_rate=0.0)[0].train()
    first = Generating.found
    toys.run(tmp_path, Generating(), max_steps=3, learning_rate=0.0)[0].train()
    assert all(torch.equal(a, b) for a, b in zip(first, Generating.found, strict=True))
    assert not torch.equal(first[0], first[1])
    assert first[0].shape[1] > 4


def mean_losses(model: PreTrainedModel, rows: list[dict[str, Any]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model.eval()(**testing.collate([row])).loss for row in rows])


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "token-classification"])
def test_evaluation_gives_each_row_its_own_mean_loss(task: str, tmp_path: Path) -> None:
    rows, (student, teacher) = testing.rows(task, 7), testing.models(task)
    trainer, _ = toys.run(tmp_path, Evaluating(), task, data=rows, per_device_eval_batch_size=3)
    trainer.train()
    ((own, theirs),) = Evaluating.found
    torch.testing.assert_close(own, mean_losses(student, rows))
    torch.testing.assert_close(theirs, mean_losses(teacher, rows))


class OfTypes(nn.Module):
    """A teacher that reads a column that the student does not know."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, kinds: Tensor) -> Any:
        return self.inner(input_ids=input_ids + kinds, attention_mask=attention_mask)


def test_a_teacher_is_evaluated_on_what_it_alone_reads(tmp_path: Path) -> None:
    task = "text-classification"
    rows, (_, teacher) = testing.rows(task, 4), testing.models(task)
    for row in rows:
        row["input_ids"], row["kinds"] = [token // 2 for token in row["input_ids"]], [1] * len(row["input_ids"])

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = testing.collate(batch)
        return found | {"kinds": found["attention_mask"]}

    trainer, _ = toys.run(
        tmp_path, Evaluating(), task, data=rows, wrap=OfTypes, give=lambda _: {"data_collator": collate}
    )
    trainer.train()
    ((_, theirs),) = Evaluating.found
    shifted = [row | {"input_ids": [token + 1 for token in row["input_ids"]]} for row in rows]
    torch.testing.assert_close(theirs, mean_losses(teacher, shifted))


def test_rows_without_labels_have_no_cross_entropy() -> None:
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(ConfigurationError, match="needs a data set with labels"):
        row_cross_entropy("causal", torch.zeros(2, 3, 5), inputs)
    labelled = inputs | {"labels": torch.tensor([[-100, 1, 1], [-100, -100, -100]])}
    torch.testing.assert_close(
        row_cross_entropy("causal", torch.zeros(2, 3, 5), labelled), torch.tensor([5.0, 1.0]).log()
    )


def test_the_training_set_is_at_hand(tmp_path: Path) -> None:
    class Reading(toys.Toy):
        def per_position(self, rows: Rows, step: Step) -> Tensor:
            assert len(step.dataset) == 4
            return super().per_position(rows, step)

    toys.run(tmp_path, Reading())[0].train()
