"""PLD: the likelihood of a ranking, choice by choice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hf_compress_plugins.language.pld import PLD, PLDConfig, pld, ranking
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import logits
from torch import Tensor

from hf_compress import testing
from hf_compress.errors import ConfigurationError, MismatchError

CASE = testing.Case("pld", "text-classification")


def by_choices(student: Tensor, teacher: Tensor, label: int | None, temperature: float) -> float:
    """The paper's sum, one choice after the other among what is left."""
    classes = sorted(range(len(teacher)), key=lambda c: (c != label, -teacher[c].item()))
    weights, total = (teacher / temperature).softmax(-1), 0.0
    while classes:
        left = torch.stack([student[c] for c in classes])
        total += float(weights[classes[0]] * (left.logsumexp(0) - left[0]))
        del classes[0]
    return total


def test_by_hand() -> None:
    """Teacher (1/2, 1/4, 1/4) of three classes, an undecided student, the label 2, which weighs 1/4.

    First choice: 2 of three, 1/4 · ln 3; then 0 of the two others, 1/2 · ln 2; the last is no choice.
    """
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    value = pld(torch.zeros(1, 3), teacher, torch.tensor([2]))
    assert value.item() == pytest.approx(0.25 * math.log(3) + 0.5 * math.log(2))
    value = pld(torch.zeros(1, 3), teacher, torch.tensor([0]))
    assert value.item() == pytest.approx(0.5 * math.log(3) + 0.25 * math.log(2))


@given(st.integers(2, 7), st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_it_is_the_sum_over_choices(classes: int, temperature: float, seed: int) -> None:
    student, teacher = 3 * logits(4, classes, seed), 3 * logits(4, classes, seed + 1)
    labels = torch.arange(4) % classes
    found = pld(student, teacher, labels, temperature=temperature)
    wanted = [by_choices(student[i], teacher[i], int(labels[i]), temperature) for i in range(4)]
    assert found.tolist() == pytest.approx(wanted)
    assert found.min() >= 0


def test_the_label_comes_first_and_what_is_equal_keeps_its_order() -> None:
    teacher = torch.tensor([[3.0, 1.0, 2.0, 1.0]]).expand(3, -1)
    found = ranking(teacher, torch.tensor([1, 0, -100]))
    assert found.tolist() == [[3, 2, 0, 1], [1, 3, 2, 0], [1, 3, 2, 0]]
    assert ranking(teacher[:1], None).tolist() == [[1, 3, 2, 0]]


def test_the_gradient_is_that_of_the_paper() -> None:
    """dL/ds_i = Σ over choices in which i is left of a_k · its probability, less its own weight."""
    student, teacher, labels = logits(3, 5, 0).requires_grad_(), logits(3, 5, 1), torch.tensor([4, 0, 2])
    pld(student, teacher, labels, temperature=2.0).sum().backward()
    weights, wanted = (teacher / 2.0).softmax(-1), torch.zeros(3, 5, dtype=torch.float64)
    for row, order in enumerate(ranking(teacher, labels).tolist()):
        for place in range(5):
            left = order[: place + 1]  # ascending: what is left when this one is chosen
            chance = student.detach()[row, left].softmax(-1)
            wanted[row, left] += weights[row, order[place]] * chance
            wanted[row, order[place]] -= weights[row, order[place]]
    torch.testing.assert_close(student.grad, wanted)
    assert torch.autograd.gradcheck(lambda own: pld(own, teacher, labels), logits(3, 5, 0).requires_grad_())


def test_equal_weights_are_listmle_and_constants_change_nothing() -> None:
    student, teacher, labels = logits(3, 5, 0), logits(3, 5, 1), torch.tensor([4, 0, 2])
    order = ranking(teacher, labels)
    ranked = student.gather(-1, order)
    likelihood = (ranked.logcumsumexp(-1) - ranked).sum(-1) / 5
    torch.testing.assert_close(pld(student, teacher, labels, temperature=1e9), likelihood)
    torch.testing.assert_close(pld(student + 7.0, teacher - 3.0, labels), pld(student, teacher, labels))


def test_the_students_logits_are_not_tempered_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(2, 4, 0).requires_grad_(), logits(2, 4, 1).requires_grad_()
    labels = torch.tensor([1, 3])
    hot, cold = (pld(student, teacher, labels, temperature=t) for t in (1.0, 2.0))
    torch.testing.assert_close(pld(student, teacher / 2, labels, temperature=1.0), cold)
    assert not torch.allclose(pld(student / 2, teacher / 2, labels), cold)
    hot.sum().backward()
    assert teacher.grad is None


def test_a_teacher_that_is_sure_of_another_class_leaves_the_label_next_to_nothing() -> None:
    teacher = torch.tensor([[20.0, 0.0, 0.0]])
    student = torch.zeros(1, 3, requires_grad=True)
    pld(student, teacher, torch.tensor([1])).sum().backward()
    assert student.grad[0, 0] < -0.4  # the teacher's own class is pulled up, second in the order
    assert abs(student.grad[0, 1].item()) < 1e-6  # the label is not


def test_excluded_classes_leave_value_and_gradient_finite() -> None:
    """A padded vocabulary: both models exclude the first classes; the rest is as without them."""
    student, teacher, labels = logits(3, 6, 0), logits(3, 6, 1), torch.tensor([4, 3, 2])
    student[:, :2] = teacher[:, :2] = -math.inf
    student.requires_grad_()
    value = pld(student, teacher, labels)
    value.sum().backward()
    torch.testing.assert_close(value, pld(student[:, 2:], teacher[:, 2:], labels - 2))
    assert student.grad.isfinite().all()
    assert pld(student, logits(3, 6, 1), labels).isinf().all()
    with pytest.raises(MismatchError, match="one shape"):
        pld(student, teacher[:, :5], labels)
    empty = torch.zeros(0, 3, requires_grad=True)
    pld(empty, empty.detach(), torch.zeros(0, dtype=torch.long)).sum().backward()
    assert empty.grad is not None


def test_labels_alone_decide_between_two_classes_what_a_binary_cross_entropy_would() -> None:
    """Two classes leave one choice: the cross-entropy, weighed by the teacher's probability of the label."""
    student, teacher, labels = logits(4, 2, 0), logits(4, 2, 1), torch.tensor([0, 1, 1, 0])
    plain = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    weight = teacher.softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(pld(student, teacher, labels), weight * plain)


def test_it_replaces_the_tasks_own_loss(tmp_path: Path) -> None:
    trainer, _ = testing.trainer(CASE, tmp_path, objective=PLD(temperature=4.0))
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    given_ = testing.signals(CASE)
    own, theirs = given_.student["logits"], given_.teacher["logits"]
    assert log["loss"] == pytest.approx(log["distill_loss"], rel=1e-6)
    assert log["loss"] == pytest.approx(
        pld(own, theirs, given_.positions.labels, temperature=4.0).mean().item(), rel=1e-5
    )


def test_rows_without_a_label_are_ranked_by_the_teacher(tmp_path: Path) -> None:
    data = testing.rows(CASE.task)
    for row in data:
        row["labels"] = -100
    trainer, _ = testing.trainer(CASE, tmp_path, data=data)
    trainer.train()
    given_ = testing.signals(CASE)
    wanted = pld(given_.student["logits"], given_.teacher["logits"], None).mean().item()
    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigurationError, match="pld: temperature"):
        PLDConfig(temperature=temperature)
