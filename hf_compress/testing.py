"""The conformance suite: what every method with an objective must hold, for our own and for third parties' methods.

```python
import pytest
from hf_compress import testing

@pytest.mark.parametrize("case", testing.cases("my_method"), ids=str)
@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, case, tmp_path):
    check(case, tmp_path)
```

Each check trains invented models of some thousand parameters on the CPU and raises `AssertionError` with what it found.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from . import distiller as d
from . import objective as o
from . import registry
from .callback import DistillCallback
from .data import Mixture
from .errors import NumericalError
from .objective import Inputs, Objective, Signals
from .parts import SIGNATURES
from .run import DistillConfig, Run
from .stepping import make_step
from .taps import Taps, unwrap, watching

VOCAB, CLASSES, PAD, IMAGE = 60, 5, 0, 8
LENGTHS = (3, 12, 5, 9)
"""Real tokens of the four rows of a batch: unequal, so that a mean of means shows."""
TASKS = (
    "text-classification",
    "token-classification",
    "fill-mask",
    "text-generation",
    "feature-extraction",
    "image-classification",
    "image-feature-extraction",
    "text-ranking",
)
"""Tasks that the suite has models for."""


@dataclass(frozen=True)
class Case:
    """A method on a task."""

    method: str
    task: str
    prepare: Callable[[Dataset, TrainingArguments], Mapping[str, Any]] | None = None
    """For a method that trains on data of its own making: gives the Trainer's train_dataset, data_collator or both."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other than the method's defaults, where these take more steps than a check has."""
    student: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    """Makes the student out of the suite's, for a method that trains a class of its own."""
    elsewhere: frozenset[str] = frozenset()
    """Public functions that another door than the Trainer's step reaches: a preparation, or other settings."""

    def __str__(self) -> str:
        return f"{self.method}-{self.task}"

    def objective(self) -> Objective:
        """A fresh objective with the method's defaults but for `settings`."""
        return registry.objective(self.method)(**self.settings)

    @property
    def labelled(self) -> bool:
        """Whether the rows of this task carry labels."""
        return self.task not in ("feature-extraction", "image-feature-extraction", "text-ranking")

    @property
    def pictures(self) -> bool:
        """Whether the rows are images, which have no padding."""
        return self.task.startswith("image")


def cases(*methods: str) -> list[Case]:
    """Every (method, task) that the suite can run, of the named methods or of all with an objective."""
    entries = registry.catalogue().methods
    chosen = methods or tuple(name for name, entry in entries.items() if "objective" in entry.parts)
    return [Case(name, task) for name in chosen for task in entries[name].tasks if task in TASKS]


@cache
def _models(task: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return _model(task, width=48, layers=2, seed=0), _model(task, width=96, layers=3, seed=1)


def models(task: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student of width 48 with two layers and a teacher of width 96 with three, without dropout."""
    student, teacher = _models(task)
    return copy.deepcopy(student).to(dtype), copy.deepcopy(teacher).to(dtype)


def pair(case: Case, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """`models` with the case's own student."""
    student, teacher = models(case.task, dtype)
    if case.student is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student = case.student(student).to(dtype)
    return student, teacher


def _sizes(case: Case) -> list[o.Sizes]:
    """Of the case's pair, as a run tells them: a student with adapters by the model inside."""
    return [o.sizes(unwrap(model)) for model in pair(case)]


def _model(task: str, *, width: int, layers: int, seed: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": width,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if task == "text-generation":
            return LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=0.0))
        if task.startswith("image"):
            image: dict[str, Any] = {
                "image_size": IMAGE,
                "patch_size": 2,
                "num_labels": CLASSES,
                "decoder_hidden_size": 16,
            }
            image |= {"decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 16}
            image |= {
                k: v for k, v in sizes.items() if k not in ("vocab_size", "max_position_embeddings", "pad_token_id")
            }
            if task == "image-classification":
                return ViTForImageClassification(ViTConfig(**image))
            return ViTMAEForPreTraining(ViTMAEConfig(**image))
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        made: type[PreTrainedModel] = {
            "text-classification": BertForSequenceClassification,
            "token-classification": BertForTokenClassification,
            "fill-mask": BertForMaskedLM,
            "feature-extraction": BertModel,
            "text-ranking": BertForSequenceClassification,
        }[task]
        config = BertConfig(**sizes, **quiet, num_labels=1 if task == "text-ranking" else CLASSES)
        return made(config)


def rows(task: str, count: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Invented rows of `LENGTHS` tokens, or images, with labels where the task has some."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for place in range(count if task.startswith("image") else 0):
        pixels = torch.randn(3, IMAGE, IMAGE, generator=draw).tolist()
        found.append({"pixel_values": pixels} | ({"labels": place % CLASSES} if task == "image-classification" else {}))
    for place in range(0 if task.startswith("image") else count):
        length = LENGTHS[place % len(LENGTHS)]
        ids = torch.randint(1, VOCAB, (length,), generator=draw).tolist()
        row: dict[str, Any] = {"input_ids": ids}
        if task == "text-classification":
            row["labels"] = place % CLASSES
        elif task == "token-classification":
            row["labels"] = [token % CLASSES for token in ids]
        elif task in ("fill-mask", "text-generation"):
            row["labels"] = ids
        found.append(row)
    return found


def collate(batch: list[dict[str, Any]], length: int | None = None) -> Inputs:
    """Pads on the right to the longest row, or to `length`; labels with -100. Images are stacked."""
    if "pixel_values" in batch[0]:
        return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}
    length = length or max(len(row["input_ids"]) for row in batch)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in batch])

    inputs = {"input_ids": padded("input_ids", PAD)}
    inputs["attention_mask"] = torch.tensor([[int(i < len(row["input_ids"])) for i in range(length)] for row in batch])
    if "labels" in batch[0]:
        listed = isinstance(batch[0]["labels"], list)
        inputs["labels"] = padded("labels", o.IGNORED) if listed else torch.tensor([row["labels"] for row in batch])
    return inputs


