"""A small retrieval set for claims about ranking: the first sentence of a docstring asks for the rest of it.

Docstrings are those of two installed packages, so that the figures belong to their versions. The teacher is the MiniLM
of sentences, as cosines of its vectors; students are its first two layers.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from hf_compress_plugins.encoders._ranking import GroupCollator, Texts, mean_of_tokens, scores_of
from hf_compress_plugins.encoders.margin_mse import margin_mse_groups
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_compress import DistillCallback, shrink
from hf_compress_evaluation import metrics

from . import _training
from .llmlingua2 import embed, encoder

PACKAGES = ("scipy", "sklearn")
TRAIN, TEST = 1000, 150
"""Queries."""
PASSAGES, CANDIDATES, NEAR = 4, 15, 30
"""Passages of a query in training and in the test, the right one among them; how many of the nearest others the
training's are drawn from."""
STEPS, BATCH, RATE = 120, 8, 2e-4
SCALE = 20.0
"""Of the teacher's cosines, as sentence encoders are trained with."""
TEXTS = Texts(query_length=16, passage_length=32)


def _docstrings() -> Iterator[tuple[str, str]]:
    """First sentence and the rest, up to 40 words."""
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"pip install {package}")
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "tests" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                    first, _, rest = text.partition("\n\n")
                    yield " ".join(first.split()), " ".join(re.sub(r"-{3,}", " ", rest).split()[:40])


@cache
def pool() -> tuple[list[str], list[str]]:
    """Queries of 5 to 25 words and the passages that answer them, each once, in one shuffled order."""
    found: dict[str, str] = {}
    for query, passage in _docstrings():
        if 5 <= len(query.split()) <= 25 and len(passage.split()) >= 12:
            found.setdefault(query, passage)
    unique = list({passage: query for query, passage in found.items()}.items())
    random.Random(0).shuffle(unique)
    return [query for _, query in unique], [passage for passage, _ in unique]


@cache
def rows() -> dict[str, datasets.Dataset]:
    """To train and to test: a query, its passages, the right one first, and the teacher's scores."""
    queries, passages = pool()
    vectors = TfidfVectorizer(sublinear_tf=True)
    known = vectors.fit_transform(passages)
    draw, found = random.Random(0), {}
    for part, places in (("test", range(TEST)), ("train", range(TEST, TEST + TRAIN))):
        similar = (vectors.transform([queries[place] for place in places]) @ known.T).toarray()
        listed = []
        for place, own in zip(places, similar, strict=True):
            near = [other for other in own.argsort()[::-1].tolist() if other != place]
            train = part == "train"
            others = draw.sample(near[:NEAR], PASSAGES - 1) if train else near[: CANDIDATES - 1]
            listed.append([place, *others])
        found[part] = datasets.Dataset.from_dict(
            {
                "query": [queries[place] for place in places],
                "passages": [[passages[place] for place in group] for group in listed],
                "teacher_scores": _cosines([queries[place] for place in places], listed, passages),
            }
        )
    return found


def _cosines(queries: Sequence[str], listed: Sequence[Sequence[int]], passages: Sequence[str]) -> list[list[float]]:
    needed = sorted({place for group in listed for place in group})
    seen = dict(zip(needed, _embedded([passages[place] for place in needed]), strict=True))
    return [
        (SCALE * torch.stack([seen[place] for place in group]) @ query).tolist()
        for query, group in zip(_embedded(queries), listed, strict=True)
    ]


def _embedded(texts: Sequence[str]) -> torch.Tensor:
    return torch.cat([embed(texts[start : start + 64]) for start in range(0, len(texts), 64)])


@cache
def groups(part: str, *, apart: bool) -> datasets.Dataset:
    """`rows` as token ids."""
    return margin_mse_groups(rows()[part], tokenizer=encoder()[1], apart=apart, texts=TEXTS)


def student(seed: int, *, apart: bool) -> Any:
    """The first two layers of the encoder, alone or under one logit for query and passage together."""
    folder = encoder()[0].config._name_or_path
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if apart:
            return shrink(AutoModel.from_pretrained(folder), layers=2, keep="first")
        whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        return shrink(whole, layers=2, keep="first")


def trained(method: Any, seed: int, *, apart: bool) -> Any:
    """A student taught by the stored scores."""
    return _training.train(
        student(seed, apart=apart),
        data=groups("train", apart=apart),
        data_collator=GroupCollator(encoder()[1]),
        steps=STEPS,
        seed=seed,
        batch=BATCH,
        learning_rate=RATE,
        callbacks=[DistillCallback(method=method)],
    )


def scores(model: Any, *, apart: bool) -> list[list[float]]:
    """Of the test's candidates."""
    test, collator = groups("test", apart=apart), GroupCollator(encoder()[1])
    if not apart:
        return scores_of(model, test.remove_columns("teacher_scores"), collator, batch=8)
    found = []
    model.eval()
    for row in test:
        batch = collator([row])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        vectors = mean_of_tokens(states, batch["attention_mask"].bool())
        found.append((vectors[1:] @ vectors[0]).tolist())
    return found


def figures(found: list[list[float]]) -> dict[str, float]:
    """Against the right passage, and against the teacher's order."""
    theirs = rows()["test"]["teacher_scores"]
    right = [[1.0, *([0.0] * (CANDIDATES - 1))] for _ in found]
    pairs = [(i, j) for i in range(CANDIDATES) for j in range(i)]
    agreed = [(own[i] - own[j]) * (t[i] - t[j]) > 0 for own, t in zip(found, theirs, strict=True) for i, j in pairs]
    return {
        "nDCG@10": metrics.load("ndcg").compute(predictions=found, references=right, k=10)["ndcg"],
        "MRR@10": metrics.load("mrr").compute(predictions=found, references=right, k=10)["mrr"],
        "pairs in the teacher's order": sum(agreed) / len(agreed),
    }


def teacher_figures() -> dict[str, float]:
    """Of the teacher's own scores."""
    return figures([list(one) for one in rows()["test"]["teacher_scores"]])


CHECK = (
    f"Docstrings of {' and '.join(PACKAGES)}: a first sentence asks for the rest of its docstring (up to 32 tokens). "
    f"{TRAIN:,} queries with {PASSAGES} passages to train, the others drawn from the {NEAR} nearest by TF-IDF; {TEST} "
    f"to test, with the {CANDIDATES - 1} nearest. Teacher: MiniLM, 6 layers, {SCALE:g} times the cosine of its "
    f"vectors, stored. Student: its first 2 layers, {STEPS} steps of {BATCH} queries at {RATE:g}"
)
"""What is run, for the claims that use it."""
