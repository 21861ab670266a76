"""The callback in a Trainer for every family and task: what the table in README.md says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import families
import pytest
import torch
import transformers
from families import (
    BROKEN,
    FAMILIES,
    FAULTS,
    LEFT_OUT,
    NO_STATES,
    NOT_TAUGHT,
    REFUSED,
    TASKS,
    TUPLES,
    UNCHUNKED,
    cases,
)
from hf_compress_plugins.general.gkd import gkd
from stub import GradientKeeper, arguments
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_compress import DistillCallback
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import kind_of, positions
from hf_compress.outputs import decoder_inputs, logits_of
from hf_compress.taps import Taps, watching
from hf_compress.testing import weights_hash

CASES = [pytest.param(*case, id="-".join(case)) for case in cases()]
TOLERANCE = 1e-6
"""Of the largest entry of a gradient: some models compute a softmax or a norm in float32 whatever their type."""


@dataclass(frozen=True)
class Outcome:
    """Of a run of tiny models."""

    gradients: list[dict[str, Tensor]]
    """Of student and learned parts, by step."""
    trainer: Trainer
    teacher: PreTrainedModel
    evaluated: dict[str, float]
    """Before the first step."""

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]


def train(
    folder: Path,
    family: str,
    task: str,
    *,
    method: Any = None,
    data: list[dict[str, Any]] | None = None,
    return_dict: bool = True,
    evaluate: bool = False,
    student_config: Mapping[str, Any] = MappingProxyType({}),
    distill: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Outcome:
    student, teacher = families.models(family, task)
    student.config.return_dict = teacher.config.return_dict = return_dict
    student.config.update(student_config)
    kept = GradientKeeper()
    distill = {"task_weight": 1.0, **distill}  # gkd publishes 0, which would hide the task's own loss
    callback = DistillCallback(teacher, method, **distill)
    data = families.rows(family, task) if data is None else data
    trainer = Trainer(
        model=student,
        args=arguments(folder, **({"learning_rate": 1e-3} | settings)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=families.collate,
        callbacks=[callback, kept],
    )
    evaluated = trainer.evaluate() if evaluate else {}
    trainer.train()
    return Outcome(kept.gradients, trainer, teacher, evaluated)


@cache
def whole(folder: Path, family: str, task: str) -> Outcome:
    """An evaluation, then three steps of all four rows."""
    return train(folder, family, task, max_steps=3, evaluate=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=TOLERANCE * scale + 1e-9, msg=name)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_three_steps_teach_the_student_and_leave_a_plain_model(
    family: str, task: str, shared: Path, tmp_path: Path
) -> None:
    before, teacher = families.models(family, task)
    run = whole(shared, family, task)

    student = run.trainer.model
    assert len(run.gradients) == 3
    for step in run.gradients:
        assert all(gradient.isfinite().all() for gradient in step.values())
    assert min(run.logged("distill_loss")) > 0
    assert len(run.logged("task_loss")) == (0 if task == "embeddings" else 3)
    assert weights_hash(student) != weights_hash(before)
    assert weights_hash(run.teacher) == weights_hash(teacher)
    assert [m.training for m in run.teacher.modules()] == [m.training for m in teacher.modules()]
    assert [p.requires_grad for p in run.teacher.parameters()] == [p.requires_grad for p in teacher.parameters()]
    run.trainer.save_model(str(tmp_path))
    auto = getattr(transformers, TASKS[task][FAMILIES[family].reads])
    loaded, report = auto.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert type(loaded) is type(before)
    assert weights_hash(loaded) == weights_hash(student)


@pytest.mark.parametrize(("family", "task"), [case for case in cases() if case[0] != "ResNet"])
def test_evaluation_measures_what_training_minimises(family: str, task: str, shared: Path) -> None:
    """Without dropout; BatchNorm uses other statistics in evaluation."""
    run = whole(shared, family, task)
    assert run.evaluated["eval_distill_loss"] == pytest.approx(run.logged("distill_loss")[0], rel=1e-5)


def _accumulating() -> list[Any]:
    """All but BatchNorm, which relates the rows of a batch."""
    marks = {case: pytest.mark.xfail(strict=True, reason=reason) for case, reason in FAULTS.items()}
    found = [case for case in cases() if case[0] != "ResNet"]
    return [pytest.param(*case, id="-".join(case), marks=marks.get(case, ())) for case in found]


@pytest.mark.parametrize(("family", "task"), _accumulating())
def test_four_micro_batches_of_one_row_give_the_gradient_of_one_batch(
    family: str, task: str, shared: Path, tmp_path: Path
) -> None:
    run = train(tmp_path, family, task, per_device_train_batch_size=1, gradient_accumulation_steps=4)

    expected = whole(shared, family, task)
    for name in ("distill_loss", "task_loss"):
        assert run.logged(name)[:1] == pytest.approx(expected.logged(name)[:1], rel=TOLERANCE), name
    assert_same(run.gradients[0], expected.gradients[0])


@pytest.mark.parametrize("empty", [(), (1, 2)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_ctc_loss_adds_up_as_it_is_meant(reduction: str, empty: tuple[int, ...], tmp_path: Path) -> None:
    """Rows without a word too."""
    data = families.rows("wav2vec2", "speech to text")
    for place in empty:
        data[place] = data[place] | {"labels": [families.IGNORED]}
    found = [
        train(
            tmp_path,
            "wav2vec2",
            "speech to text",
            data=data,
            student_config={"ctc_loss_reduction": reduction},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        for size, steps in ((4, 1), (1, 4), (3, 2))
    ]
    for run in found[1:]:
        assert run.logged("task_loss")[0] == pytest.approx(found[0].logged("task_loss")[0], rel=TOLERANCE)
        assert_same(run.gradients[0], found[0].gradients[0])


TAUGHT_BY_LABELS = {case for case in cases() if case[1] == "regression"} | {("wav2vec2", "speech to text")}
"""Whose head no method reaches."""


@pytest.mark.parametrize(("family", "task"), [case for case in cases() if case[1] != "embeddings"])
def test_rows_without_labels_are_distilled(family: str, task: str, tmp_path: Path) -> None:
    data = families.rows(family, task, labelled=False)
    if (family, task) in TAUGHT_BY_LABELS:
        with pytest.raises(ConfigurationError, match=NOT_TAUGHT):
            train(tmp_path, family, task, data=data)
        return

    run = train(tmp_path, family, task, data=data)

    assert run.logged("distill_loss")[0] > 0
    assert not run.logged("task_loss")
    assert all(gradient.isfinite().all() for gradient in run.gradients[0].values())


@pytest.mark.parametrize(("family", "task"), [case for case in cases() if case[0] in TUPLES])
def test_models_that_return_tuples_give_the_same_gradients(
    family: str, task: str, shared: Path, tmp_path: Path
) -> None:
    run = train(tmp_path, family, task, return_dict=False)
    assert_same(run.gradients[0], whole(shared, family, task).gradients[0])


HEADS = {family: next(task for task in TASKS if (family, task) in cases()) for family in FAMILIES}
"""A task of each family."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TUPLES])
def test_of_the_other_families_transformers_itself_makes_no_tuples(family: str) -> None:
    student, _ = families.models(family, HEADS[family])
    student.config.return_dict = False
    with pytest.raises(AttributeError, match="'tuple' object has no attribute"):
        student(**families.collate(families.rows(family, HEADS[family])))


