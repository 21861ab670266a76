"""DeAR's claim, first stage: the teacher's distribution over a query's passages beside the labels ranks better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_compress_plugins.encoders.dear import DeAR

from . import Claim
from . import _retrieval as retrieval

METHODS: Mapping[str, Callable[[], Any]] = {
    "DeAR, CE and KL, α = 0.1": DeAR,
    "DeAR, CE, RankNet and KL, α = 0.5": lambda: DeAR(loss="ranknet_binary_softmax_ce", alpha=0.5),
    "CE of the passages alone, α = 0": lambda: DeAR(alpha=0.0),
    "KL alone, α = 1": lambda: DeAR(alpha=1.0),
}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Test figures of one student."""
    return retrieval.run(variant, seed, METHODS)


CLAIM = Claim(
    published="nDCG@5 on TREC DL20 5.1 above open baselines; nDCG@10 of 90.97 on NovelEval, with both stages.",
    check=f"{retrieval.CHECK}. The second stage needs a language model and is not run.",
    expected="DeAR above pointwise CE and at least as good as the labels over a query's passages.",
    variants=(*METHODS, *retrieval.POINTWISE, "untrained", "teacher"),
    run=run,
)
