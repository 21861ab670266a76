"""The claim of multiple teachers: a student of two teachers that err differently goes beyond that of either."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.encoders.multi_teacher import MultiTeacher
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_compress import DistillCallback
from hf_compress_evaluation import agreement

from . import Claim
from . import _digits as digits

SEES: Mapping[str, slice] = {"left": slice(0, 5), "right": slice(3, 8)}
"""Columns of eight that each teacher sees; two are seen by both."""
TEACHER_WIDTH, WIDTH, STEPS = 64, 64, 600
TEMPERATURE = 2.0
TEACHERS: Mapping[str, Mapping[str, Any]] = {
    "left alone": {"run": "left"},
    "right alone": {"run": "right"},
    "both, probs": {"run": "left", "second": "right", "combine": "probs"},
    "both, losses": {"run": "left", "second": "right", "combine": "losses"},
}


class Half(nn.Module):
    """A perceptron that sees some of the columns."""

    def __init__(self, columns: slice, seed: int) -> None:
        super().__init__()
        self.columns, self.inner = columns, digits.Perceptron(TEACHER_WIDTH, seed)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits of images (image, 1, 8, 8)."""
        seen = torch.full_like(pixel_values, -1.0)  # black
        seen[..., self.columns] = pixel_values[..., self.columns]
        found: ImageClassifierOutput = self.inner(seen, labels)
        return found


@cache
def teacher(side: str) -> Half:
    """Trained on all training images with labels."""
    found: Half = digits.train(Half(SEES[side], 100), steps=STEPS, seed=100)
    return found


def unlabelled(batch: Any) -> dict[str, Tensor]:
    """Images alone."""
    return {"pixel_values": digits.collate(batch)["pixel_values"]}


def scores(model: nn.Module) -> Any:
    """(image, class) logits of the test images."""
    with torch.no_grad():
        return model.eval()(digits.images()[0][digits.TRAIN :]).logits.numpy()


def ratings(logits: Any) -> Any:
    """(image,) mean digit under a model's distribution: one number a row, as a rating is."""
    return torch.as_tensor(logits).softmax(-1).numpy() @ range(logits.shape[-1])


def method(variant: str) -> DistillCallback:
    """The callback of a variant."""
    chosen = TEACHERS[variant]
    if "second" not in chosen:  # of one teacher twice both ways are plain softened targets
        chosen = {**chosen, "second": chosen["run"], "combine": "probs"}
    objective = MultiTeacher(combine=chosen["combine"], temperature=TEMPERATURE, soft=1.0, cosine=0.0)
    frozen = {"second": teacher(chosen["second"])}
    return DistillCallback(teacher(chosen["run"]), objective, frozen=frozen, task_weight=0.0, kind="rows")


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student of all pixels, without labels."""
    student = digits.train(
        digits.Perceptron(WIDTH, seed), steps=STEPS, seed=seed, data_collator=unlabelled, callbacks=[method(variant)]
    )
    found = {"accuracy": digits.accuracy(student)}
    for side in SEES:
        own, theirs = scores(student), scores(teacher(side))
        found[f"label loyalty to {side}"] = agreement.label_loyalty(own, theirs)
        found[f"probability loyalty to {side} (base 2)"] = agreement.probability_loyalty(own, theirs, base=2)
        found[f"regression loyalty to {side}"] = agreement.regression_loyalty(ratings(own), ratings(theirs))
        found[f"accuracy of the {side} teacher"] = digits.accuracy(teacher(side))
    return found


CLAIM = Claim(
    published="A student of two Romanian BERTs is as good as its teachers on most of seven tasks (UPOS 98.07 against "
    "98.00 and 98.02, STS 80.66 against 79.11 and 81.18) at 65 % of the size.",
    check=f"Digits, {digits.TRAIN} images. Two teachers, perceptrons of {TEACHER_WIDTH} neurons trained with labels, "
    f"see the left five columns and the right five. Students of {WIDTH} neurons see all pixels and no labels, {STEPS} "
    f"steps of 64 images, T = {TEMPERATURE:g}. Loyalty is agreement with a teacher on the test images; that of "
    "regression is the correlation of the mean digits of the two distributions.",
    expected="The student of both above those of either teacher, its loyalty between; both ways alike, as their "
    "gradients are equal.",
    variants=tuple(TEACHERS),
    run=run,
)
