"""What a run tells the Trainer's log: means since the last log, and the terms of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from . import distiller as d
from .objective import Inputs, Signals

if TYPE_CHECKING:
    from .run import Run

_BELOW = "below "
"""Marks the denominator of an objective among the sums of an evaluation."""


@dataclass
class Sums:
    """Values added up since the last log, or over one evaluation."""

    values: dict[str, Tensor]
    count: int = 0
    """Optimizer steps."""

    def add(self, name: str, value: Tensor) -> None:
        self.values[name] = self.values[name] + value if name in self.values else value


def over_ranks(accelerator: Accelerator, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values summed over all ranks."""
    if accelerator.num_processes == 1 or not values:
        return dict(values)
    names = sorted(values)
    stacked = accelerator.reduce(torch.stack([values[name].double() for name in names]), reduction="sum")
    return dict(zip(names, stacked, strict=True))


class Reports:
    """Wrappers of the Trainer's `log` and `evaluate`, and what they are told of in between."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reset()

    def reset(self) -> None:
        """For a new `train()`; the wrappers may be in place already."""
        self.sums = Sums({})
        """Since the last log."""
        self.evaluating: tuple[str, Sums] | None = None
        """Prefix and sums of the evaluation that runs."""

    def log(self, original: Callable[..., None]) -> Callable[..., None]:
        """`Trainer.log` with the means of a training log, or the terms of an evaluation, added."""

        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            accelerator, keys = self.run.trainer.accelerator, list(self.run.distiller)
            if "loss" in logs and self.sums.count:
                values = over_ranks(accelerator, self.sums.values)
                logs.update({name: value.item() / self.sums.count for name, value in values.items()})
                self.sums = Sums({})
            if self.evaluating is not None and f"{self.evaluating[0]}_runtime" in logs:
                self.measure_pending()
                prefix, sums = self.evaluating
                values = over_ranks(accelerator, sums.values)
                if any(values[_BELOW + key].item() for key in keys):
                    means = [values[key] / values[_BELOW + key].clamp(min=1) for key in keys]
                    logs[f"{prefix}_distill_loss"] = sum(mean.item() for mean in means)
            original(logs, *args, **kwargs)

        return log

    def evaluate(self, original: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        """`Trainer.evaluate` whose batches are measured; one inside another has its own sums."""

        def evaluate(
            eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
        ) -> dict[str, float]:
            nothing = torch.zeros((), device=self.run.trainer.args.device)
            sums = Sums({name: nothing for key in self.run.distiller for name in (key, _BELOW + key)})
            outer, self.evaluating = self.evaluating, (metric_key_prefix, sums)
            try:
                return original(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
            finally:
                self.evaluating, self.run.pending = outer, None

        return evaluate

    def measure(self, signals: Signals, inputs: Inputs) -> None:
        """Adds up one evaluation batch: each objective's values, and what they are divided by in the end."""
        run = self.run
        assert self.evaluating is not None  # the pre-hook watches only then
        assert run.step is not None  # made by the pre-hook
        local, sums = d.count(run.kind, [inputs], run.distiller.objectives), self.evaluating[1]
        below = {}
        for place, (key, need) in enumerate(zip(run.distiller, run.needs, strict=True)):
            below[key] = torch.tensor(d.denominator(place, need, local), device=run.trainer.args.device)
            sums.add(_BELOW + key, below[key])
        with torch.no_grad():
            for term in d.terms(run.distiller, run.needs, signals, run.step, local, local):
                sums.add(term.key, term.weight * term.value * below[term.key])

    def measure_pending(self) -> None:
        """Measures an evaluation batch whose labels no loss function of the user's came for: it had none."""
        run = self.run
        if self.evaluating is not None and run.pending is not None and not run.is_training():
            (inputs, signals), run.pending = run.pending, None
            self.measure(signals, inputs)
