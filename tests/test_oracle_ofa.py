"""OFA's loss against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.vision.ofa import ofa, one_hot

EXACT = {"rtol": 1e-9, "atol": 1e-13}


@pytest.mark.parametrize("case", oracle.metadata("ofa_kd")["cases"], ids=lambda case: f"case{case['case']}")
def test_value_and_gradient(case: dict[str, float]) -> None:
    data = oracle.load("ofa_kd")
    student = data["student_logits"].requires_grad_()

    target = one_hot(data["labels"], student)
    loss = ofa(student, data["teacher_logits"], target, eps=case["eps"], temperature=case["temperature"]).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"case{case['case']}_loss"], **EXACT)
    torch.testing.assert_close(student.grad, data[f"case{case['case']}_grad"], **EXACT)


def test_one_example() -> None:
    data = oracle.load("ofa_kd")
    student = data["student_logits"][:1].clone().requires_grad_()

    target = one_hot(data["labels"][:1], student)
    loss = ofa(student, data["teacher_logits"][:1], target, eps=1.5, temperature=1.0).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["batch1_loss"], **EXACT)
    torch.testing.assert_close(student.grad, data["batch1_grad"], **EXACT)


def test_soft_labels_by_their_largest() -> None:
    data = oracle.load("ofa_kd")
    student = data["student_logits"].requires_grad_()
    target = one_hot(data["soft_targets"].argmax(-1), student)
    assert torch.equal(target, data["soft_mask"])

    loss = ofa(student, data["teacher_logits"], target, eps=1.1, temperature=1.0).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["soft_loss"], **EXACT)
    torch.testing.assert_close(student.grad, data["soft_grad"], **EXACT)