@dataclass(frozen=True)
class _Collator:
    """`collate` with images in the models' type."""

    dtype: torch.dtype

    def __call__(self, batch: list[dict[str, Any]]) -> Inputs:
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in collate(batch).items()}


class _Keeper(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Keeps each step's gradients; stops the run after a step where asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.stop_after = stop_after

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_after:
            control.should_training_stop = True


def trainer(
    case: Case,
    folder: Path,
    *,
    objective: Objective | None = None,
    config: DistillConfig | None = None,
    dtype: torch.dtype = torch.float32,
    data: list[dict[str, Any]] | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    kind: type[Trainer] = Trainer,
    wrap: Callable[[PreTrainedModel], Any] = lambda teacher: teacher,
    give: Callable[[DistillCallback], Mapping[str, Any]] = lambda _: {},
    **settings: Any,
) -> tuple[Trainer, PreTrainedModel]:
    """A Trainer with the method attached, and its teacher.

    Args:
        case: the method and its task.
        folder: where the Trainer writes.
        objective: instead of the case's.
        config: instead of one with the further models that the method asks for.
        dtype: of the models.
        data: rows instead of the suite's.
        callbacks: beside ours.
        kind: class of the Trainer.
        wrap: from the teacher's model to what the callback is given.
        give: from the callback to more arguments of the Trainer.
        **settings: training arguments.
    """
    student, teacher = pair(case, dtype)
    dataset = Dataset.from_list(rows(case.task) if data is None else data)
    defaults: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    method = case.objective() if objective is None else objective
    callback = DistillCallback(
        wrap(teacher), method, config=config or DistillConfig(frozen=frozen(case, method, dtype))
    )
    args = TrainingArguments(str(folder), **(defaults | settings))
    given: dict[str, Any] = {"train_dataset": dataset, "data_collator": _Collator(dtype)}
    if case.prepare is not None:
        given |= case.prepare(dataset, args)
    if isinstance(given["train_dataset"], Mixture):
        args.train_sampling_strategy = "sequential"
    given |= {"model": student, **give(callback)}
    return kind(args=args, callbacks=[callback, *callbacks], **given), teacher


def frozen(case: Case, method: Any, dtype: torch.dtype = torch.float32) -> dict[str, PreTrainedModel]:
    """A model of the student's size for each role that the method asks for."""
    if not isinstance(method, Objective):
        return {}
    roles = method.needs(*_sizes(case)).frozen
    return {role: _model(case.task, width=48, layers=2, seed=2 + place).to(dtype) for place, role in enumerate(roles)}


def weights_hash(model: nn.Module) -> str:
    """sha256 over all tensors of a model's state, in order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def signals(case: Case, dtype: torch.dtype = torch.float32, length: int | None = None) -> Signals:
    """What both models give for the four rows, the student's taps as leaves with gradient."""
    student, teacher = pair(case, dtype)
    kind = o.kind_of(student)
    needs = case.objective().needs(o.sizes(student), o.sizes(teacher))
    step = _step(case, student, teacher)
    inputs = case.objective().batch(_inputs(case, length), step)
    seen: list[dict[str, Tensor]] = []
    theirs = needs.teacher or frozenset()
    further = frozen(case, case.objective(), dtype)
    known = inspect.signature(student.forward).parameters
    own = {name: value for name, value in inputs.items() if name not in needs.columns and name in known}
    other = {name: value for name, value in case.objective().teacher_batch(inputs, step).items() if name in own}
    beside = theirs or frozenset({"logits"})  # as in a run
    rows_of_others = [
        (model, beside, {k: v for k, v in case.objective().frozen_batch(role, inputs, step).items() if k in own})
        for role, model in further.items()
    ]
    read = ((student, needs.student, own), (teacher, theirs, other), *rows_of_others)
    for model, names, given in read:
        taps = Taps(model, names, o.sizes(model).layers)
        with torch.no_grad(), watching(taps):
            output = model.eval()(**given, output_hidden_states=True)
        seen.append(taps.read(output))
        taps.remove()
    return Signals(
        student={name: tensor.clone().requires_grad_() for name, tensor in seen[0].items()},
        teacher=seen[1],
        frozen=dict(zip(further, seen[2:], strict=True)),
        inputs=inputs,
        positions=o.positions(kind, inputs),
        tokens=o.tokens(inputs),
        examples=o.batch_size(inputs),
    )


def _inputs(case: Case, length: int | None) -> Inputs:
    """A batch of the four rows, by the case's own collator where it has one."""
    if case.prepare is None:
        return collate(rows(case.task), length)
    prepared = case.prepare(Dataset.from_list(rows(case.task)), TrainingArguments(report_to=[], use_cpu=True))
    if "data_collator" not in prepared:
        return collate(rows(case.task), length)
    data = prepared.get("train_dataset", rows(case.task))
    found: Inputs = prepared["data_collator"]([data[place] for place in range(len(LENGTHS))])
    return found


def value(case: Case, given: Signals) -> tuple[Tensor, dict[str, Tensor]]:
    """The method's weighed terms on given signals, and their gradients by tap of the student."""
    student, teacher = pair(case)
    objective = case.objective()
    needs = objective.needs(o.sizes(student), o.sizes(teacher))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = {k: v.shape for k, v in given.teacher.items()}
        theirs |= {f"{role}/{k}": v.shape for role, taps in given.frozen.items() for k, v in taps.items()}
        objective.build({k: v.shape for k, v in given.student.items()}, theirs)
    local = d.count(o.kind_of(student), [given.inputs], [objective])
    step = _step(case, student, teacher)
    found = d.terms(d.Distiller([objective]), [needs], given, step, local, local)
    total = torch.stack([term.weight * term.value for term in found]).sum()
    leaves = list(given.student.values())  # none of a method that runs the student itself
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else ()
    pairs = zip(given.student, gradients, strict=True)
    return total.detach(), {name: torch.zeros(()) if g is None else g for name, g in pairs}


def _step(case: Case, student: nn.Module, teacher: nn.Module) -> o.Step:
    cpu, dataset = torch.device("cpu"), Dataset.from_list(rows(case.task))
    prepared = case.prepare(dataset, TrainingArguments(report_to=[], use_cpu=True)) if case.prepare else {}

    def run(model: nn.Module) -> Callable[..., Any]:
        def forward(*, grad: bool = False, **inputs: Any) -> Any:
            with torch.set_grad_enabled(grad):
                return model(**inputs)

        return forward

    return o.Step(
        global_step=0,
        max_steps=10,
        epoch=0.0,
        micro=0,
        micros=1,
        generator=d.generator(cpu, 0),
        shared=d.generator(cpu, 1),
        student=student,
        run_student=run(student),
        run_teacher=run(teacher),
        generate=getattr(student, "generate", run(student)),
        evaluate=lambda dataset, _: torch.ones(len(dataset)),
        dataset=prepared.get("train_dataset", dataset),
        networks={},
    )


def check_a_step_changes_the_student_alone(case: Case, folder: Path) -> None:
    """Three steps move the student by finite gradients, the teacher not at all, and leave nothing of ours behind."""
    keeper = _Keeper()
    made, teacher = trainer(case, folder, callbacks=(keeper,), max_steps=3)
    student, before = made.model, weights_hash(teacher)
    trained = [parameter.requires_grad for parameter in pair(case)[1].parameters()]
    keys, start = set(pair(case)[0].state_dict()), weights_hash(pair(case)[0])
    made.train()
    assert weights_hash(teacher) == before, "the teacher's weights changed"
    assert all(module.training for module in teacher.modules()), "the teacher's mode was not restored"
    assert [p.requires_grad for p in teacher.parameters()] == trained, "the teacher stays frozen"
    assert all(parameter.grad is None for parameter in teacher.parameters()), "the teacher got gradients"
    assert weights_hash(student) != start, "the student did not change"
    assert set(student.state_dict()) == keys, f"left on the student: {set(student.state_dict()) - keys}"
    assert not student._forward_hooks, "a forward hook is left on the student"
    assert not student._forward_pre_hooks, "a forward pre-hook is left on the student"
    for name, gradient in keeper.gradients[0].items():
        assert gradient.isfinite().all(), f"{name}: the gradient is not finite"
        assert not name.startswith(d.PREFIX) or gradient.abs().max() > 0, f"{name}: a learned part gets no gradient"


class _OneGenerator:
    """Steps whose generator goes on through the window: uniform draws are then the same by whichever micro-batches."""

    def __init__(self) -> None:
        self.original = make_step

    def __call__(self, run: Run) -> o.Step:
        step = self.original(run)
        if step.micro == 0:
            self.generator = step.generator
        return dataclasses.replace(step, generator=self.generator)


def one_generator() -> AbstractContextManager[Any]:
    """While it is open a method's draws are the same by whichever micro-batches."""
    return mock.patch("hf_compress.run.make_step", _OneGenerator())


def check_accumulation_gives_the_same_gradient(case: Case, folder: Path) -> None:
    """Rows of 3, 12, 5 and 9 tokens: one batch of four, four of one, and three and one give one gradient (float64)."""
    found = []
    for size, steps in ((4, 1), (1, 4), (3, 2)):
        keeper = _Keeper()
        settings: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        made, _ = trainer(case, folder, dtype=torch.float64, callbacks=(keeper,), **settings)
        needs = case.objective().needs(*_sizes(case))
        if needs.mean_over == "batch" or needs.relates_positions:
            return  # relates what is in a batch: accumulation changes its meaning, as its page says
        with one_generator():
            made.train()
        found.append(keeper.gradients[0])
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            torch.testing.assert_close(
                gradient, found[0][name], rtol=1e-6, atol=1e-9, msg=f"{name}: the gradients differ"
            )


def check_logits_in_chunks_give_the_same_gradient(case: Case, folder: Path) -> None:
    """Logits three positions at a time: gradients and logs are those of whole logits (float64, two micro-batches)."""
    method = case.objective()
    needs = method.needs(*_sizes(case))
    whole = method.overrides("forward") and "logits" in needs.student
    if case.task not in ("fill-mask", "text-generation") or whole or not method.overrides("per_position"):
        return
    found = []
    for memory in ("dense", "chunked"):
        keeper = _Keeper()
        config = DistillConfig(frozen=frozen(case, method, torch.float64), memory=memory, chunk=3)
        settings: dict[str, Any] = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        made, _ = trainer(case, folder, config=config, dtype=torch.float64, callbacks=(keeper,), **settings)
        made.train()
        log = next(entry for entry in made.state.log_history if "distill_loss" in entry)
        found.append((keeper.gradients[0], {name: log[name] for name in log if "loss" in name or "distill" in name}))
    (whole_gradients, whole_log), (gradients, log) = found
    assert gradients.keys() == whole_gradients.keys()
    for name, gradient in gradients.items():  # a causal model's own loss is taken in float32 whatever its type
        torch.testing.assert_close(gradient, whole_gradients[name], rtol=1e-5, atol=1e-6, msg=f"{name} differs")
    assert log.keys() == whole_log.keys(), f"logs {sorted(log)}, whole logits {sorted(whole_log)}"
    for name, logged in log.items():
        assert abs(logged - whole_log[name]) < 1e-5 * max(1.0, abs(logged)), f"{name}: {logged}, {whole_log[name]}"


def check_nan_outside_what_is_scored_changes_nothing(case: Case, folder: Path) -> None:
    """NaN in logits that are not scored and in states of padding: same value, same gradients, none of them NaN."""
    clean = signals(case)
    total, gradients = value(case, clean)
    own_ids = not case.objective().needs(*_sizes(case)).same_tokens
    theirs = clean
    if own_ids:
        read = case.objective().teacher_batch(clean.inputs, _step(case, *pair(case)))
        theirs = dataclasses.replace(clean, tokens=o.tokens(read))
    spoilt = dataclasses.replace(
        clean,
        student={name: _spoil(clean, name, tensor, own_ids).requires_grad_() for name, tensor in clean.student.items()},
        teacher={name: _spoil(theirs, name, tensor, own_ids) for name, tensor in clean.teacher.items()},
        frozen={
            role: {name: _spoil(clean, name, tensor) for name, tensor in taps.items()}
            for role, taps in clean.frozen.items()
        },
    )
    again, after = value(case, spoilt)
    torch.testing.assert_close(again, total)
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, gradients[name], msg=f"{name}: the gradient changed")


