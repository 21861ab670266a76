"""Margin-MSE: margins of a query's passages, in a cross-encoder and in a bi-encoder."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import ranked
import torch
from hf_compress_plugins.encoders import margin_mse as module
from hf_compress_plugins.encoders._ranking import (
    SCORES,
    GroupCollator,
    Texts,
    dot_scores,
    draw_passages,
    first_token,
    grouped,
    mean_of_tokens,
    ranking_groups,
    scores_of,
)
from hf_compress_plugins.encoders.margin_mse import (
    MarginMSE,
    MarginMSEConfig,
    combined,
    margin_mse,
    margin_mse_groups,
    mse_ranknet,
    pointwise_mse,
    ranknet_weighted,
    scored,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import logits, sizes
from tiny import tiny_bert_classifier
from torch import Tensor

from hf_compress.data import Augmented
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.teachers import EnsembleTeacher

LOSSES = ("margin_mse", "pointwise_mse", "ranknet_weighted", "mse_ranknet")
GROUPS = margin_mse_groups(ranked.texts(), tokenizer=ranked.TOKENIZER)


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------------- the mathematics


def test_by_hand() -> None:
    """Margins 1 and 2 against 4 and -2: (9 + 16) / 2; scores 1, 0, -1 against 3, -1, 5: (4 + 1 + 36) / 3."""
    student, teacher = tensor([1, 0, -1]), tensor([3, -1, 5])
    assert margin_mse(student, teacher).tolist() == [12.5]
    assert pointwise_mse(student, teacher).tolist() == pytest.approx([41 / 3])
    weighted = (4 * math.log1p(math.exp(-1)) - 2 * math.log1p(math.exp(-2))) / 2
    assert ranknet_weighted(student, teacher).tolist() == pytest.approx([weighted])
    plain = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    assert mse_ranknet(student, teacher).tolist() == pytest.approx([41 / 3 + plain])


@given(st.integers(1, 4), st.integers(2, 5), st.floats(-50, 50), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_an_offset_of_either_model_and_the_order_of_the_others_change_nothing(
    queries: int, passages: int, offset: float, seed: int
) -> None:
    student, teacher = logits(queries, passages, seed), logits(queries, passages, seed + 1)
    values = margin_mse(student, teacher)
    assert values.min() >= 0
    torch.testing.assert_close(margin_mse(student + offset, teacher - offset), values)
    torch.testing.assert_close(margin_mse(student, student + offset), torch.zeros_like(values))
    order = [0, *range(passages - 1, 0, -1)]
    torch.testing.assert_close(margin_mse(student[:, order], teacher[:, order]), values)


def test_the_scale_of_the_teacher_is_learned() -> None:
    student, teacher = logits(3, 4, 0), logits(3, 4, 1)
    assert (margin_mse(student, 2 * teacher) - margin_mse(student, teacher)).abs().min() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_student_alone(name: str) -> None:
    student, teacher = logits(3, 4, 0).requires_grad_(), logits(3, 4, 1).requires_grad_()
    loss = getattr(module, name)
    assert torch.autograd.gradcheck(lambda own: loss(own, teacher), student)
    loss(student, teacher).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_scores_that_would_be_broadcast_are_refused(name: str) -> None:
    with pytest.raises(MismatchError, match="must have one shape"):
        getattr(module, name)(torch.zeros(4, 1), torch.zeros(4, 4))
    if name != "pointwise_mse":
        with pytest.raises(MismatchError, match="no margins"):
            getattr(module, name)(torch.zeros(4, 1), torch.zeros(4, 1))


def test_teachers_are_averaged_as_they_are_or_on_one_scale() -> None:
    first, second = logits(3, 4, 0), logits(3, 4, 1)
    torch.testing.assert_close(combined(torch.stack([first, second])), (first + second) / 2)
    both = combined(torch.stack([first, 100 * first + 7]), standardise=True)
    assert both.mean().abs() < 1e-9
    torch.testing.assert_close(both.std(correction=0), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(both / both.std(), (first - first.mean()) / first.std())
    assert combined(torch.ones(1, 2, 2), standardise=True).tolist() == [[0, 0], [0, 0]]


def test_vectors_and_rows_of_a_query() -> None:
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]]])
    assert dot_scores(vectors).tolist() == [[11.0, -2.0]]
    rows, group = torch.arange(6.0), torch.tensor([0, 0, 0, 1, 1, 1])
    assert grouped(rows, group).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(MismatchError, match=r"have \[2, 4\] passages"):
        grouped(rows, torch.tensor([0, 0, 1, 1, 1, 1]))
    with pytest.raises(MismatchError, match="6 rows cannot be told by 3"):
        grouped(rows, group[:3])
    states = torch.arange(6.0).view(2, 3, 1)
    read = first_token(states, torch.tensor([[True, True, False], [False, True, True]]))
    assert read.tolist() == [[0.0], [4.0]]
    states[0, 2], states[1, 0] = math.nan, math.nan
    read = mean_of_tokens(states, torch.tensor([[True, True, False], [False, True, True]]))
    assert read.tolist() == [[0.5], [4.5]]


# ---------------------------------------------------------------------- the data


def test_both_models_read_the_same_texts_cut_once() -> None:
    lengths = Texts(query_length=2, passage_length=4, passage_prefix="the ")
    own = ranking_groups(
        ranked.texts(), tokenizer=ranked.TOKENIZER, texts=lengths, teacher_tokenizer=ranked.TOKENIZER, apart=True
    )[0]
    decode = partial(ranked.TOKENIZER.decode, skip_special_tokens=True)
    assert [decode(ids) for ids in own["input_ids"]] == [
        "a good",
        "the the film was",
        "the dull music",
        "the a story to",
    ]
    assert [decode(ids) for ids in own["teacher_input_ids"]] == [
        "a good the the film was", "a good the dull music", "a good the a story to",
    ]  # fmt: skip
    together = ranking_groups(ranked.texts(), tokenizer=ranked.TOKENIZER, texts=lengths)[0]
    assert together["input_ids"] == own["teacher_input_ids"]
    joined = Texts(query_length=2, passage_length=4, joined=True)
    one = ranking_groups(ranked.texts(), tokenizer=ranked.TOKENIZER, texts=joined)[0]["input_ids"]
    assert [ranked.TOKENIZER.convert_ids_to_tokens(ids).count("[SEP]") for ids in one] == [1, 1, 1]
    assert decode(one[0]) == "a good the film was very"


def test_the_passages_of_an_epoch_are_drawn_once_for_both_models() -> None:
    wide = ranked.texts().map(
        lambda row: {"passages": [*row["passages"], "love", "hate"], SCORES: [9.0, 1.0, 2.0, 3.0, 4.0]}
    )
    groups = margin_mse_groups(wide, tokenizer=ranked.TOKENIZER, teacher_tokenizer=ranked.TOKENIZER, apart=True)
    drawn = Augmented(groups, partial(draw_passages, passages=3))
    kept = set()
    for epoch in range(4):
        row, whole = drawn.row(0, epoch=epoch), groups[0]
        assert [len(row[name]) for name in ("input_ids", "teacher_input_ids", SCORES)] == [4, 3, 3]
        assert row["input_ids"][:2] == whole["input_ids"][:2]
        places = [whole[SCORES].index(score) for score in row[SCORES]]
        assert row["teacher_input_ids"] == [whole["teacher_input_ids"][place] for place in places]
        assert row["input_ids"][1:] == [whole["input_ids"][place + 1] for place in places]
        assert row == drawn.row(0, epoch=epoch)
        kept.add(tuple(places))
    assert len(kept) > 1
    assert draw_passages(groups[0], torch.Generator(), passages=5) == groups[0]
    with pytest.raises(ConfigurationError, match="at least 2"):
        draw_passages(groups[0], torch.Generator(), passages=1)


def test_data_that_has_no_margins_is_refused() -> None:
    alone = datasets.Dataset.from_dict({"query": ["a"], "passages": [["the film"]]})
    with pytest.raises(MismatchError, match="has 1 passages"):
        margin_mse_groups(alone, tokenizer=ranked.TOKENIZER)
    with pytest.raises(ConfigurationError, match="needs the teacher's scores"):
        margin_mse_groups(ranked.texts(), tokenizer=ranked.TOKENIZER, apart=True)
    with pytest.raises(ConfigurationError, match="at least 1 token"):
        Texts(query_length=0, passage_length=2)
    with pytest.raises(ConfigurationError, match="use_fast"):
        margin_mse_groups(ranked.texts(), tokenizer=object())
    with pytest.raises(ConfigurationError, match="at least one"):
        scored(ranked.texts(), teachers=[])
    with pytest.raises(ConfigurationError, match="loss must be one of"):
        MarginMSEConfig(loss="mse")  # type: ignore[arg-type]


def test_stored_scores_are_the_mean_of_the_teachers() -> None:
    teachers = [ranked.cross_encoder(seed).float() for seed in (1, 2)]
    found = scored(ranked.texts(), teachers=[(one, ranked.TOKENIZER) for one in teachers], batch=2)
    expected = torch.stack([ranked.logits(one, GROUPS) for one in teachers]).mean(0)
    torch.testing.assert_close(torch.tensor(found[SCORES]), expected.detach(), rtol=1e-4, atol=1e-5)
    assert str(found.features[SCORES].feature.dtype) == "float32"
    assert found["passages"] == ranked.texts()["passages"]
    teachers[0].train()
    scores_of(teachers[0], GROUPS, GroupCollator(ranked.TOKENIZER))
    assert teachers[0].training


# ---------------------------------------------------------------------- in a Trainer


@pytest.mark.parametrize("loss", LOSSES)
def test_the_step_of_a_cross_encoder_is_the_loss_of_its_queries(loss: Any, tmp_path: Path) -> None:
    student, teacher = ranked.cross_encoder(0, layers=1), ranked.cross_encoder(1)
    with torch.no_grad():
        targets = ranked.logits(teacher, GROUPS)
    fresh = ranked.cross_encoder(0, layers=1)
    made, gradients = ranked.train(tmp_path, student, teacher, MarginMSE(loss=loss), GROUPS, learning_rate=0.0)
    value = getattr(module, loss)(ranked.logits(fresh, GROUPS), targets).mean()
    ranked.assert_gradients(gradients[0], fresh, value)
    assert made.state.log_history[0]["distill_loss"] == pytest.approx(value.item(), rel=1e-6)

    with (
        mock.patch.object(module, loss, side_effect=RuntimeError("reached")),
        pytest.raises(RuntimeError, match="reached"),
    ):
        ranked.train(tmp_path, student, teacher, MarginMSE(loss=loss), GROUPS)


@pytest.mark.parametrize(("stored", "pooling"), [(False, "first"), (True, "first"), (True, "mean")])
def test_the_step_of_a_bi_encoder_is_the_loss_of_its_products(stored: bool, pooling: Any, tmp_path: Path) -> None:
    """A live teacher reads pairs of its own; its scores in a column teach the same."""
    teacher = ranked.cross_encoder(1)
    with torch.no_grad():
        targets = ranked.logits(teacher, GROUPS)
    data = ranked.texts()
    if stored:
        data = data.add_column(SCORES, targets.tolist())
    groups = margin_mse_groups(
        data, tokenizer=ranked.TOKENIZER, apart=True, teacher_tokenizer=None if stored else ranked.TOKENIZER
    )
    student, fresh = ranked.encoder(0), ranked.encoder(0)
    method = MarginMSE(scores="dot", pooling=pooling)
    _, gradients = ranked.train(tmp_path, student, None if stored else teacher, method, groups, learning_rate=0.0)

    batch = GroupCollator(ranked.TOKENIZER)([groups[place] for place in range(3)])
    names = ("input_ids", "attention_mask", "token_type_ids")
    states, real = fresh(**{name: batch[name] for name in names}).last_hidden_state, batch["attention_mask"].bool()
    each = [own[0] if pooling == "first" else own[mask].mean(0) for own, mask in zip(states, real, strict=True)]
    scores = torch.stack([(row[0] * row[1:]).sum(-1) for row in torch.stack(each).view(3, 4, -1)])
    expected = margin_mse(scores, targets.float().double() if stored else targets).mean()
    ranked.assert_gradients(gradients[0], fresh, expected)


def test_queries_in_any_micro_batches_give_one_gradient(tmp_path: Path) -> None:
    found = []
    for size, steps in ((3, 1), (1, 3), (2, 2)):
        sizes_ = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        student = ranked.cross_encoder(0, layers=1)
        found.append(ranked.train(tmp_path, student, ranked.cross_encoder(1), "margin_mse", GROUPS, **sizes_)[1][0])
    for other in found[1:]:
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-6, atol=1e-9, msg=name)


def test_the_mean_of_two_live_teachers(tmp_path: Path) -> None:
    teachers = [ranked.cross_encoder(seed) for seed in (1, 2)]
    with torch.no_grad():
        targets = torch.stack([ranked.logits(one, GROUPS) for one in teachers]).mean(0)
    fresh = ranked.cross_encoder(0)
    teacher = EnsembleTeacher(teachers, mean="logits")
    _, gradients = ranked.train(tmp_path, ranked.cross_encoder(0), teacher, "margin_mse", GROUPS, learning_rate=0.0)
    ranked.assert_gradients(gradients[0], fresh, margin_mse(ranked.logits(fresh, GROUPS), targets).mean())


def test_evaluation_is_the_mean_over_queries_of_a_short_last_batch_too(tmp_path: Path) -> None:
    student, teacher = ranked.cross_encoder(0, layers=1), ranked.cross_encoder(1)
    settings_: dict[str, Any] = {"eval_dataset": GROUPS, "per_device_eval_batch_size": 2, "eval_strategy": "steps"}
    made, _ = ranked.train(
        tmp_path, student, teacher, "margin_mse", GROUPS, eval_steps=1, learning_rate=0.0, **settings_
    )
    (logged,) = [entry["eval_distill_loss"] for entry in made.state.log_history if "eval_distill_loss" in entry]
    with torch.no_grad():
        expected = margin_mse(ranked.logits(student, GROUPS), ranked.logits(teacher, GROUPS)).mean()
    assert logged == pytest.approx(float(expected), rel=1e-5)


def test_models_and_batches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one, three = partial(ranked.cross_encoder, 0), tiny_bert_classifier(num_labels=3, seed=1)
    with pytest.raises(MismatchError, match="the teacher gives 3 scores of classes"):
        ranked.train(tmp_path, one(), three, "margin_mse", GROUPS)
    with pytest.raises(MismatchError, match="the student gives 3 scores of classes"):
        ranked.train(tmp_path, three, one(), "margin_mse", GROUPS)
    with pytest.raises(MismatchError, match=r"the batch lacks \['teacher_scores'\]"):
        ranked.train(tmp_path, one(), None, "margin_mse", GROUPS)
    with pytest.raises(MismatchError, match=r"lacks \['teacher_attention_mask', .*'teacher_token_type_ids'\]"):
        ranked.train(tmp_path, one(), ranked.cross_encoder(1), MarginMSE(teacher_tokens="own"), GROUPS)
    ragged = margin_mse_groups(
        datasets.Dataset.from_dict({"query": ["a", "the"], "passages": [["film", "book"], ["end", "fine", "dull"]]}),
        tokenizer=ranked.TOKENIZER,
    )
    with pytest.raises(MismatchError, match=r"have \[2, 3\] passages"):
        ranked.train(tmp_path, one(), ranked.cross_encoder(1), "margin_mse", ragged)


def test_a_cross_encoder_and_a_bi_encoder_ask_for_what_they_read() -> None:
    cross = MarginMSE().needs(sizes(2, "none"), sizes(2, "none"))
    assert (cross.student, cross.teacher, cross.same_tokens) == ({"logits"}, {"logits"}, True)
    assert cross.columns == {"group"}
    dot = MarginMSE(scores="dot").needs(sizes(2, "none"), sizes(2, "none"))
    assert (dot.student, dot.same_tokens) == ({"hidden:-1"}, False)
    assert dot.columns == {"group", "teacher_input_ids", "teacher_attention_mask"}
    alone = MarginMSE(scores="dot").needs(sizes(2, "none"), None)
    assert alone.teacher is None
    assert alone.columns == {"group", SCORES}
