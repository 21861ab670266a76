"""A small retrieval set for claims about ranking: the first sentence of a docstring asks for the rest of it.

Docstrings are those of two installed packages, so that the figures belong to their versions. The teacher is the MiniLM
of sentences: log-odds of relevance by a logistic regression of its cosines. Students are its first two layers.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from hf_compress_plugins.encoders._ranking import GROUP, SCORES, GroupCollator, Texts, mean_of_tokens, scores_of
from hf_compress_plugins.encoders.margin_mse import margin_mse_groups
from huggingface_hub import cached_assets_path
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_compress import DistillCallback, files
from hf_compress_evaluation import intervals, metrics

from . import _training
from .llmlingua2 import embed, encoder

PACKAGES = ("scipy", "sklearn")
TRAIN, TEST = 500, 150
"""Queries."""
PASSAGES, CANDIDATES, NEAR = 4, 15, 30
"""Passages of a query in training and in the test, the right one among them; how many of the nearest others the
training's are drawn from."""
STEPS, BATCH, RATE = 60, 8, 1e-4
TEXTS = Texts(query_length=16, passage_length=24)


def _docstrings() -> Iterator[tuple[str, str]]:
    """First sentence and the rest, up to 24 words."""
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
                    yield " ".join(first.split()), " ".join(re.sub(r"-{3,}", " ", rest).split()[:24])


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
    """To train and to test: a query, its passages, the right one first, and the teacher's cosines."""
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
                "cosines": _cosines([queries[place] for place in places], listed, passages),
            }
        )
    return found


def _cosines(queries: Sequence[str], listed: Sequence[Sequence[int]], passages: Sequence[str]) -> list[list[float]]:
    """Kept on disk, as two claims and a killed run ask for the same."""
    asked = json.dumps([queries, [[passages[place] for place in group] for group in listed]])
    folder = cached_assets_path("hf_compress", namespace="claims", subfolder="retrieval")
    path = folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return cast(list[list[float]], files.read_json(path)["cosines"])
    needed = sorted({place for group in listed for place in group})
    seen = dict(zip(needed, _embedded([passages[place] for place in needed]), strict=True))
    found = [
        (torch.stack([seen[place] for place in group]) @ query).tolist()
        for query, group in zip(_embedded(queries), listed, strict=True)
    ]
    files.write_text(path, json.dumps({"cosines": found}))
    return found


def _embedded(texts: Sequence[str]) -> Tensor:
    return torch.cat([embed(texts[start : start + 64]) for start in range(0, len(texts), 64)])


@cache
def log_odds() -> tuple[float, float]:
    """Slope and offset from the teacher's cosine to the log-odds that a passage is the right one, from the training."""
    cosines = torch.tensor(rows()["train"]["cosines"])
    right = torch.zeros_like(cosines)
    right[:, 0] = 1
    fitted = LogisticRegression(C=1e3).fit(cosines.view(-1, 1).numpy(), right.flatten().numpy())
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def teacher_scores(part: str) -> Tensor:
    """(query, passage) log-odds."""
    slope, offset = log_odds()
    return slope * torch.tensor(rows()[part]["cosines"]) + offset


@cache
def groups(part: str) -> datasets.Dataset:
    """`rows` as token ids, with the teacher's scores."""
    data = rows()[part].remove_columns("cosines").add_column(SCORES, teacher_scores(part).tolist())
    return margin_mse_groups(data, tokenizer=encoder()[1], texts=TEXTS)