def _spoil(given: Signals, name: str, tensor: Tensor, own_ids: bool = False) -> Tensor:
    """The tensor with NaN wherever it is not scored (logits) or padding (states; queries, keys and values).

    `own_ids`: the teacher reads other ids, and which logits are scored is the method's own.
    """
    spoilt = tensor.detach().clone()
    if name == "logits" and not own_ids:
        flat = spoilt.flatten(0, -2)
        keep = torch.zeros(len(flat), dtype=torch.bool)
        keep[given.positions.index] = True
        flat[~keep] = math.nan
        return flat.view_as(spoilt)
    if name[0] in "qkv" and spoilt.dim() == 4:
        return spoilt.masked_fill(~given.tokens[:, None, :, None], math.nan)
    return spoilt.masked_fill(~given.tokens[..., None], math.nan)


def check_padding_changes_nothing(case: Case, folder: Path) -> None:
    """The same rows padded to 12 and to 32 have one value."""
    if case.pictures or len(_inputs(case, 32).get("input_ids", torch.zeros(0, 0))[0]) != 32:
        return  # images, and batches of a collator of their own
    short, _ = value(case, signals(case, torch.float64))
    long, _ = value(case, signals(case, torch.float64, length=32))
    torch.testing.assert_close(long, short, rtol=1e-6, atol=1e-9)


