"""Rows of the gallery's students: tagged sentences of contracts, and texts and word pairs for embeddings.

Finkelstein et al.: Placing Search in Context: The Concept Revisited, 2002 (WordSim-353). Hill, Reichart, Korhonen:
SimLex-999: Evaluating Semantic Models with (Genuine) Similarity Estimation, 2015. Both lie in the package gensim.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_compress.errors import ConfigurationError
from hf_compress_evaluation.demo.data import load_sentiment

Rows = list[dict[str, Any]]
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
CHOICE, TEST = 164, 300
"""Sentences of contracts for choosing and for the reported numbers; the others are trained on."""
PAIRS = {"WordSim-353": "wordsim353.tsv", "SimLex-999": "simlex999.txt"}


def contracts() -> dict[str, Rows]:
    """Sentences with columns tokens and tags: train, choice and test, the same in every run.

    Equal sentences count once, so that none is in two parts.
    """
    packed = resources.files("hf_compress_evaluation").joinpath("gallery", "ner_finance.jsonl.gz").read_bytes()
    read = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    rows = list({" ".join(row["tokens"]).casefold(): row for row in read}.values())
    random.Random(0).shuffle(rows)
    return {"choice": rows[:CHOICE], "test": rows[CHOICE : CHOICE + TEST], "train": rows[CHOICE + TEST :]}


def texts() -> dict[str, Rows]:
    """Unlabelled sentences and their words, in a column text: train and choice."""
    parts = load_sentiment()
    sentences = [*parts.labelled.rows["text"], *parts.unlabelled.rows["text"]]
    words = sorted({word for text in sentences for word in re.findall(r"[a-z]{2,}", text.casefold())})
    return {
        "train": [{"text": text} for text in (*sentences, *words)],
        "choice": [{"text": text} for text in parts.choice.rows["text"]],
    }


def pairs() -> dict[str, Rows]:
    """Word pairs with people's scores, by collection: columns sentence1, sentence2, score.

    Raises:
        ConfigurationError: if the package that carries them is not installed.
    """
    spec = find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError("the word pairs are missing: pip install --no-deps gensim.")
    place = Path(spec.submodule_search_locations[0]) / "test" / "test_data"
    found = {}
    for name, file in PAIRS.items():
        lines = [
            line.split("\t") for line in (place / file).read_text(encoding="utf-8").splitlines() if line[:1] != "#"
        ]
        found[name] = [{"sentence1": a, "sentence2": b, "score": float(score)} for a, b, score in lines]
    return found
