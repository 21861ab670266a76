"""What the Trainer's log shows: whether the loss fell, and what each term had to do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from hf_compress.facts import Training

from .findings import Finding, Verdict, judged, not_looked_at

Values = NDArray[np.float64]

FEWEST = 8
"""Logged values that a course is told from: two for each quarter."""
FELL = 0.02
"""Of the loss at the beginning (mean of the first quarter). A loss that falls by less has not been trained."""
ROSE = 0.1
"""Of the loss at the beginning, by which it ends higher: more than batches differ by."""
DIVERGED = 0.5
"""Of the loss at the beginning, by which it ends above its lowest quarter."""
SPIKED = 1.5
"""Times the first logged value, reached later."""
STILL = 0.1
"""Of the whole fall, made in the last quarter."""
ERRORS = 3.0
"""Standard errors that the last fall must exceed, so that noise on a plateau is none."""
NOTHING = 0.01
"""Of the sum of all weighted terms. What is less at every logged step moves no weight that the others do not."""
AGAINST = -0.5
"""Spearman's correlation of two losses over the steps from which one goes up as the other goes down."""
MOVED = 0.05
"""Of its beginning, by which a loss must have risen or fallen for that to count."""
_TERM = "distill/"
_LOG = "train with logging_steps so small that 8 losses are logged, and keep trainer_state.json (trainer.save_state())"


def values(log: Sequence[Mapping[str, Any]], name: str) -> Values:
    """The logged values of that name in order; NaN and infinity among them."""
    found = [entry[name] for entry in log if _number(entry.get(name))]
    return np.array(found, np.float64)


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 1e300