class PairForSequenceClassification(BertForSequenceClassification):  # type: ignore[misc]
    """One logit for query and passage, read together: log-odds by the cosine of the means of their states.

    A logit of the first token would have to be learned from nothing, which takes more than these steps.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(1, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        states = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state
        second = token_type_ids.bool()
        query, passage = (mean_of_tokens(states, own & attention_mask.bool()) for own in (~second, second))
        logits = self.classifier(torch.cosine_similarity(query, passage)[:, None])
        loss = None if labels is None else nn.functional.binary_cross_entropy_with_logits(logits.flatten(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def student(seed: int) -> Any:
    """The encoder's first two layers, which take over the teacher's slope and offset; word vectors stay as they are."""
    folder = encoder()[0].config._name_or_path
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = PairForSequenceClassification.from_pretrained(folder, num_labels=1, num_hidden_layers=2)
    for part, value in zip((made.classifier.weight, made.classifier.bias), log_odds(), strict=True):
        nn.init.constant_(part, value)
    for unused in (made.bert.embeddings.word_embeddings, made.bert.pooler):
        unused.requires_grad_(False)
    return made


class Pointwise:
    """Batches whose rows stand alone: the model's own cross-entropy, with hard labels or the teacher's."""

    def __init__(self, *, soft: bool) -> None:
        self.soft = soft
        self.collator = GroupCollator(encoder()[1])

    def __call__(self, found: Sequence[Any]) -> dict[str, Tensor]:
        batch = self.collator(found)
        scores = batch.pop(SCORES)
        del batch[GROUP]
        hard = torch.zeros_like(scores)
        hard[:, 0] = 1.0
        return batch | {"labels": (scores.sigmoid() if self.soft else hard).flatten()}


POINTWISE = {"pointwise CE": False, "plain kd, each passage alone": True}
"""Baselines, and whether the labels are the teacher's probabilities: KD at temperature 1, but for a constant."""


def run(variant: str, seed: int, methods: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Test figures of a student that one of the methods, or a baseline, has trained."""
    if variant == "teacher":
        return figures(teacher_scores("test").tolist())
    model = student(seed)
    if variant in methods:
        _trained(model, seed, GroupCollator(encoder()[1]), callbacks=[DistillCallback(method=methods[variant]())])
    elif variant in POINTWISE:
        _trained(model, seed, Pointwise(soft=POINTWISE[variant]), remove_unused_columns=False)
    test = groups("test").remove_columns(SCORES)
    return figures(scores_of(model, test, GroupCollator(encoder()[1]), batch=8))


def _trained(model: Any, seed: int, collator: Callable[..., Any], **settings: Any) -> None:
    _training.train(
        model,
        data=groups("train"),
        data_collator=collator,
        steps=STEPS,
        seed=seed,
        batch=BATCH,
        learning_rate=RATE,
        **settings,
    )


def figures(found: list[list[float]]) -> dict[str, float]:
    """Against the right passage, with an interval over the queries, and against the teacher's order."""
    right = [[1.0, *([0.0] * (CANDIDATES - 1))] for _ in found]
    gains = [
        metrics.load("ndcg").compute(predictions=[own], references=[one], k=10)["ndcg"]
        for own, one in zip(found, right, strict=True)
    ]
    about = intervals.mean(np.array(gains), seed=0)
    low, high = cast(tuple[float, float], about.interval)
    own, theirs = torch.tensor(found), teacher_scores("test")
    first, second = torch.triu_indices(CANDIDATES, CANDIDATES, offset=1)
    agreed = (own[:, first] - own[:, second]) * (theirs[:, first] - theirs[:, second]) > 0
    return {
        "nDCG@10": float(np.mean(gains)),
        "nDCG@10, 95 % of queries drawn anew, from": low,
        "nDCG@10, 95 % of queries drawn anew, to": high,
        "pairs in the teacher's order": agreed.double().mean().item(),
    }


CHECK = (
    f"Docstrings of {' and '.join(PACKAGES)}: a first sentence asks for the rest of its docstring (up to 24 tokens). "
    f"{TRAIN:,} queries with {PASSAGES} passages to train, the others drawn from the {NEAR} nearest by TF-IDF; {TEST} "
    f"to test, with the {CANDIDATES - 1} nearest. Teacher: MiniLM, 6 layers, log-odds by a logistic regression of its "
    f"cosines, computed once. Student: its first 2 layers read query and passage together, one logit from the cosine "
    f"of the means of their states, with the teacher's slope and offset to start; {STEPS} steps of {BATCH} queries at "
    f"{RATE:g}. Pointwise CE: binary cross-entropy of each passage alone. Plain kd: the same with the teacher's "
    "probabilities as labels"
)
"""What is run, for the claims that use it."""
