"""Sentences with human sentiment ratings, split once and for all.

Hutto & Gilbert: VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014.

23,703 sentences (tweets, film reviews, news, product reviews), each rated from -4 to 4 by 20 people; the file holds
the mean. Polarity is its sign, for the sentences with a mean beyond 0.5 either way; the others are neutral or in
dispute and are left out, of the unlabelled part too, so that all parts come from one distribution. A sentence
that occurs more than once, up to case and punctuation, counts once: no text of one part is in another.
"""

from __future__ import annotations

import csv
import gzip
import io
import random
import re
from dataclasses import dataclass
from importlib import resources

from datasets import ClassLabel, Dataset, Features, Value

from hf_compress import facts
from hf_compress.errors import ConfigurationError

FILE = "sentiment_human.csv.gz"
LICENCE = "MIT"
LABELS = ("negative", "positive")
NEUTRAL = 0.5
"""Mean ratings from -0.5 to 0.5 have no polarity."""

CITATION = """@inproceedings{hutto2014vader,
  title = {{VADER}: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text},
  author = {Hutto, C.J. and Gilbert, Eric},
  booktitle = {Proceedings of the Eighth International AAAI Conference on Weblogs and Social Media (ICWSM)},
  year = {2014}
}"""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of each part."""

    choice: int = 1500
    """For choosing: settings, checkpoints, precision."""
    test: int = 1500
    """For the reported numbers, and nothing else."""
    labelled: int = 6000
    unlabelled: int = 8000


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows with what the record says of them."""

    rows: Dataset
    """Columns text and label (0 negative, 1 positive); without label in the unlabelled part."""
    data: facts.Data


@dataclass(frozen=True, kw_only=True)
class Sentiment:
    """The four parts; no text is in two of them."""

    choice: Part
    test: Part
    labelled: Part
    unlabelled: Part


@dataclass(frozen=True)
class Sentence:
    """A rated sentence of the file."""

    domain: str
    """tweet, movie, news or product."""
    rating: float
    """Mean of 20 people's, -4 to 4."""
    text: str


def read() -> tuple[Sentence, ...]:
    """All 23,703 sentences of the file, in its order."""
    packed = resources.files("hf_compress_evaluation").joinpath("demo", FILE).read_bytes()
    lines = csv.DictReader(io.StringIO(gzip.decompress(packed).decode("utf-8"), newline=""))
    return tuple(Sentence(line["domain"], float(line["rating"]), line["text"]) for line in lines)


def normalised(text: str) -> str:
    """What two sentences share that count as one: the words in lower case; of signs alone, the signs."""
    return " ".join(re.findall(r"\w+", text.casefold())) or " ".join(text.split())


def load_sentiment(rows: Rows | None = None, *, seed: int = 0) -> Sentiment:
    """The four parts, the same for the same numbers of rows and seed.

    Args:
        rows: of each part; None: `Rows()`. Smaller parts are no prefixes of larger ones.
        seed: of the shuffle before the split.

    Raises:
        ConfigurationError: if the parts need more sentences than there are, or one is negative.
    """
    rows = rows or Rows()
    sizes = {"choice": rows.choice, "test": rows.test, "labelled": rows.labelled, "unlabelled": rows.unlabelled}
    first = {normalised(sentence.text): sentence for sentence in reversed(read())}  # the first of equal texts stays
    polar = [sentence for sentence in reversed(first.values()) if abs(sentence.rating) > NEUTRAL]
    if min(sizes.values()) < 0 or sum(sizes.values()) > len(polar):
        raise ConfigurationError(f"load_sentiment: {sizes} do not fit into {len(polar):,} sentences. Ask for fewer.")
    random.Random(seed).shuffle(polar)
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = _part(name, polar[start : start + size])
        start += size
    return Sentiment(**parts)


def _part(name: str, sentences: list[Sentence]) -> Part:
    texts = [sentence.text for sentence in sentences]
    labels = None if name == "unlabelled" else [int(sentence.rating > 0) for sentence in sentences]
    columns: dict[str, list[str] | list[int]] = {"text": texts}
    features = {"text": Value("string")}
    if labels is not None:
        columns["label"] = labels
        features["label"] = ClassLabel(names=list(LABELS))
    data = facts.Data(
        name="sentiment_human",
        rows=len(texts),
        labelled=0 if labels is None else len(labels),
        fingerprint=facts.fingerprint(texts if labels is None else zip(texts, labels, strict=True)),
        licence=LICENCE,
        split=name,
    )
    return Part(rows=Dataset.from_dict(columns, features=Features(features)), data=data)
