"""The callback in a Trainer: what reaches the loss, what is refused, what is left behind.

Run as a script it is one process of the two-process test.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from hf_compress_evaluation.bench import _together
from hf_compress_plugins.encoders.minilm import MiniLM
from hf_compress_plugins.general.features import Features
from hf_compress_plugins.general.kd import KD, kd
from hf_compress_plugins.language.taid import TAID
from safetensors.torch import load_file, save_file
from stub import GradientKeeper, arguments
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitsAndBytesConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_pt_utils import LabelSmoother

from hf_compress import DistillCallback, DistillConfig
from hf_compress.checkpoints import MANIFEST
from hf_compress.errors import (
    ConfigurationError,
    ForeignFileError,
    MismatchError,
    ResumeError,
    UnknownNameError,
    UnusedLossError,
)
from hf_compress.objective import Needs, kind_of, positions
from hf_compress.provenance import describe_data
from hf_compress.taps import Reached, Taps, watching
from hf_compress.testing import CLASSES, VOCAB, collate, models, rows, weights_hash

CLASSIFY, TAG, MASK, GENERATE = "text-classification", "token-classification", "fill-mask", "text-generation"


# ---------------------------------------------------------------------- runs


@dataclass
class Run:
    """A Trainer with the callback, and what a test asks of it."""

    trainer: Trainer
    callback: DistillCallback | None
    student: nn.Module
    teacher: nn.Module
    kept: GradientKeeper

    def train(self, **arguments: Any) -> Run:
        self.trainer.train(**arguments)
        return self

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]

    @property
    def gradients(self) -> dict[str, Tensor]:
        return {name: g for name, g in self.kept.gradients[0].items() if not name.startswith("distiller.")}


def build(
    folder: Path,
    task: str = CLASSIFY,
    method: Any = "kd",
    *,
    data: list[dict[str, Any]] | None = None,
    dtype: torch.dtype = torch.float32,
    student: nn.Module | None = None,
    teacher: Any = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    distill: dict[str, Any] | None = None,
    trainer_class: type[Trainer] = Trainer,
    trainer_arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """A run on the four rows of the conformance suite; `method=False` is a Trainer without the callback."""
    pair = models(task, dtype)
    student, teacher = student or pair[0], teacher or pair[1]
    callback = None if method is False else DistillCallback(teacher, method, **(distill or {}))
    kept = GradientKeeper()
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(rows(task) if data is None else data)}
    given |= {"data_collator": collate, "model": student} | (trainer_arguments or {})
    trainer = trainer_class(
        args=arguments(folder, **settings),
        callbacks=[*([] if callback is None else [callback]), kept, *callbacks],
        **given,
    )
    return Run(trainer, callback, student, teacher, kept)


def unlabelled(task: str = CLASSIFY) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "labels"} for row in rows(task)]


def labelled(*labels: int) -> list[dict[str, Any]]:
    """The rows of a classifier with these labels, -100 for none."""
    return [row | {"labels": label} for row, label in zip(rows(CLASSIFY), labels, strict=True)]


def gradient(model: nn.Module, loss: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a loss of the logits of one batch, written by hand."""
    model.zero_grad()
    given = {name: value for name, value in inputs.items() if name != "labels"}
    loss(model.train()(**given).logits).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name in expected.keys() | found.keys():
        zero = torch.zeros_like(next(tensors[name] for tensors in (expected, found) if name in tensors))
        left, right = found.get(name, zero), expected.get(name, zero)
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, msg=f"{name}: {left} is not {right}")


class At(TrainerCallback):
    """Calls a function at the end of each step, with the step."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function(state.global_step)


class StoppedError(Exception):
    pass


def stop_at(step: int) -> At:
    def function(now: int) -> None:
        if now == step:
            raise StoppedError

    return At(function)


def ours(module: nn.Module) -> list[Any]:
    """Hooks of this package; transformers leaves some of its own where hidden states were asked for."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if hook.__module__.startswith("hf_compress")]


def assert_nothing_left(run: Run, attention: str = "sdpa") -> None:
    assert not hasattr(run.student, "distiller")
    for model in (run.student, run.teacher):
        assert not [hook for module in model.modules() for hook in ours(module)]
        assert model.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in run.teacher.parameters())
    assert not {"train", "get_batch_samples", "log", "evaluate", "loss_is_scaled_for_ga"} & vars(run.trainer).keys()


# ---------------------------------------------------------------------- the task's own loss


@pytest.mark.parametrize(("task", "factor"), [("text-classification", 4.0), ("text-generation", 1.0)])
def test_without_the_callback_accumulation_multiplies_the_gradient_of_a_bert_head(
    task: str, factor: float, tmp_path: Path
) -> None:
    """What the README says of stock transformers: four steps of one row against one of four; Llama is right."""
    norms = []
    for size, steps in ((4, 1), (1, 4)):
        keeper = GradientKeeper()
        Trainer(
            model=models(task, torch.float64)[0],
            args=arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps),
            train_dataset=Dataset.from_list(rows(task)),
            data_collator=collate,
            callbacks=[keeper],
        ).train()
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in keeper.gradients[0].values())))

    assert norms[1] / norms[0] == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("task", [CLASSIFY, TAG, MASK, GENERATE])
def test_the_task_loss_is_a_mean_over_all_labels_however_the_rows_are_batched(task: str, tmp_path: Path) -> None:
    """3, 12, 5 and 9 labels as one batch, as four and as three and one."""
    inputs = collate(rows(task))

    def mean(logits: Tensor) -> Tensor:
        labels = inputs["labels"]
        if task == GENERATE:
            logits, labels = logits[:, :-1].float(), labels[:, 1:]  # the model's causal loss is in float32
        kept = labels != -100
        return nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum") / kept.sum()

    expected = gradient(models(task, torch.float64)[0], mean, inputs)
    for size, steps in ((4, 1), (1, 4), (3, 2)):
        run = build(
            tmp_path,
            task,
            KD(weight=0),
            dtype=torch.float64,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        ).train()
        assert run.trainer.state.global_step == 1
        assert_gradients(run.gradients, expected, 1e-6 if task == GENERATE else 1e-10)


