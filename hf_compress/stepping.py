"""What a method may call during a step: forwards, generation, evaluation, and the generators of its draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import distiller as d
from . import objective as o
from .errors import ConfigurationError
from .objective import Step
from .outputs import logits_of, two_outcomes
from .taps import evaluating, returns_tuple

if TYPE_CHECKING:
    from .run import Run


def make_step(run: Run) -> Step:
    """The step that the run is at."""
    calls = _Calls(run)
    state, args = run.trainer.state, run.trainer.args
    place = (args.seed, state.global_step, run.micro)
    return Step(
        global_step=state.global_step,
        max_steps=state.max_steps,
        epoch=float(state.epoch or 0.0),
        micro=run.micro,
        micros=run.micros,
        generator=d.generator(args.device, *place, args.process_index),
        shared=d.generator(args.device, *place, -1),
        student=run.student,
        dataset=run.trainer.train_dataset,
        networks=run.networks.modules,
        run_student=calls.run_student,
        run_teacher=calls.run_teacher,
        generate=calls.generate,
        evaluate=calls.evaluate,
    )


class _Calls:
    """The callables of one step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        args = run.trainer.args
        self._draws = d.generator(
            args.device, args.seed, run.trainer.state.global_step, run.micro, -2 - args.process_index
        )

    def run_student(self, *, grad: bool = False, **inputs: Any) -> Any:
        if returns_tuple(self.run.student, inputs):
            inputs["return_dict"] = True
        with torch.set_grad_enabled(grad):
            return self.run.student.forward(**inputs)  # not __call__: the hook must not be entered again

    def run_teacher(self, *, grad: bool = False, **inputs: Any) -> Any:
        if self.run.teacher is None:
            raise ConfigurationError("this run has no teacher.")
        return self.run.teacher.run(grad=grad, **inputs)

    def generate(self, **settings: Any) -> Tensor:
        """The student's `generate` in eval mode; it draws from the global generators, which are lent and restored."""
        student: Any = self.run.student
        device = self.run.trainer.args.device
        seed = int(torch.randint(2**62, (), generator=self._draws, device=device))
        with self._aside(), torch.no_grad():
            torch.manual_seed(seed)
            found: Tensor = student.generate(**settings)
            return found

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The student in eval mode; modes and global generators as they were afterwards."""
        device = self.run.trainer.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(self.run.student):
            yield

    def evaluate(self, dataset: Any, who: Literal["student", "teacher"]) -> Tensor:
        """Mean cross-entropy of each row over its scored labels, in order of the rows, over all ranks."""
        run, trainer = self.run, self.run.trainer
        forward = self.run_student if who == "student" else self.run_teacher
        found = []
        with self._aside():  # a loader draws a seed
            for batch in trainer.get_test_dataloader(dataset):
                inputs = trainer._prepare_inputs(batch)
                student = who == "student"
                hidden = {n for n, v in inputs.items() if n in run.required or (student and run.withheld(n, v))}
                output = forward(**{name: value for name, value in inputs.items() if name not in hidden})
                values = row_cross_entropy(run.kind, logits_of(output), inputs)
                found.append(trainer.accelerator.gather_for_metrics(values))
        return torch.cat(found)


def row_cross_entropy(kind: o.Kind, logits: Tensor, inputs: o.Inputs) -> Tensor:
    """Mean cross-entropy of each example over its labels that are not -100.

    Args:
        kind: where the distributions stand.
        logits: the model's, in its own shape.
        inputs: the batch with labels.

    Returns:
        (example,) nats; 0 for an example without labels.

    Raises:
        ConfigurationError: for a batch without labels.
    """
    where = o.positions(kind, inputs)
    if kind == "labels":
        where, logits = where.of_labels(logits.shape[-1]), two_outcomes(logits)
    if where.labels is None:
        raise ConfigurationError("evaluate needs a data set with labels, to take the cross-entropy of.")
    rows = d.select_logits(logits, where).float()
    losses = nn.functional.cross_entropy(rows, where.labels, ignore_index=o.IGNORED, reduction="none")
    count = torch.zeros(o.batch_size(inputs), device=losses.device)
    total = count.index_add(0, where.example, losses)
    return total / count.index_add(0, where.example, (where.labels != o.IGNORED).float()).clamp(min=1)
