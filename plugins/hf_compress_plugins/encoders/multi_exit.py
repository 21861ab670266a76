"""One training that gives a family of sizes: the same head learns after several layers, without a teacher.

Gurioli, Pennino, Monteiro, Gabbrielli: One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early
Layer Embeddings, 2025, arXiv:2503.03008.

    L = Σ_{i in exits} (i / depth) · L_i        L_i: the model's own task after layer i, through its last norm and head

Nothing is detached: the deeper exits teach the shared lower layers by their gradients. The last layer's exit, of
weight 1, is the model's own loss. Afterwards the model is cut after any exit with `shrink(model, layers=range(i))`,
which keeps norm and head, and the cut gives what the exit gave.

Weights are not normalised, as published: with more exits the total grows. Differences from the published model: the
exits share the stock head without an appended embedding of their index, so that each cut is a stock class; in-context
classification of its pre-training and the contrastive fine-tuning are data and losses of their own and not built in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_compress.distiller import select_logits
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Needs, Objective, Signals, Sizes, Step
from hf_compress.outputs import logits_of
from hf_compress.registry import Method
from hf_compress.taps import blocks


@dataclass(frozen=True, kw_only=True)
class MultiExitConfig:
    """Hyper-parameters of the exits."""

    exits: tuple[int, ...] | None = None
    """Layers, from 1, after which the head learns too; the last layer's is there in any case. None: an eighth, a
    quarter, a half and three quarters of the depth, as 4, 9, 18 and 27 of the published 36."""

    def __post_init__(self) -> None:
        if self.exits is not None and (
            not self.exits or list(self.exits) != sorted({*self.exits}) or self.exits[0] < 1
        ):
            raise ConfigurationError(f"multi_exit: exits must be layers from 1, in rising order, got {self.exits}.")


def exit_layers(exits: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The exits before the last layer.

    Raises:
        MismatchError: if an exit lies behind the last layer, or there is no layer to leave out.
    """
    chosen = exits or tuple(sorted({max(round(depth * part), 1) for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4)}))
    if exits is not None and exits[-1] > depth:
        raise MismatchError(f"multi_exit: the model has {depth} layers, asked for an exit after {exits[-1]}.")
    inner = tuple(layer for layer in chosen if layer < depth)
    if not inner:
        raise MismatchError(f"multi_exit: a model of {depth} layers has no exit before its last among {chosen}.")
    return inner


def exit_weight(layer: int, depth: int) -> float:
    """α of the exit after that layer."""
    return layer / depth


def exit_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(position,) cross-entropy in nats, 0 where the label is -100; logits (position, class) are widened to float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), labels, reduction="none", ignore_index=IGNORED)


class _Given(nn.Module):
    """Stands for all blocks: returns states that are there already."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.states


@contextmanager
def ending_in(student: nn.Module, depth: int, states: Tensor) -> Iterator[None]:
    """The student's forward goes from its embeddings straight to its last norm and head, with these states."""
    stack = blocks(student, depth)
    kept = stack._modules
    stack._modules = {"0": _Given(states.to(next(student.parameters()).dtype))}
    try:
        yield
    finally:
        stack._modules = kept


class MultiExit(Objective):
    """The task's loss after inner layers."""

    Config = MultiExitConfig
    config: MultiExitConfig
    task_weight: ClassVar[float | None] = 1.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        self.depth, self.kind = student.layers, student.kind
        self.exits = exit_layers(self.config.exits, student.layers)
        return Needs(student=frozenset(f"hidden:{layer}" for layer in self.exits), teacher=None)

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        where = signals.positions
        if where.labels is None:
            raise ConfigurationError("multi_exit: every exit learns the labels, and the batch has none.")
        given = {name: value for name, value in signals.inputs.items() if name != "labels"}
        found = {}
        for layer in self.exits:
            states = signals.student[f"hidden:{layer}"].masked_fill(~signals.tokens[..., None], 0.0)
            with ending_in(step.student, self.depth, states):
                output = step.run_student(grad=torch.is_grad_enabled(), **given)
            rows = select_logits(logits_of(output), where)
            found[f"exit_{layer}"] = exit_weight(layer, self.depth) * exit_loss(rows, where.labels)
        return found


METHOD = Method(
    title="One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings",
    paper="arXiv:2503.03008",
    authors="Andrea Gurioli, Federico Pennino, João Monteiro, Maurizio Gabbrielli",
    year=2025,
    summary="One training without a teacher gives a model that can be cut after several of its layers.",
    bibtex="""@misc{gurioli2025one,
  title = {One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings},
  author = {Gurioli, Andrea and Pennino, Federico and Monteiro, Jo{\\~a}o and Gabbrielli, Maurizio},
  year = {2025}, eprint = {2503.03008}, archivePrefix = {arXiv}
}""",
    tasks=("text-classification", "token-classification", "fill-mask", "text-generation", "image-classification"),
    objective=MultiExit,
)
