"""From the signals of one micro-batch to its part of the run's loss.

Total = task_weight · task + Σ weightᵢ · Σ termsᵢ, each term a sum divided by a denominator that was counted over the
whole accumulation window and all processes before its first forward. So four micro-batches of one row give the gradient
of one batch of four, and two processes that of one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import objective as o
from .errors import ConfigurationError, MismatchError, NumericalError
from .objective import Inputs, Kind, Needs, Objective, Positions, Rows, Signals, Step, Values
from .outputs import two_outcomes

if TYPE_CHECKING:
    from .heads import Logits

PREFIX = "distiller."
"""Of the state that a mid-run checkpoint carries beside the student's own weights."""


class Distiller(nn.ModuleDict):
    """The objectives of a run, attached to the student as `student.distiller` while it trains.

    Learned parts are thereby in the optimizer, under clipping and DDP; parameters and buffers are in every checkpoint.
    Objectives are keyed `0_kd`, `1_kd`: two of one method may run together.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__({f"{place}_{objective.name}": objective for place, objective in enumerate(objectives)})

    @property
    def objectives(self) -> list[Objective]:
        return [module for module in self.values() if isinstance(module, Objective)]

    def label(self, key: str) -> str:
        """How a term of that objective is called in logs: by method, by key where a method runs twice."""
        name = key.partition("_")[2]
        return key if sum(objective.name == name for objective in self.objectives) > 1 else name


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the terms of a batch or of a window are divided by."""

    positions: float
    tokens: float
    examples: float
    labels: float
    """Label elements that the task's own loss averages over; examples where it needs no labels, as in autoencoders."""
    own: tuple[float, ...]
    """The objectives' own denominators, 0 where they have none."""

    def to_tensor(self) -> Tensor:
        return torch.tensor([self.positions, self.tokens, self.examples, self.labels, *self.own], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> Counts:
        positions, tokens, examples, labels, *own = values.tolist()
        return cls(positions=positions, tokens=tokens, examples=examples, labels=labels, own=tuple(own))


def count(kind: Kind, batches: Iterable[Inputs], objectives: Sequence[Objective]) -> Counts:
    """Counts over batches, from their inputs alone.

    Raises:
        MismatchError: if an objective counts some batches of a window and not others.
    """
    total = torch.zeros(4 + len(objectives), dtype=torch.float64)
    counting: list[set[bool]] = [set() for _ in objectives]
    for inputs in batches:
        own = [objective.count(inputs) for objective in objectives]
        for seen, value in zip(counting, own, strict=True):
            seen.add(value is None)
        total += torch.tensor(
            [
                len(o.positions(kind, inputs).index),
                int(o.tokens(inputs).sum()),
                o.batch_size(inputs),
                _task_elements(kind, inputs),
                *(value or 0 for value in own),
            ],
            dtype=torch.float64,
        )
    for objective, seen in zip(objectives, counting, strict=True):
        if len(seen) > 1:
            raise MismatchError(
                f"{objective.name}: count() gave a number for some batches of a window and None for others, so its "
                "values have no common denominator. Return a number, 0 included, for every batch."
            )
    return Counts.from_tensor(total)


def _task_elements(kind: Kind, inputs: Inputs) -> int:
    """What the task's own loss averages over: label elements; examples for a loss that needs no labels."""
    labels = o.task_labels(kind, inputs)
    return o.batch_size(inputs) if labels is None and kind == "none" else label_elements(labels)


def label_elements(labels: Tensor | None) -> int:
    """Over how many elements a model's own mean loss runs: all real-valued ones, class ids that are not -100."""
    if labels is None:
        return 0
    return labels.numel() if labels.is_floating_point() else int((labels != o.IGNORED).sum())


def denominator(place: int, needs: Needs, counts: Counts) -> float:
    """What the values of the objective at that place are divided by; where it is 0 their sum is 0 too."""
    if counts.own[place]:
        return counts.own[place]
    return {"positions": counts.positions, "tokens": counts.tokens}.get(needs.mean_over, counts.examples)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One named term of one objective, for one micro-batch."""

    key: str
    name: str
    value: Tensor
    """(), divided by the window's denominator, without the objective's weight."""
    weight: float
    """The objective's; 0 for a term that is logged alone."""


def terms(
    distiller: Distiller,
    needs: Sequence[Needs],
    signals: Signals,
    step: Step,
    local: Counts,
    window: Counts,
    sums: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[Term]:
    """Every term of every objective for one micro-batch.

    Args:
        distiller: the objectives.
        needs: of each.
        signals: what the models gave.
        step: where the run is.
        local: counts of this micro-batch.
        window: counts of its window.
        sums: of the values per position, by key and term, where they were taken in chunks; None: they are taken here.

    Raises:
        MismatchError: if an objective returns values of another shape than its `mean_over` says.
        NumericalError: if a value is NaN or infinite, with step, method and term.
    """
    found: list[Term] = []
    rows: Rows | None = None
    for place, ((key, module), need) in enumerate(zip(distiller.items(), needs, strict=True)):
        assert isinstance(module, Objective)  # Distiller holds nothing else; narrows the type
        bottom = max(denominator(place, need, window), 1.0)
        parts: dict[str, Tensor] = {}
        if sums is not None:
            parts |= sums.get(key, {})
        elif module.overrides("per_position"):
            rows = rows or select_rows(signals)
            for name, value in named(module.per_position(rows, step), module.name):
                check_shape(module.name, name, value, (len(rows.example),))
                parts[name] = _reduce_positions(value, signals, need)
        if module.overrides("forward"):
            for name, value in named(module(signals, step), module.name):
                check_shape(module.name, name, value, _expected(need, signals))
                summed = value.sum() * (local.examples if need.mean_over == "batch" else 1.0)
                parts[name] = parts[name] + summed if name in parts else summed
        label = distiller.label(key)
        for name, value in parts.items():
            if not torch.isfinite(value):
                raise NumericalError(
                    f"step {step.global_step}: term {name!r} of {label} is {value.item()} in micro-batch {step.micro}; "
                    "no weight was changed. Look at the teacher's outputs for this batch, or lower the learning rate."
                )
            full = label if name == module.name else f"{label}.{name}"
            weight = 0.0 if name in module.logged else module.weight
            found.append(Term(key=key, name=full, value=value / bottom, weight=weight))
    return found


def of_classes(signals: Signals, count: int) -> Signals:
    """Signals whose logits are cut to the first classes: those that padded vocabularies share."""

    def cut(taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tap[..., :count] if name == "logits" else tap for name, tap in taps.items()}

    frozen = {role: cut(taps) for role, taps in signals.frozen.items()}
    return replace(signals, student=cut(signals.student), teacher=cut(signals.teacher), frozen=frozen)


def of_labels(signals: Signals) -> Signals:
    """Signals of multi-label heads, each label's two outcomes a distribution of its own."""

    def read(taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: two_outcomes(tap) if name == "logits" else tap for name, tap in taps.items()}

    if "logits" not in signals.student:
        return signals
    return replace(
        signals,
        student=read(signals.student),
        teacher=read(signals.teacher),
        frozen={role: read(taps) for role, taps in signals.frozen.items()},
        positions=signals.positions.of_labels(signals.student["logits"].shape[-1]),
    )


def select_rows(signals: Signals) -> Rows:
    """The scored rows of both models' logits, chosen before any softmax: what is masked may hold NaN."""
    where = signals.positions
    student = select_logits(signals.student["logits"], where)
    teacher = signals.teacher.get("logits")
    frozen = {role: taps["logits"] for role, taps in signals.frozen.items() if "logits" in taps}
    return Rows(
        student_logits=student,
        teacher_logits=None if teacher is None else select_logits(teacher, where),
        frozen={role: select_logits(logits, where) for role, logits in frozen.items()},
        labels=where.labels,
        example=where.example,
    )


def select_logits(logits: Tensor, where: Positions) -> Tensor:
    """(position, class): the scored rows.

    Raises:
        MismatchError: if the logits have another number of rows than the batch asks for.
    """
    rows = logits.flatten(0, -2)
    check_rows(len(rows), where)
    return rows[where.index]


def whole_logits(rows: Logits, beside: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Logits as one tensor, of a teacher that gives rows; NaN where it knows none, so that reading them stops the run.

    Args:
        rows: of the teacher.
        beside: (…, class) the student's logits; None if the teacher read other tokens.
        shape: of the places, e.g. (batch, time).

    Returns:
        (*shape, class)
    """
    index = torch.arange(rows.count) if rows.there is None else rows.there.nonzero().squeeze(-1)
    own = rows.rows(index, None if beside is None else beside.flatten(0, -2)[index.to(beside.device)])
    if rows.there is None:
        return own.view(*shape, -1)
    found = own.new_full((rows.count, own.shape[-1]), math.nan)
    found[index] = own
    return found.view(*shape, -1)


def check_rows(count: int, where: Positions) -> None:
    """Raises `MismatchError` unless logits have the rows that the batch asks for."""
    if count != where.rows:
        raise MismatchError(
            f"the logits have {count} rows, the batch asks for {where.rows}. "
            "Pass DistillCallback(..., kind=...) if the model's kind of output was taken wrongly."
        )


def named(values: Values, method: str) -> list[tuple[str, Tensor]]:
    """An objective's values by the name of their term."""
    return list(values.items()) if isinstance(values, Mapping) else [(method, values)]


def _expected(needs: Needs, signals: Signals) -> tuple[int, ...]:
    return {
        "positions": (len(signals.positions.index) // signals.positions.each,),
        "tokens": (int(signals.tokens.sum()),),
        "examples": (signals.examples,),
        "batch": (),
    }[needs.mean_over]


def check_shape(method: str, name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """Raises `MismatchError` unless a term has the shape that it should have."""
    if tuple(value.shape) != expected:
        raise MismatchError(f"{method}: term {name!r} has shape {tuple(value.shape)}, its needs promise {expected}.")


def _reduce_positions(value: Tensor, signals: Signals, needs: Needs) -> Tensor:
    """Sum over positions; for a mean over examples each example's positions are averaged first."""
    divisor = position_divisor(signals.positions, signals.examples, needs)
    summed = value.sum() if divisor is None else (value / divisor.to(value.dtype)).sum()
    return summed / signals.positions.each if divisor is None else summed


def position_divisor(where: Positions, examples: int, needs: Needs) -> Tensor | None:
    """(position,) what values are divided by before they are summed: the positions of their example; None: 1."""
    if needs.mean_over in ("positions", "tokens") or not len(where.example):
        return None
    return torch.bincount(where.example, minlength=examples)[where.example]


def task_term(loss: Tensor | None, local: Counts, window: Counts, ctc: str | None = None) -> Tensor | None:
    """The model's own mean loss, weighed by its part of the window's labels; None for a batch without labels.

    Leaving it out matters: the mean over no labels is NaN, and 0 · NaN is NaN. A CTC loss is a mean over examples, or,
    with ctc="sum", a sum.
    """
    if loss is not None and ctc is not None:  # an empty transcript is one too
        return loss if ctc == "sum" else loss * (local.examples / window.examples)
    if loss is None or local.labels == 0 or window.labels == 0:  # a method may have made labels where there were none
        return None
    return loss * (local.labels / window.labels)


def resolve_weights(
    objectives: Sequence[Objective], alpha: float | None, task_weight: float | None
) -> tuple[float, float]:
    """Weight of the task's own loss, and the factor on every objective's weight.

    Raises:
        ConfigurationError: if both are given, or two objectives publish different task weights.
    """
    if alpha is not None and task_weight is not None:
        raise ConfigurationError(f"give alpha={alpha} or task_weight={task_weight}, not both: alpha=a makes it 1 - a.")
    if alpha is not None:
        if not 0 <= alpha <= 1:
            raise ConfigurationError(f"alpha must lie in 0 … 1, got {alpha}.")
        return 1 - alpha, alpha
    if task_weight is not None:
        if not 0 <= task_weight < float("inf"):
            raise ConfigurationError(f"task_weight must be finite and at least 0, got {task_weight}.")
        return task_weight, 1.0
    published = {objective.name: objective.task_weight for objective in objectives if objective.task_weight is not None}
    if len(set(published.values())) > 1:
        raise ConfigurationError(f"the methods publish different task weights, {published}. Choose one with alpha=….")
    return next(iter(published.values()), 1.0), 1.0


def generator(device: torch.device, *place: int) -> torch.Generator:
    """A generator whose seed is a function of its place in the run alone, so a resumed run draws the same."""
    digest = hashlib.sha256(",".join(map(str, place)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
