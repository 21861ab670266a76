"""Selective distillation of a draft model for speculative decoding.

Hu, Guo, Feng, Zhao: AdaSPEC: Selective Knowledge Distillation for Efficient Speculative Decoders, NeurIPS 2025,
arXiv:2510.19779, section 3.

    L_draft,i = KL( p_i ‖ q_i ),  L_ref,i = KL( p_i ‖ r_i )       at each scored position i
    Δ_i = L_draft,i - L_ref,i
    keep i iff Δ_i ≥ quantile( Δ, 1 - k )                          over all scored positions of the micro-batch
    L = Σ_kept L_draft,i / number of all scored positions

p is the target's (the teacher's) distribution, q the draft's, r that of a reference: the draft's own start, trained
beforehand with plain KL(p ‖ r) on the same data. A large Δ is a token that the reference shows to be learnable. Target,
reference and the choice carry no gradient. The quantile interpolates linearly; of equal Δ all are kept.

The divisor is the authors' trainer's, so that the size of a step is about k times a plain KL's. The choice is made in
each micro-batch: accumulation is not the same as a larger batch, as with the authors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.distiller import select_rows
from hf_compress.divergences import kl, log_probabilities
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Needs, Objective, Signals, Sizes, Step
from hf_compress.registry import Method

REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class AdaSPECConfig:
    """Hyper-parameters of AdaSPEC."""

    k: float = 0.4
    """Part of the positions that is kept, in (0, 1]. The authors' value for all tasks."""

    def __post_init__(self) -> None:
        if not 0 < self.k <= 1:
            raise ConfigurationError(f"adaspec: k must lie in (0, 1], got {self.k}.")


def learnable(draft: Tensor, reference: Tensor, *, k: float) -> Tensor:
    """Which positions are kept.

    Args:
        draft: (position,) L_draft, in nats.
        reference: (position,) L_ref.
        k: part that is kept.

    Returns:
        (position,) bool.
    """
    difference = (draft - reference).detach()
    if not len(difference):
        return torch.zeros_like(difference, dtype=torch.bool)
    return difference >= torch.quantile(difference, 1 - k)


def adaspec(draft_logits: Tensor, target_logits: Tensor, reference_logits: Tensor, *, k: float) -> Tensor:
    """The draft's divergence from the target where it is kept, 0 elsewhere.

    Args:
        draft_logits: (position, vocab), any float type; widened to float32.
        target_logits: (position, vocab), detached here.
        reference_logits: (position, vocab), detached here.
        k: part of the positions that is kept.

    Returns:
        (position,) nats, at least 0; NaN where a divergence is not finite, which would spoil the choice unseen.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    log_p, log_q = log_probabilities("adaspec", draft_logits, target_logits, 1.0)
    _, log_r = log_probabilities("adaspec", reference_logits, target_logits, 1.0)
    draft, reference = kl(log_p, log_q), kl(log_p, log_r.detach())
    values = torch.where(learnable(draft, reference, k=k), draft, 0.0)
    return torch.where((draft.detach() - reference).isfinite(), values, math.nan)


class AdaSPEC(Objective):
    """Forward KL on the positions that a frozen reference shows to be learnable."""

    Config = AdaSPECConfig
    config: AdaSPECConfig
    task_weight: ClassVar[float | None] = 0.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(frozen=(REFERENCE,), relates_positions=True)

    def forward(self, signals: Signals, step: Step) -> Tensor:
        rows = select_rows(signals)
        assert rows.teacher_logits is not None  # tapped by default
        return adaspec(rows.student_logits, rows.teacher_logits, rows.frozen[REFERENCE], k=self.config.k)


METHOD = Method(
    title="AdaSPEC: Selective Knowledge Distillation for Efficient Speculative Decoders",
    paper="arXiv:2510.19779",
    authors="Yuezhou Hu, Jiaxin Guo, Xinyu Feng, Tuo Zhao",
    year=2025,
    summary="A draft model learns the target's distribution only on tokens that a reference shows to be learnable.",
    bibtex="""@inproceedings{hu2025adaspec,
  title = {{AdaSPEC}: Selective Knowledge Distillation for Efficient Speculative Decoders},
  author = {Hu, Yuezhou and Guo, Jiaxin and Feng, Xinyu and Zhao, Tuo},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025}, eprint = {2510.19779}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("text-generation",),
    objective=AdaSPEC,
)
