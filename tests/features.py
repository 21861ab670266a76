"""What a Trainer can do, tried with every method on every task that the conformance suite has models for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from prepared import PREPARED, SIGNED, cases
from stub import GradientKeeper
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl

from hf_compress import DistillCallback, testing
from hf_compress import objective as o
from hf_compress.objective import Needs
from hf_compress.taps import unwrap
from hf_compress.teachers import cache, ensemble, own
from hf_compress.testing import Case, weights_hash

CASES = cases()
LANGUAGE = ("fill-mask", "text-generation")
RANDOM = {"acm"}
"""Whose student draws in its own forward."""
PREPARES = {name for name, found in PREPARED.items() if "prepare" in found}
"""Methods with data or a collator of their own."""


@dataclass(frozen=True)
class Outcome:
    """Of a run."""

    trainer: Trainer
    teacher: PreTrainedModel
    gradients: list[dict[str, Tensor]]
    """Of student and learned parts, by step."""

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]


def make(case: Case, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> tuple[Trainer, Any, GradientKeeper]:
    kept = GradientKeeper()
    settings = {"dtype": torch.float64, "learning_rate": 1e-3} | settings
    trainer, teacher = testing.trainer(case, folder, callbacks=(kept, *callbacks), **settings)
    return trainer, teacher, kept


def run(case: Case, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Outcome:
    trainer, teacher, kept = make(case, folder, *callbacks, **settings)
    trainer.train()
    found = Outcome(trainer, teacher, kept.gradients)
    assert found.gradients
    assert all(gradient.isfinite().all() for step in found.gradients for gradient in step.values())
    return found


_NEEDS: dict[str, Needs] = {}


def needs(case: Case) -> Needs:
    """Of one of `CASES`; asked for in each cell of the table, and made with two models."""
    if str(case) not in _NEEDS:
        _NEEDS[str(case)] = case.objective().needs(*(o.sizes(unwrap(model)) for model in testing.pair(case)))
    return _NEEDS[str(case)]


HOOKS = (
    *("batch", "teacher_batch", "frozen_batch", "network_losses", "count", "per_position", "forward", "after_step"),
    "finish",
)


def wiring(case: Case) -> tuple[Any, ...]:
    """What a method has to do with a Trainer, its mathematics and the task's head aside."""
    objective, asked = case.objective(), needs(case)
    return (
        tuple(hook for hook in HOOKS if objective.overrides(hook)),
        *(None if taps is None else frozenset(map(_kind, taps)) for taps in (asked.student, asked.teacher)),
        *(asked.mean_over, asked.rescored, asked.relates_positions, asked.same_tokens),
        *map(bool, (asked.frozen, asked.columns, asked.teacher_until, case.prepare, case.student)),
    )


def _kind(tap: str) -> str:
    return tap.partition(":")[0]


def one_of_each(given: Iterable[Case], turn: int) -> list[Case]:
    """One task of each method, another for another turn."""
    every = (list(of_method) for _, of_method in groupby(given, key=lambda case: case.method))
    return [tasks[turn % len(tasks)] for tasks in every]


def in_turn(given: Sequence[Case], turn: int) -> list[Any]:
    """Cases as parameters of a test, which is slow with all but one task of each method."""
    quick = one_of_each(given, turn)
    return [pytest.param(case, id=str(case), marks=[] if case in quick else [pytest.mark.slow]) for case in given]


def method_of(found: Outcome) -> str:
    return str(found.trainer.model.config.compression["methods"][0]["name"])


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-6) -> None:
    """The same gradients at each step and the same logged terms."""
    assert len(found.gradients) == len(expected.gradients)
    if method_of(found) in RANDOM:
        return
    for own_step, step in zip(found.gradients, expected.gradients, strict=True):
        assert own_step.keys() == step.keys()
        for name, gradient in own_step.items():
            scale = float(step[name].abs().max())
            torch.testing.assert_close(gradient, step[name], rtol=0, atol=tolerance * scale + 1e-9, msg=name)
    np.testing.assert_allclose(found.logged("distill_loss"), expected.logged("distill_loss"), rtol=10 * tolerance)
    logged = found.logged("distill_loss")
    assert min(logged) > 0 or (method_of(found) in SIGNED and any(logged))


