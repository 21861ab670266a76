"""Metrics by name: values worked by hand, the online metrics' own examples, edge cases, properties, no network."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import logging
import math
import os
import pkgutil
import subprocess
import sys
from typing import Any

import evaluate
import numpy as np
import pytest
from hf_compress_evaluation import metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.errors import ConfigurationError, MismatchError, NumericalError, UnknownNameError

MAPS = (
    [[[1, 2], [3, 4], [5, 255]], [[2, 7], [9, 2], [3, 6]], [[2, 2, 3], [8, 2, 4], [3, 255, 2]]],
    [[[0, 3], [5, 4], [6, 255]], [[1, 7], [9, 2], [3, 6]], [[1, 2, 2], [8, 2, 1], [3, 255, 1]]],
)
CATS = (
    [
        "The relationship between cats and dogs is not exactly friendly.",
        "a good bookshop is just a genteel black hole that knows how to read.",
    ],
    [
        ["The relationship between dogs and cats is not exactly friendly."],
        ["A good bookshop is just a genteel Black Hole that knows how to read."],
    ],
)
TAGS = (
    [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
    [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
)
SPOKEN = (
    ["this is the prediction", "there is an other sample"],
    ["this is the reference", "there is another one"],
)
ANSWERS = [{"id": "a", "answers": {"text": ["cat sat down", "dog"], "answer_start": [0, 9]}}]
SAMPLES: dict[str, tuple[dict[str, Any], str | None, float]] = {
    # name: rows and arguments, the result's name (None: it is the result), its value; most are the online examples
    "accuracy": ({"predictions": [0, 1, 1, 2, 1, 0], "references": [0, 1, 2, 0, 1, 2]}, "accuracy", 0.5),
    "f1": ({"predictions": [0, 0, 1, 1, 0], "references": [0, 1, 0, 1, 0]}, "f1", 0.5),
    "f1_macro": ({"predictions": [0, 2, 1, 0, 0, 1], "references": [0, 1, 2, 0, 1, 2]}, "f1_macro", 0.8 / 3),
    "f1_micro": ({"predictions": [0, 2, 1, 0, 0, 1], "references": [0, 1, 2, 0, 1, 2]}, "f1_micro", 1 / 3),
    "matthews_correlation": (
        {"predictions": [1, 2, 2, 0, 3, 3], "references": [1, 3, 2, 0, 3, 2]},
        "matthews_correlation",
        7 / 13,
    ),
    "pearsonr": ({"predictions": [10, 9, 2.5, 6, 4], "references": [1, 2, 3, 4, 5]}, "pearsonr", -0.742611),
    "spearmanr": ({"predictions": [10, 9, 2.5, 6, 4], "references": [1, 2, 3, 4, 5]}, "spearmanr", -0.7),
    "seqeval": ({"predictions": TAGS[0], "references": TAGS[1]}, "overall_f1", 0.5),
    "squad": ({"predictions": [{"id": "a", "prediction_text": "the cat sat"}], "references": ANSWERS}, "f1", 80.0),
    "exact_match": (
        {
            "predictions": ["cat?", "theater", "yelling", "agent"],
            "references": ["the cat", "theater", "YELLING", "agent007"],
            "regexes_to_ignore": ["the ", "yell", "YELL"],
            "ignore_case": True,
            "ignore_punctuation": True,
        },
        "exact_match",
        0.75,
    ),
    "rouge": ({"predictions": ["the cat", "a dog"], "references": ["the cat sat", "a dog"]}, "rouge1", 0.9),
    "sacrebleu": (
        {
            "predictions": ["hello there general kenobi", "on our way to ankh morpork"],
            "references": [["hello there general kenobi", "hello there !"], ["goodbye ankh morpork", "ankh morpork"]],
        },
        "score",
        39.763536,
    ),
    "chrf": ({"predictions": CATS[0], "references": CATS[1]}, "score", 84.642149),
    "wer": ({"predictions": SPOKEN[0], "references": SPOKEN[1]}, None, 0.5),
    "cer": ({"predictions": SPOKEN[0], "references": SPOKEN[1]}, None, 14 / 41),
    "perplexity": ({"nats": [math.log(8), math.log(2)], "tokens": [3, 1]}, "perplexity", 2.0),
    "bits_per_byte": ({"nats": [math.log(8), math.log(2)], "bytes": [6, 2]}, "bits_per_byte", 0.5),
    "anls": ({"predictions": ["ABCD ", "ab"], "references": [["x", "abce"], ["cd", "ac"]]}, "anls", 0.375),
    "acceptance_rate": ({"accepted": [2.5, 0.5], "tokens": [3, 1], "gamma": 2}, "block_efficiency", 1 + 3 / 4 + 9 / 16),
    "ndcg": (
        {"predictions": [[3.0, 2.0, 1.0], [1.0, 2.0]], "references": [[0, 1, 0], [0, 1]]},
        "ndcg",
        (1 / math.log2(3) + 1) / 2,
    ),
    "mrr": ({"predictions": [[3.0, 2.0, 1.0], [1.0, 2.0]], "references": [[0, 1, 0], [0, 1]]}, "mrr", 0.75),
    "mean_iou": (
        {"predictions": MAPS[0], "references": MAPS[1], "num_labels": 10, "ignore_index": 255},
        "mean_iou",
        0.4775,
    ),
}
ROWS = ("predictions", "references", "nats", "accepted", "tokens", "bytes")


def compute(name: str, **given: Any) -> Any:
    return metrics.load(name).compute(**given)


def pairs(predictions: list[Any], references: list[Any]) -> dict[str, list[Any]]:
    return {"predictions": predictions, "references": references}


# -------------------------------------------------------------------------------------------- every metric


def test_every_metric_has_a_sample() -> None:
    assert set(SAMPLES) == set(metrics.METRICS)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_value_is_the_known_one_under_the_online_name(name: str) -> None:
    given, key, expected = SAMPLES[name]
    metric = metrics.load(name)
    assert metric.name == name
    found = metric.compute(**given)
    assert (found if key is None else found[key]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_order_of_the_rows_is_no_matter_and_batches_add_up(name: str) -> None:
    given, key, expected = SAMPLES[name]
    rows = {part: value for part, value in given.items() if part in ROWS}
    metric = metrics.load(name)
    for index in reversed(range(len(next(iter(rows.values()))))):
        metric.add_batch(**{part: value[index : index + 1] for part, value in rows.items()})
    found = metric.compute(**{part: value for part, value in given.items() if part not in ROWS})
    assert (found if key is None else found[key]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", SAMPLES)
def test_no_rows_and_missing_inputs_are_refused(name: str) -> None:
    given = SAMPLES[name][0]
    with pytest.raises(MismatchError, match=f"{name}: there is no row"):
        compute(name, **{part: [] if part in ROWS else value for part, value in given.items()})
    if name in ("perplexity", "bits_per_byte"):
        with pytest.raises(MismatchError, match=f"{name}: nats is missing"):
            compute(name, **{part: value for part, value in given.items() if part != "nats"})


def test_metrics_by_name_need_no_network_and_no_time() -> None:
    """The child has no sockets at all; its seconds are those after the imports, on its own processor."""
    code = """
