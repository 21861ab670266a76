"""SinKD: the transport between two sets of predictions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.language import sinkd as module
from hf_compress_plugins.language.sinkd import SinKD, SinKDConfig, cost, plan, sinkd, soft_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import logits

from hf_compress import testing
from hf_compress.divergences import kl, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError

CASE = testing.Case("sinkd", "text-classification")


def test_by_hand() -> None:
    """Rows of (1, 0) and (0, 1) against the same in the other order: the cheap way carries each to its twin.

    W = [[2, 0], [0, 2]], ε = 1: K = [[e⁻², 1], [1, e⁻²]], whose rows and columns need one division by 1 + e⁻².
    """
    student = torch.tensor([[80.0, 0.0], [0.0, 80.0]], dtype=torch.float64)
    far, near = math.exp(-2) / (1 + math.exp(-2)), 1 / (1 + math.exp(-2))

    costs = cost(student, student.flip(0), tau=1.0)
    torch.testing.assert_close(costs, torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    found = plan(costs, epsilon=1.0, iterations=1)
    torch.testing.assert_close(found, torch.tensor([[far, near], [near, far]], dtype=torch.float64))
    values = sinkd(student, student.flip(0), tau=1.0, epsilon=1.0, iterations=20)
    assert values.tolist() == pytest.approx([2 * far, 2 * far])


def test_one_row_is_carried_to_the_other() -> None:
    student, teacher = logits(1, 4, 0), logits(1, 4, 1)
    distance = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(sinkd(student, teacher), distance)


def test_the_plan_is_the_identity_where_rows_are_equal_and_far_apart() -> None:
    student = 60 * torch.eye(5, dtype=torch.float64)
    found = plan(cost(student, student, tau=2.0), epsilon=0.1, iterations=20)
    torch.testing.assert_close(found, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-7)
    assert sinkd(student, student).max() < 1e-6


@given(st.integers(1, 6), st.integers(2, 5), st.floats(0.05, 3.0), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_columns_of_the_plan_sum_to_one_and_its_mass_is_the_number_of_rows(
    count: int, classes: int, epsilon: float, seed: int
) -> None:
    costs = cost(5 * logits(count, classes, seed), 5 * logits(count, classes, seed + 1), tau=1.0)
    found = plan(costs, epsilon=epsilon, iterations=3)
    assert costs.min() >= 0
    assert costs.max() <= 2 + 1e-12
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(0), torch.ones(count, dtype=torch.float64))


def test_a_constant_of_a_row_and_the_order_of_rows_change_nothing() -> None:
    student, teacher = logits(6, 4, 0), logits(6, 4, 1)
    values, order = sinkd(student, teacher), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(sinkd(student + 3.0, teacher - 2.0), values)
    torch.testing.assert_close(sinkd(student[order], teacher), values[order])
    torch.testing.assert_close(sinkd(student, teacher[order]), values)


def test_gradients_pass_through_the_iterations_and_not_into_the_teacher() -> None:
    student, teacher = logits(4, 3, 0).requires_grad_(), logits(4, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda own: sinkd(own, teacher, iterations=4), student)
    sinkd(student, teacher).sum().backward()
    assert teacher.grad is None
    whole = student.grad
    costs = cost(student, teacher, tau=2.0)
    (plan(costs.detach(), epsilon=0.1, iterations=20) * costs).sum().backward()
    assert (student.grad - 2 * whole).abs().max() > 1e-3  # a plan that is held fixed gives another gradient


def test_a_small_epsilon_does_not_underflow() -> None:
    student, teacher = logits(5, 4, 0).float().requires_grad_(), logits(5, 4, 1).float()
    values = sinkd(student, teacher, epsilon=1e-3)
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.isfinite().all()
    assert (torch.exp(-cost(student, teacher, tau=2.0) / 1e-3) == 0).any()


def test_half_precision_is_widened_and_no_rows_give_none() -> None:
    student, teacher = logits(4, 3, 0).half(), logits(4, 3, 1).half()
    found = sinkd(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sinkd(student.float(), teacher.float()))
    empty = torch.zeros(0, 3, requires_grad=True)
    assert sinkd(empty, empty.detach()).shape == (0,)
    sinkd(empty, empty.detach()).sum().backward()
    assert empty.grad is not None
    with pytest.raises(MismatchError, match="one shape"):
        sinkd(student, teacher[:3])


def test_soft_labels_have_no_square_of_the_temperature() -> None:
    """The gradient is that of the KL at T = 3; kd's is nine times as large."""
    student, teacher = logits(3, 4, 0).requires_grad_(), logits(3, 4, 1)
    soft_labels(student, teacher, temperature=3.0).sum().backward()
    other = student.detach().clone().requires_grad_()
    kl(*log_probabilities("test", other, teacher, 3.0)).sum().backward()
    torch.testing.assert_close(student.grad, other.grad)


