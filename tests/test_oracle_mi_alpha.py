"""MI-α, its critic and the losses that it was compared with, against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.encoders._auto_distiller import ranks
from hf_compress_plugins.encoders.mi_alpha import (
    Critic,
    LogitsLoss,
    Loss,
    MIAlphaConfig,
    hidden_loss,
    logits_loss,
    mi_alpha,
)
from torch import Tensor

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}
"""Of a strong diagonal: the authors subtract sums of exponentials in float32; here it agrees with float64 to 1e-7."""
CASES = [
    *(("k5", alpha) for alpha in ("0.0", "0.1", "0.5", "0.9", "1.0")),
    *(("k2", alpha) for alpha in ("0.1", "0.5", "0.9")),
    *(("k5_diag8", alpha) for alpha in ("0.1", "0.9")),
]
BOUNDS = {"tuba_lower_bound": 0.0, "nwj_lower_bound": 1.0, "tuba_with_baseline": None}


@pytest.mark.parametrize(("case", "alpha"), CASES)
def test_the_loss_and_its_gradients(case: str, alpha: str) -> None:
    data = oracle.load("distiller_mi_alpha")
    scores, baseline = (data[f"{case}.{name}"].requires_grad_() for name in ("scores", "log_baseline"))

    loss = mi_alpha(scores, baseline, alpha=float(alpha))
    (loss + 0 * baseline.sum()).backward()  # α = 1 does not reach the baseline
    close = ROUNDED if case == "k5_diag8" else CLOSE

    torch.testing.assert_close(loss.detach(), data[f"{case}.alpha{alpha}.loss"], **CLOSE)
    torch.testing.assert_close(scores.grad, data[f"{case}.alpha{alpha}.grad_scores"], **close)
    torch.testing.assert_close(baseline.grad, data[f"{case}.alpha{alpha}.grad_log_baseline"], **close)


@pytest.mark.parametrize(("bound", "constant"), BOUNDS.items())
def test_the_bounds_that_it_interpolates_are_those_of_one_end(bound: str, constant: float | None) -> None:
    """Without a learned baseline it is 0 (TUBA) or 1 (NWJ)."""
    data = oracle.load("distiller_mi_alpha")
    scores = data["k5.scores"].requires_grad_()
    baseline = data["k5.log_baseline"] if constant is None else torch.full((5,), constant)

    found = -mi_alpha(scores, baseline, alpha=0.0)
    found.backward()

    torch.testing.assert_close(found.detach(), data[f"k5.{bound}"], **CLOSE)
    torch.testing.assert_close(scores.grad, data[f"k5.{bound}.grad_scores"], **CLOSE)


def critic(data: dict[str, Tensor], alpha: float) -> Critic:
    sizes = oracle.metadata("distiller_mi_alpha")["hyper"]["mlp"]
    made = Critic(6, 10, MIAlphaConfig(alpha=alpha, hidden=sizes["hidden"], out=sizes["out_dim"]))
    names = {"mlp.critic.critic._s.": "student.", "mlp.critic.critic._t.": "teacher."}
    names["mlp.baseline.critic._t."] = "baseline."
    weights = {ours + key.removeprefix(p): v for p, ours in names.items() for key, v in data.items() if p in key}
    made.load_state_dict(weights)
    return made


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_critic_reads_the_first_tokens(alpha: float) -> None:
    data = oracle.load("distiller_mi_alpha")
    student = data["mlp.student_hidden"].requires_grad_()

    found = critic(data, alpha)(student, data["mlp.teacher_hidden"], data["mlp.mask"].bool())
    loss = mi_alpha(*found, alpha=alpha)
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"mlp.alpha{alpha}.loss"], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"mlp.alpha{alpha}.grad_student_hidden"], **CLOSE)


@pytest.mark.parametrize("masked", ["masked", "nomask"])
@pytest.mark.parametrize(
    ("name", "loss"), [("hid_ce_loss", "ce"), ("hid_mse_loss", "mse"), ("cos_loss", "cos"), ("pkd_loss", "pkd")]
)
def test_other_losses_of_hidden_states(name: str, loss: Loss, masked: str) -> None:
    data = oracle.load("distiller_mi_alpha")
    student, mask = data["mlp.student_hidden"].requires_grad_(), data["mlp.mask"].bool()
    tokens = mask if masked == "masked" else torch.ones_like(mask)

    found = hidden_loss(student, data["simple.teacher_hidden"], tokens, loss=loss)
    found.backward()

    torch.testing.assert_close(found.detach(), data[f"simple.{name}.{masked}.loss"], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"simple.{name}.{masked}.grad"], **CLOSE)


@pytest.mark.parametrize("temperature", [1, 4])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_losses_of_logits(loss: LogitsLoss, temperature: int) -> None:
    data = oracle.load("distiller_mi_alpha")
    student = data["simple.logits_S"].requires_grad_()

    found = logits_loss(student, data["simple.logits_T"], loss=loss, temperature=temperature).mean()
    found.backward()

    torch.testing.assert_close(found.detach(), data[f"simple.kd_{loss}_loss.T{temperature}.loss"], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"simple.kd_{loss}_loss.T{temperature}.grad"], **CLOSE)


def test_the_runs_of_a_task_lie_evenly_between_0_and_1() -> None:
    data = oracle.load("distiller_pipeline_table")
    tasks = [str(int(code)) for code in data["task"]]
    found = torch.as_tensor(ranks(data["ratio"].tolist(), tasks))
    for task in range(8):
        assert float(found[data["task"] == task].mean()) == pytest.approx(0.5)