def check_extreme_half_precision_stays_finite(case: Case, folder: Path) -> None:
    """Logits and states of ±300 in float16 and bfloat16 give a finite value and finite gradients."""
    plain = signals(case)
    for dtype in (torch.float16, torch.bfloat16):
        harsh = dataclasses.replace(
            plain,
            student={
                name: (300 * tensor.detach().sign()).to(dtype).requires_grad_()
                for name, tensor in plain.student.items()
            },
            teacher={name: (-300 * tensor.sign()).to(dtype) for name, tensor in plain.teacher.items()},
            frozen={
                role: {name: (-300 * tensor.sign()).to(dtype) for name, tensor in taps.items()}
                for role, taps in plain.frozen.items()
            },
        )
        total, gradients = value(case, harsh)
        assert total.isfinite(), f"{dtype}: the value is {total}"
        assert all(gradient.isfinite().all() for gradient in gradients.values()), f"{dtype}: a gradient is not finite"


def check_a_batch_with_nothing_to_score(case: Case, folder: Path) -> None:
    """Every label -100 beside a batch that has some: the run goes on with finite weights."""
    if not case.labelled or case.task in ("text-classification", "image-classification"):
        return  # unlabelled rows of a classifier are scored: that is what they are for
    data = rows(case.task)
    for row in data[:2]:
        row["labels"] = [o.IGNORED] * len(row["input_ids"])
    made, _ = trainer(case, folder, data=data, per_device_train_batch_size=2, max_steps=2)
    made.train()
    assert all(parameter.isfinite().all() for parameter in made.model.parameters()), "a weight is not finite"


