"""AlignDistil: the composed teacher by hand, and what a Trainer's step is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.general.gkd import gkd
from hf_compress_plugins.language import aligndistil as module
from hf_compress_plugins.language.aligndistil import AlignDistil, aligndistil, extrapolated, strength
from scene import logits
from torch import Tensor

from hf_compress import DistillConfig, testing
from hf_compress.errors import ConfigurationError, MismatchError, NumericalError
from hf_compress.objective import Rows, Signals, Step
from hf_compress.on_policy import on_policy

CASE = testing.Case("aligndistil", "text-generation")


def row(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_the_strength_by_hand() -> None:
    """(3/4, 1/4) against (1/4, 3/4): the L1 distance is 1; of distributions that share nothing 2."""
    assert strength(row(0.75, 0.25), row(0.25, 0.75), c=10.0).item() == pytest.approx(10.001)
    assert strength(row(1.0, 0.0), row(0.0, 1.0), c=10.0).item() == pytest.approx(20.001)


def test_the_teacher_by_hand() -> None:
    """One step from (3/4, 1/4) away from (1/2, 1/2) gives (9, 1) / 10; from the reference w = 1 is the DPO model."""
    dpo, other, once = row(0.75, 0.25), row(0.5, 0.5), torch.ones(1, dtype=torch.float64)
    beyond = extrapolated(dpo, other, once, reward="contrastive", temperature=1.0)
    assert beyond.exp().tolist()[0] == pytest.approx([0.9, 0.1])
    warmer = extrapolated(dpo, other, once, reward="contrastive", temperature=2.0)
    assert warmer.exp().tolist()[0] == pytest.approx([0.75, 0.25])
    back = extrapolated(dpo, other, once, reward="dpo", temperature=1.0)
    torch.testing.assert_close(back, dpo)
    assert extrapolated(dpo, other, 2 * once, reward="dpo", temperature=1.0).exp()[0, 0].item() == pytest.approx(0.9)


def test_where_both_models_agree_it_is_a_hundred_reverse_kl() -> None:
    student, dpo = logits(4, 6, 0), logits(4, 6, 1)
    w = strength(dpo, dpo, c=10.0)
    assert w.tolist() == pytest.approx([1e-3] * 4)
    target = extrapolated(dpo, dpo, w, reward="contrastive", temperature=1.0)
    expected = 100 * gkd(student, dpo, beta=1.0)
    torch.testing.assert_close(aligndistil(student, target, 0.1 / w), expected)


def test_the_step_beyond_is_rlhf_s_optimum() -> None:
    """π* ∝ π_dpo · (π_dpo / π_rev)^w: no other distribution has a larger reward w·log(π_dpo/π_rev) less KL to π_dpo."""
    dpo, other = logits(1, 5, 0), logits(1, 5, 1)
    best = extrapolated(dpo, other, torch.tensor([0.7]), reward="contrastive", temperature=1.0)
    log_p, log_r = dpo.log_softmax(-1), other.log_softmax(-1)

    def value(log_q: Tensor) -> Tensor:
        return (log_q.exp() * (0.7 * (log_p - log_r) - (log_q - log_p))).sum()

    for seed in range(20):
        assert value((best + 0.3 * logits(1, 5, seed)).log_softmax(-1)) < value(best)


def test_entries_that_a_model_excludes_give_no_nan() -> None:
    dpo, other, w = logits(2, 5, 0), logits(2, 5, 1), torch.ones(2)
    dpo[0, 1], other[0, 1], other[1, 2] = -math.inf, -math.inf, -math.inf
    student = logits(2, 5, 2)
    student[0, 1] = -math.inf
    student.requires_grad_()
    found = extrapolated(dpo, other, w, reward="contrastive", temperature=1.0)
    assert found[0, 1] == -math.inf
    values = aligndistil(student, found, w)
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    with pytest.raises(MismatchError, match="one shape"):
        extrapolated(dpo, other[:, :4], w, reward="contrastive", temperature=1.0)


def answered() -> list[dict[str, Any]]:
    """Rows whose first two tokens are the prompt."""
    return [one | {"labels": [-100, -100, *one["labels"][2:]]} for one in testing.rows(CASE.task)]


class Kept(AlignDistil):
    """Keeps what it was given."""

    rows: Rows
    signals: Signals

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        type(self).rows = rows
        return super().per_position(rows, step)

    def forward(self, signals: Signals, step: Step) -> dict[str, Tensor]:
        type(self).signals = signals
        return {}


Kept.__module__ = AlignDistil.__module__


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_weight": 0.006},
        {"temperature": 2.0},
        {"reward": "dpo"},
        {"adaptive": False},
        {"adaptive": False, "reward": "dpo"},
    ],
    ids=str,
)
def test_a_step_is_the_mean_over_answers_of_each_answer_s_mean(
    settings: dict[str, Any], on_policy: bool, tmp_path: Path
) -> None:
    method = Kept(on_policy=on_policy, max_new_tokens=4, **settings)
    trainer, _ = testing.trainer(CASE, tmp_path, objective=method, data=answered(), dtype=torch.float64)
    trainer.train()
    rows = Kept.rows
    dpo, other = rows.teacher_logits, rows.frozen["reference" if settings.get("reward") == "dpo" else "reverse"]
    assert dpo is not None
    p, r = dpo.softmax(-1), other.softmax(-1)
    w = 10 * (p - r).abs().sum(-1, keepdim=True) + 1e-3 if settings.get("adaptive", True) else torch.full((1, 1), 2.0)
    weight = 0.1 / w if settings.get("max_weight") is None else torch.clamp(0.1 / w, max=0.006)
    start = other if settings.get("reward") == "dpo" else dpo
    log_target = ((start + w * (dpo - other)) / settings.get("temperature", 1.0)).log_softmax(-1)
    log_q = rows.student_logits.log_softmax(-1)
    values = (weight * log_q.exp() * (log_q - log_target)).sum(-1)
    means = torch.stack([values[rows.example == example].mean() for example in rows.example.unique()])
    expected = means.sum().item() / 4  # an answer without tokens counts as 0
    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx(expected, rel=1e-5)
    scored = Kept.signals.positions.labels
    asked = torch.tensor([token for one in answered() for token in one["labels"] if token != -100])
    assert on_policy != torch.equal(scored, asked)


def test_samples_are_drawn_as_in_the_authors_scripts(tmp_path: Path) -> None:
    method = AlignDistil(on_policy=True, max_new_tokens=3)
    trainer, _ = testing.trainer(CASE, tmp_path, objective=method, data=answered())
    with mock.patch.object(module, "on_policy", wraps=on_policy) as called:
        trainer.train()
    expected = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 3}
    assert called.call_args.kwargs == expected


def test_the_student_s_own_answers_are_no_labels(tmp_path: Path) -> None:
    config = DistillConfig(frozen=testing.frozen(CASE, AlignDistil()), task_weight=1.0)
    with pytest.raises(ConfigurationError, match="own tokens"):
        testing.trainer(CASE, tmp_path, objective=AlignDistil(on_policy=True), config=config)


def test_a_broken_reverse_model_stops_the_run(tmp_path: Path) -> None:
    frozen = testing.frozen(CASE, AlignDistil())
    for parameter in frozen["reverse"].parameters():
        parameter.data.fill_(math.nan)
    trainer, _ = testing.trainer(CASE, tmp_path, config=DistillConfig(frozen=frozen))
    with pytest.raises(NumericalError, match="aligndistil"):
        trainer.train()


@pytest.mark.parametrize(
    "wrong",
    [{"beta": 0.0}, {"c": -1.0}, {"beta2": math.nan}, {"max_weight": 0.0}, {"max_new_tokens": 0}, {"reward": "rlhf"}],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        AlignDistil(**wrong)
