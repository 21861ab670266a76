"""Entities in tagged sequences, and answers to questions."""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np

from hf_compress.errors import MismatchError, UnknownNameError

from ._base import ONE_OR_MANY, TEXTS, Offline, needs
from .texts import several

logger = logging.getLogger(__name__)

SCHEMES = ("IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_DIGITS = str.maketrans("", "", string.digits)


class Seqeval(Offline):
    """Precision, recall and F1 of whole entities, in [0, 1]: one counts if its type and both its ends are right.

    Of lists of tags, e.g. B-PER, I-PER, O, one list a sentence: `overall_precision`, `overall_recall`, `overall_f1`
    (micro averages), `overall_accuracy` (of the tags, O included), and for each type a dict of `precision`, `recall`,
    `f1` and `number` of true entities. Leave out tags at positions labelled -100 before. Without any entity the
    overall three are `zero_division`, 0, while the accuracy says that O is right.

    `mode` and `scheme` (one of IOB1, IOB2, IOE1, IOE2, IOBES, BILOU): "strict" also demands tags that are valid in that
    scheme; without both, as conlleval does, an I- that follows no B- begins an entity. `suffix`: the prefix stands at
    the tag's end.

    Ramshaw, Marcus: Text Chunking using Transformation-Based Learning, 1995; computed by the package seqeval.

    Raises:
        MismatchError: if a sentence has not as many predicted as true tags, or no sentence has a tag.
    """

    INPUTS = "predictions: tags of a sentence; references: tags of a sentence"
    CITATION = """@misc{seqeval,
  title = {{seqeval}: A Python framework for sequence labeling evaluation},
  author = {Hiroki Nakayama},
  url = {https://github.com/chakki-works/seqeval},
  year = {2018}
}"""
    FEATURES = datasets.Features(
        {
            "predictions": datasets.List(datasets.Value("string")),
            "references": datasets.List(datasets.Value("string")),
        }
    )

    def score(
        self,
        *,
        predictions: Sequence[Sequence[str]],
        references: Sequence[Sequence[str]],
        suffix: bool = False,
        scheme: str | None = None,
        mode: str | None = None,
        sample_weight: Sequence[float] | None = None,
        zero_division: int | str = 0,
    ) -> dict[str, Any]:
        seqeval = needs("seqeval", "seqeval.metrics", "seqeval")
        if scheme is not None and scheme not in SCHEMES:
            raise UnknownNameError("scheme of tags", scheme, SCHEMES)
        for row, (given, true) in enumerate(zip(predictions, references, strict=True)):
            if len(given) != len(true):
                raise MismatchError(
                    f"seqeval: sentence {row} has {len(given)} predicted and {len(true)} true tags. "
                    "Keep the positions whose label is not -100 of both."
                )
        if not any(map(len, references)):
            raise MismatchError("seqeval: no sentence has a tag. Check which positions were left out.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning)  # its macro average of no entity, unused here
            report = seqeval.classification_report(
                y_true=references,
                y_pred=predictions,
                suffix=suffix,
                output_dict=True,
                scheme=scheme and getattr(needs("seqeval", "seqeval.scheme", "seqeval"), scheme),
                mode=mode,
                sample_weight=sample_weight,
                zero_division=zero_division,
            )
        overall = report["micro avg"]
        types = [name for name in report if name not in ("micro avg", "macro avg", "weighted avg")]
        found: dict[str, Any] = {name: _figures(report[name]) for name in types}
        return found | {
            **{f"overall_{key}": value for key, value in _figures(overall).items() if key != "number"},
            "overall_accuracy": float(seqeval.accuracy_score(y_true=references, y_pred=predictions)),
        }


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last place of each entity in a sentence's tags, as conlleval finds them; needs seqeval.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-ORG"]))
    [('ORG', 3, 3), ('PER', 0, 1)]
    """
    labeling = needs("seqeval", "seqeval.metrics.sequence_labeling", "seqeval")
    return {(str(kind), int(first), int(last)) for kind, first, last in labeling.get_entities(list(tags))}


def _figures(one: Any) -> dict[str, float]:
    return {
        "precision": float(one["precision"]),
        "recall": float(one["recall"]),
        "f1": float(one["f1-score"]),
        "number": int(one["support"]),
    }


class Squad(Offline):
    """Exact match and F1 of the words of short answers, in per cent, [0, 100], as SQuAD 1.1 counts them.

    Each prediction is `{"id", "prediction_text"}`, each reference `{"id", "answers": {"text": [...], "answer_start":
    [...]}}`; the best of several answers counts, the starts do not. Case, punctuation, the articles a, an, the and
    white space are no difference. A question without a prediction counts as 0, with a warning in the log. An empty
    prediction has F1 0, as in the authors' script, also where the answer has no word left either.

    Rajpurkar et al.: SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016, arXiv:1606.05250.

    Raises:
        MismatchError: for a question without an answer.
    """

    INPUTS = "predictions: {id, prediction_text}; references: {id, answers: {text, answer_start}}"
    CITATION = """@inproceedings{squad,
  title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author = {Pranav Rajpurkar and Jian Zhang and Konstantin Lopyrev and Percy Liang},
  booktitle = {EMNLP},
  year = {2016}
}"""
    FEATURES = datasets.Features(
        {
            "predictions": {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")},
            "references": {
                "id": datasets.Value("string"),
                "answers": {
                    "text": datasets.List(datasets.Value("string")),
                    "answer_start": datasets.List(datasets.Value("int32")),
                },
            },
        }
    )

    def score(self, *, predictions: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]) -> dict[str, float]:
        given = {one["id"]: one["prediction_text"] for one in predictions}
        exact, overlap = [], []
        for question in references:
            answers = question["answers"]["text"]
            if not answers:
                raise MismatchError(
                    f"squad: question {question['id']!r} has no answer; SQuAD 1.1 knows none without. Drop it."
                )
            if question["id"] not in given:
                logger.warning("squad: question %r has no prediction and counts as 0.", question["id"])
            said = given.get(question["id"])
            exact.append(said is not None and normalized(said) in map(normalized, answers))
            overlap.append(0.0 if said is None else max(_word_f1(said, answer) for answer in answers))
        return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def normalized(answer: str) -> str:
    """The answer in lower case without punctuation, articles and runs of white space.

    >>> normalized("The  U.S. army,")
    'us army'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def _word_f1(said: str, answer: str) -> float:
    given, true = normalized(said).split(), normalized(answer).split()
    common = (Counter(given) & Counter(true)).total()
    return 2 * common / (len(given) + len(true)) if common else 0.0


class ExactMatch(Offline):
    """Fraction of texts that equal their reference, in [0, 1].

    First what matches one of `regexes_to_ignore` is removed, then as asked for case, punctuation (ASCII) and digits
    are. Two empty texts are equal.

    >>> ExactMatch(keep_in_memory=True).compute(predictions=["cat?", "dog"], references=["cat", "dog"])
    {'exact_match': 0.5}
    """

    INPUTS = "predictions: texts; references: texts"
    FEATURES = TEXTS

    def score(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str],
        regexes_to_ignore: Sequence[str] | None = None,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_numbers: bool = False,
    ) -> dict[str, float]:
        steps: list[Callable[[str], str]] = [
            lambda text, one=one: re.sub(one, "", text)  # type: ignore[misc]  # bound now, not by the last of the loop
            for one in regexes_to_ignore or ()
        ]
        if ignore_case:
            steps.append(str.lower)
        if ignore_punctuation:
            steps.append(lambda text: text.translate(_NO_PUNCTUATION))
        if ignore_numbers:
            steps.append(lambda text: text.translate(_NO_DIGITS))

        def bare(text: str) -> str:
            for step in steps:
                text = step(text)
            return text

        same = [bare(given) == bare(true) for given, true in zip(predictions, references, strict=True)]
        return {"exact_match": float(np.mean(same))}


class Anls(Offline):
    """Average normalised Levenshtein similarity of short answers, in [0, 1], mean over the questions.

    Of each question the best of 1 - edits / length of the longer text over its `references`, where that is above 0.5,
    else 0. Case and white space at the ends are no difference. No metric of that name is online.

    Biten et al.: Scene Text Visual Question Answering, ICCV 2019, arXiv:1905.13648.

    >>> Anls(keep_in_memory=True).compute(predictions=["abcd", "ab"], references=[["abce", "x"], ["cd"]])
    {'anls': 0.375}

    Raises:
        MismatchError: for a question without an answer.
    """

    INPUTS = "predictions: texts; references: texts, or lists of texts"
    CITATION = """@inproceedings{anls,
  title = {Scene Text Visual Question Answering},
  author = {Biten, Ali Furkan and Tito, Ruben and Mafla, Andres and others},
  booktitle = {ICCV},
  year = {2019}
}"""
    FEATURES = ONE_OR_MANY

    def score(
        self, *, predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]
    ) -> dict[str, float]:
        from hf_compress_plugins.encoders.document_curriculum import (
            anls,
        )  # with what trains by it: it is slow to import

        pairs = zip(predictions, several("anls", references), strict=True)
        return {"anls": float(np.mean([anls(said, gold) for said, gold in pairs]))}
