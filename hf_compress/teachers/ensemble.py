"""Several frozen models as one teacher: the weighted mean of their distributions or of their logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_compress import facts, licences
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.heads import Logits
from hf_compress.objective import Inputs, require_one_shape
from hf_compress.teachers.model import ModelTeacher

Mean = Literal["probabilities", "logits"]


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float], mean: Mean) -> Tensor:
    """One distribution at each position from several.

    Args:
        logits: (…, class) of each model, of one shape.
        weights: of each, > 0, summing to 1.
        mean: of probabilities: log Σ w softmax(z); of logits: Σ w z.

    Returns:
        (…, class) in float32 or wider.
    """
    wide = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in logits]
    if mean == "logits":
        return torch.stack([weight * one for weight, one in zip(weights, wide, strict=True)]).sum(0)
    logs = [one.log_softmax(-1) + math.log(weight) for weight, one in zip(weights, wide, strict=True)]
    return torch.stack(logs).logsumexp(0)


class _Mixed:
    """Rows of several models' logits."""

    there: Tensor | None = None

    def __init__(self, parts: Sequence[Logits], weights: Sequence[float], mean: Mean) -> None:
        self._parts, self._weights, self._mean, self.count = parts, weights, mean, parts[0].count

    def rows(self, index: Tensor, beside: Tensor | None) -> Tensor:
        return mean_logits([part.rows(index, beside) for part in self._parts], self._weights, self._mean)


class EnsembleTeacher:
    """The mean of several models' targets; for methods on logits.

    Args:
        models: of one kind of head, with the same classes or vocabulary in the same order.
        weights: of each, > 0, divided by their sum; None: equal.
        mean: of their probabilities, or of their logits, which sharpens where they agree.

    Raises:
        ConfigurationError: for weights that fit not.
        MismatchError: for models of different heads.
    """

    def __init__(
        self, models: Sequence[nn.Module], *, weights: Sequence[float] | None = None, mean: Mean = "probabilities"
    ) -> None:
        given = [1.0] * len(models) if weights is None else list(weights)
        if not models or len(given) != len(models) or not all(0 < weight < math.inf for weight in given):
            raise ConfigurationError(
                f"EnsembleTeacher: {len(models)} models need as many weights above 0, not {given}."
            )
        if mean not in ("probabilities", "logits"):
            raise ConfigurationError(f"EnsembleTeacher: mean must be probabilities or logits, got {mean!r}.")
        self.weights, self.mean = [weight / sum(given) for weight in given], mean
        self.models = list(models)
        self.teachers = [ModelTeacher(model) for model in models]
        self.sizes = self.teachers[0].sizes
        for other in self.teachers[1:]:
            own, theirs = (
                (size.kind, size.vocab, getattr(size.config, "id2label", None)) for size in (self.sizes, other.sizes)
            )
            if own != theirs:
                raise MismatchError(f"EnsembleTeacher: the models' heads differ, {own} and {theirs}.")

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns that one of them reads."""
        return tuple(sorted({name for teacher in self.teachers for name in teacher.reads or ()}))

    def prepare(self, taps: frozenset[str], device: torch.device, until: str | None = None) -> None:
        if other := sorted(taps - {"logits"}):
            raise ConfigurationError(
                f"EnsembleTeacher: there is no mean of {other}, which the methods ask for; use methods on logits alone."
            )
        for teacher in self.teachers:
            teacher.prepare(taps, device, until)

    def __call__(self, inputs: Inputs) -> Mapping[str, Tensor]:
        found = [dict(teacher(inputs)) for teacher in self.teachers]
        if "logits" not in found[0]:
            return {}
        logits = [taps["logits"] for taps in found]
        for other in logits[1:]:
            require_one_shape("EnsembleTeacher", logits[0], other, "Use models of one tokenizer and label set.")
        return {"logits": mean_logits(logits, self.weights, self.mean)}

    def apart(self, inputs: Inputs) -> tuple[Mapping[str, Tensor], Logits | None]:
        """The logits by rows, those of each model computed late where that is proven."""
        parts = [logits for _, logits in (teacher.apart(inputs) for teacher in self.teachers) if logits is not None]
        return {}, _Mixed(parts, self.weights, self.mean) if parts else None

    def run(self, *, grad: bool = False, **inputs: Any) -> Any:
        raise ConfigurationError("EnsembleTeacher: a method that calls the teacher itself needs one model.")

    def describe(self) -> facts.Model:
        each = [teacher.describe() for teacher in self.teachers]
        counts = [one.parameters for one in each if one.parameters is not None]
        licence, _ = licences.combined({f"model {place}": one.licence for place, one in enumerate(each)})
        return facts.Model(
            licence=licence,
            architecture=f"mean of {', '.join(one.architecture for one in each)}",
            parameters=sum(counts) if len(counts) == len(each) else None,
        )

    def close(self) -> None:
        for teacher in self.teachers:
            teacher.close()
