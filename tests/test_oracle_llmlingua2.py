"""LLMLingua-2's annotation, control and decision against the authors' code."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from hf_compress_plugins.encoders.llmlingua2 import annotate, kept_words, threshold, well_aligned, word_probabilities

ALIGNED = sorted(name.removesuffix(".labels") for name in oracle.outputs("llmlingua2") if name.endswith(".labels"))
DECIDED = [f"{kind}.{reduce}" for kind in ("plain", "digits", "force") for reduce in ("mean", "first")]


@pytest.mark.parametrize("name", ALIGNED)
def test_annotation(name: str) -> None:
    data = oracle.load("llmlingua2")
    case, window = name.removeprefix("align.").rsplit(".w", 1)
    if case == "long":
        original = [f"w{i % 37}" for i in range(600)]
        compressed = original[::9]
    else:
        texts = oracle.metadata("llmlingua2")["align_cases"][case]
        original, compressed = texts["original"].split(), texts["compressed"].split()

    found = annotate(original, compressed, window=int(window))

    assert list(map(int, found.labels)) == data[f"{name}.labels"].tolist()
    metrics = (
        found.compression_rate,
        found.variation_rate,
        found.hitting_rate,
        found.matching_rate,
        found.alignment_gap,
    )
    assert metrics == pytest.approx(data[f"{name}.metrics"].tolist(), abs=1e-12)


def test_control() -> None:
    data = oracle.load("llmlingua2")
    kept = well_aligned(data["filter.variation_rate"].numpy(), data["filter.alignment_gap"].numpy())
    assert kept.tolist() == data["filter.kept_index"].tolist()


def given(kind: str, reduce: Any) -> list[float]:
    tokens, probs = oracle.metadata("llmlingua2")["decide_tokens"], oracle.load("llmlingua2")["decide.token_probs"]
    inner = [(t, float(p)) for t, p in zip(tokens, probs, strict=True) if t not in ("<s>", "</s>")]
    starts = [token.startswith("▁") or token in (",", ".") for token, _ in inner]
    found = word_probabilities([p for _, p in inner], [n - 1 for n in np.cumsum(starts).tolist()], reduce=reduce)
    words = oracle.metadata("llmlingua2")[f"decide_{kind}_words"]
    forced = {
        "plain": lambda word: False,
        "digits": lambda word: any(c.isdigit() for c in word),
        "force": lambda word: word == ".",
    }
    return [1.0 if forced[kind](word) else p for word, p in zip(words, found, strict=True)]


@pytest.mark.parametrize("name", DECIDED)
def test_decision(name: str) -> None:
    data = oracle.load("llmlingua2")
    probabilities = given(*name.split("."))
    assert probabilities == pytest.approx(data[f"decide.{name}.word_probs"].tolist(), abs=1e-6)
    for reduced in (0.5, 0.67):
        limit = threshold(probabilities, [1] * len(probabilities), rate=1 - reduced)
        assert limit == pytest.approx(data[f"decide.{name}.reduce{reduced}.threshold"].item(), abs=1e-6)
        assert list(map(int, kept_words(probabilities, limit))) == data[f"decide.{name}.reduce{reduced}.keep"].tolist()
