"""Generalised distillation: which divergence, in which direction, with which settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.general.gkd import GKD, Divergence, gkd
from scene import logits, rows, step
from torch import Tensor

from hf_compress import on_policy as module
from hf_compress import testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Signals, Step
from hf_compress.on_policy import on_policy

CHOICES: tuple[Divergence, ...] = ("jsd", "tvd", "skew_kl", "skew_rkl")


def naive(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def expected(divergence: Divergence, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Written out on probabilities, as the papers have it: p the teacher's, q the student's."""
    m = beta * p + (1 - beta) * q
    if divergence == "jsd" and beta in (0, 1):
        return naive(p, q) if beta == 0 else naive(q, p)
    return {
        "jsd": beta * naive(p, m) + (1 - beta) * naive(q, m),
        "tvd": 0.5 * (p - q).abs().sum(-1),
        "skew_kl": naive(p, m),
        "skew_rkl": naive(q, beta * q + (1 - beta) * p),
    }[divergence]


@pytest.mark.parametrize("divergence", CHOICES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_against_the_formula_on_probabilities(
    divergence: Divergence, beta: float, temperature: float
) -> None:
    student, teacher = logits(4, 6, 0).requires_grad_(), logits(4, 6, 1)

    found = gkd(student, teacher, beta=beta, temperature=temperature, divergence=divergence)
    formula = expected(divergence, (teacher / temperature).softmax(-1), (student / temperature).softmax(-1), beta)

    torch.testing.assert_close(found, formula)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), student, retain_graph=True)[0] for v in (found, formula)))


@pytest.mark.parametrize("beta", [0, 1])
def test_the_ends_of_the_jsd_are_the_two_kls(beta: float) -> None:
    student, teacher = logits(4, 6, 0), logits(4, 6, 1)

    found = gkd(student, teacher, beta=beta)

    torch.testing.assert_close(found, expected("jsd", teacher.softmax(-1), student.softmax(-1), beta))


def test_there_is_no_factor_for_the_temperature() -> None:
    student, teacher = logits(4, 6, 0), logits(4, 6, 1)

    torch.testing.assert_close(
        gkd(student, teacher, beta=0.5, temperature=2.0), gkd(student / 2, teacher / 2, beta=0.5)
    )


def test_the_jsd_of_disjoint_distributions_is_the_entropy_of_beta() -> None:
    """-β ln β - (1 - β) ln(1 - β), its largest value."""
    student = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor([[-math.inf, 0.0]], dtype=torch.float64)

    found = gkd(student, teacher, beta=0.3)

    assert found.item() == pytest.approx(-0.3 * math.log(0.3) - 0.7 * math.log(0.7))


def test_the_value_at_a_small_beta_is_a_small_part_of_the_kl() -> None:
    """As the module says: near a thirteenth at β = 0.1, for distributions that are not far apart."""
    student, teacher = logits(200, 13, 0), logits(200, 13, 1)

    ratio = gkd(student, teacher, beta=0).mean() / gkd(student, teacher, beta=0.1).mean()

    assert 10 < ratio < 18


@pytest.mark.parametrize("divergence", CHOICES)
def test_the_objective_uses_its_settings(divergence: Divergence) -> None:
    student, teacher = logits(4, 6, 0), logits(4, 6, 1)

    found = GKD(divergence=divergence, beta=0.2, temperature=3.0).per_position(rows(student, teacher), step())

    torch.testing.assert_close(found, gkd(student, teacher, beta=0.2, temperature=3.0, divergence=divergence))


def test_by_default_it_is_the_even_jsd_at_temperature_one_without_the_task() -> None:
    student, teacher = logits(4, 6, 0), logits(4, 6, 1)

    torch.testing.assert_close(GKD().per_position(rows(student, teacher), step()), gkd(student, teacher, beta=0.5))
    assert GKD.task_weight == 0.0


def test_other_vocabularies_are_refused_by_name() -> None:
    with pytest.raises(MismatchError, match="gkd: student"):
        gkd(torch.zeros(3, 1), torch.zeros(3, 11), beta=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.1}, "gkd: beta must lie in 0 … 1"),
        ({"beta": -0.1}, "gkd: beta must lie in 0 … 1"),
        ({"beta": math.nan}, "gkd: beta must lie in 0 … 1"),
        ({"beta": 0, "divergence": "skew_kl"}, "ends excluded for a skewed KL.*got 0"),
        ({"beta": 1.0, "divergence": "skew_rkl"}, "ends excluded for a skewed KL.*got 1.0"),
        ({"divergence": "kl"}, "gkd: divergence must be jsd, tvd, skew_kl or skew_rkl, got 'kl'"),
        ({"temperature": 0.0}, "gkd: temperature must be positive"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GKD(**settings)


def answered(task: str = "text-generation") -> list[dict[str, Any]]:
    """The suite's rows with a prompt of two tokens."""
    rows = testing.rows(task)
    for row in rows:
        row["labels"] = [-100, -100, *row["input_ids"][2:]]
    return rows


def test_a_part_of_the_batches_is_answered_by_the_student(tmp_path: Path) -> None:
    """λ = 0 samples nothing and λ = 1 always; between them each batch draws, and a run draws as the one before it."""
    case, counts = testing.Case("gkd", "text-generation"), {}
    for lmbda in (0.0, 0.5, 1.0, 0.5):
        with mock.patch.object(module, "on_policy", wraps=on_policy) as called:
            objective = GKD(lmbda=lmbda, max_new_tokens=4)
            trainer, _ = testing.trainer(case, tmp_path, objective=objective, data=answered(), max_steps=12)
            trainer.train()
        drawn = [call.args[1].global_step for call in called.call_args_list]
        assert counts.setdefault(lmbda, drawn) == drawn
    assert counts[0.0] == []
    assert counts[1.0] == list(range(12))
    assert 2 <= len(counts[0.5]) <= 10


def test_sampling_is_the_paper_s(tmp_path: Path) -> None:
    """The student's whole distribution at the sampling temperature: no top-k, no top-p."""
    trainer, _ = testing.trainer(
        testing.Case("gkd", "text-generation"), tmp_path, objective=GKD(lmbda=1.0, max_new_tokens=4), data=answered()
    )
    with mock.patch.object(trainer.model, "generate", wraps=trainer.model.generate) as called:
        trainer.train()
    settings = called.call_args.kwargs
    assert settings["do_sample"]
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (0.9, 0, 1.0)
    assert settings["max_new_tokens"] == 4


def test_the_value_is_the_mean_over_answers_of_each_answer_s_mean(tmp_path: Path) -> None:
    kept: list[Signals] = []

    class Kept(GKD):
        def forward(self, signals: Signals, step: Step) -> dict[str, Tensor]:
            kept.append(signals)
            return {}

    Kept.__module__ = GKD.__module__
    case = testing.Case("gkd", "text-generation")
    trainer, _ = testing.trainer(case, tmp_path, objective=Kept(lmbda=1.0, max_new_tokens=6), data=answered())
    trainer.train()
    (signals,) = kept
    where = signals.positions
    rows = [taps["logits"].detach().flatten(0, 1)[where.index] for taps in (signals.student, signals.teacher)]
    values = gkd(*rows, beta=0.5)
    means = torch.stack([values[where.example == example].mean() for example in range(4)])
    logged = [entry["distill_loss"] for entry in trainer.state.log_history if "distill_loss" in entry]
    assert logged == pytest.approx([means.mean().item()], rel=1e-5)


@pytest.mark.parametrize("settings", [{"lmbda": -0.1}, {"lmbda": 1.1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="lmbda"):
        GKD(**settings)