def check_resumed_equals_uninterrupted(case: Case, folder: Path) -> None:
    """Six steps in one go, and three, a new Trainer in another folder and three more: the same losses and weights."""
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "train_sampling_strategy": "random",
    }
    whole, _ = trainer(case, folder / "whole", **settings)
    whole.train()
    first, _ = trainer(case, folder / "parts", callbacks=(_Keeper(stop_after=3),), **settings)
    first.train()
    (folder / "parts").rename(folder / "moved")
    second, _ = trainer(case, folder / "moved", **settings)
    second.train(resume_from_checkpoint=True)
    losses = [{e["step"]: e["loss"] for e in t.state.log_history if "loss" in e} for t in (whole, second)]
    assert losses[0] == losses[1], f"losses differ: {losses}"
    assert weights_hash(whole.model) == weights_hash(second.model), "the weights differ"


def check_config_survives_json(case: Case, folder: Path) -> None:
    """The record's settings rebuild the config."""
    objective = case.objective()
    text = json.dumps(dataclasses.asdict(objective.config))
    loaded = {key: tuple(item) if isinstance(item, list) else item for key, item in json.loads(text).items()}
    assert type(objective.config)(**loaded) == objective.config, f"{text} does not rebuild the config"


def check_a_nan_stops_the_run(case: Case, folder: Path) -> None:
    """NaN in the teacher's weights: an error with step and method before any weight of the student changes."""
    if case.objective().needs(*_sizes(case)).teacher is None:
        return
    made, teacher = trainer(case, folder)
    for parameter in teacher.parameters():
        parameter.data.fill_(math.nan)
    start = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    message = ""
    try:
        made.train()
    except NumericalError as error:
        message = str(error)
    assert case.method in message, f"training went on with NaN, or the error does not name the method: {message!r}"
    assert "step 0" in message, f"the error does not name the step: {message!r}"
    for name, parameter in made.model.named_parameters():
        assert torch.equal(parameter, start[name]), f"{name} changed before the error"


