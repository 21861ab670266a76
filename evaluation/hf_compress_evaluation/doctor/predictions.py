"""What the predictions of teacher and student show: accuracy, order of the labels, softness, agreement.

Logits are (row, class), labels (row,) class ids, -100 where a row has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax

from hf_compress.objective import IGNORED
from hf_compress_evaluation import agreement

from .findings import Finding, Verdict, graded, judged, not_looked_at

Logits = NDArray[np.float32]
Labels = NDArray[np.int64]

ERRORS = 2.0
"""Standard errors that a difference of two fractions must exceed to count: 95 %. Both are taken as if of different
rows, which is the larger error."""
PERMUTED_ERRORS = 3.0
"""The same for the gain of the best of all orders over the one in use, which is a maximum and so above 0 by chance."""
WORKS = 0.5
"""Fraction right, under the best order, from which that order is the true one; by chance many classes give less."""
KNOWN = 0.99
"""Accuracy on its own training rows from which a teacher has them by heart."""
ONE_HOT = 0.05
"""Mean entropy of a teacher's targets over ln(classes) below which they are labels in all but name: with two classes
0.994 on one of them."""
LOYAL, DISLOYAL = 0.9, 0.75
"""Label loyalty on the rows that a student was trained on. Half-depth students that the demo of this package trains
keep 0.92 on rows that they have not seen; a quarter of all rows decided otherwise is no student of that teacher."""
GAP, WIDE_GAP = 0.05, 0.15
"""Loyalty lost from training to test rows: in the demo less than 0.05."""


def noise(first: float, second: float, rows: int) -> float:
    """`ERRORS` standard errors of the difference of two fractions, each of that many rows."""
    return ERRORS * math.sqrt((first * (1 - first) + second * (1 - second)) / max(rows, 1))


def accuracy(logits: Logits, labels: Labels) -> float:
    """Fraction of the labelled rows that are right; NaN without any."""
    known = labels != IGNORED
    return float((logits.argmax(-1) == labels)[known].mean()) if known.any() else math.nan


def entropy(logits: Logits, temperature: float) -> float:
    """Mean entropy of softmax(logits / temperature), in nats."""
    logs = log_softmax(logits.astype(np.float64) / temperature, axis=-1)
    return float(-(np.exp(logs) * logs).sum(-1).mean())


def best_order(chosen: Labels, labels: Labels, classes: int) -> tuple[NDArray[np.int64], float, float]:
    """The renaming of predictions under which most are right.

    Args:
        chosen: (row,) predicted class ids.
        labels: (row,) class ids, -100 for none.
        classes: how many.

    Returns:
        (class,) what each predicted id stands for, the fraction right under it, and the fraction right as it is.
    """
    known = labels != IGNORED
    confusion = np.zeros((classes, classes), np.int64)  # (predicted, label)
    np.add.at(confusion, (chosen[known], labels[known]), 1)
    # among orders that are equally good, the one that renames least
    _, order = linear_sum_assignment(confusion + np.eye(classes) / (classes + 1), maximize=True)
    rows = max(int(known.sum()), 1)
    return order, float(confusion[np.arange(classes), order].sum() / rows), float(np.trace(confusion) / rows)


def label_order(who: str, logits: Logits, labels: Labels, where: str) -> Finding:
    """Whether predictions fit the labels better under another order of the classes."""
    name = f"label order of the {who}"
    rows, classes = int((labels != IGNORED).sum()), logits.shape[-1]
    if not rows:
        return not_looked_at(name, "give rows with labels: --task task.yaml or --data train.csv")
    order, best, own = best_order(logits.argmax(-1), labels, classes)
    moved = int((order != np.arange(classes)).sum())
    certain = best - own > PERMUTED_ERRORS / math.sqrt(rows)
    values = {"rows": rows, "accuracy": own, "accuracy_in_best_order": best, "classes_renamed": moved}
    looked = f"{who}'s predictions against the labels of {rows} {where} rows"
    if not moved or not certain:
        return Finding(name=name, verdict="ok", looked_at=looked, figure=f"{own:.3f} right as it is", values=values)
    shown = ", ".join(f"{at} is {to}" for at, to in enumerate(order.tolist()) if at != to) if classes <= 10 else ""
    return Finding(
        name=name,
        verdict="bad" if best >= WORKS else "look",
        looked_at=looked,
        figure=f"{own:.3f} right as it is, {best:.3f} with {moved} classes renamed",
        values=values,
        meaning=f"The {who}'s class ids stand for other classes than the data's{f': {shown}' if shown else ''}.",
        remedy="Map the data's labels, or permute the rows of the classifier's weights and id2label, then train again.",
    )


def label_names(
    student: Mapping[int, str], teacher: Mapping[int, str] | None, unknown: int, names: int, where: str
) -> Finding:
    """Whether student, teacher and data call the classes alike.

    Args:
        student: names by id.
        teacher: likewise; None: not at hand.
        unknown: names in the data that the student does not have.
        names: different names in the data; 0: it has ids, or was not read.
        where: the data, in words.
    """
    values = {"classes": len(student), "unknown_names": unknown, "names": names}
    looked = ", ".join(["student", *(["teacher"] if teacher is not None else []), *([where] if names else [])])
    about = {"name": "label names", "looked_at": f"names of the classes: {looked}"}
    if unknown:
        return Finding(
            **about, verdict="bad", figure=f"{unknown} of {names} names in the data are no class of the student",
            values=values, meaning="Those rows cannot have been trained as what they are.",
            remedy="Set id2label and label2id to the data's names in the order of its ids.",
        )  # fmt: skip
    if teacher is None or teacher == student:
        return Finding(**about, verdict="ok", figure=f"{len(student)} classes alike", values=values)
    if len(teacher) != len(student):
        return Finding(
            **about, verdict="bad", figure=f"student {len(student)} classes, teacher {len(teacher)}", values=values,
            meaning="Their logits are not of the same classes.", remedy="Take a teacher of the student's classes.",
        )  # fmt: skip
    moved = sum(student[index] != teacher.get(index) for index in student)
    same = set(student.values()) == set(teacher.values())
    if same:
        meaning, remedy = (
            "A class of the student is taught with the targets of another.",
            "Give both configs one order of id2label and label2id, and permute the classifier's rows with it.",
        )
    else:
        meaning, remedy = (
            "Whether they stand for the same classes cannot be told.",
            "Set id2label and label2id of both alike.",
        )
    return Finding(
        **about, verdict="bad" if same else "look", figure=f"{moved} of {len(student)} ids have other names",
        values=values | {"ids_with_other_names": moved}, meaning=meaning, remedy=remedy,
    )  # fmt: skip


def teacher_order(student: Mapping[int, str], teacher: Mapping[int, str]) -> list[int] | None:
    """For each of the student's ids the teacher's id of that name; None: they do not have the same names."""
    ids = {name: index for index, name in teacher.items()}
    if len(ids) != len(teacher) or set(student.values()) != set(ids) or len(student) != len(ids):
        return None
    return [ids[student[index]] for index in range(len(student))]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Logits of a set of rows; None: that model is not at hand or was not run."""

    where: str
    """"training" or "test"."""
    labels: Labels
    student: Logits | None = None
    teacher: Logits | None = None
    alone: Logits | None = None


