"""Temporally adaptive interpolated distillation.

Shing, Misaki, Bao, Yokoi, Akiba: TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer
in Language Models, ICLR 2025, arXiv:2501.16937, section 3, equations 2 to 5.

    p_t = softmax( (1 - t) · sg(z_s) + t · z_t )                 the target, mixed in logit space
    l_i = - Σ_v p_t[v] · log softmax(z_s)[v]                      at each scored position i
    δ = (l_prev - l) / (l_prev + ε),   m ← β m + (1 - β) δ
    t ← min( t_end, max( t_lin, t + α · sigmoid(m) · (1 - t) ) ),  t_lin = t_start + (t_end - t_start) · step / steps

Gradients stop at the teacher and at the student's part of the target. The value is the authors' code's cross-entropy,
the paper's KL plus the entropy of p_t, same gradient; it rises with t, and the schedule is fed with it.

Difference from the authors' code: t moves once an optimizer step, by the loss over the whole accumulation window and
all ranks. The code moves it every micro-batch by its own rank's loss, so that ranks drift apart; without accumulation
and on one rank both agree. A window without a scored position leaves t alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_compress.divergences import cross_entropy, log_probabilities
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Objective, Rows, Step
from hf_compress.registry import Method

EPSILON = 1e-15
"""Keeps the relative change of the loss finite (authors' code)."""


@dataclass(frozen=True, kw_only=True)
class TAIDConfig:
    """Hyper-parameters of TAID; defaults of the authors' code."""

    t_start: float = 0.4
    """t at the first step, 0 … 1. The authors use 0.4 for Phi-3-mini to TinyLlama, 0.2 for two other pairs."""
    t_end: float = 1.0
    """Largest t."""
    alpha: float = 5e-4
    """α, size of the adaptive step. At this value it acts only in runs longer than about 4,000 steps."""
    beta: float = 0.99
    """β, momentum of the loss's relative change."""
    adaptive: bool = True
    """False: t is the linear ramp."""

    def __post_init__(self) -> None:
        if not 0 <= self.t_start < 1 or not 0 < self.t_end <= 1 or self.t_start > self.t_end:
            raise ConfigurationError(
                f"taid: needs 0 ≤ t_start < 1 and t_start ≤ t_end ≤ 1, got {self.t_start} and {self.t_end}."
            )
        if not 0 <= self.alpha <= 1 or not 0 <= self.beta <= 1:
            raise ConfigurationError(f"taid: alpha and beta must lie in 0 … 1, got {self.alpha} and {self.beta}.")


def taid(student_logits: Tensor, teacher_logits: Tensor, t: float | Tensor) -> Tensor:
    """Cross-entropy of the student to the interpolated target, at each position.

    Args:
        student_logits: (position, vocab), any float type; widened to float32 before mixing.
        teacher_logits: (position, vocab), detached here.
        t: 0 (own distribution, zero gradient) … 1 (the teacher's).

    Returns:
        (position,) nats. Entries that the student excludes add 0.

    Raises:
        MismatchError: if the two logits differ in shape; slice padded vocabularies to their common part first.
    """
    _, log_q = log_probabilities("taid", student_logits, teacher_logits)
    t = torch.as_tensor(t, dtype=log_q.dtype, device=log_q.device)
    own = torch.where(t < 1, (1 - t) * student_logits.detach().to(log_q.dtype), 0.0)  # 0 · -inf would be NaN
    other = torch.where(t > 0, t * teacher_logits.detach().to(log_q.dtype), 0.0)
    return cross_entropy((own + other).log_softmax(-1), log_q)


@dataclass(frozen=True)
class Schedule:
    """State of t between two steps."""

    t: Tensor
    previous: Tensor
    """Loss of the step before; inf before the first."""
    momentum: Tensor


def advance(state: Schedule, loss: Tensor, progress: float, config: TAIDConfig) -> Schedule:
    """t for the next step, from this step's loss.

    Args:
        state: before this step; () tensors.
        loss: () nats, the mean over this step's positions.
        progress: global step / steps of the run, 0 … 1.
        config: hyper-parameters.
    """
    loss = loss.detach().to(state.t.dtype)
    if state.previous.isinf():
        return Schedule(state.t, loss, state.momentum)
    change = (state.previous - loss) / (state.previous + EPSILON)
    momentum = config.beta * state.momentum + (1 - config.beta) * change
    linear = config.t_start + (config.t_end - config.t_start) * progress
    if not config.adaptive:
        return Schedule(torch.full_like(state.t, linear), loss, momentum)
    raised = state.t + config.alpha * torch.sigmoid(momentum) * (1 - state.t)
    return Schedule(raised.clamp(min=linear).clamp(max=config.t_end), loss, momentum)


class TAID(Objective):
    """The interpolated target; t, the last loss and its momentum are buffers, so a resumed run continues the ramp."""

    Config = TAIDConfig
    config: TAIDConfig
    task_weight: ClassVar[float | None] = 0.0  # distil_ratio 1.0 in the authors' code: no hard-label term
    t: Tensor
    previous: Tensor
    momentum: Tensor

    def __init__(self, config: TAIDConfig | None = None, *, weight: float = 1.0, **settings: Any) -> None:
        super().__init__(config, weight=weight, **settings)
        self.register_buffer("t", torch.tensor(float(self.config.t_start)))  # an int would never move
        self.register_buffer("previous", torch.tensor(math.inf))
        self.register_buffer("momentum", torch.tensor(0.0))

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        return taid(rows.student_logits, rows.teacher_logits, self.t)

    def after_step(self, step: Step, means: Mapping[str, Tensor]) -> None:
        loss = means["taid"]
        if loss == 0:  # a window without a scored position: the cross-entropy is 0 there and only there
            return
        progress = step.global_step / max(step.max_steps, 1)
        state = advance(Schedule(self.t, self.previous, self.momentum), loss, progress, self.config)
        self.t, self.previous, self.momentum = state.t, state.previous, state.momentum


METHOD = Method(
    title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
    paper="arXiv:2501.16937",
    authors="Makoto Shing, Kou Misaki, Han Bao, Sho Yokoi, Takuya Akiba",
    year=2025,
    summary="The target slides from the student's own distribution to the teacher's, for teachers that are far away.",
    bibtex="""@inproceedings{shing2025taid,
  title = {{TAID}: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models},
  author = {Shing, Makoto and Misaki, Kou and Bao, Han and Yokoi, Sho and Akiba, Takuya},
  booktitle = {International Conference on Learning Representations},
  year = {2025}, eprint = {2501.16937}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("text-generation", "text2text-generation", "text-classification", "token-classification", "fill-mask"),
    objective=TAID,
)
