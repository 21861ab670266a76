"""Divergences against TRL's generalised JSD and the TAID authors' baselines."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from hf_compress_plugins.general.gkd import GKD, gkd
from stub import GradientKeeper, StubForTokenClassification, stub_trainer
from torch import Tensor

from hf_compress import DistillCallback
from hf_compress.divergences import cross_entropy, jsd, kl, log_probabilities, skew_kl, tvd
from hf_compress.on_policy import rebuild

BETAS, TEMPERATURES = ("0", "0.1", "0.5", "0.9", "1"), ("1.0", "0.9", "2.0")
EXACT = {"rtol": 1e-9, "atol": 1e-11}
SINGLE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_jsd_value_and_gradient(beta: str, temperature: str) -> None:
    data = oracle.load("gkd_jsd")
    student, chosen = data["student_logits"].requires_grad_(), data["labels"] != -100

    loss = gkd(student[chosen], data["teacher_logits"][chosen], beta=float(beta), temperature=float(temperature)).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"beta{beta}_temp{temperature}/loss"], **EXACT)
    torch.testing.assert_close(student.grad, data[f"beta{beta}_temp{temperature}/grad"], **EXACT)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_jsd_through_the_callback(beta: str, temperature: str, tmp_path: Path) -> None:
    data = oracle.load("gkd_jsd")
    teacher = StubForTokenClassification(data["teacher_logits"])
    method = GKD(beta=float(beta), temperature=float(temperature))
    kept = GradientKeeper()
    trainer = stub_trainer(tmp_path, data["student_logits"], data["labels"], [DistillCallback(teacher, method), kept])
    trainer.train()

    expected = data[f"beta{beta}_temp{temperature}/loss"].item()
    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(kept.gradients[0]["rows"], data[f"beta{beta}_temp{temperature}/grad"], **EXACT)


def test_division_by_a_given_number_of_items() -> None:
    """TRL's `num_items_in_batch=17`: the sum over positions by 17."""
    data = oracle.load("gkd_jsd")
    student, chosen = data["student_logits"].requires_grad_(), data["labels"] != -100

    loss = gkd(student[chosen], data["teacher_logits"][chosen], beta=0.5).sum() / 17
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["num_items17_beta0.5/loss"], **EXACT)
    torch.testing.assert_close(student.grad, data["num_items17_beta0.5/grad"], **EXACT)


def test_other_reductions_of_the_same_values() -> None:
    """Without labels TRL divides the sum by the batch, or not at all; nothing scored gives 0."""
    data = oracle.load("gkd_jsd")
    student, teacher, none = data["student_logits"], data["teacher_logits"], data["labels"] == 12345
    every = gkd(student.flatten(0, 1), teacher.flatten(0, 1), beta=0.5)

    torch.testing.assert_close(every.sum() / len(student), data["nolabels_beta0.5/loss"], **EXACT)
    torch.testing.assert_close(every.sum(), data["nolabels_sum_beta0.5/loss"], **EXACT)
    torch.testing.assert_close(gkd(student[none], teacher[none], beta=0.5).sum(), data["allmasked/loss"], **EXACT)


def test_one_row() -> None:
    data = oracle.load("gkd_jsd")
    student, chosen = data["student_logits"][:1].clone().requires_grad_(), data["labels"][:1] != -100

    loss = gkd(student[chosen], data["teacher_logits"][:1][chosen], beta=0.1).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["b1_beta0.1/loss"], **EXACT)
    torch.testing.assert_close(student.grad, data["b1_beta0.1/grad"], **EXACT)


def test_acceptance_is_one_minus_total_variation() -> None:
    data = oracle.load("gkd_jsd")
    log_p, log_q = log_probabilities("test", data["student_logits"], data["teacher_logits"])

    torch.testing.assert_close(1 - tvd(log_p, log_q), data["hand/acceptance_per_position"], **EXACT)


def divergences(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """The baselines of the TAID repository. Its skewed KL lacks the teacher's entropy; its gradient is the KL's."""
    entropy = cross_entropy(log_p, log_p)
    found = {
        "fkl_xent": cross_entropy(log_p, log_q),
        "rkl": kl(log_q, log_p),
        "tvd": tvd(log_p, log_q),
    }
    for weight in (0.1, 0.5):
        found[f"js_teacher_weight_{weight}"] = jsd(log_p, log_q, weight)
        found[f"skew_fkl_{weight}"] = skew_kl(log_p, log_q, weight) + entropy
        found[f"skew_rkl_{weight}"] = skew_kl(log_q, log_p, weight)
    return found


BASELINES = sorted(divergences(torch.zeros(1, 2), torch.zeros(1, 2)))


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_of_the_taid_repository(name: str) -> None:
    data = oracle.load("taid_repo_divergences")
    student, chosen = data["student_logits"].requires_grad_(), data["mask"].bool()
    log_p, log_q = log_probabilities("test", student[chosen], data["teacher_logits"][chosen])

    loss = divergences(log_p, log_q)[name].mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{name}/loss"], **SINGLE)
    torch.testing.assert_close(student.grad, data[f"{name}/grad"], **SINGLE)


@pytest.mark.parametrize("name", ["fkl_xent", "rkl", "tvd"])
def test_a_class_that_both_models_exclude(name: str) -> None:
    data = oracle.load("taid_repo_divergences")
    student, chosen = data["inf/student_logits"].requires_grad_(), data["mask"].bool()
    log_p, log_q = log_probabilities("test", student[chosen], data["inf/teacher_logits"][chosen])

    loss = divergences(log_p, log_q)[name].mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"inf/{name}/loss"], **SINGLE)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_labels_of_generated_batches() -> None:
    data = oracle.load("gkd_jsd")

    found = rebuild(data["onpolicy/generated"], data["onpolicy/prompt_attention_mask"], [2])

    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(found[name], data[f"onpolicy/out_{name}"]), name
