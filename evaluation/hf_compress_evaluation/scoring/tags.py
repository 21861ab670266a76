"""Sentences with one tag a word: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_compress import facts
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress_evaluation import agreement, intervals, metrics, quality
from hf_compress_evaluation.candidates import Candidate
from hf_compress_evaluation.examples import column, label_ids
from hf_compress_evaluation.task import Task, describe, read_data

from ._base import Figure, FigureScorer, check_labels

Logits = list[NDArray[np.float32]]
"""(word, class) of each sentence; words that are cut off have no row, those before without a token NaN."""
Floats = NDArray[np.float64]
OUTSIDE = "O"


@dataclass(frozen=True, kw_only=True)
class Tagged:
    """Sentences as words, and the class ids of their tags."""

    words: tuple[tuple[str, ...], ...]
    labels: tuple[NDArray[np.int64], ...] | None
    data: facts.Data


class Tags(FigureScorer):
    """F1 of whole entities, accuracy of words, and equal tags. Sentences are what is resampled.

    A word's tag is that of its first token. A word that is cut off with the end of a long sentence counts as untagged
    ("O"), so what a short model misses is not left out of its score; so does one that the tokenizer makes no token of
    (a zero-width space). Agreement is over the words that both saw.
    """

    metrics = compared = ("seqeval_f1", "accuracy", "seqeval_precision", "seqeval_recall")
    default = ("seqeval_f1", "accuracy")
    loyalty = ("label_loyalty", "probability_loyalty")

    def check(self, candidates: Sequence[Candidate]) -> None:
        if len(candidates[-1].model.config.id2label) < 2:
            raise MismatchError("the student knows one tag. Give it the tags of the data: id2label and label2id.")
        check_labels(candidates)

    def load(self, task: Task, config: Any) -> Tagged:
        rows, name = read_data(task)
        text, _, label = task.columns
        words = [tuple(row) for row in _lists(column(rows, text, name=name), text, name)]
        for row, each in enumerate(words):
            if not each or not all(isinstance(word, str) for word in each):
                raise ConfigurationError(f"{name}: {text!r} of row {row} is no list of words. Mend or drop the row.")
        labels = None
        if label is not None:
            feature = getattr(rows.features[label], "feature", None) if label in rows.column_names else None
            named = getattr(feature, "names", None)  # ids of a ClassLabel, whose order may differ from the model's
            labels = []
            for row, tags in enumerate(_lists(column(rows, label, name=name), label, name)):
                if len(tags) != len(words[row]):
                    raise MismatchError(
                        f"{name}: row {row} has {len(words[row])} words and {len(tags)} tags. Mend or drop the row."
                    )
                said = [named[tag] if named and isinstance(tag, int) else tag for tag in tags]
                labels.append(label_ids(said, config.label2id, name=f"{name}, sentence {row}"))
        pairs = words if labels is None else [(w, ids.tolist()) for w, ids in zip(words, labels, strict=True)]
        data = describe(task, name, len(words), labelled=labels is not None, content=pairs)
        return Tagged(words=tuple(words), labels=None if labels is None else tuple(labels), data=data)

    def predict(self, one: Candidate, rows: Tagged, task: Task, *, progress: bool = False) -> Logits:
        if not one.tokenizer.is_fast:
            raise MismatchError(
                f"{one.name}: which token belongs to which word needs a fast tokenizer (tokenizer.json)."
            )
        sentences = [list(words) for words in rows.words]
        encoded = quality.encoded(one.model, one.tokenizer, sentences, task.max_length, is_split_into_words=True)
        given = quality.outputs(
            one.model,
            one.tokenizer,
            encoded,
            lambda output, _: output.logits,
            batch_size=task.batch_size,
            progress=progress,
        )
        found = []
        for row, logits in enumerate(given):
            if logits.ndim != 2:
                raise MismatchError(f"{one.name}: one tag a row and not a word. Evaluate a token classifier.")
            first: dict[int, int] = {}
            for place, word in enumerate(encoded.word_ids(row)):
                if word is not None:
                    first.setdefault(word, place)
            own = np.full((max(first, default=-1) + 1, logits.shape[-1]), np.nan, np.float32)
            own[list(first)] = logits[list(first.values())]
            found.append(own)
        return found

    def figures(self, one: Candidate, said: Logits, rows: Tagged) -> dict[str, Figure]:
        assert rows.labels is not None  # asked before
        names = [one.model.config.id2label[index] for index in range(len(one.model.config.id2label))]
        return {name: Figure(of=figure) for name, figure in Counts.of(said, rows.labels, names).figures().items()}

    def likeness(self, own: Logits, teacher: Logits) -> dict[str, Figure]:
        both = [_seen_by_both(a, b) for a, b in zip(own, teacher, strict=True)]
        words = [len(a) for a, _ in both]

        def share(compare: Callable[..., Floats]) -> Figure:
            sums = [float(compare(a, b).sum()) if len(a) else 0.0 for a, b in both]
            return Figure(of=intervals.share(sums, words), how={"of": "words"})

        return {
            "label_loyalty": share(agreement.label_loyalty_rows),
            "probability_loyalty": share(agreement.probability_loyalty_rows),
        }

    def gate(self, rows: Tagged) -> tuple[Sequence[str], None]:
        return tuple(" ".join(words) for words in rows.words), None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """(sentence,) counts from which every score of tags follows, so that sentences can be resampled."""

    hits: Floats
    """Entities that are predicted with their type and both ends."""
    predicted: Floats
    true: Floats
    right: Floats
    """Words with their tag."""
    words: Floats

    @classmethod
    def of(cls, logits: Logits, labels: Sequence[NDArray[np.int64]], names: Sequence[str]) -> Counts:
        """Counted as conlleval does: an I- that follows no B- of its type begins an entity."""
        rows = []
        for given, true in zip(logits, labels, strict=True):
            said = [OUTSIDE if np.isnan(word).any() else names[word.argmax()] for word in given]
            said += [OUTSIDE] * (len(true) - len(said))
            gold = [names[index] for index in true]
            a, b = metrics.entities(said), metrics.entities(gold)
            rows.append((len(a & b), len(a), len(b), sum(x == y for x, y in zip(said, gold, strict=True)), len(true)))
        hits, predicted, true_, right, words = np.array(rows, np.float64).T
        return cls(hits=hits, predicted=predicted, true=true_, right=right, words=words)

    def figures(self) -> dict[str, intervals.Statistic]:
        """Each score as a figure that can be resampled."""
        return {
            "seqeval_f1": intervals.share(2 * self.hits, self.predicted + self.true),
            "seqeval_precision": intervals.share(self.hits, self.predicted),
            "seqeval_recall": intervals.share(self.hits, self.true),
            "accuracy": intervals.share(self.right, self.words),
        }


def _seen_by_both(
    one: NDArray[np.float32], other: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(word, class) of each, of the words that neither lacks."""
    words = min(len(one), len(other))
    seen = ~(np.isnan(one[:words]) | np.isnan(other[:words])).any(-1)
    return one[:words][seen], other[:words][seen]


def _lists(values: Sequence[Any], what: str, name: str) -> list[list[Any]]:
    for row, value in enumerate(values):
        if not isinstance(value, list):
            raise MismatchError(
                f"{name}: {what!r} of row {row} is {str(value)[:40]!r}, no list. A file of words and tags is jsonl or "
                "parquet with one list a row."
            )
    return list(values)
