"""Matching hidden states, layer by layer.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550, section
2.2 (hints through a learned regressor); layer maps as in Sun, Cheng, Gan, Liu: Patient Knowledge Distillation, EMNLP
2019, arXiv:1908.09355; the cosine as in Sanh, Debut, Chaumond, Wolf: DistilBERT, 2019, arXiv:1910.01108.

    l_i = 1/|M| Σ_{(s,t) ∈ M} d( W_s h_s,i , h_t,i )    at each real token i
    d(a, b) = 1/dim · ‖a - b‖²  (mse)   or   1 - cos(a, b)  (cosine)

h_s is what the student's block s puts out, h_t the teacher's block t. W_s is the identity where both widths are equal,
else a learned matrix that is dropped after training. The teacher carries no gradient. PKD normalises h before the mse;
that is twice the cosine up to the dimension, so it is not offered apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Needs, Objective, Shapes, Signals, Sizes, Step, require_one_shape
from hf_compress.registry import Method

LayerMap = Literal["uniform", "last", "first"] | Mapping[int, int]
Distance = Literal["mse", "cosine"]


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Hyper-parameters of hidden-state matching."""

    layers: LayerMap = "uniform"
    """Which teacher block each student block follows: spread evenly, the teacher's last ones, its first ones, or
    {student block: teacher block}, counted from 1; negative from the end."""
    distance: Distance = "cosine"
    """d. Cosine by default: it does not depend on the scale of the hidden states, which differs between models."""

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) and self.layers not in ("uniform", "last", "first"):
            raise ConfigurationError(
                f"features: layers must be 'uniform', 'last', 'first' or a mapping, got {self.layers!r}."
            )
        if not isinstance(self.layers, str | Mapping):
            raise ConfigurationError(f"features: layers must be a name or a mapping, got {self.layers!r}.")
        if not self.layers:
            raise ConfigurationError("features: the layer map is empty, so nothing would be matched.")
        if isinstance(self.layers, Mapping):
            object.__setattr__(self, "layers", _numbers(self.layers))
        if self.distance not in ("mse", "cosine"):
            raise ConfigurationError(f"features: distance must be 'mse' or 'cosine', got {self.distance!r}.")


def _numbers(layers: Mapping[Any, Any]) -> dict[int, int]:
    """The map with whole numbers: JSON, in which settings are recorded, turns its keys into text."""
    try:
        found = {int(str(s)): int(str(t)) for s, t in layers.items()}
    except ValueError as error:
        raise ConfigurationError(f"features: a layer map has numbers of blocks alone, got {layers}.") from error
    if len(found) != len(layers):
        raise ConfigurationError(f"features: a block of the student appears twice in {layers}. Give each one once.")
    return found


