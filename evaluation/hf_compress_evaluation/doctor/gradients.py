"""The gradients of the run's terms on the student's body, at the weights that the student has.

The methods are made again from the record and attached to a Trainer that takes no step. What a method learned beside
the student (projections) or counted (schedules) is not in a model folder: a method with parts of its own is left out,
and schedules are at their end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainingArguments

from hf_compress import DistillCallback, registry
from hf_compress.errors import ConfigurationError, UnusedLossError
from hf_compress.facts import Training
from hf_compress.objective import Objective
from hf_compress.run import Run
from hf_compress.taps import body

from .findings import Finding, judged, not_looked_at

BATCHES, BATCH = 4, 16
"""Of training rows, whose mean gradient is taken: enough for a direction, seconds on a CPU."""
NOTHING = 0.01
"""Of the sum of all norms: a term that pulls less does nothing where the student is."""
CONFLICT = -0.2
"""Cosine with the task's gradient, below which the two pull apart."""
BALANCED = 0.3
"""Norm of the sum over the sum of norms. At a minimum of the total the terms cancel, so there a negative cosine is no
fault: less is left than that."""
TASK = "task"


@dataclass(frozen=True, kw_only=True)
class Pull:
    """One term's gradient on the body, its weight included."""

    term: str
    norm: float
    cosine: float | None
    """With the task's; None: there is none, or one of the two is 0."""


@dataclass(frozen=True, kw_only=True)
class Pulls:
    """All of a run's terms."""

    terms: tuple[Pull, ...]
    """The task's first, where it has a weight."""
    left: float
    """Norm of the sum over the sum of norms, in 0 … 1; 0 where there is none."""
    without: tuple[str, ...]
    """Methods that learned parts of their own, whose gradients cannot be taken."""


def objectives(training: Training) -> list[Objective]:
    """The run's objectives, made again.

    Raises:
        UnknownNameError, PluginError, ConfigurationError: for a method or settings that are not known here.
    """
    made = []
    for method in training.methods:
        settings = {key: tuple(item) if isinstance(item, list) else item for key, item in method.settings.items()}
        kind = registry.objective(method.name)
        try:
            made.append(kind(weight=method.weight, **settings))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ConfigurationError(f"{method.name} does not take its recorded settings: {error}.") from error
    return made


def measure(
    student: PreTrainedModel,
    teacher: nn.Module,
    tokenizer: Any,
    training: Training,
    rows: datasets.Dataset,
) -> Pulls:
    """The pulls of task and terms on a few batches, without dropout.

    Args:
        student: as it was saved; its gradients and modes are as before afterwards.
        teacher: of the same classes.
        tokenizer: the student's.
        training: the record.
        rows: `input_ids`, `attention_mask` and `labels`, unpadded.

    Raises:
        HfCompressError: if the run cannot be put together again: other columns or frozen models are needed.
    """
    with tempfile.TemporaryDirectory() as place:
        callback = DistillCallback(teacher, objectives(training), task_weight=training.task_weight)
        collate = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(
            model=student,
            args=TrainingArguments(place, report_to=[], disable_tqdm=True, use_cpu=True, seed=training.seed),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=[callback],
        )
        modes = [(module, module.training) for module in student.modules()]
        try:
            run = callback.run
            run.begin(trainer.state, None)
            trainer.state.global_step = trainer.state.max_steps = training.steps
            student.eval()
            student.training = True  # the hooks look at the model alone; without dropout below it
            starts = range(0, min(len(rows), BATCHES * BATCH), BATCH)
            batches = [dict(collate([rows[at] for at in range(s, min(s + BATCH, len(rows)))])) for s in starts]
            return _pulls(run, student, batches)
        finally:
            callback.detach()
            for module, mode in modes:
                module.training = mode
            student.zero_grad(set_to_none=True)