import json, socket, sys, time
def refused(*args, **kwargs): raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = refused
from hf_compress_evaluation import metrics
start = time.process_time()
for name, given in json.loads(sys.stdin.read()).items():
    metrics.load(name).compute(**given)
    print(name)
assert time.process_time() - start < 10
"""
    given = json.dumps({name: sample[0] for name, sample in SAMPLES.items()})
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=given, env=offline, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == list(SAMPLES), done.stderr


def test_the_examples_in_the_docstrings_run() -> None:
    names = [f"{metrics.__name__}.{found.name}" for found in pkgutil.iter_modules(metrics.__path__)]
    for name in (metrics.__name__, *names):
        assert doctest.testmod(importlib.import_module(name)).failed == 0, name


def test_metrics_combine() -> None:
    both = evaluate.combine([metrics.load("accuracy"), metrics.load("f1")])
    found = both.compute(predictions=[0, 1, 1], references=[0, 1, 0])
    assert found == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}


def test_metrics_leave_no_file_that_another_process_could_meet() -> None:
    assert metrics.load("accuracy").keep_in_memory
    assert not metrics.load("accuracy", keep_in_memory=False, experiment_id="apart").keep_in_memory


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'accuracy'"):
        metrics.load("acuracy")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("seqeval", "seqeval.metrics"),
        ("rouge", "rouge_score.rouge_scorer"),
        ("sacrebleu", "sacrebleu"),
        ("chrf", "sacrebleu"),
        ("wer", "jiwer"),
        ("cer", "jiwer"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf'{name}: the package .* `pip install "hf-compress\[metrics\]"`'):
        compute(name, **SAMPLES[name][0])


# ----------------------------------------------------------------------------------- classes and correlations


def test_f1_by_hand() -> None:
    """Class 0: precision 1, recall 2/3, F1 0.8, three rows; class 1: precision 1/2, recall 1, F1 2/3, one row."""
    rows = pairs([0, 0, 1, 1], [0, 0, 0, 1])
    assert compute("f1", **rows)["f1"] == pytest.approx(2 / 3)
    assert compute("f1", **rows, pos_label=0)["f1"] == pytest.approx(0.8)
    assert compute("f1", **rows, average="micro")["f1"] == 0.75
    assert compute("f1", **rows, average="macro")["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert compute("f1", **rows, average="weighted")["f1"] == pytest.approx((3 * 0.8 + 2 / 3) / 4)
    np.testing.assert_allclose(compute("f1", **rows, average=None)["f1"], [0.8, 2 / 3])
    assert compute("f1_macro", **rows)["f1_macro"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert compute("f1_micro", **rows)["f1_micro"] == 0.75


def test_f1_of_several_labels_a_row_is_the_online_one() -> None:
    rows = pairs([[0, 1, 1], [1, 1, 0]], [[0, 1, 1], [0, 1, 0]])
    assert metrics.load("f1", config_name="multilabel").compute(**rows, average="macro")["f1"] == pytest.approx(2 / 3)
    assert metrics.load("accuracy", config_name="multilabel").compute(**rows) == {"accuracy": 0.5}


def test_f1_without_the_class_is_0_and_of_more_than_two_classes_wants_an_average() -> None:
    assert compute("f1", **pairs([0, 0], [0, 0])) == {"f1": 0.0}
    assert compute("f1", **pairs([0, 0], [2, 0])) == {"f1": 0.0}
    with pytest.raises(MismatchError, match="rows hold 3"):
        compute("f1", **pairs([0, 1, 2], [0, 1, 2]))
    with pytest.raises(UnknownNameError, match="Did you mean 'macro'"):
        compute("f1", **pairs([0, 1], [0, 1]), average="makro")


def test_accuracy_takes_the_online_arguments() -> None:
    rows = pairs([0, 1, 1, 2, 1, 0], [0, 1, 2, 0, 1, 2])
    assert compute("accuracy", **rows, normalize=False) == {"accuracy": 3.0}
    weighted = compute("accuracy", **rows, sample_weight=[0.5, 2, 0.7, 0.5, 9, 0.4])
    assert weighted["accuracy"] == pytest.approx(11.5 / 13.1)


def test_matthews_correlation_by_hand() -> None:
    """One true positive, two true negatives, one false negative: (1·2 - 0·1) / √(1·2·2·3); 0 of one class."""
    rows = pairs([0, 0, 0, 1], [0, 0, 1, 1])
    assert compute("matthews_correlation", **rows)["matthews_correlation"] == pytest.approx(2 / math.sqrt(12))
    assert compute("matthews_correlation", **pairs([1, 1], [0, 1])) == {"matthews_correlation": 0.0}
    assert compute("matthews_correlation", **pairs([1, 0], [0, 1])) == {"matthews_correlation": -1.0}


def test_correlations_by_hand() -> None:
    """x - x̄ = (-1, 0, 1), y - ȳ = (-4, -1, 5)/3: r = 3/√(2 · 42/9); ranks 1, 2.5, 2.5, 4 and 1 to 4: 4.5/√(4.5 · 5)."""
    assert compute("pearsonr", **pairs([1, 2, 3], [1, 2, 4]))["pearsonr"] == pytest.approx(3 / math.sqrt(2 * 42 / 9))
    tied = compute("spearmanr", **pairs([1, 2, 2, 4], [1, 2, 3, 4]))
    assert tied["spearmanr"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    rows = SAMPLES["pearsonr"][0]
    assert compute("pearsonr", **rows, return_pvalue=True)["p-value"] == pytest.approx(0.150556, abs=1e-6)
    assert compute("spearmanr", **rows, return_pvalue=True)["spearmanr_pvalue"] == pytest.approx(0.188120, abs=1e-6)


@pytest.mark.parametrize("name", ["pearsonr", "spearmanr"])
@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (pairs([2, 2, 2], [1, 2, 3]), "the predictions are constant .2 in 3 rows"),
        (pairs([1, 2, 3], [0, 0, 0]), "the references are constant"),
        (pairs([1], [2]), "constant .1 in 1 rows"),
        (pairs([1, math.nan], [2, 3]), "row 1 of the predictions is nan"),
    ],
)
def test_a_correlation_that_is_not_defined_is_an_error_and_no_nan(name: str, rows: Any, match: str) -> None:
    with pytest.raises(MismatchError, match=f"{name}: .*{match}"):
        compute(name, **rows)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10), st.floats(-5, 5))
def test_correlations_ignore_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, 6))
    for name in ("pearsonr", "spearmanr"):
        first = compute(name, predictions=x, references=y)[name]
        assert compute(name, predictions=scale * x + offset, references=y)[name] == pytest.approx(first)


# ------------------------------------------------------------------------------------------------------ spans


def test_entities_by_hand() -> None:
    """PER is right; LOC is called ORG; the second PER ends too late, which is no entity found and one invented."""
    rows = pairs(
        [["B-PER", "I-PER", "O", "B-ORG"], ["B-PER", "I-PER"]], [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O"]]
    )
    found = compute("seqeval", **rows)
    assert found["PER"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "number": 2}
    assert (found["LOC"]["recall"], found["LOC"]["number"]) == (0.0, 1)
    assert (found["ORG"]["precision"], found["ORG"]["number"]) == (0.0, 0)
    for figure in ("precision", "recall", "f1"):
        assert found[f"overall_{figure}"] == pytest.approx(1 / 3)
    assert found["overall_accuracy"] == pytest.approx(4 / 6)


def test_sequences_without_an_entity_have_f1_0_and_an_accuracy(recwarn: pytest.WarningsRecorder) -> None:
    found = compute("seqeval", **pairs([["O", "O"], []], [["O", "O"], []]))
    overall = {"overall_precision": 0.0, "overall_recall": 0.0, "overall_f1": 0.0, "overall_accuracy": 1.0}
    assert found == overall
    assert not recwarn.list
    assert compute("seqeval", **pairs([["O"]], [["O"]]), zero_division=1)["overall_f1"] == 1.0


def test_a_strict_scheme_wants_valid_tags() -> None:
    """An I- that follows no B- begins an entity for conlleval, and is none in IOB2."""
    rows = pairs([["I-PER", "O"]], [["I-PER", "O"]])
    assert compute("seqeval", **rows)["overall_f1"] == 1.0
    assert compute("seqeval", **rows, mode="strict", scheme="IOB2")["overall_f1"] == 0.0
    with pytest.raises(UnknownNameError, match="Did you mean 'IOB2'"):
        compute("seqeval", **rows, scheme="IOB3")


def test_tags_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MismatchError, match="sentence 1 has 2 predicted and 1 true tags"):
        compute("seqeval", **pairs([["O"], ["O", "O"]], [["O"], ["O"]]))
    with pytest.raises(MismatchError, match="no sentence has a tag"):
        compute("seqeval", **pairs([[]], [[]]))


def answers(*texts: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"id": str(row), "answers": {"text": list(each), "answer_start": [0] * len(each)}}
        for row, each in enumerate(texts)
    ]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"id": str(row), "prediction_text": text} for row, text in enumerate(texts)]


def test_answers_by_hand() -> None:
    """The words cat sat of "cat sat down": 2·2/(2 + 3) = 0.8; case, articles and punctuation are no difference."""
    found = compute("squad", **pairs(said("the cat sat", "A DOG!"), answers(("dog", "cat sat down"), ("the dog",))))
    assert found == {"exact_match": 50.0, "f1": pytest.approx(90.0)}


def test_an_empty_answer_scores_0(caplog: pytest.LogCaptureFixture) -> None:
    assert compute("squad", **pairs(said(""), answers(("dog",)))) == {"exact_match": 0.0, "f1": 0.0}
    assert compute("squad", **pairs(said("the"), answers(("a",)))) == {"exact_match": 100.0, "f1": 0.0}
    with caplog.at_level(logging.WARNING):
        other = [{"id": "of another", "prediction_text": "dog"}]
        assert compute("squad", **pairs(other, answers(("dog",)))) == {"exact_match": 0.0, "f1": 0.0}
    assert "question '0' has no prediction" in caplog.text
    with pytest.raises(MismatchError, match="question '0' has no answer"):
        compute("squad", **pairs(said("dog"), answers(())))


def test_exact_match_by_hand() -> None:
    rows = pairs(["Cat1", "dog.", ""], ["cat", "dog", ""])
    assert compute("exact_match", **rows)["exact_match"] == pytest.approx(1 / 3)
    assert compute("exact_match", **rows, ignore_punctuation=True)["exact_match"] == pytest.approx(2 / 3)
    every = {"ignore_case": True, "ignore_punctuation": True, "ignore_numbers": True}
    assert compute("exact_match", **rows, **every)["exact_match"] == 1.0
    assert compute("exact_match", **rows, regexes_to_ignore=["[.]$"])["exact_match"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------------------------ texts


def test_rouge_by_hand() -> None:
    """The cat, of "the cat sat": precision 1, recall 2/3 of the words and 1/2 of the pairs."""
    found = compute("rouge", **pairs(["the cat"], ["the cat sat"]))
    expected = {"rouge1": 0.8, "rouge2": 2 / 3, "rougeL": 0.8, "rougeLsum": 0.8}
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
    turned = compute("rouge", **pairs(["a b\nc d"], ["c d\na b"]))
    assert (turned["rougeL"], turned["rougeLsum"]) == (pytest.approx(0.5), pytest.approx(1.0))


def test_rouge_takes_several_references_and_the_online_arguments() -> None:
    rows = pairs(["the cat", ""], [["a dog", "the cat sat"], ["a", "b"]])
    assert compute("rouge", **rows)["rouge1"] == pytest.approx(0.4)
    assert compute("rouge", **rows, use_aggregator=False)["rouge1"] == pytest.approx([0.8, 0.0])
    assert set(compute("rouge", **rows, rouge_types=["rouge3"])) == {"rouge3"}
    stems = pairs(["cats"], ["cat"])
    assert compute("rouge", **stems)["rouge1"] == 0.0
    assert compute("rouge", **stems, use_stemmer=True)["rouge1"] == 1.0
    greek = pairs(["γάτα"], ["γάτα"])
    assert compute("rouge", **greek)["rouge1"] == 0.0  # as the docstring warns
    assert compute("rouge", **greek, tokenizer=str.split)["rouge1"] == 1.0


def test_bleu_by_hand() -> None:
    """5 of 6 words, 3 of 5 pairs, 2 of 4, 1 of 3: (5/6 · 3/5 · 1/2 · 1/3)^¼; too short: exp(1 - 6/4)."""
    found = compute("sacrebleu", **pairs(["the cat sat on a mat"], ["the cat sat on the mat"]))
    assert found["score"] == pytest.approx(100 * (1 / 12) ** 0.25)
    assert (found["counts"], found["totals"], found["bp"]) == ([5, 3, 2, 1], [6, 5, 4, 3], 1.0)
    short = compute("sacrebleu", **pairs(["the cat sat on"], ["the cat sat on the mat"]))
    assert short["score"] == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert (short["sys_len"], short["ref_len"]) == (4, 6)


def test_chrf_by_hand() -> None:
    """Of "abcd" all of "ab" is right: precision 1, recall 1/2, F₂ = 5 · 1/2 / (4 + 1/2)."""
    found = compute("chrf", **pairs(["ab"], ["abcd"]), char_order=1)
    assert found == {"score": pytest.approx(100 * 2.5 / 4.5), "char_order": 1, "word_order": 0, "beta": 2}
    assert compute("chrf", **pairs(*CATS), word_order=2)["score"] == pytest.approx(82.872637, abs=1e-6)
    assert compute("chrf", **pairs(*CATS), word_order=2, lowercase=True)["score"] == pytest.approx(92.128531, abs=1e-6)


@pytest.mark.parametrize("name", ["sacrebleu", "chrf"])
def test_translations_that_are_empty_score_0_and_references_are_equally_many(name: str) -> None:
    assert compute(name, **pairs([""], ["the cat"]))["score"] == 0.0
    with pytest.raises(MismatchError, match=f"{name}: rows have 1 to 2 references"):
        compute(name, **pairs(["a", "b"], [["a"], ["b", "c"]]))
    with pytest.raises(MismatchError, match=f"{name}: row 1 has no reference"):
        compute(name, **pairs(["a", "b"], [["a"], []]))


def test_word_errors_by_hand() -> None:
    """One of five words is another, one is left out; put in words are errors too, also beyond 1."""
    assert compute("wer", **pairs(["a x c", "d"], ["a b c", "d e"])) == pytest.approx(2 / 5)
    assert compute("wer", **pairs(["a b c"], ["a"])) == pytest.approx(2.0)
    assert compute("wer", **pairs([""], ["a b"])) == 1.0
    moved = pairs(["", "a b"], ["a", "b"])
    assert compute("wer", **moved) == 1.0
    assert compute("wer", **moved, concatenate_texts=True) == 0.0


def test_character_errors_by_hand() -> None:
    assert compute("cer", **pairs(["abd", "a"], ["abc", "ab"])) == pytest.approx(2 / 5)
    assert compute("cer", **pairs([""], ["abc"])) == 1.0
    assert compute("cer", **pairs(["ab", "c"], ["a", "bc"]), concatenate_texts=True) == 0.0


@pytest.mark.parametrize("name", ["wer", "cer"])
def test_references_without_a_word_have_no_rate_of_errors(name: str) -> None:
    with pytest.raises(MismatchError, match=f"{name}: the references hold no"):
        compute(name, **pairs(["a"], [""]))


# --------------------------------------------------------------------------------------------------- language


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 1000), st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(vocab: int, tokens: list[int]) -> None:
    nats = [count * math.log(vocab) for count in tokens]
    found = compute("perplexity", nats=nats, tokens=tokens)
    assert found["perplexity"] == pytest.approx(vocab)
    assert found["mean_perplexity"] == pytest.approx(vocab)
    bits = compute("bits_per_byte", nats=nats, bytes=tokens)["bits_per_byte"]  # one byte a token
    assert bits == pytest.approx(math.log2(vocab))


def test_perplexity_of_texts_and_of_the_whole_by_hand() -> None:
    found = compute("perplexity", nats=[2 * math.log(4), 0.0], tokens=[2, 6])
    assert found["perplexities"] == [pytest.approx(4.0), 1.0]
    assert found["mean_perplexity"] == pytest.approx(2.5)
    assert found["perplexity"] == pytest.approx(4 ** (2 / 8))
    assert compute("perplexity", nats=[1000.0], tokens=[1])["perplexity"] == math.inf


@pytest.mark.parametrize(("name", "unit"), [("perplexity", "tokens"), ("bits_per_byte", "bytes")])
def test_texts_that_cost_nothing_sensible_are_refused(name: str, unit: str) -> None:
    with pytest.raises(MismatchError, match=f"{name}: row 1 has 0 {unit}"):
        compute(name, nats=[1.0, 1.0], **{unit: [1, 0]})
    for cost in (-1.0, math.nan, math.inf):
        with pytest.raises(NumericalError, match=f"{name}: row 0 cost"):
            compute(name, nats=[cost], **{unit: [1]})


@pytest.mark.parametrize(("accepted", "tokens"), [([1.5], [1]), ([0.0], [0]), ([-0.5], [2]), ([math.nan], [2])])
def test_more_accepted_tokens_than_there_are_or_none_at_all_are_refused(accepted: Any, tokens: Any) -> None:
    with pytest.raises(MismatchError, match="acceptance_rate: row 1 has"):
        compute("acceptance_rate", accepted=[1.0, *accepted], tokens=[2, *tokens])


# --------------------------------------------------------------------------------------------------- rankings


def test_rankings_by_hand() -> None:
    """Relevances 0, 2, 1 in that order: DCG = 2/log₂3 + 1/log₂4, the best is 2/log₂2 + 1/log₂3."""
    rows = pairs([[3.0, 2.0, 1.0]], [[0, 2, 1]])
    gain = (2 / math.log2(3) + 1 / 2) / (2 + 1 / math.log2(3))
    assert compute("ndcg", **rows)["ndcg"] == pytest.approx(gain)
    assert compute("ndcg", **rows, k=1)["ndcg"] == 0.0
    assert compute("mrr", **rows)["mrr"] == 0.5
    assert compute("mrr", **rows, k=1)["mrr"] == 0.0


def test_a_query_without_a_relevant_document_counts_as_0() -> None:
    rows = pairs([[2.0, 1.0], [2.0, 1.0]], [[0, 0], [1, 0]])
    assert compute("ndcg", **rows)["ndcg"] == 0.5
    assert compute("mrr", **rows)["mrr"] == 0.5


def test_ties_give_the_mean_over_their_orders() -> None:
    tied = pairs([[0.0, 0.0]], [[1, 0]])
    assert compute("ndcg", **tied)["ndcg"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert compute("mrr", **tied)["mrr"] == pytest.approx((1 + 1 / 2) / 2)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=2, max_size=5),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_mrr_is_the_mean_over_the_orders_of_the_tied(documents: list[tuple[int, int]], k: int | None) -> None:
    orders = [
        order for order in itertools.permutations(documents) if all(a[0] >= b[0] for a, b in itertools.pairwise(order))
    ]
    ranks = [next((rank for rank, (_, hit) in enumerate(order, 1) if hit), math.inf) for order in orders]
    expected = np.mean([1 / rank if rank <= (k or math.inf) else 0.0 for rank in ranks])
    scores, relevances = (list(map(float, column)) for column in zip(*documents, strict=True))
    assert compute("mrr", **pairs([scores], [relevances]), k=k)["mrr"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["ndcg", "mrr"])
@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (pairs([[1.0, 2.0]], [[1]]), "query 0 has 2 scores and 1 relevances"),
        (pairs([[1.0, 2.0], []], [[1, 0], []]), "query 1 has 0 scores"),
        (pairs([[1.0, math.nan]], [[1, 0]]), "scores of query 0 are not all finite"),
        (pairs([[1.0, 2.0]], [[1, -1]]), "relevance -1"),
    ],
)
def test_rankings_that_do_not_fit_are_refused(name: str, rows: Any, match: str) -> None:
    with pytest.raises(MismatchError, match=f"{name}: .*{match}"):
        compute(name, **rows)
    with pytest.raises(MismatchError, match="k must be at least 1"):
        compute(name, **SAMPLES[name][0], k=0)


# ----------------------------------------------------------------------------------------------- segmentation

HALVES = pairs([[[0, 0], [1, 1]]], [[[0, 1], [1, 1]]])


def test_mean_iou_by_hand() -> None:
    """Class 0: 1 of 2 pixels; class 1: 2 of 3; class 2 occurs nowhere and is in no mean."""
    found = compute("mean_iou", **HALVES, num_labels=3, ignore_index=255)
    assert found["mean_iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["mean_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["overall_accuracy"] == 0.75
    np.testing.assert_allclose(found["per_category_iou"], [1 / 2, 2 / 3, math.nan])
    np.testing.assert_allclose(found["per_category_accuracy"], [1, 2 / 3, math.nan])
    filled = compute("mean_iou", **HALVES, num_labels=3, ignore_index=255, nan_to_num=0)
    np.testing.assert_allclose(filled["per_category_iou"], [1 / 2, 2 / 3, 0])
    assert filled["mean_iou"] == found["mean_iou"]


def test_mean_iou_ignores_maps_and_reduces_labels() -> None:
    """Swapped ids are not swapped back; background goes, and 1 becomes 0."""
    swapped = compute("mean_iou", **HALVES, num_labels=2, ignore_index=255, label_map={0: 1, 1: 0})
    assert swapped["overall_accuracy"] == 0.25
    reduced = compute("mean_iou", **HALVES, num_labels=2, ignore_index=255, reduce_labels=True)
    assert reduced["overall_accuracy"] == pytest.approx(1 / 3)
    assert compute("mean_iou", **HALVES, num_labels=2, ignore_index=1)["overall_accuracy"] == 1.0


def test_maps_that_do_not_fit_or_do_not_count_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"image 0 is predicted as \(1, 1\) and labelled as \(1, 2\)"):
        compute("mean_iou", **pairs([[[0]]], [[[0, 1]]]), num_labels=2, ignore_index=255)
    with pytest.raises(MismatchError, match="no pixel has a class from 0 to 1"):
        compute("mean_iou", **pairs([[[0]]], [[[255]]]), num_labels=2, ignore_index=255)