LANGUAGE = [
    case for case in cases() if case[1] in ("causal LM", "encoder-decoder LM") or case == ("Whisper", "speech to text")
]


@pytest.mark.parametrize(("family", "task"), LANGUAGE)
def test_the_term_of_a_language_model_is_that_of_its_own_logits(
    family: str, task: str, shared: Path, tmp_path: Path
) -> None:
    """Soft caps and scales after the head included."""
    batch = families.collate(families.rows(family, task))
    student, teacher = families.models(family, task)
    where = positions(kind_of(student), batch)
    with torch.no_grad():
        rows = [logits_of(model(**batch)).flatten(0, 1)[where.index] for model in (student, teacher)]
    expected = gkd(*rows, beta=0.5).mean().item()

    assert whole(shared, family, task).logged("distill_loss")[0] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(("family", "task"), LANGUAGE)
def test_logits_in_chunks_give_the_same_gradient(
    family: str, task: str, shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_chunks = {"memory": "chunked", "chunk": 3}
    if (family, task) in UNCHUNKED:
        with pytest.raises(ConfigurationError, match=re.escape(UNCHUNKED[family, task])):
            train(tmp_path, family, task, distill=in_chunks)
        return

    run = train(tmp_path, family, task, distill=in_chunks)

    assert "kept whole" not in caplog.text  # the teacher's
    expected = whole(shared, family, task)
    for name in ("distill_loss", "task_loss"):
        assert run.logged(name)[0] == pytest.approx(expected.logged(name)[0], rel=TOLERANCE), name
    assert_same(run.gradients[0], expected.gradients[0])


ANSWERING = [("T5", "encoder-decoder LM"), ("BART", "encoder-decoder LM"), ("Whisper", "speech to text")]


@pytest.mark.parametrize(("family", "task"), ANSWERING)
def test_the_decoder_reads_the_labels_as_the_model_shifts_them(family: str, task: str) -> None:
    model, _ = families.models(family, task)
    batch = families.collate(families.rows(family, task))
    labels = batch.pop("labels")

    found = model(**batch, decoder_input_ids=decoder_inputs(model, labels)).logits

    torch.testing.assert_close(found, model(**batch, labels=labels).logits)


@pytest.mark.parametrize(("family", "task"), ANSWERING)
def test_hidden_states_of_an_encoder_decoder_are_its_encoders(family: str, task: str) -> None:
    model, _ = families.models(family, task)
    batch = families.collate(families.rows(family, task))
    taps = Taps(model, ["hidden:1"], 1)
    with watching(taps):
        output = model(**batch, output_hidden_states=True)
    read = {name: value for name, value in batch.items() if name != "labels"}
    expected = model.get_encoder()(**read, output_hidden_states=True).hidden_states[1]

    torch.testing.assert_close(taps.read(output)["hidden:1"], expected)
    with pytest.raises(ConfigurationError, match="Leave teacher_until out"):
        Taps(model, ["hidden:0"], 1, until="hidden:0")


@pytest.mark.parametrize("method", ["kd", None])
def test_padded_waveforms_with_a_mask_over_samples(method: str | None, tmp_path: Path) -> None:
    whole_rows = families.rows("wav2vec2", "single-label")
    lengths = [families.SOUND - 20 * place for place in range(4)]
    data = [
        row | {"input_values": row["input_values"][:length], "attention_mask": [1] * length}
        for row, length in zip(whole_rows, lengths, strict=True)
    ]

    one = train(tmp_path, "wav2vec2", "single-label", method=method, data=data)
    four = train(
        tmp_path,
        "wav2vec2",
        "single-label",
        method=method,
        data=data,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )

    assert one.logged("distill_loss")[0] > 0
    assert_same(four.gradients[0], one.gradients[0])


@pytest.mark.parametrize(("family", "task"), LEFT_OUT)
def test_what_does_not_fit_is_left_out_of_a_default_with_a_warning(
    family: str, task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = families.models(family, task)
    callback = DistillCallback(teacher)
    Trainer(model=student, args=arguments(tmp_path), callbacks=[callback])
    assert f"{LEFT_OUT[family, task]} is left out of the default methods: {NO_STATES}" in caplog.text
    assert [objective.name for objective in callback.run.distiller.objectives] == ["kd"]
    with pytest.raises(MismatchError, match=re.escape(NO_STATES)):
        Trainer(model=student, args=arguments(tmp_path), callbacks=[DistillCallback(teacher, ["kd", "features"])])


@pytest.mark.parametrize(("family", "task"), REFUSED)
def test_a_default_that_does_not_fit_is_refused(family: str, task: str, tmp_path: Path) -> None:
    student, teacher = families.models(family, task)
    with pytest.raises(MismatchError, match=re.escape(NO_STATES)):
        Trainer(model=student, args=arguments(tmp_path), callbacks=[DistillCallback(teacher)])


@pytest.mark.parametrize(("family", "task"), BROKEN)
def test_heads_that_transformers_itself_cannot_train(family: str, task: str) -> None:
    student, _ = families.models(family, task)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(BROKEN[family, task])):
        student(**families.collate(families.rows(family, task)))
