"""Margin-MSE's claim: a student learns more from the teacher's margins between passages than from labels or scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_compress_plugins.encoders.margin_mse import MarginMSE

from . import Claim
from . import _retrieval as retrieval

METHODS: Mapping[str, Callable[[], Any]] = {
    "margin-MSE": MarginMSE,
    "pointwise MSE": lambda: MarginMSE(loss="pointwise_mse"),
}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Test figures of one student."""
    return retrieval.run(variant, seed, METHODS)


CLAIM = Claim(
    published="MS MARCO: students of four architectures rank better with Margin-MSE than without distillation, and "
    "better than with the other losses of the teacher's scores.",
    check=f"{retrieval.CHECK}.",
    expected="Margin-MSE above pointwise CE, and at least as good as plain kd and pointwise MSE.",
    variants=("margin-MSE", *retrieval.POINTWISE, "pointwise MSE", "untrained", "teacher"),
    run=run,
)
