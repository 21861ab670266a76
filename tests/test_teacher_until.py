"""A teacher that stops at a tap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from hf_compress import testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Needs, Signals, Sizes, Step
from hf_compress.taps import Reached, Taps, watching

TAPS = frozenset({"hidden:1", "hidden:2"})


class Early(toys.Toy):
    """Compares tapped states of the first layers."""

    task_weight = None
    until: str | None = "hidden:2"
    seen: Signals

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(student=frozenset({"hidden:1"}), teacher=TAPS, teacher_until=self.until, mean_over="examples")

    per_position = toys.Toy.__mro__[1].per_position

    def forward(self, signals: Signals, step: Step) -> Tensor:
        type(self).seen = signals
        return signals.student["hidden:1"].square().mean((1, 2))


class Whole(Early):
    until = None


def count_calls(module: nn.Module) -> list[int]:
    calls = [0]
    module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_the_taps_are_the_same_and_later_blocks_do_not_run(task: str, tmp_path: Path) -> None:
    found = {}
    for kind, expected in ((Early, [1, 1, 0]), (Whole, [1, 1, 1])):
        trainer, teacher = toys.run(tmp_path, kind(), task)
        stack = next(m for m in teacher.modules() if isinstance(m, nn.ModuleList))
        calls = [count_calls(block) for block in stack]
        trainer.train()
        assert [call[0] for call in calls] == expected
        found[kind] = kind.seen.teacher
    for name in TAPS:
        torch.testing.assert_close(found[Early][name], found[Whole][name])


def test_the_embeddings_and_a_module_can_be_the_last(tmp_path: Path) -> None:
    model = testing.models("text-classification")[1].eval()
    inputs: dict[str, Any] = testing.collate(testing.rows("text-classification"))
    expected = model(**inputs, output_hidden_states=True).hidden_states
    for name, index in (("hidden:0", 0), ("output:bert.encoder.layer.1", 2)):
        taps = Taps(model, {name}, 3, until=name)
        with watching(taps), pytest.raises(Reached):
            model(**inputs)
        torch.testing.assert_close(taps.read(None)[name], expected[index])
        taps.remove()
        model(**inputs)


def test_a_tap_that_cannot_be_the_last_is_refused() -> None:
    model = testing.models("text-classification")[1]
    with pytest.raises(ConfigurationError, match="teacher_until"):
        Taps(model, {"logits"}, 3, until="logits")
    with pytest.raises(MismatchError, match="hidden:0"):
        Taps(model, {"hidden:3"}, 3, until="hidden:3")
    with pytest.raises(MismatchError, match="one stack of 9 blocks"):
        Taps(model, {"hidden:1"}, 9, until="hidden:1")
    assert not [module for module in model.modules() if module._forward_hooks]


def test_a_decoder_that_is_as_deep_is_not_taken_for_the_encoder() -> None:
    model = testing.models("image-feature-extraction")[1]
    model.config.num_hidden_layers = len(model.decoder.decoder_layers)
    model.vit.layers = model.vit.layers[: len(model.decoder.decoder_layers)]
    taps = Taps(model, {"hidden:0"}, len(model.vit.layers), until="hidden:0")
    seen = [0]
    model.vit.layers[0].register_forward_pre_hook(lambda *_: seen.__setitem__(0, 1))
    with watching(taps), pytest.raises(Reached):
        model(**testing.collate(testing.rows("image-feature-extraction")))
    assert seen == [0]
    assert taps.read(None)["hidden:0"].shape[-1] == model.config.hidden_size