def teacher_accuracy(scored: Sequence[Scored]) -> Finding:
    """The teacher's accuracy beside that of always the same class, and the student's."""
    name, found, values, worst = "teacher's accuracy", list[str](), dict[str, float](), 0
    meaning = remedy = ""
    for each in scored:
        known = each.labels != IGNORED
        if each.teacher is None or not known.any():
            continue
        own, rows = accuracy(each.teacher, each.labels), int(known.sum())
        constant = float(np.bincount(each.labels[known]).max() / rows)
        said = f"{own:.3f} on {rows} {each.where} rows (always the same class: {constant:.3f}"
        values |= {f"{each.where}_rows": rows, f"{each.where}_accuracy": own, f"{each.where}_constant": constant}
        if own - constant <= noise(own, constant, rows) and worst < 2:
            worst, meaning = 2, f"On {each.where} rows it knows no more than a constant does."
            remedy = "Fine-tune the teacher on the task first (recipe: teacher_training), or take another one."
        if each.student is not None:
            student = accuracy(each.student, each.labels)
            said += f", student: {student:.3f}"
            values[f"{each.where}_student"] = student
            if student - own > noise(own, student, rows) and worst < 1:
                worst, meaning = 1, f"On {each.where} rows the student is better than its teacher."
                remedy = "Lower the weight of the teacher's terms (alpha), or take a better teacher."
        found.append(f"{said})")
    if not found:
        return not_looked_at(name, "give --teacher, and rows with labels: --data train.csv or --task task.yaml")
    verdict: Verdict = graded(worst, 0, 1)
    return judged(
        name, verdict, "; ".join(found), values, of="teacher against the labels", meaning=meaning, remedy=remedy
    )


