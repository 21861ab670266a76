"""Further frozen models by role."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import toys
from torch import Tensor
from transformers import Trainer

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError, UnknownNameError
from hf_compress.objective import Inputs, Needs, Rows, Signals, Sizes, Step

TASK = "text-generation"


class WithReference(toys.Toy):
    """Needs a further model; keeps what it was given."""

    seen: tuple[Rows, Signals] | None = None

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(frozen=("reference",))

    def per_position(self, rows: Rows, step: Step) -> Mapping[str, Tensor]:
        type(self).rows = rows
        return {"toy": super().per_position(rows, step)}

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        type(self).signals = signals
        return {}

    rows: Rows
    signals: Signals


def test_its_logits_come_by_role_and_it_is_left_as_it_was(tmp_path: Path) -> None:
    reference, _ = testing.models(TASK)
    before = testing.weights_hash(reference)
    trainer, _ = toys.run(tmp_path, WithReference(), frozen={"reference": reference})

    trainer.train()

    rows, signals = WithReference.rows, WithReference.signals
    with torch.no_grad():
        expected = reference.eval()(**{k: v for k, v in signals.inputs.items() if k != "labels"}).logits
    torch.testing.assert_close(signals.frozen["reference"]["logits"], expected)
    torch.testing.assert_close(rows.frozen["reference"], expected.flatten(0, 1)[signals.positions.index])
    assert not rows.frozen["reference"].requires_grad
    torch.testing.assert_close(rows.frozen["reference"], rows.student_logits.detach())  # same start, first step
    assert not torch.equal(rows.frozen["reference"], rows.teacher_logits)
    assert testing.weights_hash(reference) == before
    assert all(parameter.requires_grad for parameter in reference.parameters())
    record = trainer.model.config.compression
    assert record["frozen"]["reference"]["architecture"] == type(reference).__name__


def test_a_role_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="frozen 'reference' model"):
        toys.run(tmp_path, WithReference())


def test_a_role_that_no_method_asks_for_is_refused(tmp_path: Path) -> None:
    model, _ = testing.models(TASK)
    with pytest.raises(UnknownNameError, match="referrence"):
        toys.run(tmp_path, WithReference(), frozen={"reference": model, "referrence": model})
    with pytest.raises(UnknownNameError, match="role"):
        toys.run(tmp_path, toys.Toy(), frozen={"reference": model})


def test_one_that_shares_weights_with_the_student_or_has_other_classes_is_refused(tmp_path: Path) -> None:
    trainer, teacher = toys.run(tmp_path, toys.Toy())
    callback = DistillCallback(teacher, WithReference(), frozen={"reference": trainer.model})
    with pytest.raises(ConfigurationError, match="one object"):
        Trainer(model=trainer.model, args=trainer.args, train_dataset=trainer.train_dataset, callbacks=[callback])
    other = testing.models("fill-mask")[0]
    with pytest.raises(MismatchError, match="kind of head"):
        toys.run(tmp_path, WithReference(), frozen={"reference": other})


class Alone(toys.Toy):
    """A further model and no teacher."""

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(teacher=None, frozen=("reference",))


class CaseOfAlone(testing.Case):
    """Of a method that no registry knows."""

    def objective(self) -> Alone:
        return Alone()


def test_without_a_teacher_a_further_model_gives_its_logits() -> None:
    """In the conformance suite's signals, as in a run."""
    found = testing.signals(CaseOfAlone("alone", TASK))
    assert not found.teacher
    assert found.frozen["reference"]["logits"].shape == found.student["logits"].shape


class OwnIds(WithReference):
    """The reference reads the ids in reverse; remembers the shapes that it was built from."""

    shapes: Mapping[str, torch.Size]

    def build(self, student: Mapping[str, torch.Size], teacher: Mapping[str, torch.Size]) -> None:
        type(self).shapes = teacher

    def frozen_batch(self, role: str, inputs: Inputs, step: Step) -> Inputs:
        assert role == "reference"
        return inputs | {"input_ids": inputs["input_ids"].flip(1), "attention_mask": inputs["attention_mask"].flip(1)}


def test_it_may_read_other_ids_and_its_shapes_are_told(tmp_path: Path) -> None:
    reference, teacher = testing.models(TASK)
    trainer, _ = toys.run(tmp_path, OwnIds(), frozen={"reference": reference})

    trainer.train()

    signals = OwnIds.signals
    own, mask = (signals.inputs[name] for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        for model, turned, found in ((reference, True, signals.frozen["reference"]), (teacher, False, signals.teacher)):
            ids, real = (given.flip(1) if turned else given for given in (own, mask))
            expected = model.eval()(input_ids=ids, attention_mask=real).logits
            torch.testing.assert_close(found["logits"], expected)
    assert OwnIds.shapes["reference/logits"] == OwnIds.shapes["logits"] == (2, 8, testing.VOCAB)


def test_two_methods_that_choose_what_it_reads_are_refused(tmp_path: Path) -> None:
    reference, _ = testing.models(TASK)
    with pytest.raises(ConfigurationError, match="rewrite the frozen_batch"):
        toys.run(tmp_path, [OwnIds(), OwnIds()], frozen={"reference": reference})