@pytest.mark.parametrize("method", [KD, Features])
@pytest.mark.parametrize("task", [CLASSIFY, GENERATE])
def test_a_method_of_weight_0_changes_no_bit_of_a_run(method: Any, task: str, tmp_path: Path) -> None:
    """With dropout in the student: the callback draws nothing from the global generator either."""
    found = []
    for chosen in (False, method(weight=0)):
        student = models(task)[0]
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        settings = {"max_steps": 5, "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
        run = build(tmp_path, task, chosen, student=student, lr_scheduler_type="linear", **settings).train()
        names = ("loss", "learning_rate", "step", "epoch")
        found.append(([run.logged(name) for name in names], run.trainer.state.global_step, weights_hash(run.student)))
    assert found[0] == found[1]


# ---------------------------------------------------------------------- two processes


def _two_process_run(
    folder: Path, task: str, size: int, steps: int, average: bool, partly: bool, memory: str = "dense"
) -> dict[str, Any]:
    data = rows(task)
    if partly:  # the second process's rows have no labels
        data = labelled(0, 1, -100, -100) if task == CLASSIFY else data
    run = build(
        folder,
        task,
        ["kd", "features", TAID(t_end=0.8, alpha=1.0, beta=0.0)],  # the third target follows from two losses
        data=data,
        dtype=torch.float64,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        average_tokens_across_devices=average,
        max_steps=3,
        distill={"memory": memory, "chunk": 3},
    ).train()
    terms = ("distill/kd", "distill/features", "distill/taid")
    logs = {name: run.logged(name) for name in ("loss", "task_loss", "distill_loss", *terms)}
    return {"gradients": run.kept.gradients[0], "weights": dict(run.student.state_dict()), "logs": logs}


TWO = [(CLASSIFY, False), (CLASSIFY, True), (GENERATE, False)]


def _child(target: Path) -> None:
    """One of two processes: the rows in two batches, the second process has the second."""
    found = {}
    for task, partly in TWO:
        for average in (True, False):
            for size, steps in ((2, 1), (1, 2)):
                result = _two_process_run(target.parent / "runs", task, size, steps, average, partly)
                found[f"{task} {partly} {average} {size}"] = result
    for size, steps in ((2, 1), (1, 2)):
        result = _two_process_run(target.parent / "runs", GENERATE, size, steps, True, False, "chunked")
        found[f"{GENERATE} False chunked {size}"] = result
    if os.environ["RANK"] == "0":
        torch.save(found, target)


def test_two_processes_give_the_gradients_weights_and_logs_of_one(tmp_path: Path) -> None:
    target = tmp_path / "found.pt"
    _together.run((__file__, target))
    found = torch.load(target, weights_only=True)
    for task, partly in TWO:
        one = _two_process_run(tmp_path / "one", task, 4, 1, True, partly)
        for key in (key for key in found if key.startswith(f"{task} {partly} ")):
            assert_gradients(found[key]["gradients"], one["gradients"], 1e-6)
            assert_gradients(found[key]["weights"], one["weights"], 1e-6)
            for name, values in one["logs"].items():
                assert found[key]["logs"][name] == pytest.approx(values, rel=1e-4), (key, name)


# ---------------------------------------------------------------------- a loss that is not used


def test_label_smoothing_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"compute_loss_func=callback\.loss"):
        build(tmp_path, label_smoothing_factor=0.1)


def test_a_loss_function_of_the_users_is_refused_with_the_way_out(tmp_path: Path) -> None:
    function = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()}
    with pytest.raises(ConfigurationError, match=r"compute_loss_func=callback\.loss"):
        build(tmp_path, trainer_arguments=function)


def _with_loss(folder: Path, function: Callable[..., Tensor], task: str = CLASSIFY, **settings: Any) -> Run:
    """A run whose task loss is the user's function, through `callback.loss`."""
    student, teacher = models(task, settings.pop("dtype", torch.float64))
    callback, kept = DistillCallback(teacher, settings.pop("method", "kd")), GradientKeeper()
    trainer = settings.pop("trainer_class", Trainer)(
        model=student,
        args=arguments(folder, **settings),
        train_dataset=Dataset.from_list(rows(task)),
        eval_dataset=Dataset.from_list(rows(task)),
        data_collator=collate,
        compute_loss_func=callback.loss(function),
        callbacks=[callback, kept],
    )
    return Run(trainer, callback, student, teacher, kept)


def standard(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    summed = nn.functional.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten(), reduction="sum")
    return summed / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize("task", [CLASSIFY, TAG])
