"""Choosing a student's architecture before any training, by how alike untrained networks behave.

Dong, Li, Wei: DisWOT: Student Architecture Search for Distillation WithOut Training, CVPR 2023, arXiv:2303.15678,
section 3.

    G = normalize_rows( F Fᵀ ),  F: (example, features)                        relation of the examples of a batch
    s_r = - ‖ G_teacher - G_student ‖² / B²
    C_k = normalize_rows( g_k g_kᵀ ),  g = ∂ cross-entropy / ∂ classifier weight (class, channel)
    s_s = - Σ_k ‖ C_k,teacher - C_k,student ‖² / (channels · classes)          semantics of the classes
    score = standardised s_r + standardised s_s, over all candidates; higher is better

Both networks have random weights: N(0, 1) for linear and convolution weights, as in the paper. F is what the head
receives, padding set to 0. Where the widths differ g gᵀ (class, class) stands in for the C_k.

Differences from the authors' code: the two scores are standardised over the candidates before they are added (the
semantic one is the larger number and would decide alone), they are averaged over several batches and draws of weights,
and gradients never add up over candidates. In a trial on digits the number of parameters ranked students better than
either score: compare candidates of nearly one size.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, tokens
from hf_compress.parts import Budget, Ranking
from hf_compress.registry import Method
from hf_compress.taps import Taps, watching

FEATURES = "hidden:-1"
DRAWS = 3
"""Draws of weights that a score is averaged over; one alone depends on it."""
SPACE = ("num_hidden_layers", "hidden_size", "intermediate_size")
"""What is varied where no space is given, to the halves and quarters of the teacher's."""


