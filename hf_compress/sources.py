"""What the models of a run give for a micro-batch: the teachers before the student's forward, the student after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import distiller as d
from . import objective as o
from .checks import warn_of_probabilities
from .chunked import Apart, rows_of
from .errors import ConfigurationError, MismatchError
from .objective import Inputs, Signals

if TYPE_CHECKING:
    from .heads import Logits
    from .run import Run


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What teacher and frozen models gave for a batch."""

    teacher: Mapping[str, Tensor]
    logits: Logits | None
    """The teacher's by rows, where they are not among its taps."""
    shape: torch.Size
    """(batch, time) of the tokens that the teacher read."""
    frozen: Mapping[str, Mapping[str, Tensor]]
    frozen_logits: Mapping[str, Logits]


class Sources:
    """Runs the teachers of a run and reads its taps."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def reset(self) -> None:
        """For a new `train()`."""
        self._looked = False

    def targets(self, inputs: Inputs) -> Targets:
        """Of teacher and frozen models, before the student's own forward."""
        run, given = self.run, inputs
        before = {name: value._version for name, value in inputs.items() if not value.is_inference()}
        seen: Mapping[str, Tensor] = {}
        lazily: Logits | None = None
        if run.teacher is not None and any(need.teacher for need in run.needs):
            for objective in run.distiller.objectives:
                assert run.step is not None  # made by the pre-hook
                if objective.overrides("teacher_batch"):
                    given = objective.teacher_batch(given, run.step)
            late = run.chunking.on or run.recorded is not None
            seen, lazily = rows_of(run.teacher, given) if late else (run.teacher(given), None)
        read = {role: self._read_by(role, inputs) for role in run.frozen}
        others = {
            role: rows_of(other, read[role]) if run.chunking.on else (other(read[role]), None)
            for role, other in run.frozen.items()
        }
        if changed := sorted(name for name, version in before.items() if inputs[name]._version != version):
            raise MismatchError(
                f"the teacher changed {changed} in place, which the student reads after it. Let it copy them first."
            )
        return Targets(
            teacher=seen,
            logits=lazily,
            shape=o.tokens(given).shape,
            frozen={role: taps for role, (taps, _) in others.items()},
            frozen_logits={role: logits for role, (_, logits) in others.items() if logits is not None},
        )

    def _read_by(self, role: str, inputs: Inputs) -> Inputs:
        """What a further frozen model sees; at most one method of a run decides it."""
        for objective in self.run.distiller.objectives:
            if objective.overrides("frozen_batch"):
                assert self.run.step is not None  # made by the pre-hook
                return objective.frozen_batch(role, inputs, self.run.step)
        return inputs

    def signals(self, inputs: Inputs, output: Any, targets: Targets) -> tuple[Signals, Apart | None]:
        """Of all models, and apart from it the logits that are taken in chunks."""
        run = self.run
        assert run.taps is not None  # checked by the hook
        student = run.taps.read(output)
        if run.chunking.on:
            student.pop("logits", None)
        if run.is_training():
            _check_gradients(student)
        signals = Signals(
            student=student,
            teacher=targets.teacher,
            frozen=targets.frozen,
            inputs=inputs,
            positions=o.positions(run.kind, inputs),
            tokens=o.tokens(inputs),
            examples=o.batch_size(inputs),
        )
        if run.chunking.on:
            own = run.chunking.logits()
            return signals, Apart(student=own, teacher=targets.logits, frozen=targets.frozen_logits, classes=run.real)
        return self._whole(signals, targets), None

    def _whole(self, signals: Signals, targets: Targets) -> Signals:
        """With all logits as tensors of all positions, over the classes that both models have."""
        run = self.run
        scores = targets.teacher.get("logits")
        if scores is not None and run.distributions and not self._looked:
            self._looked = True
            warn_of_probabilities(d.select_logits(scores, signals.positions))
        if targets.logits is not None:
            whole = self._whole_logits(targets.logits, targets.shape, signals)
            signals = replace(signals, teacher={**targets.teacher, "logits": whole})
        if run.real is not None:
            signals = d.of_classes(signals, run.real)
        return d.of_labels(signals) if run.kind == "labels" else signals

    def _whole_logits(self, rows: Logits, shape: torch.Size, signals: Signals) -> Tensor:
        """The teacher's, in the shape of the student's, or of the other tokens that it read."""
        if self.run.kind in ("causal", "tokens") and not all(need.same_tokens for need in self.run.needs):
            return d.whole_logits(rows, None, shape)
        beside = signals.student["logits"][..., : self.run.real]  # of padded vocabularies the rest is nobody's
        d.check_rows(rows.count, signals.positions)
        return d.whole_logits(rows, beside, beside.shape[:-1])


def _check_gradients(student: Mapping[str, Tensor]) -> None:
    if fixed := sorted(name for name, tensor in student.items() if not tensor.requires_grad):
        raise ConfigurationError(
            f"taps {fixed} carry no gradient: their terms would teach nothing. With gradient checkpointing set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}; else check what is frozen, as a base under "
            "adapters is."
        )
