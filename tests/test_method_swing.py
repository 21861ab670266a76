"""Swing distillation: temperatures, noise and targets by hand, and what a Trainer's step is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.general.gkd import GKD
from hf_compress_plugins.language.swing import (
    Swing,
    laplace,
    private_tokens,
    soft_targets,
    swing,
    temperatures,
)
from prepared import PREPARED
from scene import logits
from stub import GradientKeeper
from tiny import tiny_plain_tokenizer
from torch import Tensor

from hf_compress import testing
from hf_compress.errors import ConfigurationError, MismatchError

CASE = testing.Case("swing", "text-generation")


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_temperature_goes_from_the_base_to_the_highest() -> None:
    found = temperatures(torch.tensor([0.0, 0.25, 1.0]), temperature=2.0, max_temperature=16.0)
    assert found.tolist() == [2.0, 5.5, 16.0]


def test_the_noise_is_laplace_s() -> None:
    """Mean 0, mean size b·s, half of it within b·s·ln 2; none where nothing is private."""
    scores = torch.tensor([0.0, 0.5, 1.0])
    found = laplace(scores, 40_000, noise=0.2, generator=draw())
    assert not found[0].any()
    for row, scale in ((1, 0.1), (2, 0.2)):
        assert found[row].mean().item() == pytest.approx(0.0, abs=0.02 * scale * math.sqrt(2) * 2)
        assert found[row].abs().mean().item() == pytest.approx(scale, rel=0.03)
        assert (found[row].abs() < scale * math.log(2)).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(found, laplace(scores, 40_000, noise=0.2, generator=draw()))


def test_a_longer_vocabulary_and_other_micro_batches_move_no_draw() -> None:
    scores = torch.tensor([0.5, 1.0, 0.25])
    found = laplace(scores, 30, noise=0.2, generator=draw())
    assert torch.equal(laplace(scores, 40, noise=0.2, generator=draw())[:, :30], found)
    one = draw()
    parts = [laplace(part, 30, noise=0.2, generator=one) for part in (scores[:0], scores[:1], scores[1:])]
    assert torch.equal(torch.cat(parts), found)
    assert not torch.equal(found[0] / 0.5, found[1])


def test_the_noise_is_finite_at_the_ends_of_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.zeros(size))
    found = laplace(torch.ones(1), 3, noise=0.05, generator=draw())
    assert found.isfinite().all()
    assert (found < -0.5).all()


def test_targets_by_hand() -> None:
    """(4/5, 1/5) at T = 2 is (2/3, 1/3); noise of (-1/3, 1/3) makes (1/3, 2/3); what falls below 0 is 0."""
    teacher = torch.tensor([[0.8, 0.2]] * 4).log()
    teacher[3, 1] = -math.inf
    noise = torch.tensor([[0.0, 0.0], [-1 / 3, 1 / 3], [-2.0, 0.0], [0.0, 0.5]])
    found = soft_targets(teacher, torch.full((4,), 2.0), noise)
    assert found.flatten().tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 2 / 3, 0.0, 1.0, 1.0, 0.0])
    nothing = soft_targets(teacher[2:], torch.ones(2), torch.full((2, 2), -2.0))
    assert nothing.flatten().tolist() == [0.5, 0.5, 1.0, 0.0]
    assert soft_targets(teacher * math.nan, torch.ones(4), noise).isnan().all()


def test_without_privacy_it_has_kd_s_gradient() -> None:
    teacher, student = logits(4, 6, 0), logits(4, 6, 1).requires_grad_()
    plain = student.detach().clone().requires_grad_()
    heat = torch.full((4,), 2.0, dtype=torch.float64)
    swing(student, soft_targets(teacher, heat, torch.zeros(4, 6)), heat).sum().backward()
    log_p, log_q = (teacher / 2).log_softmax(-1), (plain / 2).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    torch.testing.assert_close(student.grad, plain.grad)


def test_at_an_endless_temperature_nothing_of_the_teacher_is_left() -> None:
    """The loss is the mean of -log q over the vocabulary, whoever the teacher is."""
    student, heat = logits(4, 6, 1), torch.full((4,), 1e9, dtype=torch.float64)
    values = [swing(student, soft_targets(logits(4, 6, s), heat, torch.zeros(4, 6)), torch.ones(4)) for s in (0, 7)]
    torch.testing.assert_close(values[0], -student.log_softmax(-1).mean(-1))
    torch.testing.assert_close(values[0], values[1])
    with pytest.raises(MismatchError, match="one shape"):
        swing(student, torch.ones(4, 5), heat)


def with_privacy(private: float) -> testing.Case:
    """The suite's batch with the second token of each row private."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = testing.collate(batch)
        scores = torch.zeros(found["input_ids"].shape)
        scores[:, 1] = private
        return found | {"privacy": scores}

    def prepare(*_: Any) -> Mapping[str, Any]:
        return {"data_collator": collate}

    return testing.Case("swing", CASE.task, prepare=prepare)


