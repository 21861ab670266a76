"""Plackett-Luce distillation: the teacher's ranking of all classes, the true one first.

Bassam, Zhu, Bian: PLD: A Choice-Theoretic List-Wise Knowledge Distillation, NeurIPS 2025, arXiv:2506.12542, section 4
and appendix C.

    π = the label, then the other classes by falling teacher logit
    a_k = softmax(z_t / τ_T)[π_k]
    l_i = Σ_k a_k · [ log Σ_{m ≥ k} exp(z_s[π_m]) - z_s[π_k] ]      at each scored position i

The sum over k is the likelihood, under Plackett and Luce's model, of choosing the classes one by one in that order,
each choice weighed by the teacher's probability of what is chosen. The student's logits are never tempered. The
teacher carries no gradient. The weights are those of all classes and are not normalised again once the label has moved
to the front: where the teacher is sure of another class the label weighs next to nothing.

All of the weight on the label is the cross-entropy, equal weights are ListMLE over the number of classes. The loss
replaces both the task's (weight 0) and soft labels. It is computed from the last choice to the first, as a cumulative
logsumexp of ascending classes with the label at the end. Of equal teacher logits the lower class id is ranked lower.

Ours: a position without a label, of which the paper knows none, is ranked by the teacher alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.divergences import REMEDY, check_temperature
from hf_compress.objective import IGNORED, Objective, Rows, Step, require_one_shape
from hf_compress.registry import Method


@dataclass(frozen=True, kw_only=True)
class PLDConfig:
    """Hyper-parameters of PLD."""

    temperature: float = 1.0
    """τ_T > 0 of the weights. The paper's for ImageNet, where 0.5 and 4 lose a point and more; 4 for CIFAR-100. A
    teacher that is nearly always sure needs a higher one, or the loss is the cross-entropy."""

    def __post_init__(self) -> None:
        check_temperature("pld", self.temperature)


def ranking(teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
    """The classes from the last choice to the first.

    Args:
        teacher_logits: (position, class).
        labels: (position,) class ids, -100 where there is none, or None where there are none at all.

    Returns:
        (position, class) class ids, ascending by teacher logit, the label last.
    """
    keys = teacher_logits.detach()
    if labels is not None:
        known = (labels != IGNORED)[:, None]
        place = labels.masked_fill(~known[:, 0], 0)[:, None]
        keys = keys.scatter(-1, place, torch.where(known, math.inf, keys.gather(-1, place)))
    return keys.argsort(dim=-1, stable=True)


def pld(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, *, temperature: float = 1.0) -> Tensor:
    """Negative log-likelihood of the ranking under the student, each choice weighed by the teacher.

    Args:
        student_logits: (position, class), any float type; widened to float32.
        teacher_logits: (position, class), detached here.
        labels: (position,) class ids, -100 where there is none; None: the teacher alone ranks.
        temperature: τ_T.

    Returns:
        (position,) nats, at least 0; ∞ where the student excludes a class that the teacher gives weight.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    require_one_shape("pld", student_logits, teacher_logits, REMEDY)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    order = ranking(teacher_logits, labels)
    weights = (teacher_logits.detach().to(dtype) / temperature).softmax(-1).gather(-1, order)
    ranked = student_logits.to(dtype).gather(-1, order)
    lowest = torch.finfo(dtype).min / 4  # logcumsumexp of -inf alone has a NaN gradient
    left = ranked.clamp(min=lowest).logcumsumexp(-1)
    return (weights * torch.where(weights > 0, left - ranked, 0.0)).sum(-1)


class PLD(Objective):
    """The weighed ranking at every scored position."""

    Config = PLDConfig
    config: PLDConfig
    task_weight: ClassVar[float | None] = 0.0

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        return pld(rows.student_logits, rows.teacher_logits, rows.labels, temperature=self.config.temperature)


METHOD = Method(
    title="PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
    paper="arXiv:2506.12542",
    authors="Ejafa Bassam, Dawei Zhu, Kaigui Bian",
    year=2025,
    summary="The student learns the teacher's ranking of all classes, the true one first, in place of labels and kd.",
    bibtex="""@inproceedings{bassam2025pld,
  title = {{PLD}: A Choice-Theoretic List-Wise Knowledge Distillation},
  author = {Bassam, Ejafa and Zhu, Dawei and Bian, Kaigui},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025}, eprint = {2506.12542}, archivePrefix = {arXiv}
}""",
    algorithm=("ranking",),
    knowledge=("feature",),
    tasks=(
        "text-classification",
        "token-classification",
        "image-classification",
        "audio-classification",
        "text-generation",
    ),
    objective=PLD,
)
