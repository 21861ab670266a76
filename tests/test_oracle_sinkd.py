"""SinKD against the authors' code: its 0.001 times the sum over the batch."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from hf_compress_plugins.language.sinkd import SUMMED, SinKD, cost, plan, sinkd, soft_labels
from stub import GradientKeeper, StubForTokenClassification, stub_trainer

from hf_compress import DistillCallback

CASES = ("b16c2", "b32c3", "b8c10", "b1c3", "b2c50", "b16c2_f32", "b8c3_peaked")


def close(case: str) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-6} if case.endswith("f32") else {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case: str) -> None:
    data = oracle.load("sinkd")
    student = data[f"{case}/student_logits"].requires_grad_()

    loss = SUMMED * sinkd(student, data[f"{case}/teacher_logits"]).sum()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{case}/loss"], **close(case))
    torch.testing.assert_close(student.grad, data[f"{case}/grad"], **close(case))


def test_cost_and_plan() -> None:
    data = oracle.load("sinkd")
    costs = cost(data["b8c10/student_logits"], data["b8c10/teacher_logits"], tau=2.0)
    found = plan(costs, epsilon=0.1, iterations=20)

    torch.testing.assert_close(costs, data["b8c10/cost"], **close(""))
    torch.testing.assert_close(found, data["b8c10/plan_after_20"], **close(""))
    torch.testing.assert_close((found * costs).sum(), data["b8c10/raw_sum"], **close(""))


def test_two_equal_sets() -> None:
    data = oracle.load("sinkd")
    student = data["b8c10/teacher_logits"].clone().requires_grad_()

    loss = SUMMED * sinkd(student, data["b8c10/teacher_logits"]).sum()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["identical/loss"], **close(""))
    torch.testing.assert_close(student.grad, data["identical/grad"], **close(""))


@pytest.mark.parametrize("temperature", ["1.0", "2.0", "4.0"])
def test_soft_labels(temperature: str) -> None:
    data = oracle.load("sinkd")
    student = data["b8c10/student_logits"].requires_grad_()

    loss = soft_labels(student, data["b8c10/teacher_logits"], temperature=float(temperature)).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"distillkl_T{temperature}/loss"], **close(""))
    torch.testing.assert_close(student.grad, data[f"distillkl_T{temperature}/grad"], **close(""))


def test_through_the_callback(tmp_path: Path) -> None:
    """One step on both terms, weighed as published, with the sum of the authors' code."""
    data = oracle.load("sinkd")
    student, teacher = (data[f"b8c10/{role}_logits"].float()[:, None] for role in ("student", "teacher"))
    kept = GradientKeeper()
    callback = DistillCallback(StubForTokenClassification(teacher), SinKD(summed=True))
    trainer = stub_trainer(tmp_path, student, None, [callback, kept])
    trainer.train()

    log = trainer.state.log_history[0]
    assert log["distill/sinkd.kd"] == pytest.approx(0.9 * data["distillkl_T2.0/loss"].item(), rel=1e-5)
    assert log["distill/sinkd.sinkhorn"] == pytest.approx(0.8 * data["b8c10/loss"].item(), rel=1e-5)
    wanted = 0.9 * data["distillkl_T2.0/grad"] + 0.8 * data["b8c10/grad"]
    torch.testing.assert_close(kept.gradients[0]["rows"][:, 0], wanted.float(), rtol=1e-4, atol=1e-6)
