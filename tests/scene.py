"""What an objective is given, made by hand: rows, signals and the place in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.objective import Kind, Positions, Rows, Signals, Sizes, Step


def logits(rows: int, vocab: int, seed: int) -> Tensor:
    """(row, vocab) float64, seeded."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes(layers: int, kind: Kind = "tokens", width: int = 4) -> Sizes:
    """A model of that many blocks."""
    return Sizes(kind=kind, layers=layers, width=width, heads=2, vocab=5, config=None, causal=kind == "causal")


def step(global_step: int = 0, max_steps: int = 10) -> Step:
    """A place in a run; calling a model there raises."""

    def nothing(**inputs: Any) -> Any:
        raise AssertionError("no model to run")

    return Step(
        global_step=global_step,
        max_steps=max_steps,
        epoch=0.0,
        micro=0,
        micros=1,
        generator=torch.Generator(),
        shared=torch.Generator(),
        student=nn.Identity(),
        run_student=nothing,
        run_teacher=nothing,
        generate=nothing,
        evaluate=nothing,
        dataset=None,
        networks={},
    )


def rows(student: Tensor, teacher: Tensor) -> Rows:
    """All rows of two logits, each an example of its own."""
    return Rows(student_logits=student, teacher_logits=teacher, labels=None, example=torch.arange(len(student)))


def signals(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], tokens: Tensor, *, masked: bool = True
) -> Signals:
    """Taps of both models for the tokens (batch, time); `masked`: the batch has an attention mask."""
    index = torch.arange(len(tokens))
    return Signals(
        student=student,
        teacher=teacher,
        inputs={"attention_mask": tokens.long()} if masked else {"pixel_values": torch.zeros(len(tokens), 3, 2, 2)},
        positions=Positions(index=index, example=index, labels=None, rows=len(index)),
        tokens=tokens,
        examples=len(tokens),
    )