def gradient(folder: Path, objective: Any, private: float, method: str = "swing") -> tuple[dict[str, Tensor], float]:
    keeper, case = GradientKeeper(), with_privacy(private)
    case = testing.Case(method, case.task, prepare=case.prepare)
    trainer, _ = testing.trainer(case, folder, objective=objective, dtype=torch.float64, callbacks=(keeper,))
    trainer.train()
    return keeper.gradients[0], trainer.state.log_history[0]["distill_loss"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_without_privacy_is_a_plain_kl_s(temperature: float, tmp_path: Path) -> None:
    own, _ = gradient(tmp_path, Swing(temperature=temperature), 0.0)
    plain, _ = gradient(tmp_path, GKD(beta=0.0, temperature=temperature), 0.0, "gkd")
    for name, value in own.items():
        torch.testing.assert_close(value, temperature**2 * plain[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temper_student", [True, False])
def test_a_step_is_flat_at_the_position_that_predicts_a_private_token(temper_student: bool, tmp_path: Path) -> None:
    """Position 0 predicts the second token; everything else is a plain cross-entropy to the teacher."""
    method = Swing(noise=0.0, max_temperature=8.0, temper_student=temper_student)
    _, found = gradient(tmp_path, method, 0.5)
    student, teacher = testing.models(CASE.task, torch.float64)
    inputs = testing.collate(testing.rows(CASE.task))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    total, count = 0.0, 0
    with torch.no_grad():
        z_s, z_t = student(**given).logits, teacher(**given).logits
    for row, labels in enumerate(inputs["labels"]):
        for place in range(len(labels) - 1):
            if labels[place + 1] == -100:
                continue
            heat = 4.5 if place == 0 else 1.0
            p = (z_t[row, place] / heat).softmax(-1)
            q = (z_s[row, place] / (heat if temper_student else 1.0)).log_softmax(-1)
            total, count = total - (p * q).sum().item(), count + 1
    assert found == pytest.approx(total / count, rel=1e-6)


def test_noise_is_drawn_where_a_token_is_private_alone(tmp_path: Path) -> None:
    quiet, loud = ({"noise": noise, "max_temperature": 1.0} for noise in (0.0, 0.3))
    assert gradient(tmp_path, Swing(**quiet), 0.0)[1] == gradient(tmp_path, Swing(**loud), 0.0)[1]
    values = [gradient(tmp_path, Swing(**loud), 1.0)[1] for _ in range(2)]
    assert values[0] == values[1] != gradient(tmp_path, Swing(**quiet), 1.0)[1]


def test_a_batch_without_scores_or_with_wrong_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="privacy"):
        testing.trainer(CASE, tmp_path)[0].train()
    with pytest.raises(MismatchError, match="lie in 0 … 1"):
        testing.trainer(with_privacy(1.5), tmp_path)[0].train()


def test_private_tokens_are_those_that_a_pattern_touches() -> None:
    data = Dataset.from_list([{"text": "call 01 23 45 of the film"}, {"text": "a@b.com is good"}, {"text": "day 12"}])
    tokenizer = tiny_plain_tokenizer()
    found = private_tokens(
        data, tokenizer=tokenizer, max_length=30, patterns={"[0-9][0-9 ]{3,}[0-9]": 0.5, r"\S+@\S+": 1.0}
    )
    assert found.column_names == ["input_ids", "attention_mask", "labels", "privacy"]
    for row, text in zip(found, data["text"], strict=True):
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        marked = {text[a:b] for (a, b), s in zip(spans, row["privacy"], strict=False) if s}
        assert marked == {"call 01 23 45 of the film": {"01", "23", "45"}, "day 12": set()}.get(text, marked)
        assert len(row["input_ids"]) == len(row["privacy"]) == 30
        assert [label == -100 for label in row["labels"]] == [not real for real in row["attention_mask"]]
    assert sum(found[0]["privacy"]) == 1.5
    assert set(found[1]["privacy"]) == {0.0, 1.0}
    with pytest.raises(ConfigurationError, match="0 … 1"):
        private_tokens(data, tokenizer=tokenizer, max_length=30, patterns={"x": 2.0})


def test_a_token_has_the_largest_score_of_what_it_touches_and_none_of_what_it_only_meets() -> None:
    data = Dataset.from_list([{"text": "film 20 film"}])
    patterns = {"20": 0.25, "2": 1.0, " 20 ": 0.5}
    found = private_tokens(data, tokenizer=tiny_plain_tokenizer(), max_length=20, patterns=patterns)
    assert {score for score in found[0]["privacy"] if score} == {1.0}
    assert sum(found[0]["privacy"]) == 1.0


def test_the_patterns_of_our_own() -> None:
    data = Dataset.from_list([{"text": text} for text in ("a 2024 a", "a 12 a", "a +49 (0)30-1234 a", "x.y@z.org a")])
    found = private_tokens(data, tokenizer=tiny_plain_tokenizer(), max_length=40)
    assert [any(row["privacy"]) for row in found] == [True, False, True, True]


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"max_temperature": 0.5}, {"noise": -1.0}, {"noise": math.inf}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="swing: "):
        Swing(**wrong)


def test_the_suite_s_batch_has_private_tokens() -> None:
    made = PREPARED["swing"]["prepare"](None, None)["data_collator"](testing.rows(CASE.task))
    assert 0 < made["privacy"].count_nonzero() < made["attention_mask"].sum()
