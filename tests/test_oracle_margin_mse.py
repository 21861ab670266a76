"""Margin-MSE against the authors' losses, and sentence-transformers' for several negatives."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.encoders import margin_mse as module
from hf_compress_plugins.encoders._ranking import dot_scores
from hf_compress_plugins.encoders.margin_mse import inter_passage_mse, margin_mse

EXACT = {"rtol": 1e-6, "atol": 1e-9}
LOSSES = {
    "margin_mse": "margin_mse",
    "margin_mse_hub": "margin_mse",
    "pointwise_mse": "pointwise_mse",
    "ranknet_weighted": "ranknet_weighted",
    "mse_ranknet": "mse_ranknet",
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("batch", ["batch4", "batch1"])
def test_the_losses_of_pairs(batch: str, name: str) -> None:
    data = oracle.load("margin_mse")
    student, teacher = (
        torch.stack([data[f"{batch}.{who}_{which}"] for which in ("pos", "neg")], 1) for who in ("student", "teacher")
    )
    student.requires_grad_()

    loss = getattr(module, LOSSES[name])(student, teacher).mean()
    loss.backward()

    assert student.grad is not None
    torch.testing.assert_close(loss.detach(), data[f"{batch}.{name}.loss"], **EXACT)
    torch.testing.assert_close(student.grad[:, 0], data[f"{batch}.{name}.grad_pos"], **EXACT)
    torch.testing.assert_close(student.grad[:, 1], data[f"{batch}.{name}.grad_neg"], **EXACT)


def test_an_offset_of_the_teacher_changes_nothing() -> None:
    data = oracle.load("margin_mse")
    student, teacher = (
        torch.stack([data[f"batch4.{who}_{which}"] for which in ("pos", "neg")], 1) for who in ("student", "teacher")
    )
    loss = margin_mse(student, teacher + 100).mean()
    torch.testing.assert_close(loss, data["batch4.margin_mse_teacher_shift100.loss"], **EXACT)


def test_every_part_against_every_part() -> None:
    data = oracle.load("margin_mse")
    positive, negative = data["inter.student_pos"].requires_grad_(), data["inter.student_neg"].requires_grad_()

    loss = inter_passage_mse(positive, negative, data["inter.teacher_pos"], data["inter.teacher_neg"]).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["inter.loss"], **EXACT)
    torch.testing.assert_close(positive.grad, data["inter.grad_pos"], **EXACT)
    torch.testing.assert_close(negative.grad, data["inter.grad_neg"], **EXACT)


def test_vectors_of_a_bi_encoder_with_two_negatives() -> None:
    data = oracle.load("margin_mse")
    vectors = {name: data[f"st.{name}"].requires_grad_() for name in ("query", "pos", "neg1", "neg2")}

    loss = margin_mse(dot_scores(torch.stack(list(vectors.values()), 1)), data["st.teacher_scores"]).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["st.loss"], **EXACT)
    for name, vector in vectors.items():
        torch.testing.assert_close(vector.grad, data[f"st.grad_{name}"], **EXACT)
