"""The interpolated target and its schedule, by hand and step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hf_compress_plugins.general.gkd import gkd
from hf_compress_plugins.language.taid import TAID, Schedule, TAIDConfig, advance, taid
from scene import logits, rows, step
from torch import Tensor

from hf_compress.errors import ConfigurationError, MismatchError


def gradient(t: float) -> Tensor:
    student = logits(3, 5, 0).requires_grad_()
    taid(student, logits(3, 5, 1), t).sum().backward()
    assert student.grad is not None
    return student.grad


def start(config: TAIDConfig) -> Schedule:
    return Schedule(torch.tensor(config.t_start), torch.tensor(math.inf), torch.tensor(0.0))


def test_at_zero_the_target_is_the_student_itself_and_the_gradient_is_exactly_zero() -> None:
    student = logits(3, 5, 0)

    torch.testing.assert_close(gradient(0.0), torch.zeros(3, 5, dtype=torch.float64), rtol=0, atol=1e-15)
    entropy = -(student.softmax(-1) * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(taid(student, logits(3, 5, 1), 0.0), entropy)


def test_at_one_the_gradient_is_that_of_the_forward_kl() -> None:
    student, teacher = logits(3, 5, 0).requires_grad_(), logits(3, 5, 1)

    gkd(student, teacher, beta=0).sum().backward()

    torch.testing.assert_close(gradient(1.0), student.grad)


@pytest.mark.parametrize("t", [0.2, 0.4, 0.75])
def test_between_them_it_is_the_difference_to_the_mixed_logits(t: float) -> None:
    """Cross-entropy to a fixed target: q - p_t, with p_t mixed before the softmax."""
    student, teacher = logits(3, 5, 0), logits(3, 5, 1)
    target = ((1 - t) * student + t * teacher).softmax(-1)

    torch.testing.assert_close(gradient(t), student.softmax(-1) - target)
    torch.testing.assert_close(taid(student, teacher, t), -(target * student.log_softmax(-1)).sum(-1))


def test_two_classes_by_hand() -> None:
    """Student (½, ½), teacher (9/10, 1/10), t = ½: logits (ln 3, 0), target (¾, ¼); -Σ p log ½ = ln 2."""
    student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)

    found = taid(student, torch.tensor([[math.log(9.0), 0.0]], dtype=torch.float64), 0.5)
    found.sum().backward()

    assert found.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25]], dtype=torch.float64))


def test_the_teacher_gets_no_gradient() -> None:
    teacher = logits(3, 5, 1).requires_grad_()

    taid(logits(3, 5, 0).requires_grad_(), teacher, 0.5).sum().backward()

    assert teacher.grad is None


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_excluded_classes_leave_value_and_gradient_finite(t: float, side: str) -> None:
    student, teacher = logits(3, 5, 0), logits(3, 5, 1)
    for name, tensor in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            tensor[:, 0] = -math.inf
    student.requires_grad_()

    found = taid(student, teacher, t)
    found.sum().backward()

    assert found.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_half_precision_is_mixed_in_single() -> None:
    student, teacher = logits(3, 5, 0).half(), logits(3, 5, 1).half()

    found = taid(student, teacher, 0.4)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, taid(student.float(), teacher.float(), 0.4))


def test_no_position_gives_nothing_that_is_still_connected() -> None:
    student = torch.zeros(0, 5, requires_grad=True)

    taid(student, torch.zeros(0, 5), 0.4).sum().backward()

    assert student.grad is not None


def test_other_vocabularies_are_refused_by_name() -> None:
    with pytest.raises(MismatchError, match="taid: student"):
        taid(torch.zeros(3, 1), torch.zeros(3, 11), 0.4)


def test_the_first_loss_is_kept_and_moves_nothing() -> None:
    config = TAIDConfig()

    state = advance(start(config), torch.tensor(2.5), 0.5, config)

    assert (state.t.item(), state.previous.item(), state.momentum.item()) == (pytest.approx(0.4), 2.5, 0.0)


def test_an_adaptive_step_by_hand() -> None:
    """δ = (2 - 1) / 2, m = ¼ · 0.4 + ¾ · δ = 0.475, t = 0.5 + 0.1 · sigmoid(m) · 0.5."""
    config = TAIDConfig(t_start=0.0, alpha=0.1, beta=0.25)
    state = Schedule(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(0.4))

    after = advance(state, torch.tensor(1.0), 0.0, config)

    assert after.momentum.item() == pytest.approx(0.475)
    assert after.previous.item() == 1.0
    assert after.t.item() == pytest.approx(0.5 + 0.1 * 0.5 / (1 + math.exp(-0.475)))


def test_a_rising_loss_slows_the_step_and_a_falling_one_hastens_it() -> None:
    config = TAIDConfig(t_start=0.0, alpha=0.1, beta=0.5)
    state = Schedule(torch.tensor(0.5), torch.tensor(2.0), torch.tensor(0.0))

    risen, fallen = (advance(state, torch.tensor(loss), 0.0, config).t.item() for loss in (3.0, 1.0))

    assert 0.5 < risen < 0.525 < fallen


def test_t_is_never_below_the_ramp_nor_above_its_end() -> None:
    config = TAIDConfig(t_start=0.2, t_end=0.8, alpha=1.0)
    state = Schedule(torch.tensor(0.3), torch.tensor(2.0), torch.tensor(0.0))
    slow = TAIDConfig(t_start=0.2, t_end=0.8, alpha=0.0)

    assert advance(state, torch.tensor(2.0), 0.5, slow).t.item() == pytest.approx(0.5)
    assert advance(state, torch.tensor(2.0), 0.0, slow).t.item() == pytest.approx(0.3)
    assert advance(
        Schedule(torch.tensor(0.75), state.previous, state.momentum), torch.tensor(2.0), 0.0, config
    ).t.item() == pytest.approx(0.8)


def run(objective: TAID, losses: list[float]) -> list[float]:
    """t that each step uses, over a run of that many steps, counted from 0."""
    used = []
    for done, loss in enumerate(losses):
        used.append(objective.t.item())
        objective.after_step(step(done, len(losses)), {"taid": torch.tensor(loss)})
    return used


def test_the_first_two_steps_use_t_start_and_then_it_is_the_ramp() -> None:
    """Not adaptive, ten steps from 0.2 to 1: step n uses what the step before it set."""
    used = run(TAID(t_start=0.2, adaptive=False), [1.0] * 10)

    assert used == pytest.approx([0.2] + [0.2 + 0.8 * n / 10 for n in range(9)])
    assert used[0] == used[1]


@pytest.mark.parametrize("given", [0, 0.0])
def test_a_start_given_as_a_whole_number_moves_as_well(given: float) -> None:
    objective = TAID(t_start=given, adaptive=False)

    used = run(objective, [1.5] * 10)

    assert used == pytest.approx([0.0] + [n / 10 for n in range(9)])
    assert objective.previous.item() == 1.5


def test_a_window_without_a_scored_position_leaves_the_schedule_alone() -> None:
    objective = TAID(adaptive=False)
    objective.after_step(step(0), {"taid": torch.tensor(2.0)})
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}

    objective.after_step(step(5), {"taid": torch.tensor(0.0)})

    assert {name: buffer.item() for name, buffer in objective.named_buffers()} == {
        n: b.item() for n, b in before.items()
    }


def test_the_state_travels_in_the_state_dict() -> None:
    first, second = TAID(adaptive=False), TAID(adaptive=False)
    run(first, [3.0, 2.0, 1.0])

    second.load_state_dict(first.state_dict())

    assert set(first.state_dict()) == {"t", "previous", "momentum"}
    assert second.t.item() == first.t.item() > 0.4
    assert second.previous.item() == 1.0


def test_the_objective_uses_its_t() -> None:
    student, teacher, objective = logits(3, 5, 0), logits(3, 5, 1), TAID(t_start=0.25)
    objective.t.fill_(0.75)

    found = objective.per_position(rows(student, teacher), step())

    torch.testing.assert_close(found, taid(student, teacher, 0.75))
    assert TAID.task_weight == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {"t_start": 1.0},
        {"t_start": -0.1},
        {"t_start": 0.5, "t_end": 0.4},
        {"t_start": 0.0, "t_end": 0.0},
        {"t_end": 1.1},
        {"t_start": math.nan},
        {"alpha": 1.1},
        {"alpha": math.nan},
        {"beta": -0.1},
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^taid: .*got"):
        TAID(**settings)