def _pulls(run: Run, student: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> Pulls:
    made = run.distiller.objectives
    without = [one.name for one in made if next(one.parameters(), None) is not None or one.overrides("networks")]
    weights, own = [one.weight for one in made], run.task_weight
    inside = body(student)
    parameters = [each for each in (inside or student).parameters() if each.requires_grad]
    found: dict[str, Tensor] = {}
    try:
        for place in (-1, *range(len(made))):
            if place >= 0 and made[place].name in without:
                continue
            for index, one in enumerate(made):
                one.weight = weights[index] if index == place else 0.0
            run.task_weight = own if place < 0 else 0.0
            if place >= 0 or own:
                found[TASK if place < 0 else list(run.distiller)[place]] = _mean(run, student, batches, parameters)
    finally:
        for one, weight in zip(made, weights, strict=True):
            one.weight = weight
        run.task_weight = own
    task = found.get(TASK)
    terms = []
    for key, gradient in found.items():
        norm = float(gradient.norm())
        other = None if task is None or key == TASK else norm * float(task.norm())
        cosine = float(gradient @ task) / other if other and task is not None else None
        terms.append(Pull(term=TASK if key == TASK else run.distiller.label(key), norm=norm, cosine=cosine))
    total = sum(term.norm for term in terms)
    rest = float(torch.stack(list(found.values())).sum(0).norm()) / total if total else 0.0
    return Pulls(terms=tuple(terms), left=rest, without=tuple(without))


def _mean(
    run: Run, student: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """(number,) the mean gradient over batches; 0 where the loss does not reach."""
    total = torch.zeros(sum(parameter.numel() for parameter in parameters))
    for batch in batches:
        run.begin_window([batch])
        try:
            loss = student(**batch).loss
        except UnusedLossError:  # a batch without labels has no loss of the task
            continue
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        total += torch.cat([(torch.zeros_like(p) if g is None else g).detach().flatten().float() for g, p in pairs])
    return total / len(batches)


def judge(pulls: Pulls, rows: int) -> Finding:
    """Whether a term pulls at all, and with or against the task."""
    name, without = "gradients", ", ".join(pulls.without)
    terms = [pull for pull in pulls.terms if pull.term != TASK]
    total = sum(pull.norm for pull in pulls.terms)
    if not terms or total == 0:
        why = f"{without} learned parts that a model folder does not hold" if without else "no term has a gradient"
        return not_looked_at(name, f"cannot be taken: {why}")
    idle = [pull.term for pull in terms if pull.norm < NOTHING * total]
    pulling = [pull for pull in terms if pull.term not in idle]
    apart = [pull.term for pull in pulling if pull.cosine is not None and pull.cosine < CONFLICT]
    apart = apart if pulls.left > BALANCED else []
    shown = [f"{p.term} {p.norm:.3g}" + ("" if p.cosine is None else f" (cosine {p.cosine:+.2f})") for p in pulls.terms]
    meanings = [
        *([f"{', '.join(idle)}: no pull on the body where the student is."] if idle else []),
        *([f"{', '.join(apart)}: pulls against the labels, and the two are not in balance."] if apart else []),
    ]
    remedies = [
        *(["Raise its weight if it has not been learned yet, or leave it out."] if idle else []),
        *(["Train longer, or shift the weight (alpha) to the one that counts."] if apart else []),
    ]
    values = {f"{pull.term} norm": pull.norm for pull in pulls.terms} | {"left of the sum": pulls.left}
    values |= {f"{pull.term} cosine": pull.cosine for pull in pulls.terms if pull.cosine is not None}
    aside = f", without {without}, which learned parts of their own" if without else ""
    return judged(
        name, "look" if meanings else "ok", of=f"weighted gradients on the body, {rows} training rows{aside}",
        figure=f"{', '.join(shown)}; of their sum {pulls.left:.0%} is left", values=values,
        meaning=" ".join(meanings), remedy=" ".join(remedies),
    )  # fmt: skip
