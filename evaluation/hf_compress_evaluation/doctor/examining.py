"""Looks at a run: first at what it left behind, then, where rows and a teacher are given, at what the models do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_compress import fitting, trainer_log
from hf_compress.errors import HfCompressError
from hf_compress.objective import IGNORED
from hf_compress_evaluation import quality
from hf_compress_evaluation.candidates import Candidate, torch_candidate
from hf_compress_evaluation.examples import read_rows
from hf_compress_evaluation.task import Task, read_task

from . import courses, gradients, places, predictions, recorded, texts
from .findings import ORDER, Finding, not_looked_at, ordered
from .predictions import Scored

logger = logging.getLogger(__name__)

ROWS = 1000
"""Training rows, and as many test rows, that models are run on: a fraction is then known to ± 0.03."""
_OPTIONS = {"teacher": "--teacher ID|FOLDER", "data": "--data train.csv", "task": "--task task.yaml"}
_TEACHER, _DATA, _TASK, _ROWS = ("teacher",), ("data",), ("task",), ("data", "task")
_WANTED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "label names": (_TEACHER,),
    "label order of the teacher": (_TEACHER, _ROWS),
    "label order of the student": (_ROWS,),
    "tokenizers": (_TEACHER, _ROWS),
    "teacher's accuracy": (_TEACHER, _ROWS),
    "soft targets": (_TEACHER, _DATA),
    "truncation": (_ROWS,),
    "unknown tokens": (_ROWS,),
    "duplicates": (_DATA, _TASK),
    "classes": (_DATA,),
    "labelled rows": (_DATA,),
    "agreement on training rows": (_TEACHER, _DATA),
    "agreement on test rows": (_TEACHER, _TASK),
    "gradients": (_TEACHER, _DATA),
}
"""What a finding takes beyond the run: all of these, each by one of its options."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user named beside the run."""

    teacher: str | Path | None = None
    task: Path | None = None
    """Task file: the test rows."""
    data: Path | None = None
    """File of the training rows."""
    alone: str | Path | None = None
    text: str | None = None
    label: str | None = None
    """Columns; None: those of the task file, else `text` and, where it is there, `label`."""
    max_length: int | None = None
    """Tokens that training kept; None: that of the task file, else what the model takes."""
    rows: int = ROWS
    progress: bool = False


def examine(run: Path, given: Given) -> tuple[Finding, ...]:
    """What was found, worst first; one finding for each name in `ORDER`. Nothing is written.

    Args:
        run: a student's folder, the output folder of a recipe, or that of a Trainer.
        given: what else to look at.

    Raises:
        ForeignFileError: if there is no student, or a file is malformed.
        UnknownNameError: for a column that the rows do not have.
        MismatchError: if the teacher is no classifier with weights.
    """
    place = places.find(run)
    given = replace(given, teacher=given.teacher or place.teacher)
    found = {one.name: one for one in _left_behind(place)}
    blocked = None
    if places.is_text_classifier(place.student):
        try:
            student = torch_candidate("student", place.student, "cpu")
        except HfCompressError as error:
            blocked = f"the student cannot be run: {error}"
        else:
            weights = _weights(student.model)
            found[weights.name] = weights
            if (blocked := _unfit(student, weights)) is None:
                found |= {one.name: one for one in _looked_into(place, student, given)}
    else:
        blocked = "models are run for text classification alone"
    missing = [name for name in ORDER if name not in found]
    return ordered(
        [*found.values(), *(not_looked_at(name, blocked or _wanted(name, place, given)) for name in missing)]
    )


def _wanted(name: str, place: places.Place, given: Given) -> str:
    lacking = [
        options for options in _WANTED.get(name, ()) if all(getattr(given, option) is None for option in options)
    ]
    if not lacking:
        return "give rows with labels and a teacher of the student's classes"
    teacher = None if place.record.training is None else place.record.training.teacher
    shown = dict(_OPTIONS)
    if teacher is not None and teacher.name is not None:
        shown["teacher"] = f"--teacher {teacher.name}"
    return f"give {' and '.join(' or '.join(shown[option] for option in options) for options in lacking)}"


def _left_behind(place: places.Place) -> list[Finding]:
    """From record and log."""
    training = place.record.training
    log = [] if place.log is None else trainer_log.read(place.log)
    found = [
        *recorded.of_training(training),
        *recorded.of_measurements(place.record),
        courses.learning_curve(courses.values(log, "loss")),
        courses.terms_over_time(courses.values(log, "task_loss"), courses.values(log, "distill_loss")),
        courses.weight_of_terms(log, training),
    ]
    if training is not None and training.data.labelled is not None:
        data = training.data
        found.append(
            texts.labelled(data.rows, data.labelled or 0, task_weight=training.task_weight, where="the record")
        )
    return found