def quarter(course: Values, which: int) -> Values:
    """The first (0) to the last (3) quarter."""
    return course[len(course) * which // 4 : len(course) * (which + 1) // 4]


def learning_curve(course: Values) -> Finding:
    """Whether the training loss fell, rose, jumped, or was falling still when training ended.

    Args:
        course: (log,) the loss in the order in which it was logged.
    """
    name = "learning curve"
    if len(course) < FEWEST and np.isfinite(course).all():
        return not_looked_at(name, _LOG)
    looked = f"training loss, {len(course)} logged values"
    if not np.isfinite(course).all():
        return Finding(
            name=name, verdict="bad", looked_at=looked, values={"logged": len(course)},
            figure=f"{int((~np.isfinite(course)).sum())} of {len(course)} are no finite number",
            meaning="The loss overflowed; what was trained from then on is noise.",
            remedy="Lower the learning rate, add warm-up, or train in bf16 instead of fp16.",
        )  # fmt: skip
    start, *_, end = means = [float(quarter(course, at).mean()) for at in range(4)]
    lowest = min(means)
    figures = {"logged": len(course), "start": start, "end": end, "lowest": lowest, "highest": float(course.max())}
    verdict, meaning, remedy = _judge(course, lowest)
    return Finding(
        name=name, verdict=verdict, looked_at=looked, figure=f"{start:.4g} in the first quarter, {end:.4g} in the last",
        values=figures, meaning=meaning, remedy=remedy,
    )  # fmt: skip


def _judge(course: Values, lowest: float) -> tuple[Verdict, str, str]:
    begun, highest = float(course[0]), float(course.max())
    third, last = quarter(course, 2), quarter(course, 3)
    start, end = float(quarter(course, 0).mean()), float(last.mean())
    scale = max(abs(start), 1e-12)
    jumped = begun > 0 and highest > SPIKED * begun
    if end > start + ROSE * scale or end - lowest > DIVERGED * scale or (jumped and end > begun):
        return "bad", "The loss ended above where it had been: it diverged.", "Lower the learning rate; add warm-up."
    if start - end < FELL * scale:
        return (
            "bad",
            "The loss never fell: the weights hardly moved, or nothing was to be learned.",
            "Raise the learning rate, and check that the body is not frozen.",
        )
    if jumped:
        return "look", "The loss jumped above where it began.", "Lower the learning rate, or add warm-up."
    falling = float(third.mean()) - end
    error = ERRORS * float(np.sqrt(third.var() / len(third) + last.var() / len(last)))
    if falling > STILL * (start - end) and falling > error:
        return "look", "The loss was falling still when training ended.", "Train for more steps."
    return "ok", "", ""


def terms_over_time(task: Values, distilled: Values) -> Finding:
    """Whether the task's own loss and the teacher's terms move against each other."""
    name = "terms over time"
    usable = len(task) == len(distilled) >= FEWEST and np.isfinite(task).all() and np.isfinite(distilled).all()
    if not usable:
        return not_looked_at(name, f"needs task_loss and distill_loss in the log: {_LOG}")
    still = not (np.ptp(task) > 0 and np.ptp(distilled) > 0)
    correlation = 0.0 if still else float(spearmanr(task, distilled).statistic)
    moved = [_moved(task), _moved(distilled)]
    against = correlation < AGAINST and min(moved) < -MOVED and max(moved) > MOVED
    up = "task's own loss" if moved[0] > 0 else "teacher's terms"
    return judged(
        name, "look" if against else "ok", of=f"task_loss and distill_loss, {len(task)} logged values each",
        figure=f"rank correlation {correlation:+.2f}; task {moved[0]:+.0%}, distillation {moved[1]:+.0%}",
        values={"correlation": correlation, "task_change": moved[0], "distill_change": moved[1], "logged": len(task)},
        meaning=f"The {up} rose while the other fell: labels and teacher ask for different things.",
        remedy="Compare the teacher with the labels, and shift the weight (alpha) to the one that counts.",
    )  # fmt: skip


def _moved(course: Values) -> float:
    start = float(quarter(course, 0).mean())
    return (float(quarter(course, 3).mean()) - start) / max(abs(start), 1e-12)


def weight_of_terms(log: Sequence[Mapping[str, Any]], training: Training | None) -> Finding:
    """The share of each weighted term in the sum of all, at the step where it was largest.

    The largest, because a term that was learned is small in the end and had its effect.
    """
    name = "weight of the terms"
    entries = [entry for entry in log if any(key.startswith(_TERM) for key in entry)]
    if training is None or not entries:
        return not_looked_at(name, f"needs the record of a finished run and terms in its log: {_LOG}")
    weights = _weights(training)
    shares: dict[str, list[float]] = {}
    for entry in entries:
        sizes = {
            key.removeprefix(_TERM): weights(key.removeprefix(_TERM)) * abs(float(value))
            for key, value in entry.items()
            if key.startswith(_TERM) and _number(value)
        }
        if training.task_weight and _number(entry.get("task_loss")):
            sizes["task"] = training.task_weight * abs(float(entry["task_loss"]))
        total = sum(sizes.values())
        for term, size in sizes.items():
            if np.isfinite(total):
                shares.setdefault(term, []).append(size / total if total else 0.0)
    largest = {term: max(found) for term, found in shares.items()}
    if not largest:
        return not_looked_at(name, "no log entry has finite terms")
    idle = [term for term, share in largest.items() if share < NOTHING]
    taught = [term for term in largest if term != "task"]
    useless = bool(taught) and all(term in idle for term in taught)
    return judged(
        name, "bad" if useless else "look" if idle else "ok", of=f"weighted terms in {len(entries)} log entries",
        figure="largest share of the sum: " + ", ".join(f"{term} {share:.2%}" for term, share in largest.items()),
        values=largest,
        meaning=f"{', '.join(idle)}: less than {NOTHING:.0%} of the loss at every step, so without effect.",
        remedy="Raise the weight of what is to count (weight=, alpha=), or leave it out.",
    )  # fmt: skip


def _weights(training: Training) -> Any:
    """From the name of a logged term to its method's weight: `kd`, `kd.part`, or `0_kd` where a method runs twice."""
    by_name = {method.name: method.weight for method in training.methods}
    by_name |= {f"{place}_{method.name}": method.weight for place, method in enumerate(training.methods)}
    return lambda term: by_name.get(term, by_name.get(term.partition(".")[0], 1.0))
