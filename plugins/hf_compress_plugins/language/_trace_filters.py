"""What is left out: queries that are repeated, unfit or known from an evaluation; text that comes from a template."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_compress.errors import MismatchError
from hf_compress_plugins.language._verifiers import normalised

Embed: TypeAlias = Callable[[Sequence[str]], Any]
"""From texts to (text, dim) vectors of any length."""
Spans: TypeAlias = Callable[[str], Sequence[tuple[int, int]]]
"""From a text to (start, end) characters of its tokens."""

GRAM, TIMES = 20, 20
"""Tokens of an n-gram, and how often it may occur in all answers of a source; the paper's."""
SIMILAR = 0.9
"""Cosine above which a query is taken for one of an evaluation; the paper's, with bge-m3."""
MOST_UNICODE = 0.5
"""Part of a query's characters that may lie outside of ASCII [reconstruction]; 1 for other scripts."""

_URL = re.compile(r"https?://|www\.\w", re.IGNORECASE)
_TABLE = re.compile(r"^\s*\|?\s*:?-{2,}:?\s*\|[\s:|-]*$|\\begin\{tabular|<table\b|^[^\n]*\t[^\n]*\t", re.M | re.I)
_OPEN = (",", ";", "(", "[", "{", "…", "...")
"""With which a query ends that goes on elsewhere."""


def unfit(query: str, *, most_unicode: float = MOST_UNICODE) -> str | None:
    """Why a query is left out: "empty", "incomplete", "url", "table" or "unicode"; None: it stays."""
    text = query.strip()
    if not text:
        return "empty"
    if text.endswith(_OPEN) or text.count("```") % 2:
        return "incomplete"
    if _URL.search(text):
        return "url"
    if _TABLE.search(text):
        return "table"
    return "unicode" if sum(not letter.isascii() for letter in text) > most_unicode * len(text) else None


def filter_queries(
    queries: Sequence[str],
    *,
    evaluation: Sequence[str] = (),
    embed: Embed | None = None,
    most_unicode: float = MOST_UNICODE,
) -> tuple[list[int], dict[str, int]]:
    """Places of the queries that stay, and how many were left out by reason.

    Args:
        queries: texts.
        evaluation: texts that must not be trained on: equal ones, but for case and white space, are left out.
        embed: leaves out queries whose cosine with one of them is above 0.9 too; None: equal ones alone.
        most_unicode: part of a query's characters that may lie outside of ASCII.
    """
    known, seen = {normalised(text) for text in evaluation}, set[str]()
    reasons: Counter[str] = Counter()
    kept: list[int] = []
    for place, query in enumerate(queries):
        reason = unfit(query, most_unicode=most_unicode)
        reason = reason or ("repeated" if query in seen else "evaluation" if normalised(query) in known else None)
        seen.add(query)
        if reason is None:
            kept.append(place)
        else:
            reasons[reason] += 1
    if embed is not None and kept and evaluation:
        near = similarity(embed([queries[place] for place in kept]), embed(list(evaluation))) > SIMILAR
        reasons["near an evaluation"] = int(near.sum())
        kept = [place for place, close in zip(kept, near, strict=True) if not close]
    return kept, dict(reasons)


def similarity(queries: Any, evaluation: Any) -> NDArray[np.float64]:
    """(query,) largest cosine with any evaluation text.

    Args:
        queries: (query, dim) vectors of any length.
        evaluation: (text, dim)

    Raises:
        MismatchError: if the vectors are not of one dimension, or not finite.
    """
    one, other = (np.asarray(vectors, dtype=np.float64) for vectors in (queries, evaluation))
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise MismatchError(
            f"reasoning_traces: embed gave {one.shape} for queries and {other.shape} for evaluation texts; "
            "(text, dim) with one dim is needed."
        )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise MismatchError("reasoning_traces: embed gave a number that is not finite, which is near to nothing.")
    one, other = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (one, other))
    found: NDArray[np.float64] = (one @ other.T).max(1)
    return found


def words(text: str) -> list[tuple[int, int]]:
    """(start, end) of what stands between white space."""
    return [found.span() for found in re.finditer(r"\S+", text)]


def template_grams(
    texts: Iterable[str], *, size: int = GRAM, times: int = TIMES, spans: Spans = words
) -> set[tuple[str, ...]]:
    """The n-grams that occur more than `times` times in all texts together.

    Args:
        texts: answers of one source.
        size: tokens of an n-gram.
        times: occurrences that are allowed.
        spans: finds the tokens.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(_grams([text[a:b] for a, b in spans(text)], size))
    return {gram for gram, count in counts.items() if count > times}


def _grams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


def without_templates(text: str, grams: set[tuple[str, ...]], *, size: int = GRAM, spans: Spans = words) -> str:
    """The text without the tokens that lie in one of the n-grams, nor the white space behind them."""
    places = list(spans(text))
    gone = [False] * len(places)
    for start, gram in enumerate(_grams([text[a:b] for a, b in places], size)):
        if gram in grams:
            gone[start : start + size] = [True] * size
    if not any(gone):
        return text
    ends = [start for start, _ in places[1:]] + [len(text)]
    kept = "".join(text[a:end] for (a, _), end, removed in zip(places, ends, gone, strict=True) if not removed)
    return (text[: places[0][0]] + kept).strip()
