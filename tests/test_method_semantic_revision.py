"""Semantic revision: which token is corrected, what a learned band keeps, relations inside spans, a run with all."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.general.kd import KD
from hf_compress_plugins.language import semantic_revision as module
from hf_compress_plugins.language._spans import ALONE, BEGINS, INSIDE, boundaries, with_spans
from hf_compress_plugins.language.semantic_revision import (
    START,
    Band,
    SemanticRevision,
    corrected,
    dac_kl,
    error_positions,
    kept_mass,
    log_mask,
    neighbours,
    span_ids,
    span_relation,
)
from prepared import PREPARED
from scene import logits, rows, sizes, step
from stub import GradientKeeper
from test_method_stochastok import tokenizer as byte_level
from tiny import tiny_tokenizer
from torch import Tensor

from hf_compress import DistillConfig, testing
from hf_compress.divergences import kl
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Inputs, Signals, Step

CASE = replace(testing.Case("semantic_revision", "text-generation"), **PREPARED["semantic_revision"])
TABLE: Tensor = PREPARED["semantic_revision"]["settings"]["boundaries"]
FORMS = ("bucket", "renormalised")


# ---------------------------------------------------------------------- answers


def test_a_student_that_is_its_teacher_errs_nowhere() -> None:
    scores = logits(6, 5, 0)
    found = error_positions(scores, scores, scores.argmax(-1), torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    assert found.tolist() == [-1, -1]


def test_the_one_place_where_both_differ_is_found() -> None:
    student = logits(6, 5, 0)
    teacher = student.clone()
    teacher[4] = -student[4]
    example = torch.tensor([0, 0, 0, 1, 1, 1])
    found = error_positions(student, teacher, student.argmax(-1), example, 2)
    assert found.tolist() == [-1, 4]


def test_of_the_mismatches_the_largest_divergence_counts_and_a_match_never_does() -> None:
    """Position 0 has by far the largest divergence, but the teacher would choose the token there too."""
    teacher = torch.tensor([[9.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    student = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 3.0]])
    tokens, one = torch.tensor([0, 1, 1]), torch.zeros(3, dtype=torch.long)
    assert error_positions(student, teacher, tokens, one, 1).tolist() == [2]
    assert error_positions(student, teacher, tokens, one, 3).tolist() == [2, -1, -1]


def sampled() -> Inputs:
    """Three answers to prompts of two, one and two tokens: 5 6 7, 5 6, and 5 6 9 with 9 for the end."""
    ids = torch.tensor([[1, 2, 5, 6, 7], [0, 3, 5, 6, 0], [1, 4, 5, 6, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": mask.cumsum(1) - 1}


class Writer:
    """Continues every prompt with 8 8 8 … and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], int]] = []

    def __call__(self, inputs: Inputs, count: int) -> Inputs:
        assert (inputs["labels"] == IGNORED).all()
        real = inputs["attention_mask"].bool()
        self.asked.append(([row[one].tolist() for row, one in zip(inputs["input_ids"], real, strict=True)], count))
        ids = torch.full((len(real), 3 + count), 8)
        return {"input_ids": ids, "labels": torch.cat([torch.full((len(real), 3), IGNORED), ids[:, 3:]], 1)}


def answers(found: Inputs) -> list[list[int]]:
    return [label[label != IGNORED].tolist() for label in found["labels"]]


def correct(place: list[int], choice: list[int], limit: int = 4) -> tuple[Inputs, Writer]:
    writer = Writer()
    found = corrected(sampled(), torch.tensor(place), torch.tensor(choice), writer, limit=limit, ends=[9])
    return found, writer


def test_without_an_error_the_batch_stays_as_it_is() -> None:
    found, writer = correct([-1, -1, -1], [7, 7, 7])
    assert writer.asked == []
    for name, value in sampled().items():
        real = sampled()["attention_mask"].bool()
        assert torch.equal(found[name][real], value[real])


