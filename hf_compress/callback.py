"""`DistillCallback`: distillation inside an unmodified `transformers.Trainer`.

`on_init_end` is called from inside `Trainer.__init__`; the callback takes the Trainer from the frames above it and
attaches a `Distiller` to the student before the optimizer exists. Hooks around the student's forward run the teacher
before it and replace `output.loss` after it. `on_train_end` takes everything off, so `save_model` writes a clean
student.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .checks import check_trainer
from .data import set_epoch
from .errors import ConfigurationError, UnknownNameError
from .objective import Objective
from .run import DistillConfig, Run
from .teachers import Teacher


class DistillCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Adds distillation to a Trainer: `Trainer(..., callbacks=[DistillCallback(teacher)])`.

    Args:
        teacher: a model, a hub id or folder (safetensors, no remote code), or a ready `Teacher`.
        method: a name, an `Objective` (a copy of it is used), or a list of either; None takes the default of the
            student's task, named in the first log line.
        config: a `DistillConfig`; alternatively its fields as keywords, e.g. `alpha=0.5`.

    Raises:
        ConfigurationError, MismatchError: when the Trainer is built, if teacher, student, data or settings do not fit.
        UnknownNameError: for an unknown method, with the nearest names.
    """

    def __init__(
        self,
        teacher: nn.Module | str | Path | Teacher | None = None,
        method: str | Objective | Sequence[str | Objective] | None = None,
        *,
        config: DistillConfig | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise ConfigurationError(f"give a DistillConfig or its fields {sorted(settings)}, not both.")
        known = [field.name for field in fields(DistillConfig)]
        for name in settings:
            if name not in known:
                raise UnknownNameError("setting of DistillCallback", name, known)
        self.config = config or DistillConfig(**settings)
        self.source, self.method = teacher, method
        self._trainer: weakref.ref[Trainer] | None = None
        self._run: Run | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = calling_trainer(self)
        if trainer is None:
            raise ConfigurationError("no Trainer was found above this callback: call callback.attach(trainer).")
        self.attach(trainer)

    def attach(self, trainer: Trainer) -> None:
        """Attaches to the trainer's model; idempotent. Needed by hand only after `trainer.add_callback`."""
        check_trainer(trainer, self)
        set_epoch(trainer.train_dataset, 0)  # a dry forward may read a row before any epoch begins
        same = self._trainer is not None and self._trainer() is trainer
        self._trainer = weakref.ref(trainer)
        if same and self._run is not None and self._run.student is trainer.model:
            self._run.attach()
            return
        if trainer.model_init is not None and not hasattr(trainer.model_init, "hf_compress_original"):
            trainer.model_init = self._attaching(trainer.model_init, trainer)
        self._new_run(trainer, trainer.model)

    def _attaching(self, model_init: Callable[..., nn.Module], trainer: Trainer) -> Callable[..., nn.Module]:
        """`model_init` that attaches to each model it makes, with the number of arguments that it had."""

        def with_trial(trial: Any) -> nn.Module:
            return self._new_run(trainer, model_init(trial)).student

        def without() -> nn.Module:
            return self._new_run(trainer, model_init()).student

        wrapped: Any = with_trial if len(inspect.signature(model_init).parameters) else without
        wrapped.hf_compress_original = model_init
        return wrapped  # type: ignore[no-any-return]  # Any, to carry its mark

    def _new_run(self, trainer: Trainer, student: nn.Module) -> Run:
        if self._run is not None:
            self._run.detach()
        self._run = Run(trainer, student, self.source, self.method, self.config)
        self._run.attach()
        return self._run

    def detach(self) -> None:
        """Takes everything off student, teacher and trainer; for use after training raised."""
        if self._run is not None:
            self._run.detach()

    @property
    def run(self) -> Run:
        if self._run is None:
            raise ConfigurationError("the callback is attached to no Trainer: pass it in callbacks=[…].")
        return self._run

    def loss(self, compute_loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """For `Trainer(compute_loss_func=callback.loss(f))`: f's value becomes the task's own loss.

        f gets (outputs, labels, num_items_in_batch=n) and must return a sum divided by n, as the Trainer asks of it.
        """

        def total(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
            run = self._run
            if run is None or not run.pending:
                return compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
            return run.finish_pending(outputs, labels, compute_loss_func, num_items_in_batch)

        total.hf_compress_callback = self  # type: ignore[attr-defined]  # tells it from a function of the user's
        return total

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            raise ConfigurationError(
                "this DistillCallback was added after the Trainer was built, so the optimizer lacks its learned parts. "
                "Pass it in Trainer(callbacks=[…]), or call callback.attach(trainer) before train()."
            )
        if calling_trainer(self) not in (None, trainer):
            raise ConfigurationError(
                "this DistillCallback has since been given to another Trainer. Make one for each: "
                "Trainer(callbacks=[DistillCallback(teacher)])."
            )
        if self.run.student is not trainer.model:
            raise ConfigurationError(
                "the Trainer trains another model than the one this callback is attached to. Pass the model or "
                "model_init to the Trainer, and call callback.attach(trainer) after replacing trainer.model."
            )
        self.run.begin(state, kwargs.get("optimizer"))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.begin_epoch(state.epoch)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.check_used()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.check_used()
        self.run.check_reached()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.end_step()
        if control.should_save:
            self.run.flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.flush()
        self.run.trainer.accelerator.wait_for_everyone()  # each process writes the state of its own random generators
        if args.should_save:
            self.run.saving.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.end()


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer whose constructor is calling."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back  # type: ignore[assignment]  # None at the top ends the loop
    return None
