"""Agreement, calibration, intervals, latency, predictions, tasks, table: closed forms, the authors' values, errors."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_compress_evaluation import (
    agreement,
    calibration,
    candidates,
    examples,
    folder,
    intervals,
    latency,
    metrics,
    quality,
    table,
    task,
)
from hf_compress_evaluation.scoring.classes import Classes
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, save
from rich.console import Console
from sklearn.metrics import f1_score, matthews_corrcoef
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_compress import facts
from hf_compress.errors import (
    ConfigurationError,
    ForeignFileError,
    MismatchError,
    NumericalError,
    UnknownNameError,
)

DATA = facts.Data(name="made up", rows=4, labelled=4, fingerprint="0" * 16)
WORDS = ("good", "bad", "film", "book", "very", "not")
LIMIT = 24


def logs(probs: np.ndarray) -> np.ndarray:
    """Log-probabilities, -inf for 0: what the functions take as logits."""
    with np.errstate(divide="ignore"):
        return np.log(probs)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=LIMIT,
    )


def classifier(*, seed: int = 0, num_labels: int = 2) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LIMIT,
        initializer_range=0.5,
        hidden_dropout_prob=0.5,
        num_labels=num_labels,
    )
    return BertForSequenceClassification(config)


def load(given: task.Task, label2id: dict[str, int]) -> examples.Examples:
    """The rows of a task for a classifier of these classes."""
    return Classes().load(given, BertConfig(label2id=label2id, id2label={i: name for name, i in label2id.items()}))


def texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 12))) for _ in range(count)]


# -------------------------------------------------------------------------------------------------- agreement


def test_agreement_of_two_classes_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2; ties choose the first class."""
    student, teacher = np.zeros((1, 2)), np.array([[math.log(3.0), 0.0]])
    assert agreement.kl(student, teacher) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert agreement.kl(teacher, student) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert agreement.label_loyalty(student, teacher) == 1.0
    assert agreement.label_loyalty(student, teacher[:, ::-1]) == 0.0


def test_models_without_common_ground_have_the_lowest_loyalty() -> None:
    student, teacher = logs(np.eye(2)), logs(np.eye(2)[::-1])
    assert agreement.probability_loyalty(student, teacher) == pytest.approx(1 - math.sqrt(math.log(2)))
    assert agreement.probability_loyalty(student, teacher, base=2) == pytest.approx(0.0)
    assert agreement.kl(student, teacher) == math.inf
    assert agreement.kl(student, student) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-50, 50), st.floats(0.01, 30))
def test_agreement_stays_in_range_and_ignores_a_shift(seed: int, shift: float, size: float) -> None:
    draw = np.random.default_rng(seed)
    student, teacher = size * draw.normal(size=(2, 5, 4))
    near = agreement.probability_loyalty_rows(student, teacher)
    assert ((1 - math.sqrt(math.log(2)) - 1e-9 <= near) & (near <= 1)).all()
    np.testing.assert_allclose(agreement.probability_loyalty_rows(student + shift, teacher - shift), near, atol=1e-6)
    assert (agreement.kl_rows(student, teacher) >= 0).all()
    np.testing.assert_allclose(agreement.kl_rows(student, student + shift), 0, atol=1e-9)
    assert (agreement.probability_loyalty_rows(student, student + shift) > 1 - 1e-6).all()


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_arrays_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(MismatchError, match=r"must be two \(row, class\) arrays"):
        agreement.label_loyalty(*map(np.zeros, shapes))


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_rows_without_a_distribution_are_named(bad: list[float]) -> None:
    with pytest.raises(NumericalError, match="teacher's logits of row 1"):
        agreement.kl(np.zeros((2, 2)), np.array([[0.0, 1.0], bad]))


def test_regression_loyalty_by_hand() -> None:
    """3·t + 2 follows the teacher exactly, however far away; the squares keep its order, not its line."""
    teacher = np.array([0.0, 1.0, 2.0, 3.0])
    assert agreement.regression_loyalty(3 * teacher + 2, teacher) == pytest.approx(1.0)
    assert agreement.regression_loyalty(-teacher, teacher) == pytest.approx(-1.0)
    # x - x̄ = (-3, -1, 1, 3)/2, squares less 3.5: r = 15 / √(5 · 49)
    assert agreement.regression_loyalty(teacher**2, teacher) == pytest.approx(15 / math.sqrt(5 * 49))
    assert agreement.rank_loyalty(teacher**2, teacher) == pytest.approx(1.0)
    np.testing.assert_array_equal(agreement.score_difference_rows(teacher**2, teacher), [0, 0, 2, 6])
    assert agreement.score_difference(teacher**2, teacher) == 2.0


@pytest.mark.parametrize("measure", [agreement.regression_loyalty, agreement.rank_loyalty])
def test_a_constant_model_has_no_correlation_with_its_teacher(measure: Callable[..., float]) -> None:
    with pytest.raises(MismatchError, match="the student gives 1 for all 3 rows"):
        measure(np.ones(3), np.arange(3.0))
    with pytest.raises(MismatchError, match="the teacher gives 1 for all 3 rows"):
        measure(np.arange(3.0), np.ones(3))
    assert agreement.score_difference(np.ones(3), np.arange(3.0)) == pytest.approx(2 / 3)


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"student scores \(2,\) and teacher scores \(3,\)"):
        agreement.score_difference(np.ones(2), np.ones(3))
    with pytest.raises(NumericalError, match="the teacher's score of row 1 is nan"):
        agreement.regression_loyalty(np.arange(2.0), np.array([0.0, math.nan]))


