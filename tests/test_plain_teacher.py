"""Teachers that are no models of transformers, and students whose config tells no image size."""

from __future__ import annotations

from pathlib import Path

import torch
import toys
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer

from hf_compress import DistillCallback, testing
from hf_compress.objective import Shapes

TASK = "image-classification"


class Building(toys.Toy):
    """Keeps the shapes of its dry forward."""

    shapes: tuple[Shapes, Shapes]

    def build(self, student: Shapes, teacher: Shapes) -> None:
        type(self).shapes = (student, teacher)


class Plain(nn.Module):
    def __init__(self, classes: int = testing.CLASSES) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * testing.IMAGE**2, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layer(pixel_values.flatten(1))


def train(student: nn.Module, teacher: nn.Module, folder: Path) -> Trainer:
    plain, _ = toys.run(folder, toys.Toy(), TASK)
    callback = DistillCallback(teacher, Building())
    made = Trainer(
        model=student,
        args=plain.args,
        train_dataset=plain.train_dataset,
        data_collator=testing.collate,
        callbacks=[callback],
    )
    made.train()
    return made


def test_a_plain_module_teaches_by_its_tensor(tmp_path: Path) -> None:
    made = train(testing.models(TASK)[0], Plain(), tmp_path)
    assert made.state.log_history[0]["distill_loss"] > 0


def test_a_plain_module_learns_too(tmp_path: Path) -> None:
    plain, _ = toys.run(tmp_path, toys.Toy(), TASK)
    student = Losing()
    made = Trainer(
        model=student,
        args=plain.args,
        train_dataset=plain.train_dataset,
        data_collator=testing.collate,
        callbacks=[DistillCallback(testing.models(TASK)[1], toys.Toy(), kind="rows")],
    )
    made.train()
    assert made.state.log_history[0]["distill_loss"] > 0


class Losing(Plain):
    """A student as people write them: no config, a dictionary with a loss."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(pixel_values)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def test_a_config_without_an_image_size_is_built_from_the_data(tmp_path: Path) -> None:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=testing.CLASSES
    )
    train(ResNetForImageClassification(config), testing.models(TASK)[1], tmp_path)
    assert Building.shapes[0]["logits"] == Building.shapes[1]["logits"] == torch.Size((2, testing.CLASSES))
