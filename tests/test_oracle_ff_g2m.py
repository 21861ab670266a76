"""FF-G2M's losses against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.graphs.ff_g2m import high_frequency, low_frequency, with_loops
from torch import Tensor
from torch.nn import functional as F

from hf_compress.divergences import kl

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SETTINGS = [(1.5, 0.4), (1.0, 0.0)]


def terms(data: dict[str, Tensor], student: Tensor, tau: float, lamb: float, nodewise: bool) -> list[Tensor]:
    """λ NLL, (1 - λ) L_low (node by node in the GLNN ablation) and (1 - λ) L_high."""
    teacher, train = data["teacher_logits"], data["idx_train"]
    if nodewise:
        low = kl(teacher.log_softmax(-1), student.log_softmax(-1)).mean()
    else:
        low = low_frequency(student, teacher, data["edges_loop"]).mean()
    high = high_frequency(student, teacher, data["edges_no_loop"], tau=tau).mean()
    return [lamb * F.cross_entropy(student[train], data["labels"][train]), (1 - lamb) * low, (1 - lamb) * high]


@pytest.mark.parametrize(("tau", "lamb"), SETTINGS)
@pytest.mark.parametrize("mode", ["full", "mlp", "glnn", "low", "high"])
def test_terms_and_gradient(mode: str, tau: float, lamb: float) -> None:
    data = oracle.load("ff_g2m")
    student = data["student_logits"].clone().requires_grad_()

    found = terms(data, student, tau, lamb, mode == "glnn")
    train = data["idx_train"]
    total = {
        "full": sum(found, torch.zeros(())),
        "mlp": F.cross_entropy(student[train], data["labels"][train]),
        "glnn": found[0] + found[1],
        "low": found[0] + found[1],
        "high": found[0] + found[2],
    }[mode]
    total.backward()

    name = f"{mode}_tau{tau}_lam{lamb}"
    torch.testing.assert_close(torch.stack(found).detach(), data[f"{name}_weighted_terms"], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"{name}_grad"], **CLOSE)


def test_the_terms_alone() -> None:
    data = oracle.load("ff_g2m")
    logits = (data["student_logits"], data["teacher_logits"])
    torch.testing.assert_close(low_frequency(*logits, data["edges_loop"]).mean(), data["low_loss"], **CLOSE)
    for tau in (1.0, 1.5):
        high = high_frequency(*logits, data["edges_no_loop"], tau=tau).mean()
        torch.testing.assert_close(high, data[f"high_loss_tau{tau}"], **CLOSE)


def test_self_loops_are_one_a_node() -> None:
    data = oracle.load("ff_g2m")
    found = with_loops(data["edges_no_loop"], 10)
    assert sorted(map(tuple, found.T.tolist())) == sorted(map(tuple, data["edges_loop"].T.tolist()))