def test_a_base_that_is_no_base_is_refused() -> None:
    with pytest.raises(ValueError, match="base must be above 1"):
        agreement.probability_loyalty(np.zeros((1, 2)), np.zeros((1, 2)), base=1)


# ------------------------------------------------------------------------------------------------ calibration


def test_calibration_error_by_hand() -> None:
    """Two rows say 3/4 and one is right; two say 0.9 and both are: (2 · 1/4 + 2 · 1/10) / 4."""
    logits = logs(np.array([[0.75, 0.25], [0.75, 0.25], [0.1, 0.9], [0.1, 0.9]]))
    assert calibration.calibration_error(logits, [0, 1, 1, 1]) == pytest.approx((2 / 4 + 2 / 10) / 4)
    np.testing.assert_allclose(calibration.confidence_rows(logits), [0.75, 0.75, 0.9, 0.9])


def test_errors_of_one_bin_cancel_and_those_of_two_do_not() -> None:
    """Bins end at 13/15 = 0.867: 0.81 and 0.85 lie in one, 0.87 in the next."""
    right, wrong = np.array([1.0]), np.array([0.0])
    one = calibration.binned_error(np.array([0.81, 0.85]), np.concatenate([right, wrong]))
    two = calibration.binned_error(np.array([0.81, 0.87]), np.concatenate([right, wrong]))
    assert one == pytest.approx(abs(0.19 - 0.85) / 2)
    assert two == pytest.approx((0.19 + 0.87) / 2)


def test_a_certain_model_is_calibrated_if_it_is_right() -> None:
    logits = logs(np.eye(3))
    assert calibration.calibration_error(logits, [0, 1, 2]) == 0.0
    assert calibration.calibration_error(logits, [1, 2, 0]) == 1.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_calibration_error_stays_in_range_and_ignores_a_shift_and_the_order(seed: int) -> None:
    draw = np.random.default_rng(seed)
    logits, labels, order = 3 * draw.normal(size=(20, 4)), draw.integers(0, 4, 20), draw.permutation(20)
    found = calibration.calibration_error(logits, labels)
    assert 0 <= found <= 1
    assert calibration.calibration_error(logits[order] + 0.5, labels[order]) == pytest.approx(found)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"logits \(0, 2\)"):
        calibration.calibration_error(np.zeros((0, 2)), [])
    with pytest.raises(MismatchError, match=r"labels \(1,\) for 2 rows"):
        calibration.calibration_error(np.zeros((2, 2)), [0])
    with pytest.raises(NumericalError, match="logits of row 1"):
        calibration.calibration_error(np.array([[0.0, 1.0], [math.nan, 0.0]]), [0, 0])


# -------------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_a_mean_is_the_normal_one_and_deterministic() -> None:
    rows = np.random.default_rng(0).random(1000) < 0.8
    found = intervals.mean(rows, seed=3)
    half = 1.96 * math.sqrt(rows.mean() * (1 - rows.mean()) / 1000)
    assert found.value == rows.mean()
    assert found.interval == pytest.approx((rows.mean() - half, rows.mean() + half), abs=0.004)
    assert intervals.mean(rows, seed=3) == found
    assert intervals.mean(rows, seed=4).interval != found.interval


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        low, high = intervals.mean(draw.random(120) < 0.7, seed=trial).interval or (1, 0)
        covered += low <= 0.7 <= high
    assert 88 <= covered <= 100


def test_all_right_is_not_certain() -> None:
    """Wilson for 20 of 20: n/(n+z²) = 0.839 to 1."""
    found = intervals.mean(np.ones(20))
    assert found.value == 1.0
    assert found.interval == pytest.approx((20 / (20 + 1.959964**2), 1.0), abs=1e-6)


def test_macro_f1_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    labels, predictions = draw.integers(0, 4, 200), draw.integers(0, 3, 200)
    found = intervals.macro_f1(predictions, labels)
    assert found.value == pytest.approx(f1_score(labels, predictions, average="macro", zero_division=0))
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
def test_matthews_correlation_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 200)
    predictions = np.where(draw.random(200) < 0.6, labels, draw.integers(0, 3, 200))
    found = intervals.matthews_correlation(predictions, labels)
    assert found.value == pytest.approx(matthews_corrcoef(labels, predictions))
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]
    for rows in (2, 3, 7):
        for seed in range(5):
            p, y = np.random.default_rng(seed).integers(0, 2, (2, rows))
            assert intervals.matthews_correlation(p, y).value == pytest.approx(matthews_corrcoef(y, p), abs=1e-12)


def test_one_class_throughout_has_a_matthews_correlation_of_0() -> None:
    found = intervals.matthews_correlation(np.zeros(10), np.arange(10) % 2)
    assert (found.value, found.note) == (0.0, "every resample gives the same")