def _looked_into(place: places.Place, student: Candidate, given: Given) -> list[Finding]:
    """From models and rows."""
    names = {int(index): str(name) for index, name in student.model.config.id2label.items()}
    teacher = None if given.teacher is None else torch_candidate("teacher", given.teacher, "cpu")
    theirs = None if teacher is None else {int(i): str(n) for i, n in teacher.model.config.id2label.items()}
    task = None if given.task is None else read_task(given.task)
    tables = _tables(task, given, {name: index for index, name in names.items()})
    found = []
    if teacher is not None or any(table.names for table in tables.values()):
        worst = max(tables.values(), key=lambda table: (table.unknown, table.names), default=None)
        unknown, known = (0, 0) if worst is None else (worst.unknown, worst.names)
        where = "" if worst is None else f"{worst.where} rows"
        found.append(predictions.label_names(names, theirs, unknown, max(known, unknown), where))
    if not tables:
        return found
    limit = min(given.max_length or (task.max_length if task else None) or 2**20, _longest(student))
    samples = {where: table.sample(given.rows) for where, table in tables.items()}
    found += _of_tokens(student, teacher, samples.get("training") or samples["test"], place, limit)
    found += _of_rows(student, tables, place)
    scored = [_score(student, teacher, theirs, names, samples[where], limit, given) for where in samples]
    found += _of_predictions(scored, place)
    found += _against_alone(place, given, names, scored, samples.get("test"), limit)
    if teacher is not None and "training" in samples and place.record.training is not None:
        found.append(_gradients(place, student, teacher, samples["training"], limit))
    return found


def _weights(model: Any) -> Finding:
    broken = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
    count = sum(1 for _ in model.parameters())
    return Finding(
        name="weights",
        verdict="bad" if broken else "ok",
        looked_at=f"{count} tensors of the student",
        figure=f"{len(broken)} hold NaN or infinity",
        values={"tensors": count, "broken": len(broken)},
        meaning="The training broke down; such a student decides nothing." if broken else "",
        remedy="Lower the learning rate, add warm-up, or train in bf16 instead of fp16." if broken else "",
    )


def _unfit(student: Candidate, weights: Finding) -> str | None:
    """Why the student's decisions cannot be looked at; None: they can."""
    if weights.verdict == "bad":
        return "the student's weights are no numbers"
    config = student.model.config
    single = config.num_labels > 1 and config.problem_type not in ("regression", "multi_label_classification")
    return None if single else "the student does not choose one class a row"


def _longest(student: Candidate) -> int:
    return quality.longest(student.model, student.tokenizer)


def _tables(task: Task | None, given: Given, label2id: Mapping[str, int]) -> dict[str, places.Table]:
    text, _, label = task.columns if task else ("text", None, None)
    text, label = given.text or text, given.label or label
    found = {}
    if given.data is not None:
        own = label or _usual_label(given.data)
        found["training"] = places.read(given.data, where="training", text=text, label=own, label2id=label2id)
    if task is not None:
        column, _, labels = task.columns
        found["test"] = places.read(
            Path(task.data),
            where="test",
            text=column,
            label=labels,
            label2id=label2id,
            split=task.split,
            most=task.rows,
        )
    return found


def _usual_label(path: Path) -> str | None:
    """The column that is called `label`, where there is one: training rows may have none."""
    return "label" if "label" in read_rows(path).column_names else None


def _of_tokens(
    student: Candidate, teacher: Candidate | None, table: places.Table, place: places.Place, limit: int
) -> list[Finding]:
    found = texts.tokens(student.tokenizer, table.texts, limit, table.where)
    if teacher is not None:
        shared = _share_tokens(place)
        found.append(texts.tokenizers(student.tokenizer, teacher.tokenizer, table.texts, shared=shared))
    return found


def _of_rows(student: Candidate, tables: Mapping[str, places.Table], place: places.Place) -> list[Finding]:
    """Of all rows, not of a sample."""
    if (table := tables.get("training")) is None:
        return []
    found, training = [texts.classes(table.labels, student.model.config.num_labels)], place.record.training
    if training is None or training.data.labelled is None:
        weight = None if training is None else training.task_weight
        known = int((table.labels != IGNORED).sum())
        found.append(texts.labelled(len(table.labels), known, task_weight=weight, where="the training rows"))
    if "test" in tables:
        found.append(texts.duplicates(table.texts, tables["test"].texts))
    return found