def test_what_stands_before_the_error_stays_and_what_follows_it_is_written_anew() -> None:
    found, writer = correct([1, -1, 0], [3, 0, 4])
    assert writer.asked == [([[1, 2, 5, 3], [1, 4, 4]], 3)]
    assert answers(found) == [[5, 3, 8, 8], [5, 6], [4, 8, 8, 8]]
    assert found["input_ids"].tolist() == [[1, 2, 5, 3, 8, 8], [0, 3, 5, 6, 0, 0], [1, 4, 4, 8, 8, 8]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert found["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5]


def test_an_answer_ends_with_a_corrected_end_and_at_its_limit() -> None:
    found, writer = correct([0, 1, 2], [9, 9, 3], limit=3)
    assert writer.asked == []
    assert answers(found) == [[9], [5, 9], [5, 6, 3]]


# ---------------------------------------------------------------------- tokens


def ordered(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    log_p, order = teacher.log_softmax(-1).sort(-1, descending=True)
    return log_p, student.log_softmax(-1).gather(-1, order)


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_ones_is_the_forward_kl_and_its_gradient(form: Any) -> None:
    data = oracle.load("gkd_jsd")
    student, chosen = data["student_logits"].requires_grad_(), data["labels"] != IGNORED
    log_p, log_q = ordered(student[chosen], data["teacher_logits"][chosen])
    loss = dac_kl(log_p, log_q, torch.zeros_like(log_p), form=form).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), data["beta0_temp1.0/loss"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(student.grad, data["beta0_temp1.0/grad"], rtol=1e-9, atol=1e-11)


def row(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_both_forms_by_hand() -> None:
    """p = (½, ¼, ¼), q = (¼, ½, ¼), the first two kept; as a bucket the rest is ¼ of both, renormalised it is gone."""
    log_p, log_q, kept = row(0.5, 0.25, 0.25), row(0.25, 0.5, 0.25), row(1.0, 1.0, 0.0)
    assert dac_kl(log_p, log_q, kept, form="bucket").item() == pytest.approx(0.25 * math.log(2))
    assert dac_kl(log_p, log_q, kept, form="renormalised").item() == pytest.approx(math.log(2) / 3)
    first = row(1.0, 0.0, 0.0)
    assert dac_kl(log_p, log_q, first, form="renormalised").item() == pytest.approx(0.0)
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert dac_kl(log_p, log_q, first, form="bucket").item() == pytest.approx(expected)
    half = row(1.0, 0.5, 0.5)
    expected = 0.5 * math.log(2) + 0.125 * math.log(0.5) + 0.25 * math.log(0.25 / 0.375)
    assert dac_kl(log_p, log_q, half, form="bucket").item() == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_band_of_any_softness_lies_between_0_and_the_whole_divergence(form: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    log_p, log_q = ordered(2 * logits(200, 9, 0), 2 * logits(200, 9, 1))
    log_m = torch.rand(200, 9, generator=draw, dtype=torch.float64).log()
    found, whole = dac_kl(log_p, log_q, log_m, form=form), kl(log_p, log_q)
    assert (found >= -1e-12).all()
    if form == "bucket":
        assert (found <= whole + 1e-12).all()
        assert (found < 0.9 * whole).any()


def test_the_mask_by_hand() -> None:
    """p = (0.5, 0.3, 0.15, 0.05): c = 0.5, 0.8, 0.95, 1. From 0.6 to 0.9 the second and third lie in the band."""
    log_p = row(0.5, 0.3, 0.15, 0.05)
    lower, upper = torch.tensor([[0.6], [0.9]], dtype=torch.float64)
    mask = log_mask(log_p, lower, upper, softness=1e-3).exp()
    assert mask[0].tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0], abs=1e-9)
    soft = log_mask(log_p, lower, upper, softness=0.1).exp()[0]
    second = torch.sigmoid(torch.tensor(2.0)) * torch.sigmoid(torch.tensor(4.0))
    assert soft.tolist()[:2] == pytest.approx([1.0, second.item()])
    assert kept_mass(log_p, mask.log()).item() == pytest.approx(0.95, abs=1e-6)


def test_an_excluded_token_gives_no_nan() -> None:
    student, teacher = logits(3, 6, 0), logits(3, 6, 1)
    student[:, 2] = teacher[:, 2] = -math.inf
    teacher[1, 3] = -math.inf
    student.requires_grad_()
    method = SemanticRevision(revised=0, span_weight=0)
    method.build({"logits": student.shape}, {"logits": teacher.shape})
    values = method.per_position(rows(student, teacher), step())
    sum(value.sum() for value in values.values()).backward()
    assert all(value.isfinite().all() for value in values.values())
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_a_band_begins_nearly_as_wide_as_the_distribution_and_reads_no_gradient() -> None:
    torch.manual_seed(0)
    log_p, log_q = ordered(logits(50, 80, 0).requires_grad_(), logits(50, 80, 1))
    lower, upper = Band()(log_p, log_q)
    assert lower.tolist() == pytest.approx([START[0]] * 50, abs=0.02)
    assert upper.tolist() == pytest.approx([START[1]] * 50, abs=0.02)
    assert (lower <= upper).all()
    assert torch.autograd.grad(upper.sum(), log_q, allow_unused=True) == (None,)


def test_too_little_kept_mass_costs_what_is_lacking() -> None:
    """A band that ends at its first token keeps p_1 = 0.3 alone: 0.2 are lacking."""
    method = SemanticRevision(revised=0, span_weight=0, softness=1e-4)
    teacher = row(0.3, 0.25, 0.25, 0.2)
    method.build({"logits": teacher.shape}, {"logits": teacher.shape})
    with mock.patch.object(Band, "forward", return_value=(torch.zeros(1).double(), torch.full((1,), 0.1).double())):
        found = method.per_position(rows(teacher, teacher), step())
    assert found["lacking_mass"].item() == pytest.approx(0.2)
    assert found["kept_mass"].item() == pytest.approx(0.3)
    assert found["dac_kl"].item() == pytest.approx(0.0, abs=1e-9)


# ---------------------------------------------------------------------- spans


def test_relations_by_hand() -> None:
    """Equal models: 0 with a gradient of 0; one-hot a, a against b, b: √2."""
    same = logits(4, 5, 0).requires_grad_()
    values = span_relation(same, same.detach(), torch.tensor([0, 2]), squared=False)
    values.sum().backward()
    assert values.tolist() == [0.0, 0.0]
    assert same.grad is not None
    assert (same.grad == 0).all()
    one_hot = 1e3 * torch.eye(3, dtype=torch.float64)
    student, teacher = one_hot[[1, 1]].requires_grad_(), one_hot[[0, 0]].requires_grad_()
    distance = span_relation(student, teacher, torch.tensor([0]), squared=False)
    assert distance.item() == pytest.approx(math.sqrt(2))
    assert span_relation(student, teacher, torch.tensor([0]), squared=True).item() == pytest.approx(2.0)
    assert torch.autograd.grad(distance.sum(), teacher, allow_unused=True) == (None,)
    with pytest.raises(MismatchError, match="one shape"):
        span_relation(student, teacher[:, :2], torch.tensor([0]), squared=False)


def test_only_positions_of_pairs_are_looked_at() -> None:
    student, teacher = logits(4, 5, 0), logits(4, 5, 1)
    student[3] = teacher[0] = math.nan
    assert span_relation(student, teacher, torch.tensor([1]), squared=False).isfinite().all()


def test_neighbours_are_of_one_span_and_one_answer_and_stand_side_by_side() -> None:
    spans = torch.tensor([4, 4, 4, 5, 5, -1, -1, 7, 7])
    index = torch.tensor([0, 1, 3, 4, 5, 6, 7, 8, 9])
    example = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1])
    assert neighbours(spans, index, example).tolist() == [0, 3]


def test_a_word_is_one_span_and_what_stands_alone_joins_nothing() -> None:
    kinds = torch.tensor([[BEGINS, INSIDE, ALONE, INSIDE, INSIDE, BEGINS, ALONE, ALONE]])
    assert span_ids(kinds).tolist() == [[1, 1, 2, 3, 3, 4, 5, 6]]


def test_what_tokens_do_is_told_by_how_tokenizers_mark_words() -> None:
    tokenizer = tiny_tokenizer()
    table, ids = boundaries(tokenizer, 200), tokenizer("zebra film.")["input_ids"]
    assert len(table) == 200
    assert table[ids].tolist() == [ALONE, BEGINS, INSIDE, INSIDE, INSIDE, INSIDE, BEGINS, ALONE, ALONE]
    bytes_ = byte_level()
    bytes_.add_tokens(["##", "####"])  # as byte-level vocabularies have for headings
    text = " the café, tree"
    found = boundaries(bytes_)[bytes_(text)["input_ids"]]
    spans = span_ids(found[None])[0].tolist()
    of: dict[int, str] = {}
    for number, index in zip(spans, bytes_(text)["input_ids"], strict=True):
        of[number] = of.get(number, "") + bytes_.convert_ids_to_tokens(index)
    assert [span.lstrip("Ġ") for span in of.values() if span != "Ġ"] == ["the", "cafÃ©", ",", "tree"]


def test_spans_of_a_chunker_are_aligned_to_tokens() -> None:
    """“the zebra” is a span, though a word is five tokens; what is outside has none; the prompt has no label."""
    tokenizer, text = tiny_tokenizer(), "a film the zebra bad"
    data = Dataset.from_list([{"text": text, "asked": "a film "}])
    made = with_spans(data, tokenizer=tokenizer, max_length=12, prompt="asked", chunker=lambda _: [(7, 16)])[0]
    assert made["span_ids"] == [-1, -1, -1, 0, 0, 0, 0, 0, 0, -1, -1, -1]
    assert [label == IGNORED for label in made["labels"]] == [True] * 3 + [False] * 8 + [True]
    by_words = with_spans(data, tokenizer=tokenizer, max_length=12)[0]
    assert by_words["span_ids"] == [-1, 0, 1, 2, 3, 3, 3, 3, 3, 4, -1, -1]
    assert by_words["labels"] == [*by_words["input_ids"][:-1], IGNORED]
    with pytest.raises(MismatchError, match="does not begin with"):
        with_spans(
            Dataset.from_list([{"text": text, "asked": "the"}]), tokenizer=tokenizer, max_length=12, prompt="asked"
        )
    with pytest.raises(ConfigurationError, match="fast tokenizer"):
        with_spans(data, tokenizer=object(), max_length=12)


# ---------------------------------------------------------------------- in a run


class Kept(SemanticRevision):
    """Keeps what it was given."""

    signals: Signals

    def forward(self, signals: Signals, step: Step) -> Any:
        type(self).signals = signals
        return super().forward(signals, step)


Kept.__module__ = SemanticRevision.__module__


def test_a_step_has_the_corrected_answers_and_is_the_mean_over_answers(tmp_path: Path) -> None:
    """By a loop over answers and pairs; each answer differs from the student's own in one token and what follows."""
    method = Kept(**CASE.settings)
    trainer, _ = testing.trainer(CASE, tmp_path, objective=method, dtype=torch.float64)
    own: list[Inputs] = []

    def keeping(sampled: Inputs, *args: Any, **kwargs: Any) -> Inputs:
        own.append(sampled)
        return corrected(sampled, *args, **kwargs)

    with mock.patch.object(module, "corrected", keeping):
        trainer.train()
    signals, log = Kept.signals, trainer.state.log_history[0]
    before, after = answers(own[0]), answers(signals.inputs)
    assert before != after
    student, teacher = (taps["logits"].detach().softmax(-1) for taps in (signals.student, signals.teacher))
    for example, (first, second) in enumerate(zip(before, after, strict=True)):
        place = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if place is not None:
            start = int((signals.inputs["labels"][example] != IGNORED).nonzero()[0])
            assert second[place] == int(teacher[example, start + place - 1].argmax())
    spans = span_ids(TABLE[signals.inputs["input_ids"]])
    values = []
    for example in range(4):
        scored = (signals.inputs["labels"][example] != IGNORED).nonzero().flatten().tolist()
        pairs = [t for t in scored if t + 1 in scored and spans[example, t] == spans[example, t + 1]]
        relations = [
            (student[example, t - 1] * student[example, t] - teacher[example, t - 1] * teacher[example, t]).norm()
            for t in pairs
        ]
        values.append(torch.stack(relations).mean().item() if relations else 0.0)
    assert log["distill/semantic_revision.span"] == pytest.approx(sum(values) / 4, rel=1e-4)
    assert log["distill/semantic_revision.span"] > 0
    parts = ("dac_kl", "lacking_mass", "span")
    assert log["distill_loss"] == pytest.approx(sum(log[f"distill/semantic_revision.{part}"] for part in parts))
    assert 0.5 < log["distill/semantic_revision.kept_mass"] <= 1
    assert SemanticRevision(**CASE.settings).task_weight == 0
    assert SemanticRevision(revised=0, span_weight=0).task_weight == 1


def test_the_band_alone_is_taken_in_chunks_and_learns_beside_the_student(tmp_path: Path) -> None:
    found = []
    for memory in ("dense", "chunked"):
        method, kept = SemanticRevision(revised=0, span_weight=0), GradientKeeper()
        config = DistillConfig(memory=memory, chunk=3, task_weight=0)
        trainer, _ = testing.trainer(
            CASE, tmp_path, objective=method, config=config, dtype=torch.float64, callbacks=(kept,)
        )
        trainer.train()
        found.append((kept.gradients[0], trainer.state.log_history[0]))
    (dense, log), (chunked, log_in_chunks) = found
    assert {name.rpartition("band.")[2] for name in dense if "band." in name} == {
        "hidden.weight", "hidden.bias", "out.weight", "out.bias",
    }  # fmt: skip
    for name, gradient in dense.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-5, atol=1e-8)
    for name in ("distill_loss", "distill/semantic_revision.kept_mass"):
        assert log_in_chunks[name] == pytest.approx(log[name], rel=1e-6)
    assert not any("distiller" in name for name in trainer.model.state_dict())


