"""The demo's data: disjoint parts of real sentences, the same every time."""

from __future__ import annotations

from importlib import resources

import pytest
from hf_compress_evaluation.demo import data
from hf_compress_evaluation.demo.data import Part, Rows, Sentiment, load_sentiment, normalised, read

from hf_compress import facts
from hf_compress.errors import ConfigurationError


@pytest.fixture(scope="module")
def sentiment() -> Sentiment:
    return load_sentiment()


def parts(sentiment: Sentiment) -> dict[str, Part]:
    return {name: getattr(sentiment, name) for name in ("choice", "test", "labelled", "unlabelled")}


def test_the_file_holds_the_published_sentences() -> None:
    sentences = read()
    assert len(sentences) == 23_703
    assert sum(abs(sentence.rating) > data.NEUTRAL for sentence in sentences) == 19_136
    assert {sentence.domain for sentence in sentences} == {"tweet", "movie", "news", "product"}
    assert all(-4 <= sentence.rating <= 4 for sentence in sentences)


def test_no_text_is_in_two_parts_or_twice_in_one(sentiment: Sentiment) -> None:
    texts = [normalised(text) for part in parts(sentiment).values() for text in part.rows["text"]]
    assert len(texts) == 1500 + 1500 + 6000 + 8000
    assert len(set(texts)) == len(texts)


def test_normalised_ignores_case_and_signs_but_keeps_texts_of_signs_apart() -> None:
    assert normalised("LMAO,  amazing!") == normalised("lmao amazing")
    assert normalised(":)") != normalised(":(")


def test_labels_are_the_signs_of_clear_ratings(sentiment: Sentiment) -> None:
    ratings: dict[str, set[int]] = {}
    for sentence in read():
        if abs(sentence.rating) > data.NEUTRAL:
            ratings.setdefault(sentence.text, set()).add(int(sentence.rating > 0))
    for part in (sentiment.choice, sentiment.test, sentiment.labelled):
        assert all(row["label"] in ratings[row["text"]] for row in part.rows)
        assert part.rows.features["label"].names == ["negative", "positive"]
        assert 0.45 < sum(part.rows["label"]) / len(part.rows) < 0.6


def test_the_unlabelled_part_carries_no_label(sentiment: Sentiment) -> None:
    assert sentiment.unlabelled.rows.column_names == ["text"]
    assert sentiment.unlabelled.data.labelled == 0


def test_the_split_is_the_same_for_a_seed_and_another_for_another(sentiment: Sentiment) -> None:
    again, other = load_sentiment(), load_sentiment(seed=1)
    for name, part in parts(sentiment).items():
        assert part.data == parts(again)[name].data
        assert part.data.fingerprint != parts(other)[name].data.fingerprint
    assert sentiment.test.data.fingerprint == "de1b7f4363e8b26d"  # another split makes measured numbers incomparable


def test_the_facts_describe_each_part(sentiment: Sentiment) -> None:
    for name, part in parts(sentiment).items():
        assert (part.data.split, part.data.rows, part.data.licence) == (name, len(part.rows), "MIT")
    test = sentiment.test
    rows = zip(test.rows["text"], test.rows["label"], strict=True)
    assert test.data.fingerprint == facts.fingerprint(rows)


def test_rows_scale_the_parts_down() -> None:
    tiny = load_sentiment(Rows(choice=5, test=6, labelled=7, unlabelled=8))
    assert [len(part.rows) for part in parts(tiny).values()] == [5, 6, 7, 8]


@pytest.mark.parametrize("rows", [Rows(unlabelled=20_000), Rows(test=-1)])
def test_parts_that_do_not_fit_are_refused(rows: Rows) -> None:
    with pytest.raises(ConfigurationError, match="do not fit into 1"):
        load_sentiment(rows)


def test_the_licence_and_the_citation_lie_beside_the_data() -> None:
    text = resources.files("hf_compress_evaluation").joinpath("demo", "LICENSE-sentiment_human.txt").read_text()
    assert "Copyright (c) 2014 C.J. Hutto" in text
    assert "Permission is hereby granted" in text
    assert "ICWSM" in text
    assert "Hutto" in data.CITATION