def held(case: Case) -> Any:
    """Rows to evaluate on."""
    return Dataset.from_list(testing.rows(case.task))


class Ends(TrainerCallback):
    """Raises at a step's end."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at, self.error = at, error

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise self.error


# ---------------------------------------------------------------------- the run


def short_last_window(case: Case, folder: Path) -> None:
    """Windows of three rows and of one, in micro-batches of one or whole."""
    settings = {"max_steps": 2, "learning_rate": 0.0}
    with testing.one_generator():
        one = run(case, folder, per_device_train_batch_size=1, gradient_accumulation_steps=3, **settings)
        assert_same(one, run(case, folder, per_device_train_batch_size=3, **settings))


def checkpointing(reentrant: bool) -> Callable[[Case, Path], None]:
    def feature(case: Case, folder: Path) -> None:
        kwargs = {"use_reentrant": reentrant}
        one = run(case, folder, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        assert_same(one, run(case, folder))

    return feature


def compiled(case: Case, folder: Path) -> None:
    torch._dynamo.reset()
    settings = {"max_steps": 2, "dtype": torch.float32}
    one = run(case, folder, torch_compile=True, torch_compile_backend="eager", **settings)
    assert_same(one, run(case, folder, **settings), tolerance=1e-3)


def bfloat16(case: Case, folder: Path) -> None:
    one = run(case, folder, bf16=True, dtype=torch.float32)
    whole = run(case, folder, dtype=torch.float32)
    assert one.logged("loss") == pytest.approx(whole.logged("loss"), rel=0.25)


ADAPTED = ("query", "value", "q_proj", "v_proj", "lm_head", "up", "down")


def with_adapters(case: Case) -> Case:
    """The student with adapters on its attention, and on the output embedding of a causal model."""

    def adapted(student: PreTrainedModel) -> Any:
        made = student if case.student is None else case.student(student)
        linear = [name for name, module in made.named_modules() if isinstance(module, nn.Linear)]
        targets = [name for name in linear if name.rpartition(".")[2] in ADAPTED]
        return peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))

    return replace(case, student=adapted)


def adapters(case: Case, folder: Path) -> None:
    found = run(with_adapters(case), folder, max_steps=2)
    student = found.trainer.model
    learned = {name for name in found.gradients[0] if not name.startswith("distiller.")}
    assert learned == {name for name, p in student.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learned)
    found.trainer.save_model(str(folder / "adapter"))
    assert not [name for name in student.state_dict() if "distiller" in name]
    peft.PeftModel.from_pretrained(student.unload(), folder / "adapter")


def best_model(case: Case, folder: Path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_distill_loss",
        "greater_is_better": True,  # the worst step, which is not the last
    }
    found = run(case, folder, max_steps=3, give=lambda _: {"eval_dataset": held(case)}, **settings)
    values = found.logged("eval_distill_loss")
    assert len(values) == 3
    best = found.trainer.state.best_model_checkpoint
    assert best.endswith(f"-{1 + int(np.argmax(values))}")
    loaded = type(found.trainer.model).from_pretrained(best, dtype=torch.float64)
    assert weights_hash(loaded) == weights_hash(found.trainer.model)


def smaller_batch(case: Case, folder: Path) -> None:
    """Batches of four do not fit: begun again with three."""

    class Full(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on_step_end(args, state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.train_batch_size > 3:
                raise RuntimeError("CUDA out of memory.")

    settings = {"max_steps": 2, "learning_rate": 0.0}
    found = run(case, folder, Full(), auto_find_batch_size=True, **settings)
    expected = run(case, folder, per_device_train_batch_size=3, **settings)
    found.gradients.pop(0)  # of the batch that did not fit
    assert_same(found, expected)


def made_by_model_init(case: Case, folder: Path) -> None:
    pair = testing.trainer(case, folder, dtype=torch.float64)[0].model
    student = testing.pair(case, torch.float64)[0]
    found = run(case, folder, give=lambda _: {"model": None, "model_init": lambda: student})
    assert found.trainer.model is not pair
    assert_same(found, run(case, folder))


def search(case: Case, folder: Path) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    given = {"model": None, "model_init": lambda: testing.pair(case, torch.float64)[0], "eval_dataset": held(case)}
    trainer, _, kept = make(case, folder, give=lambda _: given, eval_strategy="epoch")

    def value(metrics: dict[str, float]) -> float:
        assert math.isfinite(metrics["eval_distill_loss"])
        return metrics["eval_distill_loss"]

    rates = [1e-5, 1e-1]
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        compute_objective=value,
        n_trials=2,
        direction="minimize",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}),
    )
    assert best.hyperparameters["learning_rate"] in rates
    assert len(kept.gradients) == 2


def two_callbacks(case: Case, folder: Path) -> None:
    second = DistillCallback(testing.models(case.task)[1], case.objective())
    run(case, folder, second)


def second_train(case: Case, folder: Path) -> None:
    found = run(case, folder, max_steps=2)
    found.trainer.train()
    assert found.trainer.state.global_step == 2
    assert len(found.gradients) == 4


def exception(case: Case, folder: Path) -> None:
    """Raised in the middle; the next `train()` is a run like any other."""
    raising = Ends(1, KeyboardInterrupt())
    trainer, teacher, kept = make(case, folder, raising, max_steps=2, learning_rate=0.0)
    try:
        trainer.train()
    except KeyboardInterrupt:
        raising.at = 0
    trainer.train()
    kept.gradients.pop(0)
    assert_same(Outcome(trainer, teacher, kept.gradients), run(case, folder, max_steps=2, learning_rate=0.0))


def evaluation(case: Case, folder: Path) -> None:
    """`evaluate()` with metrics after each step changes nothing of the run; `predict()` too."""

    def metrics(given: Any) -> dict[str, float]:
        first = given.predictions[0] if isinstance(given.predictions, tuple) else given.predictions
        return {"finite": float(np.isfinite(first).all())}

    given = {"eval_dataset": held(case), "compute_metrics": metrics}
    found = run(case, folder, max_steps=2, give=lambda _: given, eval_strategy="steps", eval_steps=1)
    assert_same(found, run(case, folder, max_steps=2))
    assert np.isfinite(found.logged("eval_distill_loss")).all()
    assert len(found.logged("eval_distill_loss")) == 2
    if case.labelled:
        assert found.logged("eval_finite") == [1.0, 1.0]
    assert found.trainer.predict(held(case)).predictions is not None


def smoothing(case: Case, folder: Path) -> None:
    run(case, folder, label_smoothing_factor=0.1)


def constant(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    """A task's loss that is 0 and has a gradient of 0."""
    values = [v for k, v in outputs.items() if k != "loss" and isinstance(v, Tensor) and v.requires_grad]
    found: Tensor = 0 * sum(value.float().nan_to_num().sum() for value in values)
    return found


