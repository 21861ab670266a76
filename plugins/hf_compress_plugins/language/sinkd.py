"""Sinkhorn distance between the two models' sets of predictions of a batch.

Cui, Qin, Gao, Zhang, Xu, Wu, Li, Sun, Zhou, Li: Sinkhorn Distance Minimization for Knowledge Distillation, LREC-COLING
2024, arXiv:2402.17110; SinKD, IEEE TNNLS 36(7), 2025.

    P_s, P_t = softmax(z_s / τ), softmax(z_t / τ)                  a row for each scored position of the micro-batch
    W[i, j] = Σ_c | P_s[i, c] - P_t[j, c] |                         in 0 … 2
    K = exp(-W / ε);  20 times: each row ← row / its sum, then each column ← column / its sum
    d_i = Σ_j K[i, j] · W[i, j],   L_sink = mean_i d_i
    KD_i = - Σ_c softmax(z_t / T)[c] · log softmax(z_s / T)[c]      no T²
    L = (1 - α) · CE + α · KD + β · L_sink

Gradients flow through W and through the 20 iterations; the teacher carries none. Columns of the plan sum to exactly 1,
rows nearly so: its mass is the number of rows. Of two equal sets L_sink is small and not 0, as ε blurs the plan.

Differences from the authors' code: it adds 0.001 · Σ_i d_i, a factor that the paper does not have and a sum that grows
with the batch; `summed=True` is that form. Without the 0.001 the sum breaks a run. Its two steps of division are taken
in log space here, which changes no value and cannot underflow. Its wiring for BERT never reaches the term, and its T0
trainer takes the softmax over positions: neither is followed. Its squared error for regression is left out.

The rows that are carried to each other are those of one process's micro-batch: accumulation is not the same as a larger
batch, as with the authors, and with one row a batch L_sink is the plain L1 distance. Time and memory grow with the
square of the rows: of a language model label the answers alone. Where both models are sure of different classes the
gradient of L_sink vanishes with the softmax's, and KD's does not: keep α above 0. W has a corner where two
probabilities are equal, so that a teacher rounded to float16, as on disk, moves the gradient by about 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_compress.distiller import select_rows
from hf_compress.divergences import REMEDY, check_temperature, cross_entropy, log_probabilities
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Needs, Objective, Signals, Sizes, Step, require_one_shape
from hf_compress.registry import Method

SUMMED = 1e-3
"""Factor of the sum in the authors' code for BERT and T0; 8e-4 in that for GPT-Neo."""


@dataclass(frozen=True, kw_only=True)
class SinKDConfig:
    """Hyper-parameters of SinKD."""

    alpha: float = 0.9
    """α, 0 … 1, weight of KD beside (1 - α) of the labels. The paper's; the authors' scripts take 0.8, 0.9 or 1."""
    beta: float = 0.8
    """β ≥ 0, weight of L_sink. The paper's and the scripts'."""
    temperature: float = 2.0
    """T > 0 of KD; 1 to 4 by task in the scripts."""
    tau: float = 2.0
    """τ > 0 of the rows that are carried. The paper's; fixed in the code."""
    epsilon: float = 0.1
    """ε > 0, blur of the plan. The paper's."""
    iterations: int = 20
    """The paper's."""
    summed: bool = False
    """True: the authors' code's 0.001 times the sum over the micro-batch, instead of the mean."""

    def __post_init__(self) -> None:
        for temperature in (self.temperature, self.tau):
            check_temperature("sinkd", temperature)
        if not 0 <= self.alpha <= 1 or not 0 <= self.beta < math.inf:
            raise ConfigurationError(
                f"sinkd: alpha must lie in 0 … 1 and beta be finite and at least 0, got {self.alpha} and {self.beta}."
            )
        if not 0 < self.epsilon < math.inf or self.iterations < 1:
            raise ConfigurationError(
                f"sinkd: epsilon must be positive and iterations at least 1, got {self.epsilon} and {self.iterations}."
            )


