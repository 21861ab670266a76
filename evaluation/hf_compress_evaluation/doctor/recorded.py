"""What a folder's record shows: learning rates, steps, and whether the comparison with the baseline was fair."""

from __future__ import annotations

from hf_compress.facts import Record, Training

from .findings import Finding, Verdict, judged, not_looked_at
from .predictions import lead, noise

LOWEST_RATE, HIGHEST_RATE = 1e-6, 1e-2
"""Of AdamW for transformers: papers fine-tune at 1e-5 to 1e-4 and train from scratch up to 1e-3; ten times beyond."""
FEWEST_STEPS = 100
"""Fewer steps than that hardly move a model of millions of weights."""
WARM = 0.5
"""Part of the steps in which the learning rate still rises."""
_RECORD = "train with DistillCallback to its end and save the model, which then carries its record"
_ALONE = "measure the student trained without a teacher: hf-compress evaluate --alone, or a recipe with `alone`"


def of_training(training: Training | None) -> list[Finding]:
    """Learning rate, steps and warm-up."""
    if training is None:
        return [not_looked_at(name, _RECORD) for name in ("learning rate", "steps")]
    return [_rate(training), _steps(training)]


def _rate(training: Training) -> Finding:
    rate = training.settings.get("learning_rate")
    if not isinstance(rate, int | float):
        return not_looked_at("learning rate", _RECORD)
    optimizer = str(training.settings.get("optim", ""))
    odd = "adam" in optimizer and not LOWEST_RATE <= rate <= HIGHEST_RATE
    usual = f"Transformers are trained at {LOWEST_RATE:g} to {HIGHEST_RATE:g} with {optimizer}."
    return judged(
        "learning rate", "bad" if rate <= 0 else "look" if odd else "ok", of="the record", figure=f"{rate:g}",
        values={"learning_rate": float(rate)}, meaning="At that rate nothing is learned." if rate <= 0 else usual,
        remedy="Try 2e-5, 5e-5 and 1e-4, and keep the best on rows held out for it.",
    )  # fmt: skip


def _steps(training: Training) -> Finding:
    warm = training.settings.get("warmup_steps", 0)
    warm = float(warm) if isinstance(warm, int | float) else 0.0
    part = warm if 0 < warm < 1 else warm / max(training.steps, 1)
    faults = [
        *([f"{training.steps} steps are fewer than {FEWEST_STEPS}"] if training.steps < FEWEST_STEPS else []),
        *(["it has not seen each row once"] if training.epochs < 1 else []),
        *([f"the rate was rising for {min(part, 1.0):.0%} of the steps"] if part > WARM else []),
    ]
    return judged(
        "steps", "look" if faults else "ok", of="the record",
        figure=f"{training.steps} steps, {training.epochs:.3g} epochs, warm-up {min(part, 1.0):.0%}",
        values={"steps": training.steps, "epochs": training.epochs, "warmup": part},
        meaning=f"Little training: {', '.join(faults)}.", remedy="Train for more epochs.",
    )  # fmt: skip


def of_measurements(record: Record) -> list[Finding]:
    """Teacher and student against the baseline, and the learning rates that each was given."""
    teacher, student = (_beside_alone(record, who) for who in ("teacher", "student"))
    gain = None if student is None else against_alone(*student, "from the record")
    return [
        not_looked_at("teacher against alone", _ALONE) if teacher is None else lead(*teacher, "from the record"),
        gain or not_looked_at("student against alone", _ALONE),
        _rates(record, helped=gain is not None and gain.verdict == "ok"),
    ]


def _beside_alone(record: Record, who: str) -> tuple[float, float, int] | None:
    """Accuracy of that subject and of the baseline on the same rows, and how many these are."""
    one, alone = record.find("accuracy", who), record.find("accuracy", "alone")
    if one is None or alone is None or one.data is None or alone.data is None:
        return None
    same = one.data.fingerprint == alone.data.fingerprint
    return (one.value, alone.value, one.data.rows) if same else None


def against_alone(student: float, alone: float, rows: int, where: str) -> Finding:
    """The student's accuracy less that of the same start trained without a teacher, on the same rows."""
    room = noise(student, alone, rows)
    verdict: Verdict = "ok" if student - alone > room else "bad" if alone - student > room else "look"
    meaning = {
        "ok": "Distillation did help.",
        "look": f"The two are not told apart by {rows} rows (± {room:.3f}).",
        "bad": "Distillation did harm.",
    }[verdict]
    return Finding(
        name="student against alone",
        verdict=verdict,
        looked_at=f"accuracy on {rows} rows, {where}",
        figure=f"student {student:.3f}, alone {alone:.3f}",
        values={"student": student, "alone": alone, "rows": rows},
        meaning=meaning,
        remedy="" if verdict == "ok" else "See what else was found; more test rows tell smaller differences apart.",
    )


def _rates(record: Record, *, helped: bool) -> Finding:
    name = "rates tried"
    tried = {
        float(rate): one.how.get("chosen") is True
        for one in record.measurements
        if (one.subject, one.metric) == ("alone", "choice_accuracy")
        and isinstance(rate := one.how.get("learning_rate"), int | float)
    }
    own = None if record.training is None else record.training.settings.get("learning_rate")
    if not tried or not isinstance(own, int | float):
        return not_looked_at(name, "needs a recipe with `alone`, whose learning rates are in the record")
    best = next((rate for rate, chosen in tried.items() if chosen), None)
    unfair = len(tried) > 1 and not helped
    said = ", ".join(f"{rate:g}{' (best)' if rate == best else ''}" for rate in sorted(tried))
    return judged(
        name, "look" if unfair else "ok", of="the record", figure=f"alone: best of {said}; student: {own:g}",
        values={"rates_of_alone": len(tried), "rate_of_student": float(own)} | ({} if best is None else {"best": best}),
        meaning=f"The baseline had its best of {len(tried)} rates, the student one.",
        remedy=f"Train the student at {said} too and choose on the same rows.",
    )  # fmt: skip
