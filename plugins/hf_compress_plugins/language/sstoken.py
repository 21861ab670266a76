"""Self-modulated and semantic-aware selection of the tokens that a model is tuned on.

Qin, Wang, Liao, Zhang, Zhang, Feng, Wang, Yan: ssToken: Self-modulated and Semantic-aware Token Selection for LLM
Fine-tuning, ICLR 2026, arXiv:2510.18250.

    REL_i   = L_his(x_i) - L_cur(x_i) = log P_cur(x_i | x_<i) - log P_his(x_i | x_<i)     for each token i of an answer
    Attn_i  = 1/H Σ_h Σ_(j in prompt) A^h_ij                         the query after token i, one deep layer, 0 … 1
    Score_i = γ (REL_i - min) / (max - min + ε) + (1 - γ) Attn_i     min and max within the answer
    keep the ⌈ρ n⌉ best of the n tokens of each answer
    L = Σ_kept L_cur(x_i) / number of all kept tokens

"his" is a frozen history model, the student before it was tuned. A token is kept if the student has learnt something
about it or if it looks at the prompt. Scores and choice carry no gradient; of equal scores the earlier is kept. What
is kept is decided within an answer and how many are kept is known from the labels, so accumulation changes nothing.

The prompt is every real token that is not learnt, so later answers of a chat see all questions before them; the
authors' code counts the labels of -100 and takes so many first tokens. The divisor is the code's mean over the kept
tokens; per answer, as the paper is reported to divide, short answers would weigh more. The attention is taken again
from the layer's queries and keys, softmax(q k / √d) over the real tokens so far, whichever backend the model uses: a
sliding window, a soft cap or another scale of a model's own is not in it. Current losses are those of the training
forward, dropout included. An average of the student's own weights as history, which the paper names and the code
lacks, is not here. In the code attention alone decides until a row with data set index 10,000 is met; here for the
first steps.

The choice may also be laid over distillation: `target="teacher"` puts KL(teacher ‖ student) in the place of L_cur in L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_compress import objective as o
from hf_compress.distiller import select_rows
from hf_compress.divergences import kl, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step, check_unpacked
from hf_compress.registry import Method

HISTORY = "history"
EPSILON = 1e-8
"""Of the authors' code: where all REL are equal each counts as 0."""


@dataclass(frozen=True, kw_only=True)
class SsTokenConfig:
    """Hyper-parameters of ssToken; defaults of the authors' code."""

    rho: float = 0.6
    """ρ, part of an answer's tokens that is kept, in (0, 1]."""
    gamma: float = 0.5
    """γ, 0 … 1: weight of REL; 0 is attention alone and 1 is REL alone."""
    layer: int = -1
    """Whose attention is looked at."""
    warmup_steps: int = 0
    """First optimizer steps with γ = 0. The authors' code waits for about 10,000 rows; how many steps that is depends
    on the batch."""
    sinks: int = 0
    """So many first tokens of a row are not counted as prompt: many models put attention there that means nothing. The
    authors' code counts them."""
    target: Literal["labels", "teacher"] = "labels"
    """What the kept tokens learn: the data's labels, as in the paper, or the teacher's distributions."""

    def __post_init__(self) -> None:
        if not 0 < self.rho <= 1 or not 0 <= self.gamma <= 1:
            raise ConfigurationError(
                f"sstoken: rho must lie in (0, 1] and gamma in 0 … 1, got {self.rho} and {self.gamma}."
            )
        if self.warmup_steps < 0 or self.sinks < 0:
            raise ConfigurationError(
                f"sstoken: warmup_steps and sinks must be at least 0, got {self.warmup_steps} and {self.sinks}."
            )
        if self.target not in ("labels", "teacher"):
            raise ConfigurationError(f"sstoken: target must be 'labels' or 'teacher', got {self.target!r}.")


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(position,) L, nats: cross-entropy of logits (position, vocab), widened to float32, with labels (position,)."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def attention(query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
    """A of one row, averaged over heads.

    Args:
        query: (head, time, dim), after rotation.
        key: (key head, time, dim); each serves as many queries as there are more of these.
        tokens: (time,) bool, the real tokens.

    Returns:
        (time, time) rows that sum to 1 over the real tokens up to their own; 0 for tokens that are not real.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = (one.detach().to(dtype).masked_fill(~tokens[:, None], 0.0) for one in (query, key))
    k = k.repeat_interleave(len(q) // len(k), 0)
    allowed = torch.ones_like(tokens).expand(len(tokens), -1).tril() & tokens & tokens[:, None]
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, torch.finfo(dtype).min)
    return torch.where(allowed, scores.softmax(-1), 0.0).mean(0)


def to_prompt(weights: Tensor, prompt: Tensor) -> Tensor:
    """(time,) Attn, 0 … 1: of attention weights (time, time) the part on the prompt's tokens, prompt (time,) bool."""
    return (weights * prompt).sum(-1)


