"""Progressive distillation in four stages: between two of them one of teacher, data and loss changes.

Su, Chen, Feng, Liu, Liu, Sun, Tian, Wu, Wang: ERNIE-Tiny: A Progressive Distillation Framework for Pretrained
Transformer Compression, 2021, arXiv:2106.02241.

    stage                 teacher       data      loss
    general               pre-trained   general   L_lat
    general-enhanced      fine-tuned    general   L_lat
    task-adaptive         fine-tuned    task      L_lat
    task-specific         fine-tuned    task      L_lat + L_soft + L_hard

    L_lat = Σ_i MSE( A_s,i , A_t,g(i) ) + Σ_i MSE( H_s,i W , H_t,g(i) ),  g(i) = i · L / M, with the embeddings (i = 0)

A are the attention probabilities between real tokens; H hidden states of real tokens; W one projection for all layers,
learned with the student and carried from stage to stage, left out where both widths are one.
The teacher carries no gradient. L_soft is written as a KL at temperature 1, L_hard is the task's own loss; all weights
are 1. Optimizer and schedule start anew in each stage; labels and the head are touched in the last one alone.

Of the paper only the abstract could be compared: the form of L_lat is TinyBERT's on probabilities, which unlike scores
keep half precision finite; the weights and the temperature are our choice. Two models with other head counts are
refused.

    run_stages(RECIPE, student, folder, Surroundings(models={"pretrained": …, "finetuned": …},
                                                     data={"general": …, "task": …}, arguments={…}))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Needs, Objective, Shapes, Signals, Sizes, Step, require_one_shape
from hf_compress.registry import Method


@dataclass(frozen=True, kw_only=True)
class ERNIETinyConfig:
    """Which parts of the latent loss are used."""

    attention: bool = True
    """Attention probabilities; needs one number of heads."""
    hidden: bool = True
    """Hidden states and embeddings."""

    def __post_init__(self) -> None:
        if not (self.attention or self.hidden):
            raise ConfigurationError("ernie_tiny: attention and hidden are both off; nothing would be learned.")


def layer_map(student: int, teacher: int) -> tuple[int, ...]:
    """g: for each of the student's layers, from 1, the teacher's.

    Raises:
        MismatchError: if the student is the deeper one.
    """
    if not 0 < student <= teacher:
        raise MismatchError(
            f"ernie_tiny: a student of {student} layers cannot learn the layers of a teacher of {teacher}."
        )
    return tuple(round(layer * teacher / student) for layer in range(1, student + 1))


def attention(queries: Tensor, keys: Tensor, tokens: Tensor, *, causal: bool = False) -> Tensor:
    """Attention probabilities between real tokens.

    Args:
        queries: (batch, head, time, dim), any float type; widened to float32.
        keys: (batch, head, time, dim); fewer heads are repeated.
        tokens: (batch, time) bool, the real ones.
        causal: a token attends to itself and what comes before.

    Returns:
        (batch, head, time, time), 0 for keys that are padding or, where causal, come after; of a row of padding alone
        anything finite.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries.to(dtype) @ keys.to(dtype).mT / math.sqrt(queries.shape[-1])
    seen = tokens[:, None, None, :].expand_as(scores)
    return scores.masked_fill(~(seen.tril() if causal else seen), torch.finfo(dtype).min).softmax(-1)