def lead(teacher: float, alone: float, rows: int, where: str) -> Finding:
    """The teacher's accuracy less that of the student trained without it, both on the same rows."""
    room = noise(teacher, alone, rows)
    verdict: Verdict = "bad" if teacher <= alone else "look" if teacher - alone <= room else "ok"
    within = f"Its lead is within what {rows} rows tell apart (± {room:.3f}), so no gain can show."
    beaten = "A teacher that is no better than the student alone has nothing to teach on this task."
    return judged(
        "teacher against alone", verdict, f"teacher {teacher:.3f}, student alone {alone:.3f}",
        {"teacher": teacher, "alone": alone, "rows": rows}, of=f"accuracy on {rows} rows, {where}",
        meaning=beaten if verdict == "bad" else within,
        remedy="Train the teacher longer, or take a larger one; measure on more rows.",
    )  # fmt: skip


def soft_targets(logits: Logits, trained: float, temperature: float | None) -> Finding:
    """Whether the teacher's targets on the training rows say more than labels would.

    Args:
        logits: the teacher's on training rows.
        trained: its accuracy there; NaN: without labels.
        temperature: of the run; None: its methods have none.
    """
    classes = logits.shape[-1]
    plain, softened = entropy(logits, 1.0), entropy(logits, temperature or 1.0)
    most = math.log(classes)
    values = {"entropy": plain, "rows": len(logits), "most": most}
    figure = f"mean entropy {plain:.4f} nats at T=1"
    if temperature is not None:
        values |= {"entropy_at_temperature": softened, "temperature": temperature}
        figure += f", {softened:.4f} at T={temperature:g}"
    figure += f" (most: {most:.3f})"
    if not math.isnan(trained):
        values["accuracy"] = trained
        figure += f", accuracy {trained:.3f}"
    thin = softened < ONE_HOT * most
    return judged(
        "soft targets", "ok" if not thin else "bad" if trained >= KNOWN else "look", figure=figure, values=values,
        of=f"teacher's targets on {len(logits)} training rows",
        meaning="Targets that are nearly one-hot carry no more than labels do.",
        remedy="Raise the temperature, or distil on rows that the teacher was not trained on (held-out or unlabelled).",
    )  # fmt: skip


def agreements(scored: Sequence[Scored]) -> list[Finding]:
    """Label loyalty and KL of student and teacher, on training rows and on test rows."""
    figures: dict[str, tuple[float, float, int]] = {}
    for each in scored:
        if each.student is None or each.teacher is None or each.student.shape != each.teacher.shape:
            continue
        loyalty = agreement.label_loyalty(each.student, each.teacher)
        figures[each.where] = loyalty, agreement.kl(each.student, each.teacher), len(each.student)
    found = [_training_agreement(*figures["training"])] if "training" in figures else []
    if "test" in figures:
        found.append(_test_agreement(*figures["test"], figures.get("training")))
    return found


def _training_agreement(loyalty: float, divergence: float, rows: int) -> Finding:
    return judged(
        "agreement on training rows", graded(-loyalty, -LOYAL, -DISLOYAL), of=_compared(rows),
        figure=_figure(loyalty, divergence), values={"label_loyalty": loyalty, "kl": divergence, "rows": rows},
        meaning="The student does not follow its teacher even where it was taught: underfit.",
        remedy="Train longer or at a higher learning rate; else take a larger student.",
    )  # fmt: skip


def _compared(rows: int) -> str:
    return f"student's and teacher's decisions on {rows} rows"


def _figure(loyalty: float, divergence: float) -> str:
    return f"label loyalty {loyalty:.3f}, KL {divergence:.3f} nats"


def _test_agreement(loyalty: float, divergence: float, rows: int, training: tuple[float, float, int] | None) -> Finding:
    values = {"label_loyalty": loyalty, "kl": divergence, "rows": float(rows)}
    name, figure = "agreement on test rows", _figure(loyalty, divergence)
    if training is None:
        return Finding(
            name=name, verdict="ok", looked_at=_compared(rows), figure=figure, values=values,
            meaning="Whether it is less than on the training rows was not looked at: give --data train.csv.",
        )  # fmt: skip
    gap = training[0] - loyalty
    certain = gap > noise(training[0], loyalty, min(rows, training[2]))
    return judged(
        name, graded(gap, GAP, WIDE_GAP) if certain else "ok", of=_compared(rows),
        figure=f"{figure}; {gap:+.3f} less than on training rows", values=values | {"gap": gap},
        meaning="The student follows its teacher on the rows it was trained on, less on others.",
        remedy="Add unlabelled rows, which the teacher labels; or take a larger student.",
    )  # fmt: skip