def scores(excess: Tensor, attending: Tensor, example: Tensor, *, gamma: float) -> Tensor:
    """Score of each token.

    Args:
        excess: (position,) REL, in nats.
        attending: (position,) Attn.
        example: (position,) the answer, 0 …, that each belongs to.
        gamma: γ.

    Returns:
        (position,) 0 … 1.
    """
    if not len(excess):
        return excess
    count = int(example.max()) + 1
    ends = [
        excess.new_zeros(count).scatter_reduce(0, example, excess, reduce, include_self=False)[example]
        for reduce in ("amin", "amax")
    ]
    return gamma * (excess - ends[0]) / (ends[1] - ends[0] + EPSILON) + (1 - gamma) * attending


def kept_of(tokens: int, rho: float) -> int:
    """⌈ρ n⌉, how many of an answer's n tokens are kept: at least one."""
    return math.ceil(rho * tokens)


def keep(values: Tensor, example: Tensor, *, rho: float) -> Tensor:
    """Which tokens are kept.

    Args:
        values: (position,) scores.
        example: (position,) the answer that each belongs to.
        rho: ρ.

    Returns:
        (position,) bool, ⌈ρ n⌉ of each answer's n.
    """
    kept = torch.zeros_like(values, dtype=torch.bool)
    for one in example.unique():  # type: ignore[no-untyped-call]  # torch
        where = (example == one).nonzero().squeeze(-1)
        best = values[where].sort(descending=True, stable=True).indices
        kept[where[best[: kept_of(len(where), rho)]]] = True
    return kept


class SsToken(Objective):
    """Cross-entropy, or a divergence from the teacher, on a part of each answer's tokens."""

    Config = SsTokenConfig
    config: SsTokenConfig
    task_weight: ClassVar[float | None] = 0.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        if student.kind != "causal":
            raise MismatchError(f"sstoken: needs a causal language model with answers, got one of {student.kind}.")
        layer = self.config.layer
        return Needs(
            student=frozenset({"logits", f"q:{layer}", f"k:{layer}"}),
            teacher=frozenset({"logits"}) if self.config.target == "teacher" else None,
            frozen=(HISTORY,),
        )

    def count(self, inputs: Inputs) -> int:
        where = o.positions("causal", inputs)
        answers = torch.bincount(where.example).tolist()
        return sum(kept_of(tokens, self.config.rho) for tokens in answers if tokens)

    def forward(self, signals: Signals, step: Step) -> Tensor:
        check_unpacked(self.name, signals.inputs)
        rows = select_rows(signals)
        if rows.labels is None:
            raise MismatchError("sstoken: needs labels that are -100 on the prompt and token ids on the answer.")
        current = token_losses(rows.student_logits, rows.labels)
        with torch.no_grad():
            settings = self.config
            excess = token_losses(rows.frozen[HISTORY], rows.labels) - current
            gamma = 0.0 if step.global_step < settings.warmup_steps else settings.gamma
            values = scores(excess, self._attending(signals), rows.example, gamma=gamma)
            kept = keep(values, rows.example, rho=settings.rho)
        if settings.target == "labels":
            learnt = current
        else:
            assert rows.teacher_logits is not None  # tapped for this target
            learnt = kl(*log_probabilities(self.name, rows.student_logits, rows.teacher_logits))
        found = torch.where(kept, learnt, 0.0)
        return torch.where(values.isfinite(), found, math.nan)  # a broken history would spoil the choice unseen

    def _attending(self, signals: Signals) -> Tensor:
        """(position,) Attn of the token that each position predicts, from the query of that token."""
        layer, tokens = self.config.layer, signals.tokens
        query, key = (signals.student[f"{letter}:{layer}"] for letter in "qk")
        learnt = torch.zeros(signals.positions.rows, dtype=torch.bool, device=tokens.device)
        learnt[signals.positions.index] = True
        answer = F.pad(learnt.view_as(tokens), (1, 0))[:, :-1]  # a position scores the token after it
        prompt = tokens & ~answer & (tokens.cumsum(1) > self.config.sinks)
        found = torch.stack(
            [to_prompt(attention(*one[:3]), one[3]) for one in zip(query, key, tokens, prompt, strict=True)]
        )
        return F.pad(found, (0, 1))[:, 1:].flatten()[signals.positions.index]


METHOD = Method(
    title="ssToken: Self-modulated and Semantic-aware Token Selection for LLM Fine-tuning",
    paper="arXiv:2510.18250",
    authors="Xiaohan Qin, Xiaoxing Wang, Ning Liao, Cancheng Zhang, Xiangdong Zhang, Mingquan Feng, Jingzhi Wang, "
    "Junchi Yan",
    year=2026,
    summary="Tunes on the tokens that the student has learnt something about or that attend to the prompt.",
    bibtex="""@inproceedings{qin2026sstoken,
  title = {{ssToken}: Self-modulated and Semantic-aware Token Selection for {LLM} Fine-tuning},
  author = {Qin, Xiaohan and Wang, Xiaoxing and Liao, Ning and Zhang, Cancheng and Zhang, Xiangdong and
            Feng, Mingquan and Wang, Jingzhi and Yan, Junchi},
  booktitle = {International Conference on Learning Representations},
  year = {2026}, eprint = {2510.18250}, archivePrefix = {arXiv}
}""",
    algorithm=("supervised", "divergence"),
    knowledge=("self", "curation"),
    tasks=("text-generation",),
    objective=SsToken,
)
