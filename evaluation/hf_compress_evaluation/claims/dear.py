"""DeAR's claim, first stage: the teacher's distribution over a query's passages beside the labels ranks better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_compress_plugins.encoders.dear import DeAR
from hf_compress_plugins.encoders.margin_mse import MarginMSE

from . import Claim
from . import _retrieval as retrieval

METHODS: Mapping[str, Any] = {
    "labels alone": lambda: DeAR(alpha=0.0),
    "DeAR, α = 0.1": DeAR,
    "DeAR, RankNet and labels, α = 0.5": lambda: DeAR(loss="ranknet_binary_softmax_ce", alpha=0.5),
    "pointwise MSE": lambda: MarginMSE(loss="pointwise_mse"),
}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Test figures of a cross-encoder."""
    if variant == "teacher":
        return retrieval.teacher_figures()
    return retrieval.figures(retrieval.scores(retrieval.trained(METHODS[variant](), seed, apart=False), apart=False))


CLAIM = Claim(
    published="nDCG@5 on TREC DL20 5.1 above open baselines; nDCG@10 of 90.97 on NovelEval, with both stages.",
    check=retrieval.CHECK + ", a cross-encoder with one logit. The second stage needs a language model and is not run.",
    expected="DeAR at least as good as the labels alone; pointwise MSE far below both in so few steps.",
    variants=(*METHODS, "teacher"),
    run=run,
)
