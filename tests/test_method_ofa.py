"""OFA: any architecture to any other, exits that leave no trace."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_compress_plugins.vision.ofa import OFA, ConvExit, TokenExit, ofa, one_hot, stages
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTConfig,
)

from hf_compress import DistillCallback, export_onnx, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Sizes

CASE = testing.Case("ofa", "image-classification")


def test_by_hand() -> None:
    """Two classes, both models undecided: ε = 1 gives (1/2 + 1/2) ln 2; ε = 2 gives ((9/4 - 1) + 1/4) ln 2."""
    zeros, target = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    assert ofa(zeros, zeros, target, eps=1.0, temperature=1.0).item() == pytest.approx(math.log(2))
    assert ofa(zeros, zeros, target, eps=2.0, temperature=1.0).item() == pytest.approx(1.5 * math.log(2))


def test_an_example_without_a_label_has_no_target() -> None:
    like = torch.zeros(3, 4)
    assert one_hot(torch.tensor([2, -100, 0]), like).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert not one_hot(None, like).any()


def sizes(config: Any, layers: int) -> Sizes:
    return Sizes(kind="rows", layers=layers, width=4, heads=2, vocab=5, config=config)


def test_stages_are_blocks_of_a_transformer_and_stages_of_a_convolutional_network() -> None:
    assert stages(sizes(ViTConfig(), 12)) == ("hidden:2", "hidden:4", "hidden:10", "hidden:12")
    assert stages(sizes(ViTConfig(), 2)) == ("hidden:1", "hidden:2")
    assert stages(sizes(ResNetConfig(depths=[1, 1, 1]), 0)) == ("hidden:1", "hidden:2", "hidden:3")
    with pytest.raises(ConfigurationError, match="Name its stages"):
        stages(sizes(None, 0))


@pytest.mark.parametrize(("tokens", "merged"), [(197, 1), (196, 1), (17, 0), (785, 2)])
def test_tokens_are_merged_to_a_small_grid(tokens: int, merged: int) -> None:
    made = TokenExit(tokens, 8, 1, 5)
    assert len(made.merging) == merged
    assert made.first == (tokens - math.isqrt(tokens) ** 2)
    assert made(torch.randn(2, tokens, 8)).shape == (2, 5)


def test_maps_are_halved_to_the_last_width() -> None:
    made = ConvExit(4, 20, 3, 5)
    assert [m.out_channels for m in made.layers if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)] == [
        4,
        8,
        8,
        16,
        16,
        20,
    ]
    assert made(torch.randn(2, 4, 16, 16)).shape == (2, 5)
    assert len([m for m in ConvExit(4, 20, 0, 5).layers if isinstance(m, nn.Conv2d)]) == 1


def resnet() -> ResNetForImageClassification:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=testing.CLASSES
        )
        return ResNetForImageClassification(config)


class PlainTeacher(nn.Module):
    """Classifies, is no model of transformers, and returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * testing.IMAGE**2, testing.CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layer(pixel_values.flatten(1))


class OddConfig(PreTrainedConfig):
    model_type = "odd"


class OddStudent(PreTrainedModel):
    """A student whose stages are known by the names of its modules alone."""

    config_class = OddConfig
    main_input_name = "pixel_values"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.first, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.head = nn.Linear(8, testing.CLASSES)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.second(self.first(pixel_values).relu()).relu().mean((2, 3)))
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def train(student: nn.Module, teacher: nn.Module, folder: Path, method: Any = "ofa", **settings: Any) -> Trainer:
    plain, _ = testing.trainer(CASE, folder)
    made = Trainer(
        model=student,
        args=plain.args,
        train_dataset=plain.train_dataset,
        data_collator=testing.collate,
        callbacks=[DistillCallback(teacher, method, **settings)],
    )
    made.train()
    return made


@pytest.mark.parametrize("pair", ["transformer to convolutions", "convolutions to transformer", "plain to transformer"])
def test_any_architecture_to_any_other(pair: str, tmp_path: Path) -> None:
    vit = testing.models(CASE.task)[0]
    student, teacher = {
        "transformer to convolutions": (resnet(), vit),
        "convolutions to transformer": (vit, resnet()),
        "plain to transformer": (vit, PlainTeacher()),
    }[pair]
    made = train(student, teacher, tmp_path)
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    exits = sorted(name for name in log if name.startswith("distill/ofa.exit"))
    assert exits == ["distill/ofa.exit_1", "distill/ofa.exit_2"]
    assert log["loss"] == pytest.approx(log["task_loss"] + log["distill/ofa"] + sum(log[e] for e in exits), rel=1e-5)
    made.save_model(str(tmp_path / "student"))
    _, report = AutoModelForImageClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    export_onnx(tmp_path / "student")
    assert (tmp_path / "student/onnx/model.onnx").exists()


def test_named_stages_of_a_student_that_no_one_knows(tmp_path: Path) -> None:
    method = OFA(stages=("output:first", "output:second"))
    made = train(OddStudent(OddConfig(num_labels=testing.CLASSES)), PlainTeacher(), tmp_path, method, kind="rows")
    assert made.state.log_history[0]["distill/ofa.exit_2"] > 0
    with pytest.raises(ConfigurationError, match="Name its stages"):
        train(OddStudent(OddConfig(num_labels=testing.CLASSES)), PlainTeacher(), tmp_path, "ofa", kind="rows")


def test_exits_differ_from_plain_distillation_by_their_terms(tmp_path: Path) -> None:
    """With ε = 1 and no exits the loss is the soft cross-entropy with the teacher plus the hard one."""
    student, teacher = testing.models(CASE.task)
    made = train(student, teacher, tmp_path, OFA(exit_weight=0.0), task_weight=0.0)
    student, teacher = (model.eval() for model in testing.models(CASE.task))
    batch = testing.collate(testing.rows(CASE.task))
    with torch.no_grad():
        own, theirs = (model(batch["pixel_values"]).logits for model in (student, teacher))
    hard = nn.functional.cross_entropy(own, batch["labels"])
    soft = -(theirs.softmax(-1) * own.log_softmax(-1)).sum(-1).mean()
    plain = -((one_hot(batch["labels"], own) * own.log_softmax(-1)).sum(-1)).mean()
    assert plain.item() == pytest.approx(hard.item(), rel=1e-6)
    assert made.state.log_history[0]["distill/ofa"] == pytest.approx(soft.item(), rel=1e-4)


def test_states_that_are_no_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="maps or tokens"):
        train(testing.models(CASE.task)[0], PlainTeacher(), tmp_path, OFA(stages=("logits",)))


@pytest.mark.parametrize("settings", [{"eps": 0.5}, {"temperature": 0.0}, {"exit_weight": -1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="ofa"):
        OFA(**settings)