def test_spans_of_the_data_come_from_its_column(tmp_path: Path) -> None:
    """One span a row joins all neighbours, none joins nothing, and of one pair a row the mean is that pair's."""
    found = {}
    for number in (0, -1, 1):

        def collate(batch: list[dict[str, Any]], number: int = number) -> Inputs:
            made = testing.collate(batch)
            spans = torch.full_like(made["input_ids"], min(number, 0))
            if number == 1:
                spans = -1 - torch.zeros_like(spans)
                spans[:, 1:3] = 5
            return made | {"span_ids": spans}

        method = Kept(revised=0, dac_weight=0)
        case = testing.Case("semantic_revision", CASE.task, prepare=lambda *_: {"data_collator": collate})
        trainer, _ = testing.trainer(case, tmp_path, objective=method)
        trainer.train()
        found[number] = trainer.state.log_history[0]["distill/semantic_revision.span"]
    assert found[0] > 0
    assert found[-1] == 0
    first = [
        taps["logits"].detach()[:, :2].softmax(-1).prod(1) for taps in (Kept.signals.student, Kept.signals.teacher)
    ]
    assert found[1] == pytest.approx((first[0] - first[1]).norm(dim=-1).mean().item(), rel=1e-5)
    trainer, _ = testing.trainer(testing.Case("semantic_revision", CASE.task), tmp_path, objective=method)
    with pytest.raises(MismatchError, match=r"lacks \['span_ids'\]"):
        trainer.train()


