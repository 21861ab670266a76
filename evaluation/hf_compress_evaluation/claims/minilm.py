"""MiniLM's claim: relations of a good teacher's last layer are worth copying before the labels are seen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.encoders.minilm import MiniLM
from hf_compress_plugins.general.kd import KD
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from hf_compress import DistillCallback

from . import Claim
from . import _digits as digits

PARTS = 1100
"""Images that the teacher is trained on; students see them without labels."""
TEACHER, STUDENT = (32, 4), (16, 2)
"""Width and layers."""
TEACHER_STEPS, STEPS, TUNING = 800, 600, 150
LABELLED, HEADS = 60, 4
ALONE, HIDDEN = "masked rows, no teacher", 1 / 3
"""The same steps on the same images without a teacher, and the part of rows that is hidden."""
METHODS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "v2, A_r = 8": (("qq", "kk", "vv"), 8),
    "v2, A_r = 4": (("qq", "kk", "vv"), 4),
    "v1": (("qk", "vv"), HEADS),
    "v1, attention alone": (("qk",), HEADS),
}


class RowsOfPixels(BertForSequenceClassification):  # type: ignore[misc]  # transformers is not typed for mypy
    """A BERT that reads the eight rows of an image as tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.read = nn.Linear(8, config.hidden_size)

    def forward(self, pixel_rows: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        """Logits of images (image, 8, 8), and their cross-entropy."""
        return super().forward(inputs_embeds=self.read(pixel_rows), attention_mask=attention_mask, labels=labels)


def inputs(pixels: Tensor) -> dict[str, Tensor]:
    """Of images (image, 1, 8, 8)."""
    return {"pixel_rows": pixels[:, 0], "attention_mask": torch.ones(len(pixels), 8, dtype=torch.long)}


def rows(part: slice) -> list[dict[str, Any]]:
    """Rows of a Trainer."""
    pixels, labels = (tensor[part] for tensor in digits.images())
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]


def labelled(batch: Any) -> dict[str, Tensor]:
    """Images as sequences, with labels."""
    return unlabelled(batch) | {"labels": torch.tensor([row["labels"] for row in batch])}


def unlabelled(batch: Any) -> dict[str, Tensor]:
    """Images as sequences."""
    return inputs(torch.stack([row["pixel_values"] for row in batch]))


def model(width: int, layers: int, seed: int) -> RowsOfPixels:
    """Untrained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RowsOfPixels(
            BertConfig(
                vocab_size=1,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=HEADS,
                max_position_embeddings=8,
                num_labels=10,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.1,
            )
        )


def train(student: Any, *, steps: int, seed: int, data: Any, collate: Any = labelled, **settings: Any) -> Any:
    """A plain Trainer."""
    return digits.train(
        student,
        steps=steps,
        seed=seed,
        batch=32,
        learning_rate=2e-3,
        data=data,
        data_collator=collate,
        remove_unused_columns=False,
        **settings,
    )


@cache
def teacher() -> Any:
    """Trained with labels."""
    return train(model(*TEACHER, 0), steps=TEACHER_STEPS, seed=0, data=rows(slice(0, PARTS)))


def accuracy(trained: Any) -> float:
    """Of the test images."""
    pixels, labels = (tensor[PARTS:] for tensor in digits.images())
    with torch.no_grad():
        return float((trained.eval()(**inputs(pixels)).logits.argmax(-1) == labels).float().mean())


class Reconstruction(nn.Module):
    """The rows of pixels that the student does not see, told from those that it sees: what needs no teacher."""

    def __init__(self, student: RowsOfPixels) -> None:
        super().__init__()
        self.student = student
        self.told = nn.Linear(student.config.hidden_size, 8)

    def forward(self, pixel_rows: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The mean squared error of a third of the rows, drawn anew each time."""
        hidden = torch.rand(pixel_rows.shape[:2]) < HIDDEN
        seen = self.student.read(pixel_rows.masked_fill(hidden[..., None], 0.0))
        states = self.student.bert(inputs_embeds=seen, attention_mask=attention_mask).last_hidden_state
        return {"loss": (self.told(states) - pixel_rows)[hidden].square().mean()}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """A student after distillation without labels and tuning on a few."""
    student = model(*STUDENT, 1000 + seed)
    unseen, few = rows(slice(0, PARTS)), rows(slice(LABELLED * seed, LABELLED * (seed + 1)))
    if variant in METHODS:
        relations, heads = METHODS[variant]
        method = MiniLM(relations=relations, weights=(1.0,) * len(relations), relation_heads=heads)
        head = (*student.bert.pooler.parameters(), *student.classifier.parameters())
        for parameter in head:
            parameter.requires_grad_(False)  # relations do not reach it
        callback = DistillCallback(teacher(), method)
        train(student, steps=STEPS, seed=seed, data=unseen, collate=unlabelled, callbacks=[callback])
        for parameter in head:
            parameter.requires_grad_(True)
    elif variant == ALONE:
        with torch.random.fork_rng():
            torch.manual_seed(2000 + seed)
            alone = Reconstruction(student)
        train(alone, steps=STEPS, seed=seed, data=unseen, collate=unlabelled)
    elif variant == "kd":
        callback = DistillCallback(teacher(), KD(temperature=2.0))
        train(student, steps=STEPS, seed=seed, data=unseen, collate=unlabelled, callbacks=[callback])
    before = accuracy(student)
    train(student, steps=TUNING, seed=seed, data=few)
    return {"accuracy": accuracy(student), "before the labels": before, "of the teacher": accuracy(teacher())}


CLAIM = Claim(
    published="MiniLM of 6 layers and width 768 from BERT-base reaches a GLUE average of 81.0, against 78.6 of "
    "DistilBERT and 79.9 of TinyBERT; relations of values beside attention are better than attention alone.",
    check=f"Digits as 8 tokens, the rows of pixels. Teacher: {TEACHER[1]} layers of width {TEACHER[0]}, "
    f"{TEACHER_STEPS} steps on {PARTS} labels. Students: {STUDENT[1]} layers of width {STUDENT[0]}, random at first, "
    f"{STEPS} steps of 32 on the same images without labels, then {TUNING} steps on {LABELLED} labels; each seed has "
    "other ones. Kd at T = 2 teaches the head of this task too, which relations do not.",
    expected="All relations above no distillation; v1 above its attention alone. Kd, which has the task's own teacher, "
    "may be above them all.",
    variants=("no distillation", ALONE, *METHODS, "kd"),
    run=run,
)
