"""Scores of tags, of one number a row and of embeddings: closed forms, real folders, what a record and a card say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hf_compress_cards import card
from hf_compress_evaluation import intervals, metrics, quality, remeasuring, scoring, table, task
from hf_compress_evaluation.candidates import Candidate
from hf_compress_evaluation.examples import Examples
from hf_compress_evaluation.folder import Timing, evaluate_folder
from hf_compress_evaluation.scoring.classes import Classes
from hf_compress_evaluation.scoring.numbers import Numbered, Numbers
from hf_compress_evaluation.scoring.sentences import Embedded, Pairs, Sentences
from hf_compress_evaluation.scoring.tags import Counts, Tagged, Tags
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, pearsonr, spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from hf_compress import export_onnx, facts
from hf_compress.errors import ConfigurationError, ForeignFileError, MismatchError, UnknownNameError

NAMES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")
WORDS = ("ann", "bob", "acme", "went", "to", "the", "un", "##known")
LIMIT = 16
QUICK = Timing(batches=(1,), length=8, runs=2, warmup=0)
FLOATS = st.floats(-5, 5).map(lambda value: round(value, 3))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=LIMIT)


def bert(kind: type[Any], seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LIMIT,
        initializer_range=0.5,
        **settings,
    )
    return kind(config).eval()


def tagger(seed: int = 0) -> BertForTokenClassification:
    names = dict(enumerate(NAMES))
    return bert(BertForTokenClassification, seed, id2label=names, label2id={name: i for i, name in names.items()})


def saved(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(place: Path, kind: str, rows: list[dict[str, Any]], **keys: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {"task": kind, "data": "rows.jsonl"} | keys
    (place / "task.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
    return place / "task.yaml"


def one_hot(names: list[str]) -> np.ndarray:
    return np.eye(len(NAMES), dtype=np.float32)[[NAMES.index(name) for name in names]]


# ---------------------------------------------------------------------------------------------- figures


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=3, max_size=12))
@settings(max_examples=60, deadline=None)
def test_correlations_are_those_of_scipy_also_where_ranks_are_shared(pairs: list[tuple[float, float]]) -> None:
    one, other = np.array(pairs).T
    for figure, reference in ((intervals.pearson, pearsonr), (intervals.spearman, spearmanr)):
        found = figure(one, other)
        value = float(found.of(*found.columns, axis=-1))
        if (one == one[0]).all() or (other == other[0]).all():
            assert np.isnan(value)
        else:
            assert value == pytest.approx(float(reference(one, other).statistic), abs=1e-9)


def test_a_share_is_a_quotient_of_sums_and_its_interval_comes_from_whole_rows() -> None:
    parts, wholes = np.array([1.0, 0.0, 4.0, 2.0]), np.array([1.0, 3.0, 4.0, 4.0])
    found = intervals.estimate(intervals.share(parts, wholes))
    assert found.value == pytest.approx(7 / 12)
    assert found.interval is not None
    assert 0 < found.interval[0] < 7 / 12 < found.interval[1] <= 1
    assert intervals.estimate(intervals.share([0.0, 0.0], [0.0, 0.0])).value is None


def test_figures_that_are_compared_are_resampled_together() -> None:
    """The student misses every fourth row's part: its share is 3/4 of the teacher's whatever rows are drawn."""
    draw = np.random.default_rng(0)
    wholes = draw.integers(1, 9, 200).astype(float)
    teacher, student = intervals.share(0.8 * wholes, wholes), intervals.share(0.6 * wholes, wholes)
    kept = intervals.retention(student, teacher)
    assert kept.value == pytest.approx(0.75)
    assert kept.interval is None  # up to rounding, every resample gives the same
    assert kept.note == "every resample gives the same"

    closed = intervals.gap_closed(student, teacher, intervals.share(0.5 * wholes, wholes))
    assert closed.value == pytest.approx(1 / 3)


def test_a_constant_has_no_correlation_also_where_its_mean_is_rounded() -> None:
    for one, other in (([0.1] * 3, [1.0, 2.0, 4.0]), ([1.0, 2.0, 4.0], [0.1] * 3)):
        assert intervals.estimate(intervals.pearson(one, other)).value is None


# ---------------------------------------------------------------------------------------------- tags


def test_entities_are_counted_by_hand() -> None:
    """True: PER over two words, ORG. Said: the PER cut short, the ORG right, a PER that is none. F1 = 2·1/(3+2)."""
    said = [one_hot(["B-PER", "O", "B-ORG", "I-PER"])]
    true = [np.array([NAMES.index(name) for name in ("B-PER", "I-PER", "B-ORG", "O")])]
    figures = Counts.of(said, true, NAMES).figures()
    found = {name: float(figure.of(*figure.columns, axis=-1)) for name, figure in figures.items()}
    assert found == pytest.approx(
        {"seqeval_f1": 0.4, "seqeval_precision": 1 / 3, "seqeval_recall": 0.5, "accuracy": 0.5}
    )


@given(st.lists(st.lists(st.tuples(*[st.sampled_from(NAMES)] * 2), min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_scores_of_tags_are_those_of_the_metric(sentences: list[list[tuple[str, str]]]) -> None:
    said, true = [[a for a, _ in row] for row in sentences], [[b for _, b in row] for row in sentences]
    expected = metrics.load("seqeval").compute(predictions=said, references=true)
    assert expected is not None
    labels = [np.array([NAMES.index(name) for name in row]) for row in true]
    figures = Counts.of([one_hot(row) for row in said], labels, NAMES).figures()
    found = {name: float(figure.of(*figure.columns, axis=-1)) for name, figure in figures.items()}
    assert found["accuracy"] == pytest.approx(expected["overall_accuracy"])
    for name, other in (("seqeval_f1", "f1"), ("seqeval_precision", "precision"), ("seqeval_recall", "recall")):
        value = 0.0 if np.isnan(found[name]) else found[name]
        assert value == pytest.approx(expected[f"overall_{other}"])


def test_the_tag_of_a_word_is_that_of_its_first_token_and_cut_words_count_as_untagged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tagger()
    sentences = [
        ["ann", "unknown", "acme"],
        ["to"] * 20,
    ]  # unknown has two tokens; 14 words fit beside the special ones
    path = written(
        tmp_path,
        "token-classification",
        [{"tokens": words, "tags": ["O"] * (len(words) - 1) + ["B-PER"]} for words in sentences],
    )
    given_task = task.read_task(path)
    one = Candidate(
        subject="student", variant="torch", model=model, tokenizer=tokenizer, provider="torch-cpu", folder=None
    )
    rows = Tags().load(given_task, model.config)
    logits = Tags().predict(one, rows, given_task)
    assert [each.shape for each in logits] == [(3, 5), (14, 5)]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(["[CLS]", "ann", "un", "##known", "acme", "[SEP]"])])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, [1, 2, 4]].numpy()
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)

    counts = Counts.of(logits, rows.labels or (), NAMES)
    assert counts.words.tolist() == [3, 20]
    assert counts.true.tolist() == [1, 1]  # the cut one is missed, not left out
    assert counts.right[1] == (logits[1].argmax(-1) == 0).sum() + 5  # five of the six cut words are O


def test_a_word_without_a_token_is_untagged_and_those_after_it_are_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A tokenizer makes none of a blank; the words behind it were seen all the same."""
    words, plain = ["ann", " ", "acme", "went"], ["ann", "acme", "went"]
    rows = [{"tokens": each, "tags": ["O"] * len(each)} for each in (words, plain)]
    asked = task.read_task(written(tmp_path, "token-classification", rows))
    one, other = (
        Candidate(
            subject=who, variant="torch", model=tagger(seed), tokenizer=tokenizer, provider="torch-cpu", folder=None
        )
        for who, seed in (("student", 0), ("teacher", 1))
    )
    loaded = Tags().load(asked, one.model.config)
    own, theirs = (Tags().predict(each, loaded, asked) for each in (one, other))
    np.testing.assert_allclose(own[0][[0, 2, 3]], own[1], atol=1e-5)
    assert np.isnan(own[0][1]).all()
    counts = Counts.of(own, loaded.labels or (), NAMES)
    assert counts.right[0] == counts.right[1] + 1  # the blank is O
    found = {m.metric: m.value for m in Tags().measure(one, own, loaded, asked, teacher=theirs)}
    same = float((own[1].argmax(-1) == theirs[1].argmax(-1)).mean())
    assert found["label_loyalty"] == pytest.approx(same)  # of six words, not of seven
    assert 0 < found["probability_loyalty"] < 1


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        ([{"tokens": ["ann", "went"], "tags": ["B-PER"]}], MismatchError, "row 0 has 2 words and 1 tags"),
        ([{"tokens": ["ann"], "tags": ["B-DOG"]}], UnknownNameError, "B-DOG"),
        ([{"tokens": "ann went", "tags": "O O"}], MismatchError, "no list"),
        (
            [{"tokens": [], "tags": []}, {"tokens": ["to"], "tags": ["O"]}],
            ConfigurationError,
            "row 0 is no list of words",
        ),
        ([{"words": ["ann"], "tags": ["O"]}], UnknownNameError, "tokens"),
    ],
)
def test_rows_of_tags_with_a_fault_name_it(
    tmp_path: Path, rows: list[dict[str, Any]], kind: type[Exception], said: str
) -> None:
    path = written(tmp_path, "token-classification", rows)
    with pytest.raises(kind, match=said):
        Tags().load(task.read_task(path), tagger().config)


