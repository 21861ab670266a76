"""The squared distance of two models' logits.

Ba, Caruana: Do Deep Nets Really Need to be Deep?, NeurIPS 2014, arXiv:1312.6184, section 2.2.

    l_i = ½ Σ_v ( z_s,i[v] - z_t,i[v] )²      at each scored position i

The teacher carries no gradient. The logits are compared as they are; a constant added to one side counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import ConfigurationError
from hf_compress.objective import Objective, Rows, Step
from hf_compress.registry import Method


@dataclass(frozen=True, kw_only=True)
class SquaredConfig:
    """Hyper-parameters of the squared distance."""

    scale: float = 1.0
    """Divides both logits; the paper's are not scaled."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ConfigurationError(f"squared: scale must be positive and finite, got {self.scale}.")


def squared(student_logits: Tensor, teacher_logits: Tensor, *, scale: float) -> Tensor:
    """Half the squared distance at each position.

    Args:
        student_logits: (position, vocab), any float type; widened to float32.
        teacher_logits: (position, vocab), detached here.
        scale: divides both.

    Returns:
        (position,) at least 0.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    difference = (student_logits.to(dtype) - teacher_logits.detach().to(dtype)) / scale
    return difference.square().sum(-1) / 2


class Squared(Objective):
    """The squared distance at every scored position."""

    Config = SquaredConfig
    config: SquaredConfig

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        return squared(rows.student_logits, rows.teacher_logits, scale=self.config.scale)


METHOD = Method(
    title="Do Deep Nets Really Need to be Deep?",
    paper="arXiv:1312.6184",
    authors="Lei Jimmy Ba, Rich Caruana",
    year=2014,
    summary="The student matches the teacher's logits in squared distance.",
    bibtex="""@inproceedings{ba2014deep,
  title = {Do Deep Nets Really Need to be Deep?},
  author = {Ba, Lei Jimmy and Caruana, Rich},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2014}, eprint = {1312.6184}, archivePrefix = {arXiv}
}""",
    tasks=("text-classification", "text-generation"),
    objective=Squared,
)