def attention_loss(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Squared difference of probabilities, for each real token as a query.

    Args:
        student: (batch, head, time, time).
        teacher: the same shape, detached here.
        tokens: (batch, time) bool, the real ones.

    Returns:
        (token,) means over heads and real keys.

    Raises:
        MismatchError: if the shapes differ, e.g. in heads.
    """
    require_one_shape("ernie_tiny", student, teacher, "Give both models one number of heads, or set attention=False.")
    square = (student - teacher.detach()).square().mean(1).sum(-1)
    return (square / tokens.sum(1, keepdim=True).clamp(min=1))[tokens]


def state_loss(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """(token,) squared difference of states (batch, time, dim), mean over dim, of the real tokens; teacher detached.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("ernie_tiny", student, teacher, "Use models that read the same tokens.")
    dtype = torch.promote_types(student.dtype, torch.float32)
    return (student[tokens].to(dtype) - teacher.detach()[tokens].to(dtype)).square().mean(-1)


class ERNIETiny(Objective):
    """The latent loss of all stages."""

    Config = ERNIETinyConfig
    config: ERNIETinyConfig

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        assert teacher is not None  # the callback asks for one first
        self.causal = student.causal or teacher.causal
        self.pairs = tuple(enumerate(layer_map(student.layers, teacher.layers), 1))
        if self.config.attention and student.heads != teacher.heads:
            raise MismatchError(
                f"ernie_tiny: the student has {student.heads} heads, the teacher {teacher.heads}. Give both one number "
                "of heads, or set attention=False."
            )
        own, theirs = set[str](), set[str]()
        for layer, other in self.pairs:
            if self.config.hidden:
                own |= {"hidden:0", f"hidden:{layer}"}
                theirs |= {"hidden:0", f"hidden:{other}"}
            if self.config.attention:
                own |= {f"q:{layer - 1}", f"k:{layer - 1}"}
                theirs |= {f"q:{other - 1}", f"k:{other - 1}"}
        return Needs(student=frozenset(own), teacher=frozenset(theirs), mean_over="tokens")

    def build(self, student: Shapes, teacher: Shapes) -> None:
        if self.config.hidden and student["hidden:0"][-1] != teacher["hidden:0"][-1]:
            self.projection = nn.Linear(student["hidden:0"][-1], teacher["hidden:0"][-1], bias=False)

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.config.hidden:
            pairs = ((0, 0), *self.pairs)
            found["hidden"] = self._sum([self._states(signals, own, theirs) for own, theirs in pairs])
        if self.config.attention:
            found["attention"] = self._sum([self._attention(signals, own, theirs) for own, theirs in self.pairs])
        return found

    @staticmethod
    def _sum(values: list[Tensor]) -> Tensor:
        return torch.stack(values).sum(0)

    def _states(self, signals: Signals, own: int, theirs: int) -> Tensor:
        student = signals.student[f"hidden:{own}"].masked_fill(~signals.tokens[..., None], 0.0)
        projection: Any = getattr(self, "projection", None)
        if projection is not None:
            student = projection(student.to(projection.weight.dtype))
        return state_loss(student, signals.teacher[f"hidden:{theirs}"], signals.tokens)

    def _attention(self, signals: Signals, own: int, theirs: int) -> Tensor:
        real = signals.tokens
        maps = []
        for taps, layer in ((signals.student, own), (signals.teacher, theirs)):
            queries, keys = (taps[f"{letter}:{layer - 1}"] for letter in "qk")
            padding = ~real[:, None, :, None]
            queries, keys = (vectors.masked_fill(padding, 0.0) for vectors in (queries, keys))
            maps.append(attention(queries, keys, real, causal=self.causal))
        return attention_loss(maps[0], maps[1], real)


RECIPE: Mapping[str, Any] = {
    "stages": (
        {
            "name": "general",
            "teacher": "pretrained",
            "data": "general",
            "methods": ("ernie_tiny",),
            "labels": False,
            "trainable": "body",
        },
        {
            "name": "general-enhanced",
            "teacher": "finetuned",
            "data": "general",
            "methods": ("ernie_tiny",),
            "labels": False,
            "trainable": "body",
        },
        {
            "name": "task-adaptive",
            "teacher": "finetuned",
            "data": "task",
            "methods": ("ernie_tiny",),
            "labels": False,
            "trainable": "body",
        },
        {
            "name": "task-specific",
            "teacher": "finetuned",
            "data": "task",
            "methods": ("ernie_tiny", {"name": "kd", "temperature": 1.0}),
            "task_weight": 1.0,
        },
    )
}
"""The four stages, for `hf_compress.stages.run_stages`."""

METHOD = Method(
    title="ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression",
    paper="arXiv:2106.02241",
    authors="Weiyue Su, Xuyi Chen, Shikun Feng, Jiaxiang Liu, Weixin Liu, Yu Sun, Hao Tian, Hua Wu, Haifeng Wang",
    year=2021,
    summary="Four stages from a general teacher and text to the task's, of which each changes one thing.",
    bibtex="""@misc{su2021ernietiny,
  title = {{ERNIE-Tiny}: A Progressive Distillation Framework for Pretrained Transformer Compression},
  author = {Su, Weiyue and Chen, Xuyi and Feng, Shikun and Liu, Jiaxiang and Liu, Weixin and Sun, Yu and Tian, Hao and
            Wu, Hua and Wang, Haifeng},
  year = {2021}, eprint = {2106.02241}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence", "similarity"),
    knowledge=("feature",),
    tasks=("text-classification", "token-classification", "fill-mask"),
    objective=ERNIETiny,
    recipe=RECIPE,
)
