"""PLD against the code that its authors list in their appendix C."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from hf_compress_plugins.language.pld import PLD, pld, ranking
from stub import GradientKeeper, StubForTokenClassification, stub_trainer
from torch import Tensor

from hf_compress import DistillCallback

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def compare(case: str, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> None:
    data = oracle.load("pld")
    student.requires_grad_()
    loss = pld(student, teacher, labels, temperature=temperature).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), data[f"{case}/loss"], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"{case}/grad"], **CLOSE)


def test_the_ranking() -> None:
    data = oracle.load("pld")
    assert torch.equal(ranking(data["teacher_logits"], data["labels"]), data["ranking_last_is_first_choice"])


@pytest.mark.parametrize("temperature", ["0.5", "1.0", "2.0", "4.0"])
def test_value_and_gradient(temperature: str) -> None:
    data = oracle.load("pld")
    compare(f"temp{temperature}", data["student_logits"], data["teacher_logits"], data["labels"], float(temperature))


def test_one_row() -> None:
    data = oracle.load("pld")
    compare("n1", data["student_logits"][:1].clone(), data["teacher_logits"][:1], data["labels"][:1])


def test_a_teacher_that_is_sure_of_the_label_gives_the_cross_entropy() -> None:
    data = oracle.load("pld")
    teacher = 200.0 * torch.nn.functional.one_hot(data["labels"], 10).double()
    compare("onehot_teacher", data["student_logits"], teacher, data["labels"])
    plain = torch.nn.functional.cross_entropy(data["student_logits"], data["labels"])
    torch.testing.assert_close(plain, data["onehot_teacher/loss"], **CLOSE)
    assert plain.item() == pytest.approx(3.7106367094)


def test_large_logits() -> None:
    data = oracle.load("pld")
    student, teacher = (50 * data[f"{role}_logits"].float() for role in ("student", "teacher"))
    loss = pld(student, teacher, data["labels"]).mean()
    torch.testing.assert_close(loss, data["large_logits_f32/loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", ["1.0", "4.0"])
def test_through_the_callback(temperature: str, tmp_path: Path) -> None:
    """The task's own loss has no part in it."""
    data = oracle.load("pld")
    student, teacher = (data[f"{role}_logits"].float()[:, None] for role in ("student", "teacher"))
    kept = GradientKeeper()
    callback = DistillCallback(StubForTokenClassification(teacher), PLD(temperature=float(temperature)))
    trainer = stub_trainer(tmp_path, student, data["labels"][:, None], [callback, kept])
    trainer.train()

    assert trainer.state.log_history[0]["loss"] == pytest.approx(data[f"temp{temperature}/loss"].item(), rel=1e-5)
    wanted = data[f"temp{temperature}/grad"].float()
    torch.testing.assert_close(kept.gradients[0]["rows"][:, 0], wanted, rtol=1e-4, atol=1e-6)
