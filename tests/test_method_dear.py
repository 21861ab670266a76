"""DeAR: the distribution over a query's passages, and windows that a listwise ranker slides over."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import ranked
import torch
from hf_compress_plugins.encoders import dear as module
from hf_compress_plugins.encoders.dear import (
    DeAR,
    DeARConfig,
    Rank,
    binary,
    dear,
    dear_groups,
    listnet,
    parse_order,
    prompt,
    ranknet,
    rationales,
    rerank,
    slide,
    soft_ranking,
    softmax_ce,
    windows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import logits

from hf_compress.errors import ConfigurationError, MismatchError

GROUPS = dear_groups(ranked.texts(), tokenizer=ranked.TOKENIZER)


# ---------------------------------------------------------------------- the first stage


def test_by_hand() -> None:
    """Two passages, scores 0 and 0, teacher ln 3 and 0, which is 3/4 and 1/4 at T = 1."""
    scores, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert softmax_ce(scores).item() == pytest.approx(math.log(2))
    assert soft_ranking(scores, teacher, temperature=1.0).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    )
    tempered = soft_ranking(scores, 2 * teacher, temperature=2.0).item()
    assert tempered == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    apart = torch.tensor([[1.0, 0.0]])
    target = 1 / (1 + math.exp(-1))
    entropy = -target * math.log(target) - (1 - target) * math.log(1 - target)
    assert ranknet(apart, binary(apart)).item() == pytest.approx(entropy)
    assert listnet(apart, binary(apart)).item() == pytest.approx(0.0, abs=1e-7)
    half = dear(scores, teacher, alpha=0.25, temperature=1.0).item()
    assert half == pytest.approx(0.75 * math.log(2) + 0.25 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_binary_ranknet_pulls_the_margin_to_one_and_the_others_together() -> None:
    scores = logits(1, 4, 0).requires_grad_()
    optimizer = torch.optim.SGD([scores], lr=2.0)
    for _ in range(400):
        optimizer.zero_grad()
        ranknet(scores, binary(scores)).sum().backward()
        optimizer.step()
    assert (scores[0, 0] - scores[0, 1:]).tolist() == pytest.approx([1.0] * 3, abs=1e-3)


@pytest.mark.parametrize("loss", get_args(Rank))
def test_gradients_reach_the_student_alone(loss: Rank) -> None:
    student, teacher = logits(3, 4, 0).requires_grad_(), logits(3, 4, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda own: dear(own, teacher, loss=loss, alpha=0.3, temperature=2.0), student)
    dear(student, teacher, loss=loss, alpha=0.3, temperature=2.0).sum().backward()
    assert teacher.grad is None


@given(st.integers(1, 4), st.integers(2, 5), st.sampled_from(get_args(Rank)), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_an_offset_and_the_order_of_the_others_change_nothing(
    queries: int, passages: int, loss: Rank, seed: int
) -> None:
    student, teacher = logits(queries, passages, seed), logits(queries, passages, seed + 1)
    values = dear(student, teacher, loss=loss, alpha=0.3, temperature=2.0)
    assert values.min() >= 0
    moved = dear(student + 3, teacher - 2, loss=loss, alpha=0.3, temperature=2.0)
    torch.testing.assert_close(moved, values)
    order = [0, *range(passages - 1, 0, -1)]
    turned = dear(student[:, order], teacher[:, order], loss=loss, alpha=0.3, temperature=2.0)
    torch.testing.assert_close(turned, values)


def test_what_is_no_group_or_no_setting_is_refused() -> None:
    with pytest.raises(MismatchError, match="must have one shape"):
        dear(torch.zeros(3, 1), torch.zeros(3, 3), alpha=0.1, temperature=2.0)
    with pytest.raises(MismatchError, match="no pairs"):
        ranknet(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ConfigurationError, match="listnet_teacher needs the teacher's scores"):
        dear(torch.zeros(3, 2), None, loss="listnet_teacher", alpha=0.1, temperature=2.0)
    for wrong in ({"alpha": 1.5}, {"temperature": 0.0}, {"loss": "lambda"}, {"teacher_tokens": "both"}):
        with pytest.raises(ConfigurationError, match="dear: "):
            DeARConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", get_args(Rank))
def test_the_step_of_a_trainer_is_the_loss_of_its_queries(loss: Rank, tmp_path: Path) -> None:
    student, fresh = (ranked.cross_encoder(0, layers=1) for _ in range(2))
    teacher = ranked.cross_encoder(1)
    with torch.no_grad():
        targets = ranked.logits(teacher, GROUPS)
    method = DeAR(loss=loss, alpha=0.3)
    made, gradients = ranked.train(tmp_path, student, teacher, method, GROUPS, learning_rate=0.0)
    value = dear(ranked.logits(fresh, GROUPS), targets, loss=loss, alpha=0.3, temperature=2.0).mean()
    ranked.assert_gradients(gradients[0], fresh, value)
    assert made.state.log_history[0]["distill_loss"] == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["ranknet", "listnet", "softmax_ce", "soft_ranking", "binary"])
def test_a_step_reaches_every_function(name: str, tmp_path: Path) -> None:
    loss: Any = {"listnet": "listnet_binary", "softmax_ce": "softmax_ce"}.get(name, "ranknet_binary")
    pair = ranked.cross_encoder(0, layers=1), ranked.cross_encoder(1)
    with (
        mock.patch.object(module, name, side_effect=RuntimeError("reached")),
        pytest.raises(RuntimeError, match="reached"),
    ):
        ranked.train(tmp_path, *pair, DeAR(loss=loss), GROUPS)


def test_texts_carry_the_authors_prefixes() -> None:
    ids = GROUPS[0]["input_ids"]
    tokens = ranked.TOKENIZER.convert_ids_to_tokens(ids[0])
    letters = "".join(token.removeprefix("##") for token in tokens)
    assert letters.startswith("[CLS]query[UNK]agoodfilm[SEP]document[UNK]thefilm")


def test_a_teacher_of_other_tokens_reads_its_own(tmp_path: Path) -> None:
    """The same ids under the teacher's names give the same step; with other ids it differs."""
    own = dear_groups(ranked.texts(), tokenizer=ranked.TOKENIZER, teacher_tokenizer=ranked.TOKENIZER)
    found = []
    for settings_, groups in (({}, GROUPS), ({"teacher_tokens": "own"}, own)):
        student, teacher = ranked.cross_encoder(0, layers=1), ranked.cross_encoder(1)
        found.append(ranked.train(tmp_path, student, teacher, DeAR(**settings_), groups)[1][0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    turned = own.map(lambda row: {"teacher_input_ids": [ids[::-1] for ids in row["teacher_input_ids"]]})
    student, teacher = ranked.cross_encoder(0, layers=1), ranked.cross_encoder(1)
    other = ranked.train(tmp_path, student, teacher, DeAR(teacher_tokens="own"), turned)[1][0]
    assert max(float((gradient - found[0][name]).abs().max()) for name, gradient in other.items()) > 1e-4


# ---------------------------------------------------------------------- the second stage


@given(st.text(alphabet="[] >0123456789</think>a", max_size=40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_any_answer_gives_an_order(answer: str, count: int) -> None:
    assert sorted(parse_order(answer, count)) == list(range(count))


def test_what_was_thought_is_not_read() -> None:
    assert parse_order("<think>[1] > [2]</think> [3] > [2]", 3) == [2, 1, 0]
    assert parse_order("9" * 5000, 2) == [0, 1]


@given(st.integers(0, 60), st.integers(2, 20), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_passage_is_in_a_window_and_the_best_reach_the_top(count: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    places = windows(count, window=window, stride=stride)
    seen = {place for start, end in places for place in range(start, end)}
    assert seen == (set(range(count)) if count > 1 else set())
    assert all(0 <= start < end <= count and end - start <= window for start, end in places)
    if stride >= window:
        return
    moved = min(stride, window - stride)  # both windows hold them
    worst_first = list(range(count))
    found = slide(
        worst_first, lambda part: sorted(range(len(part)), key=lambda at: -part[at]), window=window, stride=stride
    )
    assert sorted(found) == worst_first
    assert found[:moved] == sorted(worst_first, reverse=True)[:moved]


def test_the_released_windows_miss_the_first_passages() -> None:
    assert windows(23, window=10, stride=5) == [(13, 23), (8, 18), (3, 13), (0, 8)]
    assert windows(23, window=10, stride=5, released=True) == [(13, 23), (8, 18), (3, 13)]
    assert windows(8, window=10, stride=5) == [(0, 8)]
    assert windows(8, window=10, stride=5, released=True) == []
    assert windows(30) == [(10, 30), (0, 20)]
    for wrong in ({"window": 1, "stride": 1}, {"window": 4, "stride": 5}, {"window": 4, "stride": 0}):
        with pytest.raises(ConfigurationError, match="a window needs"):
            windows(9, **wrong)
    with pytest.raises(MismatchError, match="no order of 3 passages"):
        slide("abc", lambda part: [0, 0, 1], window=3, stride=1)


def answer(question: str) -> str:
    """Reasons, and ranks by the number that a passage names."""
    found = re.findall(r"^\[(\d+)\] .*worth (\d+)", question, re.MULTILINE)
    order = sorted(found, key=lambda pair: -int(pair[1]))
    return "<think>[1] is first</think> " + " > ".join(f"[{place}]" for place, _ in order)


def test_a_text_ranker_ranks_window_by_window() -> None:
    passages = [f"{'word ' * 3}worth {worth}" for worth in (3, 1, 4, 15, 9, 2, 6)]
    asked: list[str] = []

    def told(question: str) -> str:
        asked.append(question)
        return answer(question)

    found = rerank("what is worth most", passages, told, window=4, stride=2, first=6)
    assert found[:2] == [3, 4]
    assert found[-1] == 6  # beyond the first six
    assert len(asked) == 2
    assert all("Query: what is worth most" in question for question in asked)
    assert rerank("query", passages[:1], told) == [0]
    assert rerank("query", [], told) == []
    short = rerank("query", passages[:3], told, window=4, stride=2)
    assert short == [2, 0, 1]
    assert rerank("query", passages[:3], told, window=4, stride=2, released=True) == [0, 1, 2]


def test_a_passage_is_cut_to_so_many_words() -> None:
    asked = prompt("q", ["one two  three four", "five"], words=3)
    assert "[1] one two three\n[2] five\n" in asked
    assert "four" not in asked


def test_reasonings_that_name_every_passage_become_rows() -> None:
    def teacher(question: str) -> str:
        return "Needs: …\n[2] > [1]" if "slow book" in question else "Needs: …\n[2] > [3] > [1]"

    found = rationales(ranked.texts(), teacher=teacher)
    assert len(found) == 2
    assert found.column_names == ["prompt", "completion"]
    assert found[0]["prompt"] == prompt("a good film", ranked.texts()[0]["passages"])
    assert parse_order(found[0]["completion"], 3) == [1, 2, 0]


def order_of(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def test_both_stages_one_after_the_other() -> None:
    """The pointwise scores give the order that the listwise ranker begins with."""
    scores, passages = [0.1, 0.9, 0.5], ["worth 1", "worth 2", "worth 3"]
    first = order_of(scores)
    found = rerank("query", [passages[place] for place in first], answer)
    assert [first[place] for place in found] == [2, 1, 0]