def _share_tokens(place: places.Place) -> bool:
    """Whether the teacher read the student's token ids; so it is where no method says otherwise."""
    if place.record.training is None:
        return True
    try:
        made = gradients.objectives(place.record.training)
    except HfCompressError:  # a method of another installation
        return True
    return not any(one.overrides("teacher_batch") for one in made)


def _score(
    student: Candidate,
    teacher: Candidate | None,
    theirs: Mapping[int, str] | None,
    names: Mapping[int, str],
    table: places.Table,
    limit: int,
    given: Given,
) -> Scored:
    """Logits of both, the teacher's in the order of the student's classes where the names tell it."""
    own = _predict(student, table, limit, given)
    other = None
    if teacher is not None and theirs is not None and len(theirs) == len(names):
        other = _predict(teacher, table, limit, given)
        if (order := predictions.teacher_order(names, theirs)) is not None:
            other = other[:, order]
    return Scored(where=table.where, labels=table.labels, student=own, teacher=other)


def _predict(one: Candidate, table: places.Table, limit: int, given: Given) -> quality.Logits:
    return quality.predict(one.model, one.tokenizer, table.texts, max_length=limit, progress=given.progress)


def _of_predictions(scored: list[Scored], place: places.Place) -> list[Finding]:
    labelled = max(scored, key=lambda each: int((each.labels != IGNORED).sum()))
    found = []
    if labelled.student is not None and (labelled.labels != IGNORED).any():
        found.append(predictions.label_order("student", labelled.student, labelled.labels, labelled.where))
    if labelled.teacher is None:
        return found
    found.append(predictions.label_order("teacher", labelled.teacher, labelled.labels, labelled.where))
    found.append(predictions.teacher_accuracy(scored))
    for each in scored:
        if each.where == "training" and each.teacher is not None:
            trained = predictions.accuracy(each.teacher, each.labels)
            found.append(predictions.soft_targets(each.teacher, trained, _temperature(place)))
    return [*found, *predictions.agreements(scored)]


def _temperature(place: places.Place) -> float | None:
    """Of the first method that has one."""
    training = place.record.training
    for method in () if training is None else training.methods:
        value = method.settings.get("temperature")
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None


def _against_alone(
    place: places.Place,
    given: Given,
    names: Mapping[int, str],
    scored: list[Scored],
    test: places.Table | None,
    limit: int,
) -> list[Finding]:
    """Measured here where a baseline was named, or lies in the run and its record does not say."""
    known = place.record.find("accuracy", "alone") is not None
    source = given.alone or (None if known else place.alone)
    rows = None if test is None else int((test.labels != IGNORED).sum())
    if source is None or test is None or not rows:
        return []
    alone = torch_candidate("alone", source, "cpu")
    theirs = {int(index): str(name) for index, name in alone.model.config.id2label.items()}
    if theirs != names and (order := predictions.teacher_order(names, theirs)) is None:
        why = f"the baseline has the classes {', '.join(theirs.values())[:80]}, not those of the student"
        return [not_looked_at(f"{who} against alone", why) for who in ("student", "teacher")]
    logits = _predict(alone, test, limit, given)
    value = predictions.accuracy(logits if theirs == names else logits[:, order], test.labels)
    own, where, found = next(each for each in scored if each.where == "test"), "measured here", []
    if own.student is not None:
        found.append(recorded.against_alone(predictions.accuracy(own.student, own.labels), value, rows, where))
    if own.teacher is not None:
        found.append(predictions.lead(predictions.accuracy(own.teacher, own.labels), value, rows, where))
    return found


def _gradients(place: places.Place, student: Candidate, teacher: Candidate, table: places.Table, limit: int) -> Finding:
    training = place.record.training
    assert training is not None  # asked before
    if training.frozen:
        return not_looked_at("gradients", f"the run had further frozen models ({', '.join(training.frozen)})")
    table = table.sample(gradients.BATCHES * gradients.BATCH)
    encoded = fitting.encode(student.tokenizer, table.texts, np.asarray(table.labels), limit)
    try:
        pulls = gradients.measure(student.model, teacher.model, student.tokenizer, training, encoded)
    except Exception as error:  # a method may be anybody's, and without its run raise anything
        return not_looked_at("gradients", f"the run cannot be put together again: {type(error).__name__}: {error}")
    return gradients.judge(pulls, len(table.texts))