def test_the_standard_loss_through_callback_loss_is_the_models_own(task: str, tmp_path: Path) -> None:
    own = build(tmp_path, task, dtype=torch.float64).train()
    for size, steps in ((4, 1), (1, 4), (3, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        run = _with_loss(tmp_path, standard, task, **settings).train()
        assert_gradients(run.gradients, own.gradients, 1e-9)
        for name in ("loss", "task_loss", "distill_loss"):
            assert run.logged(name) == pytest.approx(own.logged(name), rel=1e-5)


def test_label_smoothing_works_through_callback_loss(tmp_path: Path) -> None:
    inputs, (student, teacher) = collate(rows(TAG)), models(TAG, torch.float64)
    kept = inputs["labels"] != -100
    targets = teacher(**inputs).logits[kept].detach()

    def total(logits: Tensor) -> Tensor:
        smooth = nn.functional.cross_entropy(logits[kept], inputs["labels"][kept], label_smoothing=0.1)
        return smooth + kd(logits[kept], targets, temperature=2.0).mean()

    expected = gradient(student, total, inputs)
    for size, steps in ((4, 1), (1, 4)):
        settings: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        run = _with_loss(tmp_path, LabelSmoother(0.1), TAG, label_smoothing_factor=0.1, **settings).train()
        assert_gradients(run.gradients, expected, 1e-5)  # the smoother sums in float32


def test_evaluation_through_callback_loss_measures_the_same_terms(tmp_path: Path) -> None:
    """The Trainer takes the labels out before the forward; which positions are scored depends on them."""
    own = build(tmp_path, TAG, dtype=torch.float64).trainer.evaluate(Dataset.from_list(_half_labelled()))
    run = _with_loss(tmp_path, standard, TAG)
    found = run.trainer.evaluate(Dataset.from_list(_half_labelled()))
    assert found["eval_distill_loss"] == pytest.approx(own["eval_distill_loss"], rel=1e-6)
    assert found["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-6)
    unscored = run.trainer.evaluate(Dataset.from_list(unlabelled(TAG)))
    assert math.isfinite(unscored["eval_distill_loss"])
    assert unscored["eval_distill_loss"] != pytest.approx(own["eval_distill_loss"], rel=1e-3)


def _half_labelled() -> list[dict[str, Any]]:
    return [row | {"labels": [-100 if i % 2 else x for i, x in enumerate(row["labels"])]} for row in rows(TAG)]


class OwnLoss(Trainer):
    """Computes its loss from the logits."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs["labels"]
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class TakesLabels(OwnLoss):
    """The same with the labels taken out first."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class Doubled(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("trainer_class", [OwnLoss, TakesLabels])
def test_a_trainer_that_ignores_the_loss_is_stopped_in_the_first_step(
    trainer_class: type[Trainer], steps: int, tmp_path: Path
) -> None:
    settings = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
    runs = [build(tmp_path, trainer_class=trainer_class, **settings)]
    if trainer_class is TakesLabels:
        runs.append(_with_loss(tmp_path, standard, trainer_class=trainer_class, dtype=torch.float32, **settings))
    for run in runs:
        before = weights_hash(run.student)
        with pytest.raises(UnusedLossError, match="compute_loss"):
            run.train()
        run.callback.detach()
        assert weights_hash(run.student) == before


def test_a_trainer_that_doubles_the_loss_gets_double_the_gradient(tmp_path: Path) -> None:
    plain = build(tmp_path, dtype=torch.float64).train().gradients
    doubled = build(tmp_path, dtype=torch.float64, trainer_class=Doubled).train().gradients
    assert_gradients(doubled, {name: 2 * gradient for name, gradient in plain.items()}, 1e-10)


class LooksFirst(Trainer):
    """Runs the model in training mode without gradient beside its step, for a metric."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            looked = model(**inputs).loss
            own = model.eval()(**inputs).loss
        assert torch.equal(looked, own)
        model.train()
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_forward_without_gradient_in_training_mode_is_left_alone(tmp_path: Path) -> None:
    plain = build(tmp_path, dtype=torch.float64).train()
    run = build(tmp_path, dtype=torch.float64, trainer_class=LooksFirst).train()
    assert_gradients(run.gradients, plain.gradients, 1e-12)
    assert run.logged("distill_loss") == plain.logged("distill_loss")


# ---------------------------------------------------------------------- data without labels


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    "data",
    [unlabelled(), labelled(-100, -100, -100, -100), labelled(1, -100, 3, -100), labelled(-100, -100, -100, 2)],
    ids=["no column", "all -100", "half", "one"],
)
def test_unlabelled_rows_are_distilled_and_left_out_of_the_task_loss(
    data: list[dict[str, Any]], steps: int, tmp_path: Path
) -> None:
    inputs, (student, teacher) = collate(data), models(CLASSIFY, torch.float64)
    targets = teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits.detach()

    def total(logits: Tensor) -> Tensor:
        labels = inputs.get("labels", torch.full((4,), -100))
        task = nn.functional.cross_entropy(logits, labels) if (labels != -100).any() else 0.0
        return task + kd(logits, targets, temperature=2.0).mean()

    settings = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
    run = build(tmp_path, data=data, dtype=torch.float64, **settings).train()
    assert_gradients(run.gradients, gradient(student, total, inputs), 1e-9)
    assert all(math.isfinite(value) for value in run.logged("loss") + run.logged("distill_loss"))
    assert ("task_loss" in run.trainer.state.log_history[0]) == (inputs.get("labels", torch.tensor(-100)).max() >= 0)


@pytest.mark.parametrize("method", [MiniLM(relation_heads=4), Features()], ids=["minilm", "features"])
def test_a_head_that_nothing_reaches_is_an_error_that_names_what_to_add(method: Any, tmp_path: Path) -> None:
    run = build(tmp_path, method=method, data=unlabelled())
    before = weights_hash(models(CLASSIFY)[0])
    with pytest.raises(ConfigurationError, match=r"classifier.*method=\['kd'"):
        run.train()
    run.callback.detach()
    assert weights_hash(run.student) == before
    with pytest.raises(ConfigurationError, match="weight 0"):  # labels alone do not help where they count nothing
        build(tmp_path, method=method, distill={"alpha": 1.0}).train()
    build(tmp_path, method=["kd", method], data=unlabelled()).train()


# ---------------------------------------------------------------------- weights and methods


@pytest.mark.parametrize(
    ("settings", "task_weight", "factor"),
    [({}, 1.0, 1.0), ({"alpha": 0.25}, 0.75, 0.25), ({"task_weight": 3.0}, 3.0, 1.0), ({"alpha": 1.0}, 0.0, 1.0)],
)
def test_the_loss_is_the_weighed_sum_of_what_is_logged(
    settings: dict[str, float], task_weight: float, factor: float, tmp_path: Path
) -> None:
    run = build(tmp_path, method=[KD(weight=2.0), Features(weight=0.5)], distill=settings).train()
    (entry,) = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    distilled = factor * (2.0 * entry["distill/kd"] + 0.5 * entry["distill/features"])
    assert entry["distill_loss"] == pytest.approx(distilled, rel=1e-5)
    assert entry["loss"] == pytest.approx(task_weight * entry["task_loss"] + distilled, rel=1e-5)


class Half(KD):
    task_weight: ClassVar[float | None] = 0.5


class Quarter(KD):
    task_weight: ClassVar[float | None] = 0.25


def test_different_published_task_weights_ask_for_alpha(tmp_path: Path) -> None:
    assert build(tmp_path, method=[Half(), KD()]).callback.run.task_weight == 0.5
    with pytest.raises(ConfigurationError, match="alpha="):
        build(tmp_path, GENERATE, ["gkd", Half(), Quarter()])
    assert build(tmp_path, method=[Half(), Quarter()], distill={"alpha": 0.5}).callback.run.task_weight == 0.5


@pytest.mark.parametrize("settings", [{"alpha": 1.5}, {"alpha": math.nan}, {"alpha": 0.5, "task_weight": 1.0}])
def test_weights_that_make_no_sense_are_refused(settings: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="alpha"):
        build(tmp_path, distill=settings)


def test_one_method_twice_is_two_terms(tmp_path: Path) -> None:
    run = build(tmp_path, method=[KD(temperature=1.0), KD(temperature=4.0, weight=0.5)]).train()
    (entry,) = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    alone = [build(tmp_path, method=KD(temperature=t)).train().logged("distill/kd")[0] for t in (1.0, 4.0)]
    assert [entry["distill/0_kd"], entry["distill/1_kd"]] == pytest.approx(alone, rel=1e-5)
    assert entry["distill_loss"] == pytest.approx(alone[0] + 0.5 * alone[1], rel=1e-5)


class BothWays(KD):
    """One value a position from each of the two methods."""

    def needs(self, student: Any, teacher: Any) -> Needs:
        return Needs()

    def forward(self, signals: Any, step: Any) -> Tensor:
        return torch.full((len(signals.positions.index),), 10.0)


def test_terms_of_per_position_and_forward_add_up(tmp_path: Path) -> None:
    alone = build(tmp_path).train().logged("distill_loss")[0]
    assert build(tmp_path, method=BothWays()).train().logged("distill_loss")[0] == pytest.approx(alone + 10, rel=1e-5)


@pytest.mark.parametrize(("task", "names"), [(CLASSIFY, {"kd", "features"}), (GENERATE, {"gkd"})])
def test_the_default_of_the_task_is_named_in_the_first_log_line(
    task: str, names: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="hf_compress.run"):
        build(tmp_path, task, None)
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_compress.run"]
    assert lines[0].startswith(f"hf_compress: {task} with ")
    assert set(lines[0].rpartition(" with ")[2].split(", ")) == names


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'alpha'"):
        DistillCallback(None, alhpa=0.5)
    with pytest.raises(ConfigurationError, match="not both"):
        DistillCallback(None, config=DistillConfig(), alpha=0.5)
    with pytest.raises(ConfigurationError, match="rows, labels, tokens, causal"):
        DistillConfig(kind="token")  # type: ignore[arg-type]


def test_an_unknown_method_lists_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="'features'"):
        build(tmp_path, method="feature")


def test_the_users_objective_is_left_as_it_was(tmp_path: Path) -> None:
    """One list of methods may serve several runs: neither alpha nor a schedule's state piles up in it."""
    objective = TAID(t_start=0.4, adaptive=False)
    for _ in range(2):
        run = build(tmp_path, method=objective, distill={"alpha": 0.5}, max_steps=3).train()
        assert run.callback.run.distiller.objectives[0].weight == 0.5
    assert objective.weight == 1.0
    assert objective.t == pytest.approx(0.4)


# ---------------------------------------------------------------------- logs and evaluation


def test_logs_are_means_since_the_last_log(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2}
    each = build(tmp_path, method=None, logging_steps=1, **settings).train()
    pairs = build(tmp_path, method=None, logging_steps=2, **settings).train()
    for name in ("loss", "task_loss", "distill_loss", "distill/kd", "distill/features"):
        values = each.logged(name)
        assert len(values) == 4
        means = [sum(values[:2]) / 2, sum(values[2:]) / 2]
        assert pairs.logged(name) == pytest.approx(means, rel=1e-5), name


def test_evaluate_and_predict_see_the_students_own_loss_and_logits(tmp_path: Path) -> None:
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)  # one array: no hidden states of ours beside it
        return {"hits": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    given = {"eval_dataset": Dataset.from_list(rows(CLASSIFY)), "compute_metrics": metrics}
    found = []
    for method in (False, ["kd", "features"]):
        run = build(tmp_path, method=method, trainer_arguments=given)
        before = run.trainer.evaluate()
        predicted = run.trainer.predict(given["eval_dataset"])
        run.train()
        found.append((before["eval_loss"], before["eval_hits"], predicted.predictions, predicted.metrics["test_loss"]))
        assert ("eval_distill_loss" in before) == (method is not False)
        assert "test_distill_loss" not in predicted.metrics
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]
    assert found[0][3] == found[1][3]
    np.testing.assert_array_equal(found[0][2], found[1][2])
    assert set(shapes) == {(4, CLASSES)}


@pytest.mark.parametrize("task", [CLASSIFY, GENERATE])
def test_eval_distill_loss_is_what_training_minimises(task: str, tmp_path: Path) -> None:
    """On the training rows, before the first step: the same number as the first step's, in batches of any size."""
    expected = build(tmp_path, task, [KD(weight=0.5), Features()]).train().logged("distill_loss")[0]
    for size in (4, 3, 1):
        run = build(tmp_path, task, [KD(weight=0.5), Features()], per_device_eval_batch_size=size)
        found = run.trainer.evaluate(run.trainer.train_dataset)
        assert found["eval_distill_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_best_model_is_chosen_by_eval_distill_loss_on_unlabelled_data(tmp_path: Path) -> None:
    data = {"eval_dataset": Dataset.from_list(unlabelled())}
    run = build(
        tmp_path,
        data=unlabelled(),
        trainer_arguments=data,
        max_steps=4,
        learning_rate=2.0,  # too large: the last step is not the best
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_distill_loss",
        greater_is_better=False,
        load_best_model_at_end=True,
    )
    run.train()
    values = run.logged("eval_distill_loss")
    best = values.index(min(values)) + 1
    assert len(values) == 4
    assert run.trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    kept = load_file(Path(run.trainer.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in run.student.state_dict().items())
    assert_nothing_left(run)


def test_steps_epochs_and_learning_rates_are_those_of_a_plain_trainer(tmp_path: Path) -> None:
    found = []
    for method in (False, "kd"):
        run = build(
            tmp_path,
            method=method,
            max_steps=-1,
            num_train_epochs=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            lr_scheduler_type="linear",
            warmup_steps=2,
        ).train()
        found.append((run.logged("learning_rate"), run.logged("epoch"), run.trainer.state.global_step))
    assert found[0] == found[1]
    assert found[0][2] == 6


# ---------------------------------------------------------------------- life cycle


def test_a_second_train_goes_on_with_learned_parts_and_a_fresh_schedule(tmp_path: Path) -> None:
    seen: list[float] = []
    run = build(
        tmp_path,
        method=[TAID(t_start=0.2), Features()],
        max_steps=4,
        callbacks=(At(lambda _: seen.append(float(run.callback.run.distiller.objectives[0].t))),),
    )
    run.train()
    assert_nothing_left(run)
    learned = weights_hash(run.callback.run.distiller["1_features"])
    run.train()
    assert seen[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.01)
    assert seen[4:] == pytest.approx(seen[:4], abs=0.01)
    assert weights_hash(run.callback.run.distiller["1_features"]) != learned
    assert len(run.logged("distill/features")) == 4
    assert_nothing_left(run)


def test_training_again_after_an_exception_has_one_hook_and_clean_logs(tmp_path: Path) -> None:
    stop = stop_at(2)
    run = build(tmp_path, method=["kd", "features"], max_steps=3, callbacks=(stop,))
    with pytest.raises(StoppedError):
        run.train()
    assert hasattr(run.student, "distiller")
    assert len(ours(run.student)) == 2
    stop.function = lambda _: None
    run.kept.gradients.clear()
    run.train()
    assert len(run.logged("distill_loss")) == 3
    assert_nothing_left(run)


@pytest.mark.parametrize("memory", ["dense", "chunked"])
def test_a_retry_with_a_smaller_batch_is_a_run_with_that_batch(memory: str, tmp_path: Path) -> None:
    """`auto_find_batch_size`: weights, schedules and logs are those of a run that began with the smaller batch."""

    def full(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and len(kwargs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")

    settings: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "distill": {"memory": memory, "chunk": 3}}
    plain = build(tmp_path, GENERATE, ["taid", "features"], per_device_train_batch_size=2, **settings).train()
    run = build(
        tmp_path, GENERATE, ["taid", "features"], per_device_train_batch_size=4, auto_find_batch_size=True, **settings
    )
    run.student.register_forward_pre_hook(full, with_kwargs=True)
    run.train()
    assert run.trainer._train_batch_size == 2
    assert run.logged("distill_loss") == plain.logged("distill_loss")
    assert weights_hash(run.student) == weights_hash(plain.student)


def test_an_exception_inside_the_forward_leaves_evaluation_as_it_was(tmp_path: Path) -> None:
    given = {"eval_dataset": Dataset.from_list(rows(CLASSIFY))}
    run = build(tmp_path, method=["kd", "features"], trainer_arguments=given)
    before = run.trainer.evaluate()

    def broken(hidden: Tensor) -> Tensor:
        raise StoppedError

    run.student.classifier.forward = broken
    with pytest.raises(StoppedError):
        run.train()
    del run.student.classifier.forward
    after = run.trainer.evaluate()
    assert [after[name] for name in ("eval_loss", "eval_distill_loss")] == [
        before[name] for name in ("eval_loss", "eval_distill_loss")
    ]
    run.train()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detach_after_an_exception_leaves_nothing(attention: str, tmp_path: Path) -> None:
    student, teacher = models(CLASSIFY)
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    method = ["kd", "features", MiniLM(relation_heads=4)]
    run = build(tmp_path, method=method, student=student, teacher=teacher, callbacks=(stop_at(1),))
    assert student.config._attn_implementation != attention
    with pytest.raises(StoppedError):
        run.train()
    run.callback.detach()
    run.callback.detach()
    assert_nothing_left(run, attention)
    assert all(module.training for module in teacher.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_backend_is_given_back_and_gives_one_loss(attention: str, tmp_path: Path) -> None:
    student, teacher = models(CLASSIFY)
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    run = build(tmp_path, method=["kd", MiniLM(relation_heads=4)], student=student, teacher=teacher).train()
    assert_nothing_left(run, attention)
    other = build(tmp_path, method=["kd", MiniLM(relation_heads=4)]).train()
    assert run.logged("distill_loss") == pytest.approx(other.logged("distill_loss"), rel=1e-4)


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    second = DistillCallback(models(CLASSIFY)[1], "kd")
    with pytest.raises(ConfigurationError, match=r"method=\['kd', 'features'\]"):
        build(tmp_path, callbacks=(second,))
    run = build(tmp_path)
    with pytest.raises(ConfigurationError, match=r"detach\(\)"):
        build(tmp_path, student=run.student)


def test_a_callback_added_later_says_how_to_attach_it(tmp_path: Path) -> None:
    run = build(tmp_path, method=False, dtype=torch.float64)
    callback = DistillCallback(run.teacher, "kd")
    run.trainer.add_callback(callback)
    before = weights_hash(run.student)
    with pytest.raises(ConfigurationError, match=r"callback\.attach\(trainer\)"):
        run.train()
    assert weights_hash(run.student) == before
    callback.attach(run.trainer)
    callback.attach(run.trainer)
    run.train()
    assert_gradients(run.gradients, build(tmp_path, dtype=torch.float64).train().gradients, 1e-12)


@pytest.mark.parametrize("arguments_of", [0, 1])
def test_model_init_distils_every_model_that_it_makes(arguments_of: int, tmp_path: Path) -> None:
    """Two runs of one Trainer: equal, so neither alpha nor a schedule is applied to the second on top."""
    made: list[nn.Module] = []

    def model() -> nn.Module:
        made.append(models(CLASSIFY)[0])
        return made[-1]

    init: Callable[..., nn.Module] = model if arguments_of == 0 else lambda trial: model()
    method = [TAID(adaptive=False), Features()]
    given = {"model": None, "model_init": init}
    run = build(tmp_path, method=method, distill={"alpha": 0.5}, max_steps=3, trainer_arguments=given)
    found = []
    for _ in range(2):
        run.train()
        found.append(([run.logged(name) for name in ("loss", "distill/taid", "distill/features")], run.trainer.model))
    assert len(found[0][0][1]) == 3
    assert found[0][0] == found[1][0]
    assert found[0][1] is not found[1][1]
    assert not any(hasattr(student, "distiller") or ours(student) for student in made)


def test_a_model_put_in_by_hand_is_refused_until_attached(tmp_path: Path) -> None:
    run = build(tmp_path)
    run.trainer.model = run.trainer.model_wrapped = models(CLASSIFY)[0]
    with pytest.raises(ConfigurationError, match=r"callback\.attach\(trainer\)"):
        run.train()


def test_a_callback_moves_to_a_second_trainer_whole(tmp_path: Path) -> None:
    """As when a notebook cell runs twice: the second Trainer counts its windows, the first refuses."""
    run = build(tmp_path, dtype=torch.float64)
    kept = GradientKeeper()
    again = Trainer(
        model=run.student,
        args=arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4),
        train_dataset=run.trainer.train_dataset,
        data_collator=collate,
        callbacks=[run.callback, kept],
    )
    with pytest.raises(ConfigurationError, match="another Trainer"):
        run.train()
    again.train()
    expected = build(tmp_path, dtype=torch.float64).train().gradients
    assert_gradients(kept.gradients[0], expected, 1e-10)


def test_one_teacher_serves_two_trainers_built_side_by_side(tmp_path: Path) -> None:
    """The end of the first run gives the teacher back; the second still sees it in eval mode, and tapped."""
    teacher = models(CLASSIFY)[1]
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    method = ["kd", MiniLM(relation_heads=4)]
    runs = [build(tmp_path, method=method, teacher=teacher) for _ in range(2)]
    losses = [run.train().logged("distill_loss") for run in runs]
    assert losses[0] == losses[1]
    assert_nothing_left(runs[1])


def test_students_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    teacher = models(CLASSIFY)[1]
    with pytest.raises(ConfigurationError, match="auto_model"):
        build(tmp_path, student=nn.Sequential(models(CLASSIFY)[0]))
    with pytest.raises(ConfigurationError, match="one object"):
        build(tmp_path, student=teacher, teacher=teacher)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_student_that_shares_layers_with_its_teacher_is_refused(tmp_path: Path) -> None:
    """Freezing the teacher would freeze them silently."""
    teacher = models(CLASSIFY)[1]
    student = copy.deepcopy(teacher)
    student.bert.encoder.layer = nn.ModuleList(teacher.bert.encoder.layer[:2])
    student.config.num_hidden_layers = 2
    with pytest.raises(ConfigurationError, match=r"share weights.*deepcopy"):
        build(tmp_path, student=student, teacher=teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_an_optimizer_without_the_learned_parts_is_refused(tmp_path: Path) -> None:
    student = models(CLASSIFY)[0]
    before = weights_hash(student)
    given = {"optimizers": (torch.optim.SGD(student.parameters(), lr=0.1), None)}
    with pytest.raises(ConfigurationError, match="let the Trainer make it"):
        build(tmp_path, method=["kd", "features"], student=student, trainer_arguments=given).train()
    del student.distiller
    assert weights_hash(student) == before
    student = models(CLASSIFY)[0]
    given = {"optimizers": (torch.optim.SGD(student.parameters(), lr=0.1), None)}
    build(tmp_path, student=student, trainer_arguments=given).train()


def test_the_teacher_stays_in_eval_mode_and_frozen_and_is_given_back(tmp_path: Path) -> None:
    student, teacher = models(CLASSIFY)
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    teacher.bert.embeddings.eval()
    teacher.classifier.bias.requires_grad_(False)
    modes = [module.training for module in teacher.modules()]
    seen: list[bool] = []
    run = build(
        tmp_path,
        method=["kd", "features"],
        student=student,
        teacher=teacher,
        max_steps=3,
        learning_rate=0.0,
        callbacks=(
            At(lambda _: seen.append(any(m.training for m in teacher.modules()))),
            At(lambda _: seen.append(any(p.requires_grad for p in teacher.parameters()))),
        ),
    ).train()
    assert not any(seen)
    assert len(set(run.logged("distill_loss"))) == 1  # dropout would show
    assert [module.training for module in teacher.modules()] == modes
    assert [name for name, p in teacher.named_parameters() if not p.requires_grad] == ["classifier.bias"]


# ---------------------------------------------------------------------- resume

SAVED: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
TAID_FEATURES: Any = [TAID(adaptive=False), Features()]


def _without(checkpoint: Path, part: str) -> None:
    """As another release would have written it."""
    file = checkpoint / "model.safetensors"
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    save_file({name: t for name, t in load_file(file).items() if part not in name}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["distiller.0_taid.t", "distiller."])
def test_a_checkpoint_without_the_state_of_a_method_is_not_resumed(part: str, tmp_path: Path) -> None:
    build(tmp_path, GENERATE, TAID_FEATURES, **SAVED).train()
    _without(tmp_path / "checkpoint-3", part)
    run = build(tmp_path, GENERATE, TAID_FEATURES, **SAVED)
    with pytest.raises(ResumeError, match=r"step 3.*0_taid\.t"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_in_mid_run_is_the_student_and_the_state_of_the_methods(tmp_path: Path) -> None:
    run = build(tmp_path, GENERATE, TAID_FEATURES, **SAVED).train()
    names = set(load_file(tmp_path / "checkpoint-3" / "model.safetensors"))
    assert {name for name in names if name.startswith("distiller.")} == {
        *(f"distiller.0_taid.{part}" for part in ("t", "previous", "momentum")),
        *(f"distiller.1_features.project.{layer}.weight" for layer in (1, 2)),
    }
    loaded, report = type(run.student).from_pretrained(tmp_path / "checkpoint-6", output_loading_info=True)
    assert not report["missing_keys"]
    assert weights_hash(loaded) == weights_hash(run.student)


def test_a_run_of_another_method_is_not_resumed(tmp_path: Path) -> None:
    build(tmp_path, GENERATE, "kd", **SAVED).train()
    with pytest.raises(ResumeError, match="0_taid"):
        build(tmp_path, GENERATE, "taid", **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("task", [CLASSIFY, GENERATE])
def test_a_moved_checkpoint_resumes_bit_identically(task: str, tmp_path: Path) -> None:
    settings = SAVED | {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    whole = build(tmp_path / "here", task, TAID_FEATURES, **settings).train()
    (tmp_path / "here" / "checkpoint-3").rename(tmp_path / "moved")
    resumed = build(tmp_path / "there", task, TAID_FEATURES, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved"))
    for name in ("loss", "distill/taid", "distill/features"):
        assert resumed.logged(name) == whole.logged(name)
    assert weights_hash(resumed.student) == weights_hash(whole.student)


def test_the_same_trainer_resumes_its_own_checkpoint(tmp_path: Path) -> None:
    """The distiller is off when the checkpoint is loaded, and was on when the best model was."""
    settings = SAVED | {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    given = {"eval_dataset": Dataset.from_list(rows(GENERATE))}
    run = build(tmp_path, GENERATE, TAID_FEATURES, trainer_arguments=given, **settings).train()
    losses = run.logged("distill/taid")
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert run.logged("distill/taid") == losses
    _without(tmp_path / "checkpoint-3", "distiller.")
    with pytest.raises(ResumeError, match="step 3"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_adapters_resume_bit_identically_from_the_side_file(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> Run:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        student = peft.get_peft_model(models(GENERATE)[0], config)
        callbacks = () if stop is None else (stop_at(stop),)
        return build(folder, GENERATE, TAID_FEATURES, student=student, callbacks=callbacks, **SAVED)

    whole = run(tmp_path / "whole").train()
    with pytest.raises(StoppedError):
        run(tmp_path / "parts", stop=4).train()
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    assert not any("distiller" in name for name in load_file(checkpoint / "adapter_model.safetensors"))
    resumed = run(tmp_path / "parts").train(resume_from_checkpoint=True)
    assert resumed.logged("loss") == whole.logged("loss")
    assert weights_hash(resumed.student) == weights_hash(whole.student)
    (checkpoint / "distiller.safetensors").unlink()
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(ResumeError, match=r"checkpoint-3 has no distiller\.safetensors"):
        run(tmp_path / "parts").train(resume_from_checkpoint=str(checkpoint))


# ---------------------------------------------------------------------- checkpointing, precision, compilation


@pytest.mark.parametrize("method", [MiniLM(relation_heads=4), Features()], ids=["minilm", "features"])
def test_gradient_checkpointing_changes_no_gradient(method: Any, tmp_path: Path) -> None:
    plain = build(tmp_path, method=["kd", method], dtype=torch.float64).train().gradients
    for reentrant in (False, True):
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        run = build(tmp_path, method=["kd", method], dtype=torch.float64, **settings)
        if reentrant and isinstance(method, MiniLM):
            with pytest.raises(ConfigurationError, match="'use_reentrant': False"):
                run.train()
            continue
        assert_gradients(run.train().gradients, plain, 1e-9)


@pytest.mark.parametrize("task", [CLASSIFY, GENERATE])
def test_bfloat16_autocast_is_finite_and_close(task: str, tmp_path: Path) -> None:
    method = ["kd", "features", MiniLM(relation_heads=4)]
    full = build(tmp_path, task, method).train()
    half = build(tmp_path, task, method, bf16=True).train()
    for name in ("loss", "distill_loss"):
        assert half.logged(name) == pytest.approx(full.logged(name), rel=0.05)
    a, b = (torch.cat([g.flatten() for _, g in sorted(run.gradients.items())]) for run in (full, half))
    assert b.isfinite().all()
    assert nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_a_compiled_run_gives_the_same_losses(tmp_path: Path) -> None:
    """Under the backend that needs no C++ compiler; the graph breaks at our hooks are the same."""
    method = ["kd", "features", MiniLM(relation_heads=4)]
    plain = build(tmp_path, method=method, max_steps=2).train()
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = build(tmp_path, method=method, max_steps=2, **settings).train()
    for name in ("loss", "distill_loss"):
        assert compiled.logged(name) == pytest.approx(plain.logged(name), rel=1e-4)


# ---------------------------------------------------------------------- outputs, teachers, data


class DictOutput(nn.Module):
    """A model of the user's own that returns a plain dict."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return dict(self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels))


class TupleOutput(DictOutput):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return tuple(super().forward(input_ids, attention_mask, labels).values())


@pytest.mark.parametrize("wrap", [DictOutput, TupleOutput])
@pytest.mark.parametrize("data", [None, unlabelled()], ids=["labels", "none"])
def test_plain_modules_return_dicts_or_tuples(wrap: Any, data: Any, tmp_path: Path) -> None:
    expected = build(tmp_path, data=data, dtype=torch.float64).train()
    student = wrap(models(CLASSIFY, torch.float64)[0])
    run = build(tmp_path, data=data, student=student, dtype=torch.float64, distill={"kind": "rows"}).train()
    found = {name.removeprefix("inner."): gradient for name, gradient in run.gradients.items()}
    assert_gradients(found, expected.gradients, 1e-12)


class OtherIds(KD):
    """The teacher reads a column that the student never sees."""

    def needs(self, student: Any, teacher: Any) -> Needs:
        return Needs(columns=frozenset({"teacher_input_ids"}), same_tokens=False)

    def teacher_batch(self, inputs: dict[str, Tensor], step: Any) -> dict[str, Tensor]:
        return inputs | {"input_ids": inputs["teacher_input_ids"]}


@pytest.mark.parametrize("remove", [True, False])
def test_columns_of_the_teacher_reach_it_alone_in_training_and_evaluation(remove: bool, tmp_path: Path) -> None:
    """Given the student's own ids, the loss is kd's."""
    data = [row | {"teacher_input_ids": row["input_ids"]} for row in rows(CLASSIFY)]

    def both(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        if "teacher_input_ids" not in batch[0]:
            return collate(batch)
        theirs = collate([{"input_ids": row["teacher_input_ids"]} for row in batch])["input_ids"]
        return collate(batch) | {"teacher_input_ids": theirs}

    given = {"data_collator": both, "eval_dataset": Dataset.from_list(data)}
    run = build(
        tmp_path,
        method=OtherIds(),
        data=data,
        student=DictOutput(models(CLASSIFY)[0]),  # its forward takes no other names
        distill={"kind": "rows"},
        remove_unused_columns=remove,
        trainer_arguments=given,
    )
    before = run.trainer.evaluate()
    expected = build(tmp_path).train().logged("distill_loss")
    assert run.train().logged("distill_loss") == pytest.approx(expected, rel=1e-6)
    assert before["eval_distill_loss"] == pytest.approx(expected[0], rel=1e-5)
    with pytest.raises(MismatchError, match=r"lacks \['teacher_input_ids'\].*collator"):
        build(tmp_path, method=OtherIds()).train()


class Unpacks(Trainer):
    """Reads the tuple that its model returns."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        assert type(outputs) is tuple
        loss, _logits = outputs
        return (loss, outputs) if return_outputs else loss


def test_tuples_stay_tuples_of_the_same_fields(tmp_path: Path) -> None:
    """`return_dict=False` in the config, with taps that need fields of the output, of both models."""
    student, teacher = models(CLASSIFY, torch.float64)
    expected = build(tmp_path, method=["kd", "features"], dtype=torch.float64).train()
    student.config.return_dict = teacher.config.return_dict = False
    given = {"eval_dataset": Dataset.from_list(rows(CLASSIFY))}
    run = build(
        tmp_path,
        method=["kd", "features"],
        student=student,
        teacher=teacher,
        dtype=torch.float64,
        trainer_class=Unpacks,
        trainer_arguments=given,
    ).train()
    assert_gradients(run.gradients, expected.gradients, 1e-12)
    assert run.trainer.predict(given["eval_dataset"]).predictions.shape == (4, CLASSES)


def test_a_teacher_gets_the_inputs_that_its_forward_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=VOCAB, dim=32, hidden_dim=32, n_layers=2, n_heads=2, num_labels=CLASSES)
    teacher = DistilBertForSequenceClassification(config)

    def with_types(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = collate(batch)
        return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}

    run = build(tmp_path, teacher=teacher, trainer_arguments={"data_collator": with_types}).train()
    assert math.isfinite(run.logged("distill_loss")[0])


def test_a_teacher_in_half_precision_teaches(tmp_path: Path) -> None:
    teacher = models(CLASSIFY, torch.bfloat16)[1]
    run = build(tmp_path, method=None, teacher=teacher).train()
    full = build(tmp_path, method=None).train()
    assert run.logged("distill_loss") == pytest.approx(full.logged("distill_loss"), rel=0.05)
    assert teacher.dtype == torch.bfloat16


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_label_out_of_range_is_named_before_the_forward(label: int, tmp_path: Path) -> None:
    run = build(tmp_path, data=labelled(0, 1, label, 2))
    with pytest.raises(MismatchError, match=f"label {label} is out of range.*num_labels"):
        run.train()


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="empty"):
        build(tmp_path, trainer_arguments={"train_dataset": Dataset.from_dict({"input_ids": [], "labels": []})})


def _classifier(**settings: Any) -> BertForSequenceClassification:
    config: dict[str, Any] = models(CLASSIFY)[1].config.to_dict() | settings
    return BertForSequenceClassification(BertConfig(**config))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"num_labels": 3, "id2label": None}, "the student has 5 labels, the teacher 3.*method='features'"),
        ({"vocab_size": 40}, "embeds 60 tokens, the teacher 40.*processing_class"),
        ({"vocab_size": 90}, "embeds 60 tokens, the teacher 90.*processing_class"),
    ],
    ids=["labels", "smaller vocabulary", "larger vocabulary"],
)
def test_a_teacher_that_does_not_fit_is_refused_when_the_trainer_is_built(
    teacher: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {key: value for key, value in teacher.items() if value is not None}
    made = _classifier(**settings) if "num_labels" not in settings else _of_labels(3)
    with pytest.raises(MismatchError, match=message):
        build(tmp_path, teacher=made)


def _of_labels(number: int) -> BertForSequenceClassification:
    settings = models(CLASSIFY)[1].config.to_dict()
    del settings["id2label"], settings["label2id"]
    return BertForSequenceClassification(BertConfig(**settings, num_labels=number))


def test_another_label_order_is_refused(tmp_path: Path) -> None:
    student, teacher = models(CLASSIFY)
    names = ["anger", "fear", "joy", "love", "sadness"]
    student.config.id2label = dict(enumerate(names))
    teacher.config.id2label = dict(enumerate(reversed(names)))
    with pytest.raises(MismatchError, match=r"label orders differ.*id2label"):
        build(tmp_path, student=student, teacher=teacher)
    build(tmp_path, method="features", student=student, teacher=teacher)  # compares no labels


def test_a_token_that_the_teacher_does_not_embed_is_named(tmp_path: Path) -> None:
    teacher = models(CLASSIFY)[1]
    teacher.resize_token_embeddings(20)
    teacher.config.vocab_size = VOCAB  # its config says otherwise, so it shows with the first batch only
    run = build(tmp_path, teacher=teacher)
    teacher.config.vocab_size = 20
    with pytest.raises(MismatchError, match=r"token id \d+, the teacher embeds 0 … 19"):
        run.train()


def test_heads_without_a_softmax_are_refused_for_methods_that_compare_one(tmp_path: Path) -> None:
    pair = [_classifier(problem_type="regression") for _ in range(2)]
    with pytest.raises(MismatchError, match="method='features'"):
        build(tmp_path, student=pair[0], teacher=pair[1])
    several = [row | {"labels": [1.0, 0.0, 1.0, 0.0, 0.0]} for row in rows(CLASSIFY)]

    def collated(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        plain = collate([{"input_ids": row["input_ids"]} for row in batch])
        return plain | {"labels": torch.tensor([row["labels"] for row in batch])}

    run = build(tmp_path, data=several, trainer_arguments={"data_collator": collated})
    with pytest.raises(MismatchError, match="multi_label_classification"):  # the config does not say so: the labels do
        run.train()
    for size, steps in ((4, 1), (1, 4)):
        build(
            tmp_path,
            method="features",
            data=several,
            trainer_arguments={"data_collator": collated},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        ).train()


def test_logits_of_another_shape_than_the_positions_are_refused(tmp_path: Path) -> None:
    """A model of tokens taken for one of rows: the first rows of its logits would be scored in silence."""
    with pytest.raises(MismatchError, match="kind="):
        build(tmp_path, TAG, distill={"kind": "rows"}, data=unlabelled(TAG)).train()


def test_kind_decides_for_both_models(tmp_path: Path) -> None:
    student, teacher = (DictOutput(model) for model in models(TAG))
    run = build(tmp_path, TAG, student=student, teacher=teacher, distill={"kind": "tokens"}).train()
    assert run.logged("distill_loss") == pytest.approx(build(tmp_path, TAG).train().logged("distill_loss"), rel=1e-6)


def test_decoders_with_images_are_causal_and_unlabelled_decoders_score_their_own_tokens() -> None:
    class SeesForConditionalGeneration(nn.Module):
        config = BertConfig()

    assert kind_of(SeesForConditionalGeneration()) == "causal"
    SeesForConditionalGeneration.config.is_encoder_decoder = True
    assert kind_of(SeesForConditionalGeneration()) == "tokens"
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.long), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}
    assert positions("tokens", inputs).index.tolist() == [0, 1, 2, 3, 4, 5]
    assert positions("tokens", inputs | {"decoder_attention_mask": mask}).index.tolist() == [0, 1, 3]


def _tokenizer(order: list[int]) -> PreTrainedTokenizerFast:
    words = {("[UNK]" if word == 0 else f"w{word}"): place for place, word in enumerate(order)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]")


def test_a_tokenizer_of_equal_size_and_other_ids_is_refused(tmp_path: Path) -> None:
    ours, theirs = _tokenizer(list(range(50))), _tokenizer([0, *reversed(range(1, 50))])
    teacher = models(CLASSIFY)[1]
    teacher.save_pretrained(tmp_path / "teacher")
    for method in ("kd", ["kd", "features"]):
        theirs.save_pretrained(tmp_path / "teacher")
        with pytest.raises(MismatchError, match=r"tokens of the tokenizer have another id.*Use its tokenizer"):
            build(
                tmp_path, method=method, teacher=str(tmp_path / "teacher"), trainer_arguments={"processing_class": ours}
            )
        ours.save_pretrained(tmp_path / "teacher")
        build(tmp_path, method=method, teacher=str(tmp_path / "teacher"), trainer_arguments={"processing_class": ours})
    long = _tokenizer(list(range(70)))
    with pytest.raises(MismatchError, match="70 tokens, the teacher embeds 60"):
        build(tmp_path, trainer_arguments={"processing_class": long})


def test_equal_tokenizers_allow_padded_vocabularies(tmp_path: Path) -> None:
    tokenizer, teacher = _tokenizer(list(range(60))), _classifier(vocab_size=64)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    given = {"processing_class": tokenizer}
    build(tmp_path, teacher=str(tmp_path / "teacher"), trainer_arguments=given).train()


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_folder_is_a_teacher(as_type: Any, tmp_path: Path) -> None:
    models(CLASSIFY)[1].save_pretrained(tmp_path / "teacher")
    run = build(tmp_path, teacher=as_type(tmp_path / "teacher")).train()
    assert run.logged("distill_loss") == build(tmp_path).train().logged("distill_loss")
    with pytest.raises(ConfigurationError, match="got int"):
        build(tmp_path, teacher=3)


def test_a_teacher_is_loaded_as_it_is_told(tmp_path: Path) -> None:
    models(CLASSIFY)[1].save_pretrained(tmp_path / "all" / "teacher")
    settings = {"dtype": torch.bfloat16, "subfolder": "teacher", "device_map": "cpu"}
    run = build(tmp_path, teacher=str(tmp_path / "all"), distill={"teacher_kwargs": settings}).train()
    half = build(tmp_path, teacher=models(CLASSIFY)[1].bfloat16()).train()
    assert run.logged("distill_loss") == half.logged("distill_loss")
    assert run.logged("distill_loss") != build(tmp_path).train().logged("distill_loss")
    with pytest.raises(ConfigurationError, match=r"\['trust_remote_code'\] cannot be set"):
        build(tmp_path, teacher=str(tmp_path / "all"), distill={"teacher_kwargs": {"trust_remote_code": True}})
    with pytest.raises(ConfigurationError, match=r"\['dtype'\] are for a hub id or a folder"):
        build(tmp_path, distill={"teacher_kwargs": {"dtype": torch.bfloat16}})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_teacher_in_few_bits_teaches(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    models(GENERATE)[1].save_pretrained(tmp_path / "teacher")
    quantized = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    settings = {"quantization_config": quantized, "device_map": {"": 0}}
    distill = {"teacher_kwargs": settings}
    run = build(tmp_path, GENERATE, teacher=str(tmp_path / "teacher"), distill=distill, use_cpu=False).train()
    whole = build(tmp_path, GENERATE).train()
    assert run.logged("distill_loss")[0] == pytest.approx(whole.logged("distill_loss")[0], rel=0.3)


def test_a_masked_language_model_folder_teaches_a_classifier_by_hidden_states(tmp_path: Path) -> None:
    models(MASK)[1].save_pretrained(tmp_path / "teacher")
    build(tmp_path, method="features", teacher=str(tmp_path / "teacher")).train()
    with pytest.raises(MismatchError, match="method='features'"):
        build(tmp_path, teacher=str(tmp_path / "teacher"))


def test_a_teacher_folder_with_missing_weights_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    teacher = models(CLASSIFY)[1]
    teacher.config.save_pretrained(folder)
    with pytest.raises(ForeignFileError, match="safetensors"):
        build(tmp_path, teacher=str(folder))
    teacher.save_pretrained(folder)
    _without(folder, "classifier")
    with pytest.raises(ForeignFileError, match=r"classifier.*fine-tune"):
        build(tmp_path, teacher=str(folder))
    teacher.save_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ForeignFileError, match="safetensors"):
        build(tmp_path, teacher=str(folder))
    BertModel(teacher.config).save_pretrained(tmp_path / "body")
    with pytest.raises(MismatchError, match="method='features'"):
        build(tmp_path, teacher=str(tmp_path / "body"))


class Counts(KD):
    """A denominator of its own, for some batches."""

    def count(self, inputs: dict[str, Tensor]) -> int | None:
        return 1 if len(inputs["input_ids"]) == 1 else None


def test_a_denominator_for_some_batches_of_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no common denominator"):
        build(tmp_path, method=Counts(), per_device_train_batch_size=3, gradient_accumulation_steps=2).train()


if __name__ == "__main__":
    _child(Path(sys.argv[1]))


# ---------------------------------------------------------------------- the order of the forwards


def test_a_teacher_that_calls_the_student_leaves_its_step_watched(tmp_path: Path) -> None:
    student, inner = models(CLASSIFY)

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.student = inner, [student]

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            self.student[0](input_ids=input_ids, attention_mask=attention_mask)
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    run = build(tmp_path, student=student, teacher=Asking()).train()
    assert run.logged("distill_loss") == pytest.approx(build(tmp_path).train().logged("distill_loss"))


def test_a_teacher_that_changes_the_batch_in_place_is_refused(tmp_path: Path) -> None:
    class Changing(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            input_ids.fill_(1)
            return {"logits": torch.zeros(len(input_ids), CLASSES)}

    with pytest.raises(MismatchError, match=r"\['input_ids'\] in place"):
        build(tmp_path, teacher=Changing()).train()


@pytest.mark.parametrize("training", [True, False])
def test_what_a_user_asks_of_the_student_is_not_withheld(training: bool, tmp_path: Path) -> None:
    """Though the teacher's forward names it and the student's does not."""
    config = DistilBertConfig(vocab_size=VOCAB, dim=16, n_layers=1, n_heads=2, hidden_dim=16, num_labels=CLASSES)
    run = build(tmp_path, student=DistilBertForSequenceClassification(config))
    batch = collate(rows(CLASSIFY))
    with torch.set_grad_enabled(training):
        found = run.student.train(training)(**batch, output_hidden_states=True)
    assert len(found.hidden_states) == 2


def test_labels_of_a_formatted_data_set_are_counted(tmp_path: Path) -> None:
    data = Dataset.from_list([row | {"labels": [1.0, 0.0]} for row in rows(CLASSIFY)]).with_format("torch")
    assert describe_data(data, None).labelled == 4


@pytest.mark.parametrize("until", [None, "output:model.layers.0.mlp"])
def test_a_module_is_named_as_in_the_model_inside_adapters(until: str | None) -> None:
    student, ids = models(GENERATE)[0], collate(rows(GENERATE))["input_ids"]
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    taps = Taps(adapted, ["output:model.layers.0.mlp"], 2, until)
    output = None
    with torch.no_grad(), watching(taps), contextlib.suppress(Reached):
        output = adapted(input_ids=ids)
    assert taps.read(output)["output:model.layers.0.mlp"].shape == (4, 12, 48)
    taps.remove()
