"""Margin-MSE's claim: a student of another architecture learns margins better than scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_compress_plugins.encoders.margin_mse import MarginMSE

from . import Claim
from . import _retrieval as retrieval

LOSSES: Mapping[str, Any] = {
    "margin-MSE": "margin_mse",
    "pointwise MSE": "pointwise_mse",
    "RankNet, weighed": "ranknet_weighted",
}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Test figures of a bi-encoder."""
    if variant == "teacher":
        return retrieval.teacher_figures()
    if variant == "untrained":
        return retrieval.figures(retrieval.scores(retrieval.student(seed, apart=True), apart=True))
    method = MarginMSE(loss=LOSSES[variant], scores="dot", pooling="mean")
    return retrieval.figures(retrieval.scores(retrieval.trained(method, seed, apart=True), apart=True))


CLAIM = Claim(
    published="MS MARCO: students of four architectures rank better with Margin-MSE than without distillation, and "
    "better than with the other losses of the teacher's scores.",
    check=retrieval.CHECK + ", a bi-encoder: product of the means of its states, not of length 1.",
    expected="Margin-MSE above pointwise MSE, which must also learn the teacher's offset and scale.",
    variants=(*LOSSES, "untrained", "teacher"),
    run=run,
)