# ---------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_means_of_the_real_tokens_or_the_first_one(tokenizer: PreTrainedTokenizerFast) -> None:
    model = bert(BertModel)
    one = Candidate(
        subject="student", variant="torch", model=model, tokenizer=tokenizer, provider="torch-cpu", folder=None
    )
    data = facts.Data(name="pairs", rows=1, labelled=0, fingerprint="0" * 16)
    rows = Pairs(texts=("ann went to acme",), others=("bob",), labels=None, data=data)
    for pooling in ("mean", "cls"):
        found = Sentences().predict(
            one, rows, task.Task(task="sentence-similarity", data="x", pooling=pooling, label=None)
        )
        for text, value in (("ann went to acme", found.texts[0]), ("bob", found.others[0])):
            with torch.no_grad():
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = states.mean(0) if pooling == "mean" else states[0]
            np.testing.assert_allclose(value, (expected / expected.norm()).numpy(), atol=1e-5)


def test_a_rotated_space_keeps_the_order_and_loses_the_cosine() -> None:
    draw = np.random.default_rng(0)
    parts = [draw.normal(size=(40, 4)) for _ in range(2)]
    units = [part / np.linalg.norm(part, axis=-1, keepdims=True) for part in parts]
    turn = np.linalg.qr(draw.normal(size=(4, 4)))[0]
    teacher, student = (
        Embedded(texts=units[0], others=units[1]),
        Embedded(texts=units[0] @ turn, others=units[1] @ turn),
    )
    data = facts.Data(name="pairs", rows=40, labelled=40, fingerprint="0" * 16)
    pairs = Pairs(texts=("a",) * 40, others=("b",) * 40, labels=teacher.cosines**3, data=data)
    one = Candidate(subject="student", variant="torch", model=None, tokenizer=None, provider="", folder=None)  # type: ignore[arg-type]
    given_task = task.Task(task="sentence-similarity", data="x")
    found = {m.metric: m.value for m in Sentences().measure(one, student, pairs, given_task, teacher=teacher)}
    assert found["rank_loyalty"] == pytest.approx(1.0)
    assert found["spearmanr"] == pytest.approx(1.0)
    assert found["retention"] == pytest.approx(1.0)
    assert found["teacher_cosine"] < 0.9