def test_the_data_step_alone_serves_another_method(tmp_path: Path) -> None:
    """KD on corrected answers; without a correction, as with a teacher that is the student, on the student's own."""
    alone = SemanticRevision(dac_weight=0, span_weight=0, max_new_tokens=4, sampling_temperature=0)
    settings: dict[str, Any] = {"objective": [alone, KD(temperature=1.0)], "config": DistillConfig(task_weight=0)}
    trainer, _ = testing.trainer(CASE, tmp_path, **settings)
    with mock.patch.object(module, "corrected", wraps=corrected) as called:
        trainer.train()
    assert (called.call_args.args[1] >= 0).any()
    log = trainer.state.log_history[0]
    assert log["distill/kd"] == pytest.approx(log["distill_loss"])
    assert log["distill_loss"] > 0

    same, _ = testing.trainer(CASE, tmp_path, wrap=lambda _: testing.pair(CASE)[0], **settings)
    with mock.patch.object(module, "corrected", wraps=corrected) as called:
        same.train()
    assert called.call_args.args[1].tolist() == [-1] * 4


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"revised": 1.5}, "revised"),
    ({"revised": 0, "dac_weight": 0, "span_weight": 0}, "nothing is done"),
    ({"dac_weight": -1.0}, "dac_weight"),
    ({"form": "both"}, "form must be"),
    ({"softness": 0.0}, "softness"),
    ({"least_mass": 2.0}, "least_mass"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({}, "boundaries"),
]


@pytest.mark.parametrize(("settings", "told"), WRONG, ids=str)
def test_settings_that_cannot_be_served_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        SemanticRevision(**settings)


def test_a_model_that_is_not_causal_is_refused() -> None:
    with pytest.raises(MismatchError, match="causal"):
        SemanticRevision(revised=0, span_weight=0).needs(sizes(2), sizes(2))
    assert SemanticRevision(revised=0, span_weight=0).needs(sizes(2, "causal"), None).mean_over == "examples"
