"""One thing that was looked at, or that was not and what it would take; how they are ordered and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

Verdict = Literal["bad", "look", "ok", "not looked at"]

ORDER = (
    "weights",
    "label names",
    "label order of the teacher",
    "label order of the student",
    "tokenizers",
    "learning rate",
    "learning curve",
    "weight of the terms",
    "teacher against alone",
    "teacher's accuracy",
    "soft targets",
    "truncation",
    "unknown tokens",
    "duplicates",
    "classes",
    "labelled rows",
    "steps",
    "agreement on training rows",
    "agreement on test rows",
    "gradients",
    "terms over time",
    "rates tried",
    "student against alone",
)
"""Of findings of one verdict the earlier one is told first: it can be the cause of those behind it, not the reverse.
A wrong order of labels makes teacher, curve and agreement look bad; that alone was beaten explains nothing."""
_RANK: tuple[Verdict, ...] = ("bad", "look", "ok", "not looked at")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was looked at, what it gave, and what that means."""

    name: str
    """One of `ORDER`."""
    verdict: Verdict
    looked_at: str = ""
    figure: str = ""
    """For people."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The same by name: fractions, nats, counts, losses as they were logged."""
    meaning: str = ""
    remedy: str = ""
    """What to do; of what was not looked at, the option or setting that lets it be."""


def judged(
    name: str, verdict: Verdict, figure: str, values: Mapping[str, float], *, of: str, meaning: str, remedy: str
) -> Finding:
    """A finding whose meaning and remedy are told only where something is out of order.

    Args:
        of: what was looked at.
    """
    told = verdict in ("bad", "look")
    return Finding(
        name=name, verdict=verdict, looked_at=of, figure=figure, values=values,
        meaning=meaning if told else "", remedy=remedy if told else "",
    )  # fmt: skip


def graded(value: float, look: float, bad: float) -> Verdict:
    """The verdict of a figure that is worse the higher it is."""
    return "bad" if value > bad else "look" if value > look else "ok"


def not_looked_at(name: str, remedy: str) -> Finding:
    """A finding that could not be made, and what would let it be."""
    return Finding(name=name, verdict="not looked at", remedy=remedy)


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Worst first; among equals the possible causes of others first."""
    return tuple(sorted(findings, key=lambda one: (_RANK.index(one.verdict), ORDER.index(one.name))))


def most_likely(findings: Iterable[Finding]) -> Finding | None:
    """The first of those that are not in order; that the baseline was not beaten is what is to be explained."""
    wrong = [one for one in ordered(findings) if one.verdict in ("bad", "look")]
    return next((one for one in wrong if one.name != ORDER[-1]), wrong[0] if wrong else None)


def summary(findings: Iterable[Finding]) -> str:
    """One line."""
    every = tuple(findings)
    looked = sum(one.verdict != "not looked at" for one in every)
    first = most_likely(every)
    if first is None:
        return f"Nothing out of order in the {looked} things looked at; {len(every) - looked} were not looked at."
    return f"Most likely: {first.name} ({first.figure}). {first.meaning} {first.remedy}".rstrip()


COLUMNS = ("verdict", "what", "looked at", "figure", "what it means, what to do")


def rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Cells by `COLUMNS` of what was looked at, worst first."""
    return [
        (one.verdict, one.name, one.looked_at, one.figure, f"{one.meaning} {one.remedy}".strip())
        for one in ordered(findings)
        if one.verdict != "not looked at"
    ]


def left_out(findings: Iterable[Finding]) -> list[str]:
    """A line for each reason why something was not looked at, with all that it holds for."""
    reasons: dict[str, list[str]] = {}
    for one in ordered(findings):
        if one.verdict == "not looked at":
            reasons.setdefault(one.remedy, []).append(one.name)
    return [f"not looked at: {', '.join(names)}: {remedy}" for remedy, names in reasons.items()]


def as_json(findings: Iterable[Finding]) -> str:
    """All of it; a figure that is no finite number is null."""
    every = ordered(findings)
    first = most_likely(every)
    shown = []
    for one in every:
        values = {name: value if math.isfinite(value) else None for name, value in one.values.items()}
        shown.append(asdict(one) | {"values": values})
    found = {"most_likely": None if first is None else first.name, "summary": summary(every), "findings": shown}
    return json.dumps(found, indent=1, allow_nan=False)
