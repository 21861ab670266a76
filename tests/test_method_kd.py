"""Softened targets by hand, by their properties, and their settings."""

from __future__ import annotations

import math

import pytest
import torch
from hf_compress_plugins.general.kd import KD, KDConfig, kd
from scene import logits, rows, step

from hf_compress.errors import ConfigurationError, MismatchError


def test_two_classes_by_hand() -> None:
    """Teacher (¾, ¼), student (½, ½): KL = ¾ ln 3/2 + ¼ ln ½."""
    found = kd(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), temperature=1.0)

    assert found.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_the_temperature_softens_both_and_its_square_scales() -> None:
    """Teacher logits (2 ln 3, 0) at T = 2 are (¾, ¼) again, times 4."""
    found = kd(torch.zeros(1, 2), torch.tensor([[2 * math.log(3.0), 0.0]]), temperature=2.0)

    assert found.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_the_gradient_is_t_times_the_difference_of_the_distributions() -> None:
    student, teacher = logits(3, 5, 0).requires_grad_(), logits(3, 5, 1)

    kd(student, teacher, temperature=3.0).sum().backward()

    expected = 3.0 * ((student.detach() / 3).softmax(-1) - (teacher / 3).softmax(-1))
    torch.testing.assert_close(student.grad, expected)


def test_for_a_high_temperature_the_gradient_is_that_of_centred_logits() -> None:
    """Section 2.1 of the paper: (z_s - z_t) / classes, for logits of zero mean."""
    student, teacher = logits(3, 5, 0), logits(3, 5, 1)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    student.requires_grad_()

    kd(student, teacher, temperature=1e4).sum().backward()

    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 5, rtol=1e-3, atol=1e-4)


def test_equal_logits_give_zero_and_no_gradient() -> None:
    student = logits(3, 5, 0).requires_grad_()

    found = kd(student, student, temperature=2.0)
    found.sum().backward()

    torch.testing.assert_close(found.detach(), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(student.grad, torch.zeros(3, 5, dtype=torch.float64))


def test_the_objective_uses_its_temperature() -> None:
    student, teacher = logits(3, 5, 0), logits(3, 5, 1)

    for objective, temperature in ((KD(), 2.0), (KD(temperature=5), 5.0), (KD(KDConfig(temperature=0.5)), 0.5)):
        found = objective.per_position(rows(student, teacher), step())
        torch.testing.assert_close(found, kd(student, teacher, temperature=temperature))


def test_it_leaves_the_weight_of_the_task_alone() -> None:
    assert KD.task_weight is None


def test_other_vocabularies_are_refused_by_name() -> None:
    with pytest.raises(MismatchError, match=r"kd: student \(3, 5\) and teacher \(3, 6\) must have one shape"):
        kd(torch.zeros(3, 5), torch.zeros(3, 6), temperature=2.0)


@pytest.mark.parametrize("temperature", [0, -2.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigurationError, match="kd: temperature must be positive and finite"):
        KD(temperature=temperature)


def test_an_unknown_setting_lists_those_that_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"kd has no setting \['temprature'\]; it has \['temperature'\]"):
        KD(temprature=2.0)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ConfigurationError, match="kd: weight must be finite and at least 0"):
        KD(weight=weight)
