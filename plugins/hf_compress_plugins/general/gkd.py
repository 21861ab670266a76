"""Generalised knowledge distillation, on the data's answers or on the student's own.

Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem: On-Policy Distillation of Language Models: Learning from
Self-Generated Mistakes, ICLR 2024, arXiv:2306.13649, section 3.

    l_i = D( p_i , q_i ),    p, q = softmax(z_t / T), softmax(z_s / T)    at each scored position i
    D = β KL(p ‖ m) + (1 - β) KL(q ‖ m),  m = β p + (1 - β) q;    β = 0: KL(p ‖ q),  β = 1: KL(q ‖ p)

D may also be the total variation (DistillSpec, arXiv:2310.08461) or a skewed KL towards m in either direction
(DistiLLM, arXiv:2402.03898), with β as the part of the first distribution in m. The teacher carries no gradient. There
is no T²: the paper has none. The task's own loss is left out (weight 0), as in the paper's objective.

With probability λ, one draw a batch and the same on all ranks, the answers of a batch are replaced by samples of the
current student (Algorithm 1); the divergence is then averaged within each answer and over answers, as the objective's
1/|y| says, because the lengths of a window's later batches are not known. Through sampling there is no gradient; the
prompt is not scored, the end-of-sequence token is.

With small β the JSD's gradient is small: at β = 0.1 its value is about a thirteenth of the KL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hf_compress.divergences import check_temperature, jsd, log_probabilities, skew_kl, tvd
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Rows, Step
from hf_compress.on_policy import OnPolicy, check_answers
from hf_compress.registry import Method

Divergence = Literal["jsd", "tvd", "skew_kl", "skew_rkl"]


@dataclass(frozen=True, kw_only=True)
class GKDConfig:
    """Hyper-parameters of generalised knowledge distillation."""

    divergence: Divergence = "jsd"
    """D."""
    beta: float = 0.5
    """β, 0 … 1. The default of TRL's GKDConfig."""
    temperature: float = 1.0
    """T > 0 in the loss. TRL's trainer uses 1 here; its `temperature` of 0.9 affects sampling only."""

    lmbda: float = 0.0
    """λ, 0 … 1: part of batches that the student answers. TRL's default is 0.5; 0 asks neither for prompts in the data
    nor for the time of sampling."""
    max_new_tokens: int = 128
    """Of a sampled answer. TRL's default."""
    sampling_temperature: float = 0.9
    """Of the samples. TRL's default."""

    def __post_init__(self) -> None:
        check_temperature("gkd", self.temperature)
        check_temperature("gkd", self.sampling_temperature)
        check_answers("gkd", self.lmbda, self.max_new_tokens)
        if self.divergence not in ("jsd", "tvd", "skew_kl", "skew_rkl"):
            raise ConfigurationError(f"gkd: divergence must be jsd, tvd, skew_kl or skew_rkl, got {self.divergence!r}.")
        ends = self.divergence.startswith("skew")
        if not 0 <= self.beta <= 1 or (ends and self.beta in (0, 1)):
            raise ConfigurationError(f"gkd: beta must lie in 0 … 1 (ends excluded for a skewed KL), got {self.beta}.")


def gkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    divergence: Divergence = "jsd",
) -> Tensor:
    """D(p, q) at each position.

    Args:
        student_logits: (position, vocab), any float type; widened to float32.
        teacher_logits: (position, vocab), detached here.
        beta: β; for tvd without effect.
        temperature: T, divides both logits.
        divergence: D.

    Returns:
        (position,) at least 0, in nats; for tvd 0 … 1.

    Raises:
        MismatchError: if the two logits differ in shape.
    """
    log_p, log_q = log_probabilities("gkd", student_logits, teacher_logits, temperature)
    if divergence == "tvd":
        return tvd(log_p, log_q)
    if divergence == "skew_kl":
        return skew_kl(log_p, log_q, beta)
    if divergence == "skew_rkl":
        return skew_kl(log_q, log_p, beta)
    return jsd(log_p, log_q, beta)


class GKD(OnPolicy):
    """A divergence of choice at every scored position."""

    Config = GKDConfig
    config: GKDConfig
    task_weight: ClassVar[float | None] = 0.0

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        settings = self.config
        return gkd(
            rows.student_logits,
            rows.teacher_logits,
            beta=settings.beta,
            temperature=settings.temperature,
            divergence=settings.divergence,
        )


METHOD = Method(
    title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    paper="arXiv:2306.13649",
    authors="Rishabh Agarwal, Nino Vieillard, Yongchao Zhou, Piotr Stanczyk, Sabela Ramos, Matthieu Geist, "
    "Olivier Bachem",
    year=2024,
    summary="A generalised Jensen-Shannon divergence between the teacher's and the student's next-token distributions.",
    bibtex="""@inproceedings{agarwal2024onpolicy,
  title = {On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes},
  author = {Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and
            Geist, Matthieu and Bachem, Olivier},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2306.13649}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("text-generation", "text2text-generation", "automatic-speech-recognition", "fill-mask"),
    default_for=("text-generation", "text2text-generation", "automatic-speech-recognition"),
    objective=GKD,
)
