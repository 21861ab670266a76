"""Alignment to preferences as distillation from two models that were aligned before, token by token.

Zhang, Zhang, Zhang, Hu, Chen, Xu: AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation,
ACL 2025, arXiv:2503.02832.

    d   = Σ_v | π_dpo[v] - π_rev[v] |                          0 … 2, at each scored position
    w   = c · d + 0.001                                        how far the teacher goes beyond the DPO model
    π*  = softmax( ( z_dpo + w (z_dpo - z_rev) ) / T )         the teacher
    l   = (β / w) · KL( π_θ ‖ π* )                             the whole vocabulary
    L   = mean over answers of the mean of l within the answer

The teacher of the run is a model that DPO has aligned; the frozen "reverse" model is the same base after DPO with
chosen and rejected answers exchanged: TRL's DPOTrainer makes both. The student is a copy of the base or of the DPO
model. All three read the same tokens. Both models and w carry no gradient. Where the two disagree, the teacher goes
further and the weight is smaller; where they agree the weight reaches β / 0.001, which `max_weight` bounds. Answers
are the data's chosen ones, or, with `on_policy`, samples of the current student.

The paper's earlier forms are here too, with a constant w = β / β₂ and weight β₂: the reward of DPO against its base,
π* = softmax( z_ref + w (z_dpo - z_ref) ) (`reward="dpo"`, which asks for a frozen "reference", the base), and the
contrast of both without adaptation (`adaptive=False`). Their equality with RLHF is the paper's theorem.

Differences from the authors' code. Off-policy it masks logits by the labels of the same place, so that the logits that
predict an answer's first token are left out and those after its end are taken; here a position is scored if the token
that it predicts is labelled. On-policy it tempers the student by T as well; here never. T is 1 in its scripts. An
entry that either model excludes is not extrapolated, as the difference of two infinities is no number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_compress.divergences import check_temperature, kl, log_probabilities
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Inputs, Needs, Objective, Rows, Sizes, Step, require_one_shape
from hf_compress.on_policy import on_policy
from hf_compress.registry import Method

FLOOR = 1e-3
"""Least w, of the authors' code."""
Reward = Literal["contrastive", "dpo"]
ROLES: dict[Reward, str] = {"contrastive": "reverse", "dpo": "reference"}
"""The further frozen model by reward."""


@dataclass(frozen=True, kw_only=True)
class AlignDistilConfig:
    """Hyper-parameters of AlignDistil; defaults of the authors' scripts."""

    beta: float = 0.1
    """β > 0 of the DPO models."""
    c: float = 10.0
    """c > 0. The authors use 10 on the data's answers and 15 on the student's own."""
    temperature: float = 1.0
    """T > 0, divides the teacher's logits alone."""
    reward: Reward = "contrastive"
    """What a token is worth: log π_dpo - log π_rev, or log π_dpo - log π_ref."""
    adaptive: bool = True
    """False: w = β / β₂ everywhere, weight β₂."""
    beta2: float = 0.05
    """β₂ > 0, used where nothing adapts. Our choice, which doubles the step from the base: the paper's is not known."""
    max_weight: float | None = None
    """Bound on β / w; None: β / 0.001, as with the authors."""
    on_policy: bool = False
    """Whether answers are sampled from the current student."""
    max_new_tokens: int = 1024
    """Of a sampled answer; sampled at temperature 1 from the whole vocabulary."""

    def __post_init__(self) -> None:
        check_temperature("aligndistil", self.temperature)
        for name in ("beta", "c", "beta2"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"aligndistil: {name} must be positive and finite, got {getattr(self, name)}.")
        if self.max_weight is not None and not 0 < self.max_weight < math.inf:
            raise ConfigurationError(
                f"aligndistil: max_weight must be positive and finite or None, got {self.max_weight}."
            )
        if self.reward not in ROLES or self.max_new_tokens < 1:
            raise ConfigurationError(
                f"aligndistil: reward must be one of {sorted(ROLES)} and max_new_tokens at least 1, got "
                f"{self.reward!r} and {self.max_new_tokens}."
            )