def check_every_function_is_reached(case: Case, folder: Path) -> None:
    """Each public function of the method's module, replaced by one that raises, makes the Trainer raise."""
    entry = registry.get(case.method)
    module = importlib.import_module(entry.module)
    public = [
        name
        for name, member in vars(module).items()
        if inspect.isfunction(member) and member.__module__ == module.__name__ and not name.startswith("_")
        if name not in {*entry.parts.values(), *case.elsewhere}
    ]
    assert public, f"{module.__name__} has no pure function"
    for name in public:
        with mock.patch.object(module, name, side_effect=_ReachedError(name)):
            try:
                trainer(case, folder)[0].train()
            except _ReachedError:
                continue
        raise AssertionError(f"{module.__name__}.{name} is not reached by a step of the Trainer")


class _ReachedError(Exception):
    pass


def check_the_saved_student_loads(case: Case, folder: Path) -> None:
    """`save_model` after training writes a plain checkpoint: same class, same keys, same output, and its record."""
    made, _ = trainer(case, folder)
    made.train()
    made.save_model(str(folder / "student"))
    loaded, report = type(made.model).from_pretrained(folder / "student", output_loading_info=True)
    assert not report["missing_keys"], f"missing {report['missing_keys']}"
    assert not report["unexpected_keys"], f"unexpected {report['unexpected_keys']}"
    assert weights_hash(loaded) == weights_hash(made.model), "the loaded weights differ"
    record: Mapping[str, Any] = loaded.config.compression
    assert record["methods"][0]["name"] == case.method, f"the record names {record['methods']}"


def check_parts(name: str) -> None:
    """Every part that the method declares is there and can be called as `hf_compress.parts.SIGNATURES` says."""
    entry = registry.get(name)
    method = entry.load()
    for part, bound in entry.parts.items():
        value = getattr(method, part)
        assert value is getattr(importlib.import_module(entry.module), bound), f"{name}: {part} is not {bound}"
        if (wanted := SIGNATURES.get(part)) is None:
            continue
        called = value.__call__ if inspect.isclass(value) else value
        found = inspect.signature(called).parameters
        missing = [word for word in wanted if word not in found]
        assert not missing, f"{name}: {part} {bound} takes no {missing}; it takes {list(found)}"


CHECKS: tuple[Callable[[Case, Path], None], ...] = (
    check_a_step_changes_the_student_alone,
    check_accumulation_gives_the_same_gradient,
    check_logits_in_chunks_give_the_same_gradient,
    check_nan_outside_what_is_scored_changes_nothing,
    check_padding_changes_nothing,
    check_extreme_half_precision_stays_finite,
    check_a_batch_with_nothing_to_score,
    check_resumed_equals_uninterrupted,
    check_config_survives_json,
    check_a_nan_stops_the_run,
    check_every_function_is_reached,
    check_the_saved_student_loads,
)

__all__ = ["CHECKS", "Case", "cases", "check_parts", "models", "rows", "trainer", "weights_hash"]