def layer_pairs(layers: LayerMap, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """(student block, teacher block) pairs, counted from 1, for models of that many blocks.

    Raises:
        MismatchError: for a block that a model does not have, or a teacher with fewer blocks under last and first.
    """
    if not isinstance(layers, str):
        pairs = tuple(sorted((s % (student + 1), t % (teacher + 1)) for s, t in layers.items()))
        wrong = [(s, t) for s, t in layers.items() if not (0 < abs(s) <= student and 0 < abs(t) <= teacher)]
        if wrong:
            raise MismatchError(
                f"features: pairs {wrong} name blocks beyond the student's {student} or the teacher's {teacher}."
            )
        if len({s for s, _ in pairs}) != len(pairs):
            raise MismatchError(f"features: {dict(layers)} names a block of the student twice. Give each one once.")
        return pairs
    if layers == "uniform":
        return tuple((s, max(round(s * teacher / student), 1)) for s in range(1, student + 1))
    if teacher < student:
        raise MismatchError(
            f"features: layers={layers!r} needs a teacher with at least {student} blocks, got {teacher}."
        )
    shift = teacher - student if layers == "last" else 0
    return tuple((s, s + shift) for s in range(1, student + 1))


def hidden_distance(student: Tensor, teacher: Tensor, *, distance: Distance) -> Tensor:
    """d at each token.

    Args:
        student: (token, dim), projected already; widened to float32.
        teacher: (token, dim), detached here.
        distance: mse, the mean over dim of the squared difference, or cosine, 1 - cos, 0 … 2.

    Returns:
        (token,)

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("features", student, teacher, "Give both models the same tokens of each example.")
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if distance == "mse":
        return (student - teacher).square().mean(-1)
    return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)


def select_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    """(token, dim) states of the real tokens."""
    if hidden.dim() != 3 or hidden.shape[:2] != tokens.shape:
        raise MismatchError(
            f"features: hidden states of shape {tuple(hidden.shape)} do not fit tokens of shape {tuple(tokens.shape)}. "
            "Both models must see the same tokens."
        )
    return hidden[tokens]


class Features(Objective):
    """Hidden states of every mapped block; projections are made where the widths differ."""

    Config = FeaturesConfig
    config: FeaturesConfig
    pairs: tuple[tuple[int, int], ...]

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        if teacher is None or not student.layers or not teacher.layers:
            raise MismatchError("features: both models must have hidden states: num_hidden_layers in their configs.")
        self.pairs = layer_pairs(self.config.layers, student.layers, teacher.layers)
        return Needs(
            student=frozenset(f"hidden:{s}" for s, _ in self.pairs),
            teacher=frozenset(f"hidden:{t}" for _, t in self.pairs),
            same_tokens=False,
            mean_over="tokens",
        )

    def build(self, student: Shapes, teacher: Shapes) -> None:
        self.project = nn.ModuleDict()
        for s, t in self.pairs:
            narrow, wide = student[f"hidden:{s}"][-1], teacher[f"hidden:{t}"][-1]
            if narrow != wide:
                self.project[str(s)] = nn.Linear(narrow, wide, bias=False)

    def forward(self, signals: Signals, step: Step) -> Tensor:
        values = [self._pair(signals, s, t) for s, t in self.pairs]
        return torch.stack(values).mean(0)

    def _pair(self, signals: Signals, s: int, t: int) -> Tensor:
        """(token,) of one pair; where rows have no tokens (images) the mean over a row's states."""
        student, teacher = signals.student[f"hidden:{s}"], signals.teacher[f"hidden:{t}"]
        per_row = "attention_mask" not in signals.inputs and signals.tokens.shape[1] == 1 and student.dim() == 3
        tokens = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if per_row else signals.tokens
        chosen = select_tokens(student, tokens)
        if str(s) in self.project:
            projection = self.project[str(s)]
            chosen = projection(chosen.to(next(projection.parameters()).dtype))
        value = hidden_distance(chosen, select_tokens(teacher, tokens), distance=self.config.distance)
        return value.view(student.shape[:2]).mean(1) if per_row else value


METHOD = Method(
    title="FitNets: Hints for Thin Deep Nets",
    paper="arXiv:1412.6550",
    authors="Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta, Yoshua Bengio",
    year=2015,
    summary="The student's hidden states follow the teacher's layer by layer, projected where widths differ.",
    bibtex="""@inproceedings{romero2015fitnets,
  title = {FitNets: Hints for Thin Deep Nets},
  author = {Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and
            Bengio, Yoshua},
  booktitle = {International Conference on Learning Representations},
  year = {2015}, eprint = {1412.6550}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=(
        "text-classification",
        "text-regression",
        "token-classification",
        "question-answering",
        "fill-mask",
        "text-generation",
        "feature-extraction",
        "image-classification",
        "audio-classification",
    ),
    default_for=(
        "text-classification",
        "text-regression",
        "token-classification",
        "question-answering",
        "fill-mask",
        "feature-extraction",
        "image-classification",
        "audio-classification",
    ),
    objective=Features,
)
