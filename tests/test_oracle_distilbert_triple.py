"""DistilBERT's three-term loss against its authors' training script: through the functions, and in a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.encoders import _triple
from hf_compress_plugins.encoders.efficient_attention import EfficientAttention
from hf_compress_plugins.encoders.multi_teacher import MultiTeacher, teachers_kl
from stub import GradientKeeper, StubConfig, arguments
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput

from hf_compress import DistillCallback
from hf_compress.divergences import softened_kl
from hf_compress.objective import Objective

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
FULL = ("distilbert_5_2_1_T2", "distilbert_5_2_1_T2_restrict", "batch1")


def compare(case: str, **found: Tensor) -> None:
    data = oracle.load("distilbert_triple")
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), data[f"{case}.{name}"], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def rows(case: str) -> dict[str, Tensor]:
    """The given tensors, of row 1 alone for batch1, and those of the student as leaves."""
    data = oracle.load("distilbert_triple")
    part = slice(1, 2) if case == "batch1" else slice(None)
    names = ("student_logits", "student_hidden", "teacher_logits", "teacher_hidden", "attention_mask", "mlm_labels")
    found = {name: data[name][part].clone() for name in names}
    return {k: v.requires_grad_() if k.startswith("student") else v for k, v in found.items()}


@pytest.mark.parametrize("case", FULL)
def test_the_three_terms(case: str) -> None:
    given = rows(case)
    real, labels = given["attention_mask"].bool(), given["mlm_labels"]
    where = labels != -100 if case.endswith("restrict") else real
    student, teacher = (given[f"{side}_logits"][where] for side in ("student", "teacher"))
    ce = softened_kl("triple", student, teacher, temperature=2.0).mean()
    mlm = nn.functional.cross_entropy(given["student_logits"].flatten(0, 1), labels.flatten())
    states = [_triple.real_states(given[f"{side}_hidden"], real)[0] for side in ("student", "teacher")]
    cosine = _triple.state_cosine(*states).mean()
    loss = 5 * ce + 2 * mlm + cosine
    loss.backward()
    logits, hidden = (given[f"student_{name}"].grad for name in ("logits", "hidden"))
    assert logits is not None
    assert hidden is not None
    compare(case, loss=loss, loss_ce=ce, loss_mlm=mlm, loss_cos=cosine)
    compare(case, grad_student_logits=logits, grad_student_hidden=hidden)


def test_soft_targets_alone_and_beside_squared_logits() -> None:
    for case, temperature in (("only_ce_T1", 1.0), ("mse_T2", 2.0)):
        given = rows(case)
        real = given["attention_mask"].bool()
        student, teacher = (given[f"{side}_logits"][real] for side in ("student", "teacher"))
        ce = teachers_kl(student, [teacher], [1.0], temperature=temperature, combine="losses").mean()
        mse = _triple.squared_logits(student, teacher).mean()
        loss = 0.5 * ce + 0.1 * mse if case == "mse_T2" else ce
        loss.backward()
        gradient = given["student_logits"].grad
        assert gradient is not None
        compare(case, loss=loss, loss_ce=ce, grad_student_logits=gradient)
        if case == "mse_T2":
            compare(case, loss_mse=mse)


class Rows(nn.Module):
    """A body whose states are parameters."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = nn.Parameter(states.clone())

    def forward(self, index: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.states[index])


class StubForMaskedLM(PreTrainedModel):
    """Logits and states are its parameters."""

    config_class = StubConfig
    base_model_prefix = "body"
    main_input_name = "index"

    def __init__(self, logits: Tensor, states: Tensor) -> None:
        super().__init__(StubConfig(vocab_size=logits.shape[-1], num_hidden_layers=1))
        self.body, self.rows = Rows(states), nn.Parameter(logits.clone())

    def forward(
        self, index: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> TokenClassifierOutput:
        states, logits = self.body(index).last_hidden_state, self.rows[index] + 0.0
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=(states,))


def step(case: str, method: Objective, folder: Path, **settings: Any) -> tuple[Trainer, dict[str, Tensor]]:
    """One step on all rows of a case, its teacher both the run's and the second."""
    given, keeper = rows(case), GradientKeeper()

    def model(side: str) -> StubForMaskedLM:
        return StubForMaskedLM(given[f"{side}_logits"].detach(), given[f"{side}_hidden"].detach())

    def collate(batch: list[dict[str, int]]) -> dict[str, Tensor]:
        index = torch.tensor([row["index"] for row in batch])
        return {"index": index, "attention_mask": given["attention_mask"][index], "labels": given["mlm_labels"][index]}

    frozen = {"second": model("teacher")} if isinstance(method, MultiTeacher) else {}
    callback = DistillCallback(model("teacher"), method, frozen=frozen, **settings)
    trainer = Trainer(
        model=model("student"),
        args=arguments(folder, per_device_train_batch_size=len(given["mlm_labels"])),
        train_dataset=Dataset.from_list([{"index": place} for place in range(len(given["mlm_labels"]))]),
        data_collator=collate,
        callbacks=[callback, keeper],
    )
    trainer.train()
    return trainer, keeper.gradients[0]


@pytest.mark.parametrize("case", FULL)
@pytest.mark.parametrize("combine", ["probs", "losses"])
def test_through_the_callback_with_one_teacher_twice(case: str, combine: Any, tmp_path: Path) -> None:
    method = MultiTeacher(combine=combine, restrict=case.endswith("restrict"))
    assert_callback(case, method, tmp_path)


@pytest.mark.parametrize("case", FULL)
def test_through_the_callback_with_one_teacher(case: str, tmp_path: Path) -> None:
    assert_callback(case, EfficientAttention(restrict=case.endswith("restrict")), tmp_path)


def assert_callback(case: str, method: Objective, folder: Path) -> None:
    trainer, gradients = step(case, method, folder)
    compare(case, grad_student_logits=gradients["rows"], grad_student_hidden=gradients["body.states"])
    log = trainer.state.log_history[0]
    data = oracle.load("distilbert_triple")
    for name, term, weight in (("soft", "ce", 5.0), ("cosine", "cos", 1.0)):
        assert log[f"distill/{method.name}.{name}"] == pytest.approx(weight * data[f"{case}.loss_{term}"].item())
    assert log["task_loss"] == pytest.approx(data[f"{case}.loss_mlm"].item())


def test_squared_logits_through_the_callback(tmp_path: Path) -> None:
    method = MultiTeacher(soft=0.5, squared=0.1, cosine=0.0, weights=(1.0, 3.0))
    _, gradients = step("mse_T2", method, tmp_path, task_weight=0.0)
    compare("mse_T2", grad_student_logits=gradients["rows"])