# ---------------------------------------------------------------------------------------------- folders


def tagged_rows(count: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(1)
    rows = []
    for _ in range(count):
        words = [str(word) for word in draw.choice(WORDS[:6], int(draw.integers(2, 8)))]
        rows.append({"tokens": words, "tags": ["B-PER" if word in ("ann", "bob") else "O" for word in words]})
    return rows


def numbered_rows(count: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(2)
    return [{"text": " ".join(draw.choice(WORDS[:6], 4)), "label": float(draw.normal())} for _ in range(count)]


def paired_rows(count: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    return [
        {
            "sentence1": " ".join(draw.choice(WORDS[:6], 4)),
            "sentence2": " ".join(draw.choice(WORDS[:6], 3)),
            "score": float(draw.normal()),
        }
        for _ in range(count)
    ]


def told(kind: str, **settings: Any) -> tuple[Candidate, task.Task]:
    """Whose predictions are given by hand, and their task."""
    model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(NAMES))))
    one = Candidate(subject="student", variant="torch", model=model, tokenizer=None, provider="torch-cpu", folder=None)  # type: ignore[arg-type]  # no model is run
    return one, task.Task(task=kind, data="rows.jsonl", **settings)


def check_derived(found: dict[str, facts.Measurement], metric: str, own: float, teacher: float, alone: float) -> None:
    assert {found[name].how["metric"] for name in ("retention", "gap_closed", "gain")} == {metric}
    assert found["retention"].value == pytest.approx(own / teacher)
    assert found["gap_closed"].value == pytest.approx((own - alone) / (teacher - alone))
    assert found["gain"].value == pytest.approx(own - alone)