def strength(dpo_logits: Tensor, other_logits: Tensor, *, c: float) -> Tensor:
    """(position,) w, at least 0.001: c times the L1 distance, 0 … 2, of the two models' distributions.

    Args:
        dpo_logits: (position, vocab), any float type; widened to float32.
        other_logits: (position, vocab), of the reverse model or the reference.
        c: c.

    Raises:
        MismatchError: if the shapes differ.
    """
    log_p, log_r = log_probabilities("aligndistil", other_logits.detach(), dpo_logits)
    return c * (log_p.exp() - log_r.exp()).abs().sum(-1) + FLOOR


def extrapolated(dpo_logits: Tensor, other_logits: Tensor, w: Tensor, *, reward: Reward, temperature: float) -> Tensor:
    """(position, vocab) log π*.

    Args:
        dpo_logits: (position, vocab), any float type; widened to float32.
        other_logits: (position, vocab), of the reverse model or the reference.
        w: (position,) how far.
        reward: from which model the step is taken: contrastive from the DPO model, dpo from the reference.
        temperature: T.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("aligndistil", other_logits, dpo_logits, "Both frozen models need the student's vocabulary.")
    dtype = torch.promote_types(dpo_logits.dtype, torch.float32)
    dpo, other = dpo_logits.detach().to(dtype), other_logits.detach().to(dtype)
    step = torch.where(dpo.isinf() | other.isinf(), 0.0, dpo - other)
    start = dpo if reward == "contrastive" else other
    return ((start + w.to(dtype)[:, None] * step) / temperature).log_softmax(-1)


def aligndistil(student_logits: Tensor, log_target: Tensor, weight: Tensor) -> Tensor:
    """The reverse KL, weighed.

    Args:
        student_logits: (position, vocab), any float type; widened to float32.
        log_target: (position, vocab) log π*.
        weight: (position,) β / w.

    Returns:
        (position,) nats, at least 0; infinite where the target excludes what the student allows.

    Raises:
        MismatchError: if the shapes differ.
    """
    log_p, log_q = log_probabilities("aligndistil", student_logits, log_target)
    return weight * kl(log_q, log_p)


class AlignDistil(Objective):
    """A reverse KL to a teacher that is composed, at each token, of two aligned models."""

    Config = AlignDistilConfig
    config: AlignDistilConfig
    task_weight: ClassVar[float | None] = 0.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        settings = self.config
        return Needs(frozen=(ROLES[settings.reward],), mean_over="examples", rescored=settings.on_policy)

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        if not self.config.on_policy:
            return inputs
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return on_policy(inputs, step, max_new_tokens=self.config.max_new_tokens, **sampling)

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        settings, dpo, other = self.config, rows.teacher_logits, rows.frozen[ROLES[self.config.reward]]
        if settings.adaptive:
            w = strength(dpo, other, c=settings.c)
            weight = (settings.beta / w).clamp(0.0, settings.max_weight)
        else:
            weight = torch.full(dpo.shape[:1], settings.beta2, device=dpo.device)
            w = settings.beta / weight
        log_target = extrapolated(dpo, other, w, reward=settings.reward, temperature=settings.temperature)
        return aligndistil(rows.student_logits, log_target, weight)


METHOD = Method(
    title="AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
    paper="arXiv:2503.02832",
    authors="Songming Zhang, Xue Zhang, Tong Zhang, Bojie Hu, Yufeng Chen, Jinan Xu",
    year=2025,
    summary="Aligns a model token by token to a teacher composed of a DPO model and one aligned the other way round.",
    bibtex="""@inproceedings{zhang2025aligndistil,
  title = {{AlignDistil}: Token-Level Language Model Alignment as Adaptive Policy Distillation},
  author = {Zhang, Songming and Zhang, Xue and Zhang, Tong and Hu, Bojie and Chen, Yufeng and Xu, Jinan},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2025}, eprint = {2503.02832}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature", "feedback"),
    tasks=("text-generation",),
    objective=AlignDistil,
)