def relation(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """How differently two networks relate the examples of a batch.

    Args:
        student_features: (example, …) of any width.
        teacher_features: (example, …) of any width, detached here.

    Returns:
        () squared distance of the matrices of similarities by the squared number of examples; 0 for one example.

    Raises:
        MismatchError: if the numbers of examples differ.
    """
    if len(student_features) != len(teacher_features):
        raise MismatchError(
            f"diswot: {len(student_features)} and {len(teacher_features)} examples; both networks must read one batch."
        )
    own, theirs = (_related(features) for features in (student_features, teacher_features.detach()))
    return (own - theirs).square().sum() / len(own) ** 2


def _related(features: Tensor) -> Tensor:
    flat = features.flatten(1)
    return normalize(flat @ flat.T, dim=1)


def channels(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """How differently two networks relate the channels of each example.

    Args:
        student_features: (example, channel, …).
        teacher_features: the same number of examples and channels, detached here.

    Returns:
        () squared distance by channels and examples.

    Raises:
        MismatchError: if examples or channels differ in number.
    """
    if student_features.shape[:2] != teacher_features.shape[:2]:
        raise MismatchError(
            f"diswot: {tuple(student_features.shape[:2])} and {tuple(teacher_features.shape[:2])} examples and "
            "channels must be the same."
        )
    own, theirs = (_correlated(features) for features in (student_features, teacher_features.detach()))
    return (own - theirs).square().sum() / (own.shape[0] * own.shape[1])


def _correlated(features: Tensor) -> Tensor:
    flat = features.flatten(2) if features.dim() > 2 else features[..., None]
    return normalize(flat @ flat.mT, dim=2)


def semantics(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """How differently two networks' classifiers would learn the classes.

    Args:
        student_gradient: (class, channel) of the classifier's weight.
        teacher_gradient: (class, channel), of any number of channels; detached here.

    Returns:
        () distance of the channels' correlations by class, where both have as many; else of the classes'.
    """
    if student_gradient.shape == teacher_gradient.shape:
        return channels(student_gradient, teacher_gradient)
    own, theirs = (normalize(g @ g.T, dim=1) for g in (student_gradient, teacher_gradient.detach()))
    return (own - theirs).square().sum() / len(own) ** 2


def classifier_gradient(pooled: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(class, channel) gradient of the mean cross-entropy by the classifier's weight; pooled: (example, channel)."""
    error = (pooled @ weight.T).softmax(-1)
    error[torch.arange(len(labels)), labels] -= 1
    return error.T @ pooled / len(labels)


def combine(relations: Sequence[float], classes: Sequence[float]) -> list[float]:
    """Scores of the candidates from both distances: each standardised over the candidates, negated and added."""
    columns = [torch.tensor(column, dtype=torch.float64) for column in (relations, classes)]
    spread = [(c - c.mean()) / c.std().clamp(min=1e-12) if len(c) > 1 else c * 0 for c in columns]
    return [float(value) for value in -(spread[0] + spread[1])]


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """The model with N(0, 1) weights in its linear and convolution layers, biases 0, norms 1; in eval mode."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw))
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw))
            elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d) and module.weight is not None:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
    return model.eval()


@dataclass(frozen=True)
class _Behaviour:
    """What an untrained network does with a batch."""

    features: Tensor
    gradient: Tensor


def _behaviour(model: nn.Module, inputs: Inputs) -> _Behaviour:
    head = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    if head is None or "labels" not in inputs:
        raise ConfigurationError("diswot: needs models that end in a linear classifier, and batches with labels.")
    taps, received = Taps(model, {FEATURES}, 0), list[Tensor]()
    handle = head.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    try:
        with watching(taps), torch.no_grad():
            output = model(**{name: value for name, value in inputs.items() if name != "labels"})
        features = taps.read(output)[FEATURES]
    finally:
        handle.remove()
        taps.remove()
    if features.dim() == 3 and "attention_mask" in inputs:
        features = features * tokens(inputs)[..., None]
    pooled = received[-1].flatten(0, -2)
    return _Behaviour(features, classifier_gradient(pooled, head.weight.detach(), inputs["labels"].flatten()))


def diswot(
    teacher: PreTrainedModel,
    *,
    data: Sequence[Inputs],
    budget: Budget,
    space: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
) -> Ranking:
    """Ranks students by configuration, without training any.

    Args:
        teacher: decides class and configuration; its weights are not used.
        data: batches with labels; 64 to 128 rows each in the paper.
        budget: how large a student may be, and how many are tried. A space with more is searched by evolution.
        space: values by key of the config; None: the teacher's depth and widths, their halves and quarters.
        seed: of weights and evolution.

    Returns:
        the candidates that were tried, best first.

    Raises:
        ConfigurationError: if no configuration of the space is within the budget.
    """
    space = space or _around(teacher)
    fitting = [values for values in itertools.product(*space.values()) if _fits(teacher, space, values, budget)]
    if not fitting:
        raise ConfigurationError(
            f"diswot: no configuration of {dict(space)} has {budget.parameters:,} parameters or less."
        )
    distances: dict[int, tuple[float, float]] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of weights that lie in no layer, which constructors draw
        theirs = [
            [_behaviour(untrained(type(teacher)(teacher.config), seed + d), b) for b in data] for d in range(DRAWS)
        ]
        for place in _candidates(fitting, budget, random.Random(seed), distances):
            student = _student(teacher, space, fitting[place])
            found = [
                _distances(_behaviour(untrained(student, seed + draw), batch), reference)
                for draw in range(DRAWS)
                for batch, reference in zip(data, theirs[draw], strict=True)
            ]
            distances[place] = (sum(one for one, _ in found) / len(found), sum(two for _, two in found) / len(found))
    ranked = _ranked(distances)
    return Ranking(
        configs=tuple(dict(zip(space, fitting[place], strict=True)) for place, _ in ranked),
        scores=tuple(score for _, score in ranked),
        build=lambda rank: _student(teacher, space, fitting[ranked[rank][0]]),
    )


def _distances(student: _Behaviour, teacher: _Behaviour) -> tuple[float, float]:
    return (
        float(relation(student.features, teacher.features)),
        float(semantics(student.gradient, teacher.gradient)),
    )


def _ranked(distances: Mapping[int, tuple[float, float]]) -> list[tuple[int, float]]:
    scores = combine([one for one, _ in distances.values()], [other for _, other in distances.values()])
    return sorted(zip(distances, scores, strict=True), key=lambda pair: -pair[1])


def _around(teacher: PreTrainedModel) -> dict[str, list[int]]:
    config: Any = teacher.config
    return {
        key: sorted({max(value // part, 1) for part in (1, 2, 4)})
        for key in SPACE
        if isinstance(value := getattr(config, key, None), int)
    }


def _student(teacher: PreTrainedModel, space: Mapping[str, Any], values: tuple[Any, ...]) -> PreTrainedModel:
    config = copy.deepcopy(teacher.config)
    for key, value in zip(space, values, strict=True):
        setattr(config, key, value)
    return type(teacher)(config)


def _candidates(
    fitting: Sequence[tuple[Any, ...]],
    budget: Budget,
    draw: random.Random,
    distances: Mapping[int, tuple[float, float]],
) -> Iterator[int]:
    """Places of all configurations; of more than the budget allows half at random, then the neighbours of the best."""
    if len(fitting) <= budget.evaluations:
        yield from range(len(fitting))
        return
    left = draw.sample(range(len(fitting)), len(fitting))
    for _ in range(max(budget.evaluations // 2, 1)):
        yield left.pop()
    while len(distances) < budget.evaluations:
        best = [place for place, _ in _ranked(distances)[: max(len(distances) // 4, 1)]]
        parent = fitting[draw.choice(best)]
        child = min(left, key=lambda place: sum(a != b for a, b in zip(fitting[place], parent, strict=True)))
        left.remove(child)
        yield child


def _fits(teacher: PreTrainedModel, space: Mapping[str, Any], values: tuple[Any, ...], budget: Budget) -> bool:
    try:
        with torch.device("meta"):
            student = _student(teacher, space, values)
    except (ValueError, RuntimeError, TypeError):
        return False  # widths that the heads do not divide
    return bool(sum(parameter.numel() for parameter in student.parameters()) <= budget.parameters)


METHOD = Method(
    title="DisWOT: Student Architecture Search for Distillation WithOut Training",
    paper="arXiv:2303.15678",
    authors="Peijie Dong, Lujun Li, Zimian Wei",
    year=2023,
    summary="Ranks students of a space of configurations by how alike they and the teacher behave untrained.",
    bibtex="""@inproceedings{dong2023diswot,
  title = {{DisWOT}: Student Architecture Search for Distillation WithOut Training},
  author = {Dong, Peijie and Li, Lujun and Wei, Zimian},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}, eprint = {2303.15678}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=("text-classification", "image-classification"),
    search=diswot,
)