DATA = facts.Data(name="rows", rows=12, fingerprint="0" * 16)


def test_a_student_of_classes_is_held_against_teacher_and_baseline_each_in_its_place() -> None:
    """Of 12 rows own misses three and alone six, of which own has none right: McNemar's 3 losses against 6 wins."""
    labels = np.arange(12) % 2
    right = np.eye(2, dtype=np.float32)[labels]
    own, alone = right.copy(), right.copy()
    own[:3], alone[3:9] = own[:3, ::-1].copy(), alone[3:9, ::-1].copy()
    one, asked = told("text-classification")
    rows = Examples(texts=("a",) * 12, labels=labels, data=DATA)
    given = Classes().measure(one, own, rows, asked, teacher=right, alone=alone)
    found = {m.metric: m for m in given}
    check_derived(found, "accuracy", 9 / 12, 1, 6 / 12)
    assert found["gain"].how == {"metric": "accuracy", "mcnemar_p": pytest.approx(binomtest(6, 9).pvalue)}
    assert found["label_loyalty"].value == pytest.approx(9 / 12)


def test_a_student_of_numbers_is_held_against_teacher_and_baseline_each_in_its_place() -> None:
    draw, labels = np.random.default_rng(0), np.arange(12.0)
    own, teacher, alone = (labels + draw.normal(0, scale, 12) for scale in (2, 0.5, 9))
    one, asked = told("text-classification", metrics=("pearsonr", "mean_squared_error"))
    rows = Numbered(texts=("a",) * 12, labels=labels, data=DATA)
    given = Numbers().measure(one, own, rows, asked, teacher=teacher, alone=alone)
    found = {m.metric: m for m in given}
    check_derived(found, "pearsonr", *(pearsonr(each, labels).statistic for each in (own, teacher, alone)))
    assert found["mean_squared_error"].value == pytest.approx(((own - labels) ** 2).mean())
    assert found["rank_loyalty"].value == pytest.approx(spearmanr(own, teacher).statistic)