def cost(student_logits: Tensor, teacher_logits: Tensor, *, tau: float) -> Tensor:
    """L1 distance of each of the student's rows to each of the teacher's.

    Args:
        student_logits: (position, class), any float type; widened to float32.
        teacher_logits: (position, class), detached here.
        tau: τ.

    Returns:
        (position of the student, position of the teacher) in 0 … 2.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    require_one_shape("sinkd", student_logits, teacher_logits, REMEDY)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    own = (student_logits.to(dtype) / tau).softmax(-1)
    theirs = (teacher_logits.detach().to(dtype) / tau).softmax(-1)
    return torch.cdist(own, theirs, p=1.0)


def plan(costs: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """What part of each of the student's rows is carried to each of the teacher's.

    Args:
        costs: (row, row).
        epsilon: ε.
        iterations: how often rows and columns are divided by their sums.

    Returns:
        (row, row) at least 0; columns sum to 1.
    """
    log_plan = -costs / epsilon
    for _ in range(iterations):
        log_plan = log_plan.log_softmax(1)
        log_plan = log_plan.log_softmax(0)
    return log_plan.exp()


def sinkd(
    student_logits: Tensor, teacher_logits: Tensor, *, tau: float = 2.0, epsilon: float = 0.1, iterations: int = 20
) -> Tensor:
    """Cost of carrying each of the student's rows to the teacher's.

    Args:
        student_logits: (position, class), any float type; widened to float32.
        teacher_logits: (position, class), detached here.
        tau: τ.
        epsilon: ε.
        iterations: of the plan.

    Returns:
        (position,) d, at least 0. Its sum is the transport of the whole batch; each value depends on all rows.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    costs = cost(student_logits, teacher_logits, tau=tau)
    return (plan(costs, epsilon=epsilon, iterations=iterations) * costs).sum(1)


def soft_labels(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """KD: cross-entropy with the teacher's softened distribution, (position,) nats; arguments as of `sinkd`."""
    return cross_entropy(*log_probabilities("sinkd", student_logits, teacher_logits, temperature))


class SinKD(Objective):
    """Soft labels row by row, and the transport between both sets of rows."""

    Config = SinKDConfig
    config: SinKDConfig
    task_weight: ClassVar[float | None] = 0.1

    def __init__(self, config: SinKDConfig | None = None, *, weight: float = 1.0, **settings: Any) -> None:
        super().__init__(config, weight=weight, **settings)
        self.task_weight = 1 - self.config.alpha  # type: ignore[misc]  # α is a setting here

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(relates_positions=True)

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        rows, settings = select_rows(signals), self.config
        own, theirs = rows.student_logits, rows.teacher_logits
        assert theirs is not None  # tapped by default
        transport = sinkd(own, theirs, tau=settings.tau, epsilon=settings.epsilon, iterations=settings.iterations)
        return {
            "kd": settings.alpha * soft_labels(own, theirs, temperature=settings.temperature),
            "sinkhorn": settings.beta * transport * (SUMMED * len(own) if settings.summed else 1.0),
        }


METHOD = Method(
    title="Sinkhorn Distance Minimization for Knowledge Distillation",
    paper="arXiv:2402.17110",
    authors="Xiao Cui, Yulei Qin, Yuting Gao, Enwei Zhang, Zihan Xu, Tong Wu, Ke Li, Xing Sun, Wengang Zhou, "
    "Houqiang Li",
    year=2024,
    summary="Beside soft labels, all predictions of a batch are carried to the teacher's at the least cost.",
    bibtex="""@inproceedings{cui2024sinkd,
  title = {Sinkhorn Distance Minimization for Knowledge Distillation},
  author = {Cui, Xiao and Qin, Yulei and Gao, Yuting and Zhang, Enwei and Xu, Zihan and Wu, Tong and Li, Ke and
    Sun, Xing and Zhou, Wengang and Li, Houqiang},
  booktitle = {Joint International Conference on Computational Linguistics, Language Resources and Evaluation},
  year = {2024}, eprint = {2402.17110}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("text-classification", "image-classification", "audio-classification", "text-generation"),
    objective=SinKD,
)
