"""TAID against its authors' code: through the functions, and through the callback in a real Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import torch
from hf_compress_plugins.language.taid import TAID, Schedule, TAIDConfig, advance, taid
from stub import GradientKeeper, StubForTokenClassification, stub_trainer
from torch import Tensor

from hf_compress import DistillCallback

FIXED = ("0.0", "0.2", "0.4", "0.75", "1.0")
CASES = ("adaptive_default", "adaptive_fast", "adaptive_cap", "linear")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def config(case: str) -> TAIDConfig:
    given = json.loads(json.dumps(oracle.metadata("taid")["configs"]))[case]
    adaptive = not given.pop("disable_adaptive", False)
    return TAIDConfig(adaptive=adaptive, **given)


def masked_mean(student: Tensor, teacher: Tensor, mask: Tensor, t: float | Tensor) -> Tensor:
    chosen = mask.bool()
    return taid(student[chosen], teacher[chosen], t).mean()


@pytest.mark.parametrize("t", FIXED)
def test_value_and_gradient_at_a_fixed_t(t: str) -> None:
    data = oracle.load("taid")
    student = data["student_logits"].requires_grad_()

    loss = masked_mean(student, data["teacher_logits"], data["mask"], float(t))
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"fixed_t/{t}/loss"], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"fixed_t/{t}/grad"], **CLOSE)


def test_one_row_with_one_position() -> None:
    data = oracle.load("taid")
    student = data["student_logits"][:1].clone().requires_grad_()

    loss = masked_mean(student, data["teacher_logits"][:1], data["b1/mask"], 0.4)
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["b1/loss"], **CLOSE)
    torch.testing.assert_close(student.grad, data["b1/grad"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_schedule_over_forty_steps(case: str) -> None:
    data, settings = oracle.load("taid"), config(case)
    student = data["student_logits"].clone()
    state = Schedule(torch.tensor(settings.t_start), torch.tensor(torch.inf), torch.tensor(0.0))
    used, losses, momenta, moves = [], [], [], []
    for n in range(40):
        student.requires_grad_()
        used.append(state.t)
        loss = masked_mean(student, data["teacher_logits"], data["mask"], state.t)
        (gradient,) = torch.autograd.grad(loss, student)
        before = state
        state = advance(state, loss, n / 40, settings)
        raised = settings.alpha * torch.sigmoid(state.momentum) * (1 - before.t)
        moves.append(torch.tensor(torch.nan) if n == 0 else raised)
        losses.append(loss.detach())
        momenta.append(state.momentum)
        student = student.detach() - 3.0 * gradient

    torch.testing.assert_close(torch.stack(used), data[f"{case}/t_used"], **CLOSE)
    torch.testing.assert_close(torch.stack(losses), data[f"{case}/loss"], **CLOSE)
    torch.testing.assert_close(torch.stack(momenta), data[f"{case}/momentum"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.stack(moves), data[f"{case}/delta_t"], rtol=1e-4, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(state.t, data[f"{case}/t_final"], **CLOSE)
    torch.testing.assert_close(student, data[f"{case}/final_student"], rtol=0, atol=1e-3)


def test_schedule_alone_on_ten_given_losses() -> None:
    data = oracle.load("taid")
    given = oracle.metadata("taid")["update_only_cfg"]
    steps = given.pop("num_train_steps")
    settings = TAIDConfig(**given)
    state = Schedule(torch.tensor(settings.t_start), torch.tensor(torch.inf), torch.tensor(0.0))
    t, momentum = [], []
    for n, loss in enumerate(data["update_only/loss_in"]):
        state = advance(state, loss, n / steps, settings)
        t.append(state.t)
        momentum.append(state.momentum)

    torch.testing.assert_close(torch.stack(t), data["update_only/t_after"], **CLOSE)
    torch.testing.assert_close(torch.stack(momentum), data["update_only/momentum_after"], **CLOSE)


@pytest.mark.parametrize("t", FIXED[1:])
def test_gradient_at_a_fixed_t_through_the_callback(t: str, tmp_path: Path) -> None:
    data = oracle.load("taid")
    labels = torch.where(data["mask"].bool(), 1, -100)
    teacher = StubForTokenClassification(data["teacher_logits"])
    objective = TAID(t_start=min(float(t), 0.999999), t_end=1.0)
    objective.t.fill_(float(t))
    kept = GradientKeeper()
    trainer = stub_trainer(tmp_path, data["student_logits"], labels, [DistillCallback(teacher, objective), kept])
    trainer.train()

    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx(data[f"fixed_t/{t}/loss"].item(), rel=1e-5)
    torch.testing.assert_close(kept.gradients[0]["rows"], data[f"fixed_t/{t}/grad"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_forty_steps_through_the_callback(case: str, tmp_path: Path) -> None:
    """Stochastic gradient descent at 3.0 in the Trainer is the oracle's own rule."""
    data = oracle.load("taid")
    labels = torch.where(data["mask"].bool(), 1, -100)
    teacher = StubForTokenClassification(data["teacher_logits"])
    callback = DistillCallback(teacher, TAID(config(case)))
    trainer = stub_trainer(tmp_path, data["student_logits"], labels, [callback], max_steps=40, learning_rate=3.0)
    trainer.train()

    losses = [entry["distill_loss"] for entry in trainer.state.log_history if "distill_loss" in entry]
    torch.testing.assert_close(torch.tensor(losses), data[f"{case}/loss"], rtol=1e-4, atol=1e-5)
    (objective,) = callback.run.distiller.objectives
    torch.testing.assert_close(objective.t, data[f"{case}/t_final"], **CLOSE)
    torch.testing.assert_close(trainer.model.rows.detach(), data[f"{case}/final_student"], rtol=0, atol=1e-3)