def test_a_student_of_embeddings_is_held_against_teacher_and_baseline_each_in_its_place() -> None:
    draw, labels = np.random.default_rng(1), np.arange(12.0)

    def turned(angles: np.ndarray) -> np.ndarray:
        return np.stack((np.cos(angles), np.sin(angles)), -1)

    def made(scale: float, first: float) -> Embedded:
        angles = (12 - labels + draw.normal(0, scale, 12)) / 9
        return Embedded(texts=turned(np.full(12, first)), others=turned(angles + first))

    own, teacher, alone = made(2, 0.1), made(0.5, 0.4), made(9, 0.0)
    one, asked = told("sentence-similarity")
    rows = Pairs(texts=("a",) * 12, others=("b",) * 12, labels=labels, data=DATA)
    found = {m.metric: m for m in Sentences().measure(one, own, rows, asked, teacher=teacher, alone=alone)}
    check_derived(found, "spearmanr", *(spearmanr(each.cosines, labels).statistic for each in (own, teacher, alone)))
    near = [(a * b).sum(-1).mean() for a, b in ((own.texts, teacher.texts), (own.others, teacher.others))]
    assert found["teacher_cosine"].value == pytest.approx(np.mean(near))


def test_a_student_of_tags_is_held_against_teacher_and_baseline_each_in_its_place() -> None:
    truth = ["B-PER", "O", "B-ORG", "O"]
    said = {"own": ["B-PER", "O", "O", "B-PER"], "teacher": truth, "alone": ["O", "B-PER", "O", "B-PER"]}
    one, asked = told("token-classification", metrics=("accuracy",))
    labels = tuple(one_hot(truth).argmax(-1) for _ in range(3))
    rows = Tagged(words=(("a",) * 4,) * 3, labels=labels, data=DATA)
    own, teacher, alone = ([one_hot(said[who])] * 3 for who in ("own", "teacher", "alone"))
    found = {m.metric: m for m in Tags().measure(one, own, rows, asked, teacher=teacher, alone=alone)}
    check_derived(found, "accuracy", 1 / 2, 1, 0)
    assert found["label_loyalty"].value == pytest.approx(1 / 2)