def test_the_interval_of_a_calibration_error_corrects_what_chance_adds() -> None:
    """True error 0.25: covered. True error 0: the value is above it, and the interval still reaches down to it."""
    draw = np.random.default_rng(0)
    covered = {0.0: 0, 0.25: 0}
    for bias in covered:
        for seed in range(10):
            confidence = draw.uniform(0.5, 1, 200)
            correct = draw.random(200) < confidence - bias
            found = intervals.calibration_error(confidence, correct, seed=seed)
            assert found.value == pytest.approx(calibration.binned_error(confidence, correct.astype(float)))
            assert found.value > 0.02
            assert found.interval is not None
            covered[bias] += found.interval[0] <= max(bias, 0.01) and found.interval[1] >= bias
    assert covered[0.25] >= 8
    assert covered[0.0] >= 5


def test_a_class_that_a_resample_lacks_does_not_count_as_zero() -> None:
    """One row in 100 is of class 1; every resample is perfect, with it or without it."""
    rows = np.arange(100) == 0
    assert intervals.macro_f1(rows, rows).note == "every resample gives the same"


def test_paired_rows_make_the_interval_of_a_gain_narrow() -> None:
    """The student repairs 30 of 1,000 rows and breaks none: the gain is certain although each accuracy is not."""
    alone = np.random.default_rng(0).random(1000) < 0.5
    student = alone.copy()
    student[np.flatnonzero(~alone)[:30]] = True
    found = intervals.gain(student, alone)
    assert found.value == pytest.approx(0.03)
    assert found.interval is not None
    assert 0.015 < found.interval[0] < found.interval[1] < 0.045
    assert intervals.mcnemar(student, alone) == pytest.approx(2 * 0.5**30)


def test_mcnemar_by_hand() -> None:
    """Three rows won, one lost: 2 · (C(4,0) + C(4,1)) / 2^4 = 0.625."""
    assert intervals.mcnemar([1, 1, 1, 0, 1], [0, 0, 0, 1, 1]) == pytest.approx(0.625)
    assert intervals.mcnemar([1, 0], [1, 0]) == 1.0


def test_retention_and_gap_closed_by_hand() -> None:
    """Teacher 90, student 85, alone 80 of 100: 85/90 kept, (85 - 80)/(90 - 80) of the gap closed."""
    place = np.arange(1000) % 100
    teacher, student, alone = place < 90, place < 85, place < 80
    kept, closed = intervals.retention(student, teacher), intervals.gap_closed(student, teacher, alone)
    assert kept.value == pytest.approx(85 / 90)
    assert closed.value == pytest.approx(0.5)
    for found in (kept, closed):
        assert found.value is not None
        assert found.interval is not None
        assert found.interval[0] < found.value < found.interval[1]


def test_a_gap_that_is_no_gap_has_no_value_or_no_interval_and_never_a_nan() -> None:
    place = np.arange(100)
    same = intervals.gap_closed(place < 50, place < 60, place < 60)
    assert (same.value, same.interval) == (None, None)
    assert same.note == "the teacher's lead over the baseline is not above 0"
    shaky = intervals.gap_closed(place < 60, place < 61, place < 60)  # one row ahead: absent from 37 % of resamples
    assert shaky.value == pytest.approx(0.0)
    assert shaky.interval is None
    assert shaky.note is not None
    assert "of the resamples" in shaky.note
    assert intervals.retention(place < 50, place < 0).value is None
    assert intervals.gap_closed(place < 55, place < 50, place < 60).value is None  # a teacher behind the baseline


def test_rows_that_no_resample_tells_apart_have_no_interval() -> None:
    rows = np.arange(10) % 2
    for found in (intervals.gain(rows, rows), intervals.retention(rows, rows), intervals.macro_f1(rows, rows)):
        assert found.value in (0.0, 1.0)
        assert (found.interval, found.note) == (None, "every resample gives the same")


def test_one_row_has_no_interval_and_none_is_refused() -> None:
    assert intervals.macro_f1([1], [1]) == intervals.Estimate(
        value=1.0, interval=None, note="one row says nothing of its spread"
    )
    with pytest.raises(MismatchError, match="at least one row"):
        intervals.mean([])
    with pytest.raises(MismatchError, match="of one length"):
        intervals.gain([1, 0], [1])


# ---------------------------------------------------------------------------------------------------- latency


def test_candidates_take_turns_and_warm_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take one second, the first two of each candidate a hundred."""
    called: list[str] = []
    now = 0.0

    def call(name: str) -> None:
        nonlocal now
        called.append(name)
        now += 1.0 if called.count(name) > 2 else 100.0

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    calls: dict[str, Callable[[], object]] = {"a": lambda: call("a"), "b": lambda: call("b")}
    found = latency.measure_all(calls, batch=2, length=8, runs=3, warmup=2, threads=1)
    assert called == ["a", "b"] * 5
    assert found["a"] == latency.Latency(
        mean=1.0, median=1.0, p90=1.0, p99=1.0, runs=3, warmup=2, batch=2, length=8, threads=1
    )


def test_median_and_p90_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of 1 to 11 seconds: median 6, nine tenths of the way 10."""
    ends = (value for i in range(1, 12) for value in (0.0, float(i)))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ends))
    found = time_one(lambda: None, batch=1, length=1, runs=11, warmup=0, threads=1)
    assert (found.median, found.p90) == (6.0, 10.0)


