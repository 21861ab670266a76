"""Rankings: for each query the scores of its documents against their relevances. Both names are ours.

Documents of equal score have no order. Both metrics then give the mean over all orders of the tied, so that a model
which scores all documents alike gains nothing from the order in which they happen to stand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import numpy as np

from hf_compress.errors import MismatchError

from ._base import Offline


class _Ranking(Offline):
    INPUTS = "predictions: scores of a query's documents; references: their relevances, 0 for irrelevant"
    FEATURES = datasets.Features(
        {
            "predictions": datasets.List(datasets.Value("float64")),
            "references": datasets.List(datasets.Value("float64")),
        }
    )


class Ndcg(_Ranking):
    """Normalised discounted cumulative gain, in [0, 1]; mean over the queries.

    DCG = Σ relevance / log2(rank + 1), divided by that of the best order. `k`: the first so many ranks; None: all.
    Relevances are taken as given: pass 2^r - 1 for the exponential gain. A query without a relevant document counts
    as 0, as in scikit-learn.

    Järvelin, Kekäläinen: Cumulated gain-based evaluation of IR techniques, ACM TOIS 20(4), 2002.

    Raises:
        MismatchError: for a query of fewer than two documents, or a relevance below 0.
    """

    def score(
        self, *, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]], k: int | None = None
    ) -> dict[str, float]:
        from sklearn.metrics import ndcg_score

        _check("ndcg", predictions, references, k, least=2)
        each = [ndcg_score([truth], [given], k=k) for given, truth in zip(predictions, references, strict=True)]
        return {"ndcg": float(np.mean(each))}


class Mrr(_Ranking):
    """Mean over the queries of 1 / rank of the first relevant document, in [0, 1].

    Relevant is what is above 0. `k`: a first relevant document beyond that rank counts as 0, as does a query without
    any.

    Voorhees: The TREC-8 question answering track report, 1999.

    Raises:
        MismatchError: for a query without documents, or a relevance below 0.

    >>> Mrr(keep_in_memory=True).compute(predictions=[[0.1, 0.9], [0.7, 0.2]], references=[[1, 0], [1, 0]])
    {'mrr': 0.75}
    """

    def score(
        self, *, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]], k: int | None = None
    ) -> dict[str, float]:
        _check("mrr", predictions, references, k, least=1)
        each = [
            _reciprocal_rank(np.asarray(given), np.asarray(truth) > 0, k or len(given))
            for given, truth in zip(predictions, references, strict=True)
        ]
        return {"mrr": float(np.mean(each))}


def _reciprocal_rank(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """Mean over all orders of the documents that tie with the best relevant one; 0 beyond rank k."""
    if not relevant.any():
        return 0.0
    best = scores[relevant].max()
    above, tied = int((scores > best).sum()), scores == best
    among, hits = int(tied.sum()), int((tied & relevant).sum())
    # the first of `hits` documents stands at place j among the tied in C(among - j, hits - 1) of C(among, hits) ways
    places = range(1, min(among - hits + 1, k - above) + 1)
    ways = math.comb(among, hits)
    return sum(math.comb(among - j, hits - 1) / ways / (above + j) for j in places)


def _check(
    metric: str,
    predictions: Sequence[Sequence[float]],
    references: Sequence[Sequence[float]],
    k: int | None,
    *,
    least: int,
) -> None:
    if k is not None and k < 1:
        raise MismatchError(f"{metric}: k must be at least 1, got {k}.")
    for row, (scores, truth) in enumerate(zip(predictions, references, strict=True)):
        if len(scores) != len(truth) or len(scores) < least:
            raise MismatchError(
                f"{metric}: query {row} has {len(scores)} scores and {len(truth)} relevances, expected equally many "
                f"and at least {least}. Score every document that was judged, or drop the query."
            )
        if not np.isfinite(scores).all():
            raise MismatchError(f"{metric}: the scores of query {row} are not all finite.")
        if not all(0 <= each < math.inf for each in truth):
            raise MismatchError(f"{metric}: query {row} has the relevance {min(truth)}, expected at least 0.")