def test_tags_of_a_class_label_are_read_by_name(tmp_path: Path) -> None:
    """The ids of a data set may count in another order than the model's."""
    names = [*NAMES[::-1]]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = datasets.Dataset.from_dict({"tokens": [["ann", "went"]], "tags": [["B-PER", "O"]]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    asked = task.Task(task="token-classification", data=str(tmp_path / "rows.parquet"))
    loaded = Tags().load(
        asked, BertConfig(id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    )
    assert [each.tolist() for each in loaded.labels or ()] == [[1, 0]]


KINDS = {
    "token-classification": (tagger, tagged_rows, "seqeval_f1", "label_loyalty"),
    "text-classification": (
        lambda seed=0: bert(BertForSequenceClassification, seed, num_labels=1),
        numbered_rows,
        "pearsonr",
        "regression_loyalty",
    ),
    "sentence-similarity": (lambda seed=0: bert(BertModel, seed), paired_rows, "spearmanr", "teacher_cosine"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_each_task_is_measured_verified_and_described(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    make, rows, main, loyalty = KINDS[kind]
    teacher = saved(make(seed=1), tokenizer, tmp_path / "teacher")
    student = saved(make(seed=0), tokenizer, tmp_path / "student")
    export_onnx(student)
    path = written(tmp_path, kind, rows(40), hub_id="me/rows", config="small")
    found = evaluate_folder(student, task=path, teacher=teacher, alone=teacher, timing=QUICK)
    by_name = {(m.subject, m.variant, m.metric): m for m in found}
    assert by_name["student", "onnx", main].value == pytest.approx(by_name["student", "torch", main].value, abs=1e-4)
    assert by_name["alone", "torch", main].value == by_name["teacher", "torch", main].value
    assert by_name["alone", "torch", loyalty].value == pytest.approx(1.0)  # it is the teacher
    assert by_name["student", "torch", loyalty].value < 0.999
    assert ("teacher", "torch", loyalty) not in by_name
    assert ("alone", "torch", "retention") not in by_name

    again = remeasuring.remeasure(student, task=path, teacher=teacher)
    scores = [one for one in again if any(f" {name}" in one.what for name in (main, loyalty))]
    scores = [one for one in scores if not one.what.startswith("alone")]  # its folder is not given
    assert len(scores) == 5  # main of teacher and of the student's two, loyalty of these two
    assert {one.state for one in scores} == {"holds"}
    saved(make(seed=7), tokenizer, student)  # another student's weights
    replaced = remeasuring.remeasure(student, task=path, teacher=teacher)
    now = next(one for one in replaced if one.what == f"student torch {loyalty}")
    assert now.state == "fails" or now.note.startswith("differs, within")  # few rows have a wide interval
    assert now.found != now.recorded

    data = ModelCard(card.write(student).read_text()).data
    assert table.SCORES[main] in {column.header for column in table.table(facts.load(student)).columns}
    assert (data.eval_results or [])[0].dataset_type == "me/rows"
    assert [one.name for one in (student / ".eval_results").iterdir()] == ["me-rows-small.yaml"]
    assert (data.eval_results or [])[0].metric_value == by_name["student", "torch", main].value


def test_retention_is_verified_as_that_of_the_score_it_was_recorded_of(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = saved(tagger(1), tokenizer, tmp_path / "teacher")
    student = saved(tagger(0), tokenizer, tmp_path / "student")
    path = written(tmp_path, "token-classification", tagged_rows(40), metrics=["accuracy"])
    found = evaluate_folder(student, task=path, teacher=teacher, timing=Timing(batches=()))
    kept = next(m for m in found if m.metric == "retention")
    assert kept.how["metric"] == "accuracy"
    again = next(
        one for one in remeasuring.remeasure(student, task=path, teacher=teacher) if one.what.endswith("retention")
    )
    assert (again.state, again.note) == ("holds", "")
    assert again.found == pytest.approx(kept.value)


def test_a_task_file_asks_only_for_what_its_scorers_know() -> None:
    """What a task file may name is what its scorers know, and what is measured unasked is among it."""
    for kind, names in task.METRICS.items():
        scorers = [scoring.scorer(kind, BertConfig(num_labels=number)) for number in (2, 1)]
        assert {name for one in scorers for name in one.metrics} == set(names)
        assert all(set(one.default) <= set(one.metrics) for one in scorers)


def test_metrics_of_other_tasks_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="accuracy"):
        task.read_task(written(tmp_path, "sentence-similarity", paired_rows(2), metrics=["accuracy"]))
    with pytest.raises(ForeignFileError, match="slices"):
        task.read_task(written(tmp_path, "token-classification", tagged_rows(2), slices=True))
    with pytest.raises(ForeignFileError, match="would not be given them"):  # the first texts alone give other scores
        task.read_task(
            written(tmp_path, "text-classification", paired_rows(2), text="sentence1", text_pair="sentence2")
        )
    asked = task.read_task(written(tmp_path, "text-classification", numbered_rows(2), metrics=["accuracy"]))
    with pytest.raises(UnknownNameError, match="pearsonr"):
        scoring.scorer(asked.task, BertConfig(num_labels=1)).asked(asked)


def test_outputs_of_tokens_lose_their_padding_on_either_side(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tagger()
    texts = ["ann", "ann went to the acme"]
    found = {}
    for side in ("right", "left"):
        tokenizer.padding_side = side
        given_rows = quality.encoded(model, tokenizer, texts, None)
        found[side] = quality.outputs(model, tokenizer, given_rows, lambda output, _: output.logits)
    tokenizer.padding_side = "right"
    assert [each.shape for each in found["right"]] == [(3, 5), (7, 5)]
    assert [each.shape for each in found["left"]] == [(3, 5), (7, 5)]
    np.testing.assert_allclose(found["left"][1], found["right"][1], atol=1e-5)  # the longest has no padding
