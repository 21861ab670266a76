"""The student without its adapters as its own teacher: no second model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress import facts
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Inputs, Sizes, sizes
from hf_compress.taps import Reached, Taps, evaluating, unwrap, watching
from hf_compress.teachers.model import ModelTeacher


class SelfTeacher:
    """`DistillCallback(SelfTeacher())`: a PEFT student taught by what it is with its adapters off.

    The base model is run in eval mode and without gradient, in the student's own precision; each module's mode is
    restored.
    """

    def __init__(self) -> None:
        self._student: Any = None
        self._taps: Taps | None = None
        self.sizes = Sizes(kind="none", layers=0, width=0, heads=0, vocab=0, config=None)

    def of(self, student: nn.Module) -> SelfTeacher:
        """For that student.

        Raises:
            ConfigurationError: if it has no adapters.
        """
        if not hasattr(student, "disable_adapter"):
            raise ConfigurationError(
                f"SelfTeacher: {type(student).__name__} has no adapters to turn off. Make the student with "
                "peft.get_peft_model, or give a copy of it as the teacher."
            )
        made = SelfTeacher()
        made._student, made.sizes = student, sizes(unwrap(student))
        return made

    def prepare(self, taps: frozenset[str], device: torch.device, until: str | None = None) -> None:
        if self._taps is None:
            self._inputs = ModelTeacher(unwrap(self._student))
            self._taps = Taps(self._student, taps, self.sizes.layers, until)

    @contextmanager
    def _off(self) -> Iterator[None]:
        with torch.no_grad(), evaluating(self._student), self._student.disable_adapter():
            yield

    def __call__(self, inputs: Inputs) -> Mapping[str, Tensor]:
        if self._taps is None:
            raise ConfigurationError("the teacher was called before `prepare`.")
        given: dict[str, Any] = dict(inputs) | {"return_dict": True}
        if self._taps.hidden_states:
            given["output_hidden_states"] = True
        output = None
        with self._off(), watching(self._taps), suppress(Reached):
            output = self._student.forward(**self._inputs.prepared(given))  # not __call__: that is the student's step
        return {name: tensor.detach() for name, tensor in self._taps.read(output).items()}

    def run(self, *, grad: bool = False, **inputs: Any) -> Any:
        if grad:
            raise ConfigurationError("SelfTeacher: a method that differentiates through the teacher needs a copy.")
        with self._off():
            return self._student.forward(**self._inputs.prepared(inputs))

    def describe(self) -> facts.Model:
        inner = unwrap(self._student)
        count = sum(p.numel() for name, p in self._student.named_parameters() if not name.startswith("distiller."))
        return facts.Model(architecture=f"{type(inner).__name__} without its adapters", parameters=count)

    def close(self) -> None:
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