def loss_function(case: Case, folder: Path) -> None:
    run(case, folder, give=lambda _: {"compute_loss_func": constant})


def loss_through_callback(case: Case, folder: Path) -> None:
    found = run(case, folder, give=lambda callback: {"compute_loss_func": callback.loss(constant)})
    if case.labelled:
        assert found.logged("task_loss") == [0.0]


class OwnLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = constant(outputs, None) + sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, outputs) if return_outputs else loss


def own_compute_loss(case: Case, folder: Path) -> None:
    run(case, folder, kind=OwnLoss)


def unused_columns(case: Case, folder: Path) -> None:
    """A column that no model knows is dropped, whatever the method needs is not."""
    data = [row | {"note": "unknown"} for row in testing.rows(case.task)]
    found = run(case, folder, data=data, remove_unused_columns=True)
    assert_same(found, run(case, folder))


# ---------------------------------------------------------------------- the data


def padded_left(case: Case, folder: Path) -> None:
    """Positions that are relative give the same gradient."""

    def left(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found, length = testing.collate(batch), max(len(row["input_ids"]) for row in batch)
        rolls = [length - len(row["input_ids"]) for row in batch]
        turned = {
            name: torch.stack([row.roll(n) for row, n in zip(value, rolls, strict=True)]) if value.dim() > 1 else value
            for name, value in found.items()
        }
        if case.task == "text-generation":  # padding would predict the first token
            turned["labels"][torch.arange(len(batch)), rolls] = o.IGNORED
        return turned

    found = run(case, folder, give=lambda _: {"data_collator": left})
    if case.task == "text-generation" and case.method != "minilm":  # its heads split what a rotation holds together
        assert_same(found, run(case, folder), tolerance=1e-4)  # rotations are taken in float32


def packed(case: Case, folder: Path) -> None:
    """The four rows one after another in one, told apart by their positions."""

    def one_row(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [token for row in batch for token in row["input_ids"]]
        places = [place for row in batch for place in range(len(row["input_ids"]))]
        labels = [label for row in batch for label in [o.IGNORED, *row["labels"][1:]]]  # nothing predicts the first
        return {
            name: torch.tensor([value])
            for name, value in (("input_ids", ids), ("position_ids", places), ("labels", labels))
        }

    found = run(case, folder, give=lambda _: {"data_collator": one_row})
    if needs(case).mean_over == "positions" and not needs(case).relates_positions:
        assert_same(found, run(case, folder))


def unlabelled(case: Case, folder: Path) -> None:
    data = [{name: value for name, value in row.items() if name != "labels"} for row in testing.rows(case.task)]
    found = run(case, folder, data=data)
    assert not found.logged("task_loss")


def tuples(case: Case, folder: Path) -> None:
    def plain(student: PreTrainedModel) -> PreTrainedModel:
        made = student if case.student is None else case.student(student)
        made.config.return_dict = False
        return made

    assert_same(run(replace(case, student=plain), folder), run(case, folder))


# ---------------------------------------------------------------------- the teacher


def from_disk(case: Case, folder: Path) -> None:
    stored = folder / "cache"
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.0}
    first = run(case, folder, wrap=lambda teacher: cache.CacheTeacher(stored, teacher, dtype="float32"), **settings)
    assert_same(first, run(case, folder, **settings))
    run(case, folder, wrap=lambda _: cache.CacheTeacher(stored))


def mean_of_two(case: Case, folder: Path) -> None:
    """Of one model twice: that model."""
    found = run(case, folder, wrap=lambda teacher: ensemble.EnsembleTeacher([teacher, testing.models(case.task)[1]]))
    assert np.isfinite(found.logged("distill_loss")).all()


def without_adapters(case: Case, folder: Path) -> None:
    run(with_adapters(case), folder, wrap=lambda _: own.SelfTeacher())


def half_precision(case: Case, folder: Path) -> None:
    """A teacher in bfloat16 beside a student in float32."""
    found = run(case, folder, dtype=torch.float32, wrap=lambda teacher: teacher.bfloat16())
    assert {p.dtype for p in found.teacher.parameters()} == {torch.bfloat16}


FEATURES: Mapping[str, Callable[[Case, Path], None]] = MappingProxyType(
    {
        "accumulation, a short last window": short_last_window,
        "gradient checkpointing": checkpointing(False),
        "gradient checkpointing, reentrant": checkpointing(True),
        "torch_compile": compiled,
        "bf16 on a CPU": bfloat16,
        "LoRA student": adapters,
        "load_best_model_at_end": best_model,
        "auto_find_batch_size": smaller_batch,
        "model_init": made_by_model_init,
        "hyperparameter_search": search,
        "two callbacks of ours": two_callbacks,
        "a second train()": second_train,
        "an exception in the middle": exception,
        "evaluate() and predict() with compute_metrics": evaluation,
        "label smoothing": smoothing,
        "compute_loss_func": loss_function,
        "compute_loss_func=callback.loss(f)": loss_through_callback,
        "a subclass's own compute_loss": own_compute_loss,
        "remove_unused_columns": unused_columns,
        "padding left": padded_left,
        "packed sequences": packed,
        "data without labels": unlabelled,
        "return_dict=False": tuples,
        "teacher from a cache on disk": from_disk,
        "mean of two teachers": mean_of_two,
        "the student without its adapters as teacher": without_adapters,
        "teacher in bfloat16": half_precision,
    }
)


@dataclass(frozen=True)
class Rule:
    """Of cells that are not "yes"."""

    feature: str
    holds: Callable[[Case], bool]
    says: str
    """Part of the error's text, or why there is nothing to try."""
    refused: bool = True


def of(*names: str) -> Callable[[Case], bool]:
    """Methods, or tasks."""
    return lambda case: case.method in names or case.task in names


def related(case: Case) -> bool:
    return needs(case).mean_over == "batch" or needs(case).relates_positions


def everywhere(case: Case) -> bool:
    return True


OWN_COLLATOR = "its rows come from a collator of its own"
HEADLESS = of("acm", "autodistil", "ernie_tiny", "mi_alpha", "minilm", "features")
STATES = of(
    *("autodistil", "ernie_tiny", "mi_alpha", "minilm", "features", "multi_teacher", "efficient_attention"),
    *("dmae", "fspad"),
)
RULES = (
    Rule("accumulation, a short last window", related, "it relates what is in a batch", refused=False),
    Rule("two callbacks of ours", everywhere, "two DistillCallbacks on one Trainer"),
    Rule("label smoothing", everywhere, "label_smoothing_factor makes the Trainer compute its own loss"),
    Rule("compute_loss_func", everywhere, "compute_loss_func replaces the model's loss"),
    Rule("a subclass's own compute_loss", everywhere, "the Trainer did not use the loss with the distillation terms"),
    Rule(
        "gradient checkpointing, reentrant",
        of("acm", "autodistil", "ernie_tiny", "minilm", "sstoken"),
        "carry no gradient",
    ),
    Rule("LoRA student", of("ernie_tiny"), "'hidden:0', 'k:0'] carry no gradient"),
    Rule("LoRA student", of("mi_alpha"), "taps ['hidden:0'] carry no gradient"),
    Rule("LoRA student", of("acm"), "'output:vit.layers.0.attention.v_proj.route'] carry no gradient"),
    Rule("LoRA student", of("autodistil"), "merge adapters first"),
    Rule("padding left", lambda case: case.pictures, "images are not padded", refused=False),
    Rule("padding left", of("dparallel", "alm", "swing", "margin_mse", "dear", "mend"), OWN_COLLATOR, refused=False),
    Rule("padding left", of("encoder_decoder"), "its answers are padded on the right", refused=False),
    Rule("packed sequences", of("encoder_decoder"), "causal models alone", refused=False),
    Rule("packed sequences", lambda case: case.task != "text-generation", "causal models alone", refused=False),
    Rule("packed sequences", of("alm", "swing", "mend"), OWN_COLLATOR, refused=False),
    Rule(
        "packed sequences",
        of("minilm", "sstoken", "semantic_revision", "fspad"),
        "takes a row of the batch for one document",
    ),
    Rule("data without labels", lambda case: not case.labelled, "its rows have none", refused=False),
    Rule("data without labels", HEADLESS, "do not teach the head. Add labels"),
    Rule("data without labels", of("multi_exit"), "every exit learns the labels, and the batch has none"),
    Rule("data without labels", of("sstoken"), "needs labels that are -100 on the prompt"),
    Rule(
        "compute_loss_func=callback.loss(f)",
        of("semantic_revision"),
        "need labels that tell the prompt from the answer",
    ),
    Rule("data without labels", of("semantic_revision"), "need labels that tell the prompt from the answer"),
    Rule("data without labels", of("ddk"), "evaluate needs a data set with labels"),
    Rule(
        "return_dict=False",
        lambda case: case.pictures or (case.task == "text-generation" and case.method not in ("fspad", "mend")),
        "'tuple' object has no attribute 'last_hidden_state'",
    ),
    Rule(
        "teacher from a cache on disk",
        of("dparallel", "dmae", "aligndistil", "semantic_revision", "encoder_decoder"),
        "a method of this run changes the batch",
    ),
    Rule(
        "teacher from a cache on disk",
        lambda case: case.method in ("features", "multi_teacher") and case.pictures,
        "cannot be cached, as it does not follow the",
    ),
    Rule("teacher from a cache on disk", of("ddk"), "a cache without its model cannot be run"),
    Rule("mean of two teachers", of("margin_mse", "dear"), 'Pass mean="logits"'),
    Rule("mean of two teachers", STATES, "use methods on logits alone"),
    Rule(
        "mean of two teachers",
        of("ddk", "semantic_revision", "encoder_decoder"),
        "a method that calls the teacher itself needs one model",
    ),
    Rule(
        "the student without its adapters as teacher",
        of("encoder_decoder"),
        "the teacher must be a causal language model",
    ),
    Rule(
        "the student without its adapters as teacher",
        of("acm"),
        "'output:vit.layers.0.attention.v_proj.route'] carry no gradient",
    ),
    Rule("the student without its adapters as teacher", of("fspad"), "must be the language model that the drafter was"),
    Rule("the student without its adapters as teacher", of("mi_alpha"), "taps ['hidden:0'] carry no gradient"),
    Rule("the student without its adapters as teacher", of("autodistil"), "merge adapters first"),
    Rule("the student without its adapters as teacher", of("ernie_tiny"), "'hidden:0', 'k:0'] carry no gradient"),
)


def rule(feature: str, case: Case) -> Rule | None:
    """What is said of a cell; None: "yes"."""
    return next((each for each in RULES if each.feature == feature and each.holds(case)), None)


ELSEWHERE = {
    "accumulation, resume, logits in chunks, rows with nothing to score": "yes, for every method: `conformance/`",
    "two processes (gloo)": "yes, for every method: `test_two_processes.py`",
    "Seq2SeqTrainer with predict_with_generate": "yes: `scripts/summarization.py`",
    "TRL's SFTTrainer, sentence-transformers' trainer": "see README.md; `ci/trainers`",
    "FSDP": "not run: it needs more than one GPU",
    "DeepSpeed": "not run: it needs a GPU",
}
"""What is tried otherwise, or not at all."""


def markdown() -> str:
    """A table of features by methods, and what its cells say in numbers."""
    methods = sorted({case.method for case in CASES})
    notes: list[str] = []
    lines = [["feature", *methods]]
    for feature in FEATURES:
        lines.append([feature, *(_cell(feature, method, notes) for method in methods)])
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, "|" + "---|" * len(lines[0]))
    text += ["", *(f"{place}. {said}" for place, said in enumerate(notes, 1)), ""]
    text += [f"- {name}: {said}." for name, said in ELSEWHERE.items()]
    return "\n".join(text)


def _cell(feature: str, method: str, notes: list[str]) -> str:
    """What holds on all tasks of a method, or on which of them."""
    found: dict[str, list[str]] = {}
    for case in CASES:
        if case.method == method:
            found.setdefault(_word(rule(feature, case), notes), []).append(case.task)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{word} ({', '.join(tasks)})" for word, tasks in found.items())


def _word(said: Rule | None, notes: list[str]) -> str:
    if said is None:
        return "yes"
    note = f"refused: “{said.says}”" if said.refused else f"nothing to try: {said.says}"
    if note not in notes:
        notes.append(note)
    return f"{'refused' if said.refused else '–'} [{notes.index(note) + 1}]"