def test_the_thread_count_is_set_and_restored_also_after_an_error() -> None:
    before, during = torch.get_num_threads(), []
    time_one(lambda: during.append(torch.get_num_threads()), batch=1, length=1, runs=2, warmup=0, threads=before + 1)
    assert during == [before + 1] * 2
    assert torch.get_num_threads() == before

    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        time_one(broken, batch=1, length=1, runs=1, warmup=0, threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_latency_becomes_two_facts_with_their_conditions() -> None:
    taken = latency.Latency(mean=0.625, median=0.5, p90=0.75, p99=0.8, runs=3, warmup=1, batch=2, length=8, threads=1)
    median, p90 = taken.measurements("student", "onnx", provider="CPUExecutionProvider")
    assert (median.metric, median.value, median.unit) == ("latency_median", 0.5, "seconds")
    assert (p90.metric, p90.value) == ("latency_p90", 0.75)
    conditions = {"threads": 1, "batch": 2, "length": 8, "runs": 3, "warmup": 1, "provider": "CPUExecutionProvider"}
    assert median.how == p90.how == conditions


def time_one(call: latency.Call, **how: int) -> latency.Latency:
    return latency.measure_all({"": call}, **how)[""]


def test_counts_that_time_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'runs': 0"):
        time_one(lambda: None, batch=1, length=1, runs=0, warmup=0, threads=1)
    with pytest.raises(ConfigurationError, match="at least one candidate"):
        latency.measure_all({}, batch=1, length=1, runs=1, warmup=0, threads=1)


# -------------------------------------------------------------------------------------------------- predictions


def test_predictions_stand_in_the_order_of_the_texts_and_padding_changes_nothing(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model, rows = classifier().eval(), texts(23)
    together = quality.predict(model, tokenizer, rows, batch_size=5)
    alone = np.concatenate([quality.predict(model, tokenizer, [row]) for row in rows])
    assert together.shape == (23, 2)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.unique(alone.argmax(-1)).size == 2  # not a constant that any order would satisfy


def test_predictions_are_the_eval_modes_and_every_modules_mode_returns(tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = classifier(), texts(6)
    expected = quality.predict(model.eval(), tokenizer, rows)
    model.train()
    model.bert.embeddings.eval()  # frozen by the user
    modes = {name: module.training for name, module in model.named_modules()}
    np.testing.assert_array_equal(quality.predict(model, tokenizer, rows), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_half_precision_gives_float32_logits(tokenizer: PreTrainedTokenizerFast) -> None:
    found = quality.predict(classifier().to(torch.bfloat16), tokenizer, texts(3))
    assert found.dtype == np.float32


def test_an_input_that_the_model_does_not_take_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokenizer makes token_type_ids; DistilBERT has none."""
    config = DistilBertConfig(vocab_size=10, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=24)
    model = DistilBertForSequenceClassification(config)
    assert quality.takes(model, "attention_mask")
    assert not quality.takes(model, "token_type_ids")
    assert quality.takes(classifier(), "token_type_ids")
    assert quality.predict(model, tokenizer, texts(3)).shape == (3, 2)


def test_long_texts_are_cut_to_what_the_model_takes(tokenizer: PreTrainedTokenizerFast) -> None:
    long = " ".join(WORDS * 20)
    whole = quality.predict(classifier().eval(), tokenizer, [long])
    np.testing.assert_allclose(
        whole, quality.predict(classifier().eval(), tokenizer, [long], max_length=LIMIT), atol=1e-6
    )
    assert not np.allclose(whole, quality.predict(classifier().eval(), tokenizer, [long], max_length=4))


def test_predict_refuses_no_texts_other_things_and_broken_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    model = classifier()
    with pytest.raises(ConfigurationError, match="no texts"):
        quality.predict(model, tokenizer, [])
    with pytest.raises(ConfigurationError, match="row 1 is None"):
        quality.predict(model, tokenizer, ["good", None])  # type: ignore[list-item]
    torch.nn.init.constant_(model.classifier.bias, math.nan)
    with pytest.raises(NumericalError, match="outputs of row 0"):
        quality.predict(model, tokenizer, ["good"])


def test_quality_facts_by_hand() -> None:
    logits = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    teacher = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    labels = np.array([0, 0, 1, 1])
    found = quality.measure_classification("student", "onnx", logits, labels, DATA, teacher, seed=7)
    assert [fact.metric for fact in found] == ["accuracy", "f1_macro", "label_loyalty", "probability_loyalty"]
    accuracy, f1, same, near = found
    assert accuracy.value == same.value == 0.75
    assert f1.value == pytest.approx((0.8 + 2 / 3) / 2)
    assert near.value == pytest.approx(agreement.probability_loyalty(logits, teacher))
    for fact in found:
        assert (fact.subject, fact.variant, fact.unit, fact.seed, fact.data) == ("student", "onnx", "fraction", 7, DATA)
        assert fact.interval is not None
        assert fact.interval[0] <= fact.value <= fact.interval[1]


def test_what_a_task_may_ask_for_is_measured_with_intervals() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 60)
    logits, teacher = (draw.normal(size=(2, 60, 3)) + 2 * np.eye(3)[labels]).astype(np.float32)
    found = quality.measure_classification(
        "student", "torch", logits, labels, DATA, teacher, metrics=("accuracy", *quality.METRICS[2:])
    )
    names = ["accuracy", "f1_micro", "matthews_correlation", "calibration_error"]
    assert [fact.metric for fact in found] == [*names, "label_loyalty", "probability_loyalty", "kl"]
    facts_of = {fact.metric: fact for fact in found}
    assert facts_of["f1_micro"].value == facts_of["accuracy"].value
    assert facts_of["f1_micro"].interval == facts_of["accuracy"].interval
    assert facts_of["matthews_correlation"].value == pytest.approx(matthews_corrcoef(labels, logits.argmax(-1)))
    assert facts_of["calibration_error"].value == pytest.approx(calibration.calibration_error(logits, labels))
    assert facts_of["calibration_error"].how == {"bins": 15, "interval": "basic bootstrap"}
    assert (facts_of["kl"].value, facts_of["kl"].unit) == (pytest.approx(agreement.kl(logits, teacher)), "nats")
    for fact in found:
        assert fact.interval is not None
        assert fact.interval[0] <= fact.value <= fact.interval[1]


def test_what_has_no_labels_no_teacher_or_no_end_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logits, asked = np.zeros((2, 2), np.float32), ("matthews_correlation", "kl")
    assert not quality.measure_classification("teacher", "torch", logits, None, DATA, metrics=asked)
    excluding = np.array([[0, -np.inf], [0, 0]], np.float32)
    with caplog.at_level(logging.INFO):
        found = quality.measure_classification("student", "torch", excluding, None, DATA, logits, metrics=asked)
    assert [fact.metric for fact in found] == ["label_loyalty", "probability_loyalty"]
    assert "kl of student (torch) is not recorded: the student excludes a class" in caplog.text
    with pytest.raises(UnknownNameError, match="Did you mean 'kl'"):
        quality.measure_classification("student", "torch", logits, None, DATA, logits, metrics=("kll",))


def test_slices_by_hand() -> None:
    """Class 0: 2 of 3 right, class 1: 1 of 1, class 2 has no row; lengths 3 3 | 4 9, of which the last is wrong."""
    logits = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    labels, tokens = np.array([0, 0, 1, 0]), np.array([3, 3, 4, 9])
    found = quality.measure_slices(
        "student", "onnx", logits, labels, DATA, classes=("good", "/m/09x0r", "none"), tokens=tokens, seed=3
    )
    assert [(fact.metric, fact.how.get("class"), fact.how.get("tokens"), fact.value) for fact in found] == [
        ("accuracy_by_class", "good", None, pytest.approx(2 / 3)),
        ("accuracy_by_class", "#1", None, 1.0),  # a record refuses what looks like a path
        ("accuracy_by_length", None, "3-3", 1.0),
        ("accuracy_by_length", None, "4-4", 1.0),
        ("accuracy_by_length", None, "9-9", 0.0),
    ]
    assert {(fact.subject, fact.variant, fact.unit, fact.seed, fact.data) for fact in found} == {
        ("student", "onnx", "fraction", 3, DATA)
    }
    assert facts.Record(measurements=found).find("accuracy", "student", "onnx") is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_every_row_is_in_one_slice_by_length_and_none_is_split(lengths: list[int]) -> None:
    logits = np.eye(2, dtype=np.float32)[np.zeros(len(lengths), int)]
    found = quality.measure_slices(
        "s", "torch", logits, np.zeros(len(lengths), int), DATA, classes=("a", "b"), tokens=np.array(lengths)
    )
    spans = [
        tuple(map(int, str(fact.how["tokens"]).split("-"))) for fact in found if fact.metric == "accuracy_by_length"
    ]
    assert 1 <= len(spans) <= 4
    for length in lengths:
        assert sum(low <= length <= high for low, high in spans) == 1


def test_slices_that_do_not_fit_are_refused() -> None:
    logits, labels = np.zeros((2, 2), np.float32), np.zeros(2, int)
    for classes, tokens in ((("a",), np.ones(2, int)), (("a", "b"), np.ones(3, int))):
        with pytest.raises(MismatchError, match="one name a class and one count a row"):
            quality.measure_slices("s", "torch", logits, labels, DATA, classes=classes, tokens=tokens)


def test_token_counts_are_those_that_the_model_reads(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = ["good", "good film", " ".join(WORDS * 20)]
    assert quality.token_counts(classifier(), tokenizer, rows).tolist() == [3, 4, LIMIT]
    assert quality.token_counts(classifier(), tokenizer, rows, max_length=4).tolist() == [3, 4, 4]


def test_without_labels_agreement_is_measured_alone() -> None:
    logits = np.eye(2, dtype=np.float32)
    found = quality.measure_classification("student", "torch", logits, None, DATA, logits)
    assert [fact.metric for fact in found] == ["label_loyalty", "probability_loyalty"]


def test_derived_facts_leave_out_what_has_no_value(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.arange(40) % 2
    teacher = np.eye(2, dtype=np.float32)[labels]
    student = teacher.copy()
    student[:4] = student[:4, ::-1]
    with caplog.at_level(logging.INFO):
        right = [intervals.average(quality.right(logits, labels)) for logits in (student, teacher)]
        found = quality.measure_derived(
            "student", "torch", right[0], DATA, metric="accuracy", teacher=right[1], alone=right[1]
        )
    assert [(fact.metric, fact.value) for fact in found] == [
        ("retention", pytest.approx(0.9)),
        ("gain", pytest.approx(-0.1)),
    ]
    assert "gap_closed of student (torch) is not recorded" in caplog.text
    assert found[1].how == {"metric": "accuracy"}


def test_labels_that_do_not_fit_the_logits_are_refused() -> None:
    with pytest.raises(MismatchError, match="labels from 0 to 2 for 2 classes"):
        quality.measure_classification("s", "torch", np.zeros((2, 2), np.float32), np.array([0, 2]), DATA)
    with pytest.raises(MismatchError, match="Score the rows"):
        quality.measure_classification("s", "torch", np.zeros((2, 2), np.float32), np.array([0]), DATA)


def test_size_counts_the_model_and_every_file_of_a_variant(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    for name in ("README.md", "compression.json", "training_args.bin", ".gitattributes"):
        (tmp_path / name).write_text("not the model")
    for name in ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/sub/tokenizer.json", "evidence/curve.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1234567")

    size, parameters = quality.measure_size("student", "torch", tmp_path)
    assert (size.metric, size.value, size.unit) == ("bytes", model_bytes, "bytes")
    assert (parameters.metric, parameters.value, parameters.unit) == ("parameters", model.num_parameters(), "count")
    (size,) = quality.measure_size("student", "onnx", tmp_path)
    assert size.value == 21
    with pytest.raises(ForeignFileError, match="holds no file of the model"):
        quality.measure_size("student", "evidence/none", tmp_path / "evidence")


# ---------------------------------------------------------------------------------------------------- tasks


def write_task(place: Path, content: str = "text,label\ngood film,1\nbad book,0\n", **keys: object) -> Path:
    (place / "rows.csv").write_text(content)
    path = place / "task.yaml"
    path.write_text(json.dumps({"task": "text-classification", "data": "rows.csv"} | keys))  # JSON is YAML
    return path


LABELS = {"negative": 0, "positive": 1}


def test_a_task_reads_texts_and_labels_beside_its_file(tmp_path: Path) -> None:
    found = load(task.read_task(write_task(tmp_path, licence="MIT")), LABELS)
    assert found.texts == ("good film", "bad book")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0]
    assert (found.data.name, found.data.rows, found.data.licence) == ("rows", 2, "MIT")
    assert found.data.fingerprint == facts.fingerprint([("good film", 1), ("bad book", 0)])


def test_labels_may_be_names_and_texts_may_read_like_missing_values(tmp_path: Path) -> None:
    rows = "body,polarity\nNA,positive\nnull,negative\nnan,positive\n"
    path = write_task(tmp_path, rows, text="body", label="polarity", rows=2)
    found = load(task.read_task(path), LABELS)
    assert found.texts == ("NA", "null")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0]


def test_class_labels_of_a_data_set_are_matched_by_name_not_by_order() -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    rows = Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features)
    found = examples.examples(rows, name="made up", text="text", label="label", label2id=LABELS)
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize("ending", ["csv.gz", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]})
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        rows.to_parquet(path)
    elif ending == "jsonl":
        rows.to_json(path)
    else:
        path.write_bytes(gzip.compress(b"text,label\ngood,1\nbad,0\n"))
    assert list(examples.read_rows(path)) == list(rows)
    assert len(examples.read_rows(path, split="train[:1]")) == 1


def test_reading_a_file_tells_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: asked.append(where))
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nfine,0\n")

    examples.read_rows(path)

    assert not asked


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        ({"colour": 1}, UnknownNameError, "Known: batch_size, config, data, hub_id, label"),
        ({"batchsize": 1}, UnknownNameError, "Did you mean 'batch_size'"),
        ({"task": "ranking"}, ForeignFileError, "task: Input should be 'text-classification'"),
        ({"rows": 0}, ForeignFileError, "rows: "),
        ({"metrics": ["acuracy"]}, ForeignFileError, "Did you mean 'accuracy'"),
        ({"slices": True, "label": None}, ForeignFileError, "needs labels"),
    ],
)
def test_a_task_file_with_a_fault_names_it(
    tmp_path: Path, keys: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        task.read_task(write_task(tmp_path, **keys))


@pytest.mark.parametrize(
    ("rows", "keys", "error", "match"),
    [
        ("text,label\n", {}, ForeignFileError, "holds no row"),
        ("text,label\na,0\n", {"text": "txt"}, UnknownNameError, r"which has text, label\) 'txt'. Did you mean 'text'"),
        ("text,label\na,2\n", {}, MismatchError, "row 0 is 2; the model has the classes 0 to 1"),
        ("text,label\na,0\na,0.5\n", {}, MismatchError, "row 1 is 0.5"),
        ("text,label\na,neutral\n", {}, UnknownNameError, "row 0.*Known: negative, positive"),
        ("text,label\na,0\n", {"data": "none.csv"}, ForeignFileError, "does not exist"),
        ("text,label\na,0\n", {"data": "task.yaml"}, UnknownNameError, "files ending in '.yaml'"),
        ('text,label\n"a,0\nb', {}, ForeignFileError, "cannot be read as csv"),
        ("text,label\n1,0\n2,1\n", {}, ConfigurationError, "row 0 is 1, not a text"),
    ],
)
def test_data_with_a_fault_names_it(
    tmp_path: Path, rows: str, keys: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        load(task.read_task(write_task(tmp_path, rows, **keys)), LABELS)


# ------------------------------------------------------------------------------------------- folder and table


def write_graph(place: Path) -> None:
    """logits[b] = mean over time of mask · table[ids], the smallest classifier there is."""
    place.mkdir(parents=True)
    weights = np.random.default_rng(0).normal(size=(4 + len(WORDS), 2)).astype(np.float32)
    tokens = ["batch_size", "sequence_length"]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
            helper.make_node("Mul", ["rows", "wide"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "time"], ["logits"], keepdims=0),
        ],
        "classifier",
        [helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", 2])],
        [
            numpy_helper.from_array(weights, "table"),
            numpy_helper.from_array(np.array([2]), "last"),
            numpy_helper.from_array(np.array([1]), "time"),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), place / "model.onnx")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """student/ with onnx/ and without onnx_int8/, beside teacher/, alone/ and task.yaml."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher", "alone")):
        classifier(seed=seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    write_graph(place / "student" / "onnx")
    classifier().config.save_pretrained(place / "student" / "onnx")
    tokenizer.save_pretrained(place / "student" / "onnx")
    rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts(40)))
    write_task(place, "text,label\n" + rows)
    return place / "student"


@pytest.fixture(scope="module")
def measured(student: Path) -> tuple[facts.Measurement, ...]:
    logger = logging.getLogger(candidates.__name__)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append(entry.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    found = folder.evaluate_folder(
        student,
        task=student.parent / "task.yaml",
        teacher=student.parent / "teacher",
        alone=student.parent / "alone",
        variants=("torch", "onnx", "onnx_int8"),
        timing=folder.Timing(batches=(1, 32), length=400, runs=2, warmup=1),
    )
    logger.removeHandler(handler)
    assert lines == ["student holds no onnx_int8 variant (onnx_int8/model.onnx): skipped."]
    return found


def test_a_folder_is_measured_whole_and_its_record_holds_it(
    student: Path, measured: tuple[facts.Measurement, ...]
) -> None:
    record = facts.load(student)
    assert record.measurements == measured
    score = {"accuracy", "f1_macro"}
    agree = {"label_loyalty", "probability_loyalty"}
    time = {"latency_median", "latency_p90", "throughput", "throughput_tokens"}
    expected = {
        ("teacher", "torch"): score | time | {"bytes", "parameters"},
        ("alone", "torch"): score | agree | time | {"bytes", "parameters"},
        ("student", "torch"): score | agree | time | {"bytes", "parameters"},
        ("student", "onnx"): score | agree | time | {"bytes"},
    }
    derived = {"retention", "gain", "gap_closed"}
    for key, names in expected.items():
        found = {fact.metric for fact in measured if (fact.subject, fact.variant) == key}
        assert found - derived == names, key
        assert ("retention" in found) == (key[0] == "student")
    timed = record.find("latency_median", "student", "onnx", batch=32)
    assert timed is not None
    assert timed.how["length"] == LIMIT  # what was asked for is more than the models take
    assert timed.how["provider"] == "CPUExecutionProvider"


def test_the_measured_accuracy_is_the_metrics_own(
    student: Path, measured: tuple[facts.Measurement, ...], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = load(task.read_task(student.parent / "task.yaml"), {"LABEL_0": 0, "LABEL_1": 1})
    chosen = quality.predict(classifier().eval(), tokenizer, rows.texts).argmax(-1)
    for name in quality.QUALITY:
        found = facts.Record(measurements=measured).find(name)
        assert found is not None
        assert found.data == rows.data
        expected = metrics.load(name).compute(predictions=chosen, references=rows.labels)[name]
        assert found.value == pytest.approx(expected)


def test_slices_and_further_metrics_are_measured_where_the_task_asks(student: Path, tmp_path: Path) -> None:
    place = tmp_path / "models"
    shutil.copytree(student.parent, place, ignore=shutil.ignore_patterns(facts.FILE))
    rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts(40)))
    asked = ["accuracy", "f1_micro", "matthews_correlation", "calibration_error", "kl"]
    path = write_task(place, "text,label\n" + rows, metrics=asked, slices=True)
    found = folder.evaluate_folder(
        place / "student", task=path, teacher=place / "teacher", timing=folder.Timing(batches=())
    )
    record = facts.load(place / "student")
    for subject, variant in (("teacher", "torch"), ("student", "torch"), ("student", "onnx")):
        own = [fact for fact in found if (fact.subject, fact.variant) == (subject, variant)]
        assert {fact.metric for fact in own} >= {*asked} - ({"kl"} if subject == "teacher" else set())
        assert [fact.how["class"] for fact in own if fact.metric == "accuracy_by_class"] == ["LABEL_0", "LABEL_1"]
        whole = record.find("accuracy", subject, variant)
        assert whole is not None
        by_class = [fact.value for fact in own if fact.metric == "accuracy_by_class"]  # 20 rows each
        assert np.mean(by_class) == pytest.approx(whole.value)
    spans = {
        subject: [f.how["tokens"] for f in found if (f.metric, f.subject) == ("accuracy_by_length", subject)]
        for subject in ("teacher", "student")
    }
    assert spans["student"] == spans["teacher"] * 2  # torch and onnx: the same rows
    assert "student torch: micro-F1 " in printed(record)
    shown = json.loads(table.as_json(record))[-1]["further"]
    assert list(shown) == asked[1:]


def test_onnx_predictions_are_the_graphs(student: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from hf_compress.onnx import load_onnx

    weights = np.random.default_rng(0).normal(size=(4 + len(WORDS), 2)).astype(np.float32)
    rows = texts(9)
    found = quality.predict(load_onnx(student / "onnx", provider="cpu", threads=1), tokenizer, rows, batch_size=4)
    expected = [weights[tokenizer(row)["input_ids"]].sum(0) for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_classes_that_differ_are_refused_before_anything_is_measured(
    tmp_path: Path, student: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = classifier()
    other.config.id2label = {0: "yes", 1: "no"}
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    before = facts.load(student)
    with pytest.raises(MismatchError, match="teacher torch has the classes"):
        folder.evaluate_folder(student, task=student.parent / "task.yaml", teacher=tmp_path / "other")
    assert facts.load(student) == before


def test_an_empty_folder_is_refused(tmp_path: Path, student: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ForeignFileError, match="holds none of torch"):
        folder.evaluate_folder(tmp_path / "empty", task=student.parent / "task.yaml")


def test_a_body_without_its_head_is_refused(tmp_path: Path, student: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    classifier().bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"teacher: the weights lack .*classifier"):
        folder.evaluate_folder(student, task=student.parent / "task.yaml", teacher=tmp_path)


def printed(record: facts.Record) -> str:
    console = Console(width=220, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table.table(record))
    return console.export_text()


def test_the_table_shows_the_records_numbers_and_a_dash_for_what_is_missing() -> None:
    def fact(metric: str, value: float, unit: str, variant: str = "torch", **more: object) -> facts.Measurement:
        return facts.Measurement.model_validate(
            {"subject": "student", "variant": variant, "metric": metric, "value": value, "unit": unit} | more
        )

    how = {"batch": 1, "length": 16, "threads": 1, "provider": "CPUExecutionProvider"}
    record = facts.Record(
        measurements=(
            fact("accuracy", 0.5, "fraction"),
            fact("accuracy", 0.875, "fraction", interval=(0.86, 0.89), data=DATA),
            fact("parameters", 1_500_000, "count"),
            fact("bytes", 6_200_000, "bytes"),
            fact("latency_median", 0.0123, "seconds", "onnx", how=how),
            fact("latency_p90", 0.02, "seconds", "onnx", how=how),
            fact("gap_closed", 0.62, "ratio", interval=(0.4, 0.9)),
            facts.Measurement(subject="teacher", metric="accuracy", value=0.9, unit="fraction"),
        )
    )
    text = printed(record)
    lines = [line for line in text.splitlines() if line.startswith(("student ", "teacher "))]
    teacher, torch_row, onnx_row = (re.split(r"\s{2,}", line.rstrip()) for line in lines)
    assert [teacher[0], torch_row[1], onnx_row[1]] == ["teacher", "torch", "onnx"]
    assert torch_row[2:] == ["0.875 ± 0.015", "1.50 M", "6.2 MB", "— / —", "— / —"]
    assert onnx_row[3:] == ["1.50 M", "—", "12.3 / 20.0", "— / —"]
    assert "student: 0.620 (0.400 to 0.900) of the teacher's lead over alone made up" in text
    assert "scored on made up, 4 rows" in text
    assert "latency: 16 tokens, threads 1, CPUExecutionProvider" in text

    rows = json.loads(table.as_json(record))
    assert [(row["subject"], row["variant"]) for row in rows] == [
        ("teacher", "torch"),
        ("student", "torch"),
        ("student", "onnx"),
    ]
    assert rows[1]["scores"]["accuracy"] == {"value": 0.875, "unit": "fraction", "interval": [0.86, 0.89]}
    assert rows[0]["bytes"] is None
    assert rows[2]["latency"]["1"][0]["value"] == 0.0123


def test_an_empty_record_gives_an_empty_table() -> None:
    assert table.rows(facts.Record()) == ()
    assert table.as_json(facts.Record()) == "[]"
    assert "accuracy" in printed(facts.Record())