def test_the_weights_of_its_three_terms(tmp_path: Path) -> None:
    found = {}
    for summed in (False, True):
        method = SinKD(alpha=0.75, beta=0.5, summed=summed)
        trainer, _ = testing.trainer(CASE, tmp_path, objective=method)
        trainer.train()
        found[summed] = trainer.state.log_history[0]
        log = found[summed]
        parts = log["distill/sinkd.kd"] + log["distill/sinkd.sinkhorn"]
        assert log["loss"] == pytest.approx(0.25 * log["task_loss"] + parts, rel=1e-5)
    assert found[True]["distill/sinkd.kd"] == found[False]["distill/sinkd.kd"]
    mean = found[False]["distill/sinkd.sinkhorn"]
    assert found[True]["distill/sinkd.sinkhorn"] == pytest.approx(4 * 1e-3 * mean, rel=1e-5)
    given_ = testing.signals(CASE)
    rows = sinkd(given_.student["logits"], given_.teacher["logits"])
    assert mean == pytest.approx(0.5 * rows.mean().item(), rel=1e-5)
    assert SinKD().task_weight == pytest.approx(0.1)


def test_it_is_the_micro_batch_that_is_carried(tmp_path: Path) -> None:
    """Twice two rows are not four: the page says so, and the log shows the mean of both transports."""
    trainer, _ = testing.trainer(CASE, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    found = testing.signals(CASE)
    own, theirs = found.student["logits"], found.teacher["logits"]
    halves = torch.cat([sinkd(own[:2], theirs[:2]), sinkd(own[2:], theirs[2:])]).mean().item()
    assert trainer.state.log_history[0]["distill/sinkd.sinkhorn"] == pytest.approx(0.8 * halves, rel=1e-4)
    assert halves != pytest.approx(sinkd(own, theirs).mean().item(), rel=1e-2)


def test_where_distributions_do_not_overlap_its_gradient_vanishes_as_the_kl_s_does_not() -> None:
    """Logits x 30: the KL's gradient stays near its bound, that of the L1 transport dies with the softmax."""
    norms = {}
    for scale in (1.0, 30.0):
        student = (scale * logits(16, 10, 0)).requires_grad_()
        teacher = scale * logits(16, 10, 1)
        (transport,) = torch.autograd.grad(sinkd(student, teacher).mean(), student)
        (soft,) = torch.autograd.grad(soft_labels(student, teacher, temperature=2.0).mean(), student)
        norms[scale] = transport.norm().item(), soft.norm().item()
    assert norms[30.0][0] < 0.2 * norms[1.0][0]
    assert norms[30.0][1] > norms[1.0][1]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"alpha": 1.1}, {"beta": -1.0}, {"beta": math.inf}, {"tau": 0.0}, {"temperature": math.nan}),
        *({"epsilon": 0.0}, {"iterations": 0}),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="sinkd"):
        SinKDConfig(**wrong)


def test_the_step_fails_with_the_function(tmp_path: Path) -> None:
    trainer, _ = testing.trainer(CASE, tmp_path)
    with mock.patch.object(module, "sinkd", side_effect=KeyError("sinkd")), pytest.raises(KeyError):
        trainer.train()
