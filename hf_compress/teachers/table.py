"""A teacher whose outputs are known: looked up by the id that each row carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_compress import facts
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Kind, Sizes


class TableTeacher:
    """Outputs by id, for teachers that cannot read a batch alone (graphs) or have been run before.

    Args:
        outputs: by tap, e.g. {"logits": (id, class)}.
        column: of the batch, with the ids; a method that uses such a teacher names it among its columns.
        kind: where the logits stand.
        about: what the record says of the model that gave them.

    Raises:
        ConfigurationError: if the taps hold different numbers of rows.
    """

    def __init__(
        self, outputs: Mapping[str, Tensor], *, column: str, kind: Kind = "rows", about: facts.Model | None = None
    ) -> None:
        rows = {len(values) for values in outputs.values()}
        if len(rows) != 1:
            raise ConfigurationError(f"TableTeacher: outputs must have one row an id, got {sorted(rows)} rows.")
        self.outputs = {tap: values.detach() for tap, values in outputs.items()}
        self.column, self.rows = column, rows.pop()
        self.about = about or facts.Model(architecture="table")
        vocab = outputs["logits"].shape[-1] if "logits" in outputs else 0
        self.sizes = Sizes(kind=kind, layers=0, width=0, heads=0, vocab=vocab, config=None)

    def prepare(self, taps: frozenset[str], device: torch.device, until: str | None = None) -> None:
        if missing := sorted(taps - self.outputs.keys()):
            raise ConfigurationError(f"TableTeacher: has {sorted(self.outputs)}, the methods ask for {missing}.")
        self.taps = taps
        self.outputs = {tap: values.to(device) for tap, values in self.outputs.items()}

    def __call__(self, inputs: Inputs) -> Mapping[str, Tensor]:
        if self.column not in inputs:
            raise MismatchError(f"TableTeacher: the batch has no column {self.column!r}; it has {sorted(inputs)}.")
        ids = inputs[self.column]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise MismatchError(f"TableTeacher: id {int(ids.max())} of {self.column!r}; there are 0 … {self.rows - 1}.")
        return {tap: self.outputs[tap][ids] for tap in self.taps}

    def run(self, *, grad: bool = False, **inputs: Any) -> Any:
        raise ConfigurationError("TableTeacher: there is no model to run; use a method that reads the teacher's taps.")

    def describe(self) -> facts.Model:
        return self.about

    def close(self) -> None:
        """Nothing was taken."""
