"""Margin-MSE: a student of any architecture learns by how much the teacher prefers one passage to another.

Hofstätter, Althammer, Schröder, Sertkan, Hanbury: Improving Efficient Neural Ranking Models with Cross-Architecture
Knowledge Distillation, 2020, arXiv:2010.02666.

    l_q = 1 / (n - 1) · Σ_j ( (s_0 - s_j) - (t_0 - t_j) )²      a query with n passages, the relevant one is 0
    L   = mean over queries of l_q                              the paper has n = 2

s are the student's scores, t the teacher's, which carry no gradient. An offset of the teacher changes nothing, its
scale does: scores of different architectures lie on different scales, and the student takes over the teacher's. There
is no temperature and no term of labels; passage 0 need not be the teacher's choice, and its margin may be negative.

The baselines of the authors' code are `loss="pointwise_mse"`, mean_j (s_j - t_j)²; `"ranknet_weighted"`, mean_j
(t_0 - t_j) · log(1 + exp(s_j - s_0)), whose weight is negative where the teacher prefers j, so that it has no lower
bound there; `"mse_ranknet"`, the first plus the second without its weight.

Student: `scores="logit"`, a cross-encoder with one logit for query and passage together; `scores="dot"`, a bi-encoder
(an AutoModel) that reads each alone: product of the states of the first tokens, neither projected nor normalised, as
the paper's. All texts of a batch pass through it in one forward. Cosines would not do: they cannot reach a teacher's
margins. Teacher: live, with one logit, or the column `teacher_scores`, which `scored` makes: the mean of the scores of
several teachers (the paper's T2 is three), in float32, as bfloat16 would lose the margins.

    groups = margin_mse_groups(dataset, tokenizer=tokenizer)     # columns query, passages: the relevant one first
    Trainer(model, args, train_dataset=groups, data_collator=GroupCollator(tokenizer),
            callbacks=[DistillCallback(teacher, "margin_mse")])

The authors train with Adam at 7e-6 without decay, 32 triples a step. Margins of ±20 make the easy pairs most of the
loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Signals, Step, require_one_shape
from hf_compress.registry import Method
from hf_compress_plugins.encoders._ranking import (
    SCORES,
    RankingObjective,
    Texts,
    first_token,
    mean_of_tokens,
    ranking_groups,
    scores_of,
)
from hf_compress_plugins.encoders._ranking import GroupCollator as GroupCollator
from hf_compress_plugins.encoders._ranking import draw_passages as draw_passages

REMEDY = "Give both models the same passages, (query, passage) each."
TEXTS = Texts(query_length=30, passage_length=200)
"""As the authors' matchmaker is remembered to cut them; not checked."""


@dataclass(frozen=True, kw_only=True)
class MarginMSEConfig:
    """Which of the authors' losses, and how the student scores."""

    loss: Literal["margin_mse", "pointwise_mse", "ranknet_weighted", "mse_ranknet"] = "margin_mse"
    """The paper's; the others are its baselines."""
    scores: Literal["logit", "dot"] = "logit"
    """logit: a cross-encoder's; dot: a bi-encoder's product. The paper distils into both kinds."""
    pooling: Literal["first", "mean"] = "first"
    """Vector of a text for "dot": the state of its first token, as the paper's, or the mean over its tokens, which
    encoders for sentences were trained with."""
    teacher_tokens: Literal["shared", "own"] = "shared"
    """own: a live teacher reads the columns teacher_input_ids, teacher_attention_mask, …; always so for "dot"."""

    def __post_init__(self) -> None:
        for name, known in (
            ("loss", ("margin_mse", "pointwise_mse", "ranknet_weighted", "mse_ranknet")),
            ("scores", ("logit", "dot")),
            ("pooling", ("first", "mean")),
            ("teacher_tokens", ("shared", "own")),
        ):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"margin_mse: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )


def margins(scores: Tensor) -> Tensor:
    """(query, passage - 1): the first passage's score minus each other's.

    Raises:
        MismatchError: for scores that are not (query, passage) with at least two passages.
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise MismatchError(
            f"margin_mse: scores {tuple(scores.shape)} have no margins; (query, at least 2 passages) was expected."
        )
    return scores[:, :1] - scores[:, 1:]


def margin_mse(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Squared difference of the two models' margins.

    Args:
        student_scores: (query, passage), the relevant passage first.
        teacher_scores: (query, passage), detached here.

    Returns:
        (query,) at least 0: mean over the other passages.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("margin_mse", student_scores, teacher_scores, REMEDY)
    return (margins(student_scores) - margins(teacher_scores.detach())).square().mean(1)


def pointwise_mse(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """(query,) squared difference of the scores themselves, mean over passages; arguments as of `margin_mse`."""
    require_one_shape("margin_mse", student_scores, teacher_scores, REMEDY)
    return (student_scores - teacher_scores.detach()).square().mean(1)


def ranknet_weighted(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """(query,) logistic loss of each margin times the teacher's margin, mean over the other passages.

    Negative where the teacher prefers another passage than the first. Arguments as of `margin_mse`.
    """
    require_one_shape("margin_mse", student_scores, teacher_scores, REMEDY)
    return (margins(teacher_scores.detach()) * F.softplus(-margins(student_scores))).mean(1)


def mse_ranknet(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """(query,) sum of `pointwise_mse` and the logistic loss of each margin, without weights: the first passage is taken
    to be better whatever the teacher says. Arguments as of `margin_mse`."""
    return pointwise_mse(student_scores, teacher_scores) + F.softplus(-margins(student_scores)).mean(1)


def inter_passage_mse(
    student_positive: Tensor, student_negative: Tensor, teacher_positive: Tensor, teacher_negative: Tensor
) -> Tensor:
    """Margins of every part of a relevant document against every part of another, for students that score parts.

    Args:
        student_positive: (query, part) scores of the parts of the relevant document.
        student_negative: (query, part) of the other document.
        teacher_positive: (query, at least as many parts), detached here; what is beyond the student's is left out.
        teacher_negative: as many of the other document.

    Returns:
        (query,) mean over all pairs of parts.
    """

    def pairs(positive: Tensor, negative: Tensor) -> Tensor:
        return positive[:, : student_positive.shape[1], None] - negative[:, None, : student_negative.shape[1]]

    own = pairs(student_positive, student_negative)
    theirs = pairs(teacher_positive.detach(), teacher_negative.detach())
    require_one_shape("margin_mse", own, theirs, "The teacher must score at least the student's parts.")
    return (own - theirs).square().mean((1, 2))


def combined(scores: Tensor, *, standardise: bool = False) -> Tensor:
    """One teacher of several.

    Args:
        scores: (teacher, query, passage).
        standardise: each teacher's to mean 0 and standard deviation 1 first, over all that it scored, for teachers on
            different scales; the margins that the student learns are then on that scale.

    Returns:
        (query, passage) arithmetic mean of the scores.
    """
    if standardise:
        spread = scores.std((1, 2), keepdim=True, correction=0).clamp(min=torch.finfo(scores.dtype).eps)
        scores = (scores - scores.mean((1, 2), keepdim=True)) / spread
    return scores.mean(0)


class MarginMSE(RankingObjective):
    """The chosen loss of the scores of each query's passages."""

    Config = MarginMSEConfig
    config: MarginMSEConfig

    @property
    def apart(self) -> bool:
        return self.config.scores == "dot"

    def vectors(self, states: Tensor, tokens: Tensor) -> Tensor:
        return (first_token if self.config.pooling == "first" else mean_of_tokens)(states, tokens)

    def forward(self, signals: Signals, step: Step) -> Tensor:
        losses = {
            "margin_mse": margin_mse,
            "pointwise_mse": pointwise_mse,
            "ranknet_weighted": ranknet_weighted,
            "mse_ranknet": mse_ranknet,
        }
        return self.over_rows(losses[self.config.loss](*self.scores(signals)), signals)


def margin_mse_groups(
    dataset: datasets.Dataset,
    *,
    tokenizer: Any,
    teacher_tokenizer: Any = None,
    apart: bool = False,
    texts: Texts = TEXTS,
) -> datasets.Dataset:
    """Queries with passages as token ids; arguments as of `_ranking.ranking_groups`, `apart` for a bi-encoder."""
    return ranking_groups(dataset, tokenizer=tokenizer, texts=texts, teacher_tokenizer=teacher_tokenizer, apart=apart)


def scored(
    dataset: datasets.Dataset,
    *,
    teachers: Sequence[tuple[Any, Any]],
    texts: Texts = TEXTS,
    standardise: bool = False,
    batch: int = 32,
) -> datasets.Dataset:
    """The data set with the column `teacher_scores`: the mean of the teachers' scores, computed once.

    Args:
        dataset: columns `query` and `passages`, as many for each query.
        teachers: (model with one logit, its tokenizer) each.
        texts: as for training, so that the teachers read what the student reads.
        standardise: as of `combined`.
        batch: queries at a time.

    Raises:
        ConfigurationError: without teachers.
    """
    if not teachers:
        raise ConfigurationError("margin_mse: scored needs at least one (model, tokenizer).")
    found = []
    for model, tokenizer in teachers:
        groups = ranking_groups(dataset.select_columns(["query", "passages"]), tokenizer=tokenizer, texts=texts)
        found.append(torch.tensor(scores_of(model, groups, GroupCollator(tokenizer), batch=batch)))
    scores = combined(torch.stack(found), standardise=standardise)
    features = datasets.Features({**dataset.features, SCORES: datasets.List(datasets.Value("float32"))})
    return datasets.Dataset.from_dict({**dataset.to_dict(), SCORES: scores.tolist()}, features=features)


METHOD = Method(
    title="Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
    paper="arXiv:2010.02666",
    authors="Sebastian Hofstätter, Sophia Althammer, Michael Schröder, Mete Sertkan, Allan Hanbury",
    year=2020,
    summary="A ranking student, cross-encoder or bi-encoder, learns the teacher's margins between passages.",
    bibtex="""@misc{hofstatter2020marginmse,
  title = {Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
  author = {Hofstätter, Sebastian and Althammer, Sophia and Schr{\\"o}der, Michael and Sertkan, Mete and
    Hanbury, Allan},
  year = {2020}, eprint = {2010.02666}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=("text-ranking",),
    objective=MarginMSE,
    preparation=margin_mse_groups,
)
