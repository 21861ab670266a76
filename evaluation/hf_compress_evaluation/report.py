"""Runs a student and its teacher over the rows of a task, for the report that stays on this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from hf_compress.comparison import ClassShare, Comparison, Disagreement, Right, Share
from hf_compress.errors import ConfigurationError

from . import agreement, intervals, quality
from .candidates import Candidate, load_variants, torch_candidate
from .scoring.classes import Classes
from .task import Task, read_task

EXAMPLES = 20
"""Rows that are shown."""
CLASSES = 50
"""Classes that are told apart, the teacher's most frequent ones."""


def compare(
    folder: Path, *, task: Task | Path, teacher: str | Path, device: str = "cpu", seed: int = 0, progress: bool = False
) -> Comparison:
    """Where a student decides as its teacher does, and where it does not. Nothing is written.

    Args:
        folder: the student; its torch model is run, or its first exported variant where it holds none.
        task: a task, or its file.
        teacher: folder or hub id.
        device: "cpu" or "cuda".
        seed: of resampled intervals.
        progress: show bars.

    Raises:
        ForeignFileError, MismatchError: as `evaluate_folder`.
    """
    task = task if isinstance(task, Task) else read_task(task)
    if task.task != "text-classification":
        raise ConfigurationError(
            f"report: rows are compared class by class, and {task.task} has none. Leave --task out."
        )
    student, own = _student(Path(folder), device), torch_candidate("teacher", teacher, device)
    scorer = Classes()
    scorer.check([own, student])
    rows = scorer.load(task, student.model.config)
    logits = {one.subject: scorer.predict(one, rows, task, progress=progress) for one in (own, student)}
    names = [str(student.model.config.id2label[index]) for index in range(len(student.model.config.id2label))]
    chosen = {subject: each.argmax(-1) for subject, each in logits.items()}
    same = agreement.label_loyalty_rows(logits["student"], logits["teacher"])
    differing = np.flatnonzero(same == 0)
    return Comparison(
        teacher=Path(teacher).resolve().name if Path(teacher).is_dir() else str(teacher),
        variant=student.variant,
        data=rows.data,
        same=_share(same, seed),
        classes=_classes(chosen["student"], chosen["teacher"], names, seed),
        differ=len(differing),
        right=None if rows.labels is None else _right(chosen, rows.labels, differing),
        examples=_examples(logits, rows.texts, rows.labels, names, differing),
    )


def _student(folder: Path, device: str) -> Candidate:
    variants = ["torch", *sorted(path.parent.name for path in folder.glob("onnx*/model.onnx"))]
    if len(variants) > 1 and not any(folder.glob("*.safetensors")):
        variants = variants[1:]
    return load_variants("student", folder, variants[:1], device, threads=1)[0]


def _share(same: NDArray[np.float64], seed: int) -> Share:
    found = intervals.mean(same, seed=seed)
    return Share(rows=len(same), value=float(same.mean()), interval=found.interval)


def _classes(
    student: NDArray[np.intp], teacher: NDArray[np.intp], names: list[str], seed: int
) -> tuple[ClassShare, ...]:
    counts = np.bincount(teacher, minlength=len(names))
    found = []
    for index in np.argsort(-counts, kind="stable")[:CLASSES]:
        if not counts[index]:
            break
        decided = student[teacher == index]
        others = np.bincount(decided[decided != index], minlength=len(names))
        instead = (names[others.argmax()], int(others.max())) if others.any() else None
        same = _share((decided == index).astype(np.float64), seed)
        found.append(ClassShare(name=names[index], same=same, instead=instead))
    return tuple(found)


def _right(chosen: dict[str, NDArray[np.intp]], labels: NDArray[np.int64], differing: NDArray[np.intp]) -> Right:
    student, teacher = (int((chosen[who] == labels)[differing].sum()) for who in ("student", "teacher"))
    return Right(teacher=teacher, student=student, neither=len(differing) - teacher - student)


def _examples(
    logits: dict[str, quality.Logits],
    texts: tuple[str, ...],
    labels: NDArray[np.int64] | None,
    names: list[str],
    differing: NDArray[np.intp],
) -> tuple[Disagreement, ...]:
    probabilities = {subject: softmax(each[differing].astype(np.float64), axis=-1) for subject, each in logits.items()}
    sure = np.minimum(probabilities["student"].max(-1), probabilities["teacher"].max(-1))
    found = []
    for place in np.argsort(-sure, kind="stable")[:EXAMPLES]:
        row = int(differing[place])
        student, teacher = probabilities["student"][place], probabilities["teacher"][place]
        found.append(
            Disagreement(
                row=row,
                text=texts[row],
                teacher=names[teacher.argmax()],
                teacher_probability=float(teacher.max()),
                student=names[student.argmax()],
                student_probability=float(student.max()),
                label=None if labels is None else names[labels[row]],
            )
        )
    return tuple(found)
