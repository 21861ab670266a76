"""MiniLM of six layers taught to three on rated sentences, for benches beside others' distillation trainers."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from hf_compress_plugins.general.kd import KD, kd
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_compress import DistillCallback
from hf_compress.shrinking import shrink
from hf_compress.teachers.cache import CacheTeacher
from hf_compress_evaluation.demo.data import load_sentiment
from hf_compress_evaluation.demo.recipe import packaged

from . import Figures
from ._machine import Machine
from ._steps import QUIET

LAYERS, BATCH, LENGTH, RATE = 3, 16, 32, 1e-4
"""The student's layers; rows of a step, tokens at most, and the learning rate at the start, of both trainings."""
ROWS, EPOCHS = 1024, 2
"""A student's training."""
TEACHER_ROWS, TEACHER_EPOCHS = 2048, 2
"""Its teacher's; the student's rows are the first of them."""
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
"""Of the sweep, in which a student sees its rows once."""
START, CACHED = "start", "cached"
"""Parts: what is known before training, and with the teacher run once a row."""
SETTING = (
    f"Rated sentences, two classes: MiniLM of six layers, fine-tuned on {TEACHER_ROWS:,} rows, into {LAYERS} of its "
    f"layers, {ROWS:,} of the rows {EPOCHS} times in batches of {BATCH}, at most {LENGTH} tokens, AdamW, learning rate "
    f"{RATE:g} falling to 0, the same rows in the same order. A round is a seed; accuracy is on the demo's test rows, "
    "seconds run until the weights are on disk. What is at a T is of one seed and one pass over the rows."
)
Row = Mapping[str, Any]
Soft = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""A soft loss of the student's and the teacher's logits (row, class), labels (row,), and T."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both sides optimise, and for how long.

    L = soft · KL( softmax(z_t / T) ‖ softmax(z_s / T) ) + hard · CE(labels), both means over rows.
    """

    temperature: float
    """T."""
    soft: float
    """Weight of the divergence, which has no T² of its own here."""
    hard: float
    """Weight of the labels."""
    clip: float | None = None
    """Norm that the gradient is clipped to; None: it is not."""
    epochs: int = EPOCHS


class Side(Protocol):
    """A way to train: gets what it needs in the clear and leaves the student trained, its weights below `output`."""

    def __call__(self, given: Given, recipe: Recipe, seed: int, output: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Given:
    """What both sides start from."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    train: Sequence[Row]
    test: Sequence[Row]

    @classmethod
    def read(cls, folder: Path) -> Given:
        """From what `prepare` wrote."""
        load = AutoModelForSequenceClassification.from_pretrained
        rows = json.loads((folder / "rows.json").read_text())
        return cls(teacher=load(folder / "teacher"), student=load(folder / "student"), **rows)


def prepare(folder: Path) -> None:
    """Writes the tokenized rows, the teacher, and the student that is cut from it."""
    tokenizer, data = AutoTokenizer.from_pretrained(packaged()), load_sentiment()
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, part in (("train", data.labelled.rows[:TEACHER_ROWS]), ("test", data.test.rows[:])):
        ids = tokenizer(part["text"], truncation=True, max_length=LENGTH)["input_ids"]
        rows[name] = [{"input_ids": one, "labels": label} for one, label in zip(ids, part["label"], strict=True)]
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(packaged(), num_labels=2)
    arguments = _arguments(folder / "run", TEACHER_EPOCHS, 0, clip=1.0, train_sampling_strategy="random")
    trainer = Trainer(model=teacher, args=arguments, train_dataset=rows["train"], data_collator=pad)
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is a command's result
    trainer.train()
    teacher.save_pretrained(folder / "teacher")
    shrink(teacher, layers=LAYERS).save_pretrained(folder / "student")
    rows["train"] = rows["train"][:ROWS]
    (folder / "rows.json").write_text(json.dumps(rows))


def _arguments(folder: Path, epochs: int, seed: int, *, clip: float | None, **settings: Any) -> TrainingArguments:
    """Linear to 0 without warm-up, AdamW without weight decay: the Trainer's defaults."""
    return TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        max_grad_norm=clip or 0.0,
        seed=seed,
        dataloader_pin_memory=False,
        use_cpu=True,
        **{**QUIET, **settings},
    )


def pad(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch as long as its longest row: input_ids and attention_mask (batch, time), labels (batch,)."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([[*row["input_ids"], *[0] * (length - len(row["input_ids"]))] for row in rows])
    real = torch.tensor([[place < len(row["input_ids"]) for place in range(length)] for row in rows])
    return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.tensor([row["labels"] for row in rows])}


def drawn(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows in a seed's order; batches are cut from it."""
    found = list(rows)
    random.Random(seed).shuffle(found)
    return found


def _batches(rows: Sequence[Row]) -> list[Sequence[Row]]:
    return [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]


def in_order(rows: Sequence[Row], seed: int, epochs: int) -> list[Row]:
    """All rows of all epochs: batches stay together and change places, as they do where batches are cached."""
    batches, shuffled = _batches(drawn(rows, seed)), random.Random(seed)
    found: list[Row] = []
    for _ in range(epochs):
        shuffled.shuffle(batches)
        found += [row for batch in batches for row in batch]
    return found


def loader(rows: Sequence[Row]) -> DataLoader[Any]:
    """Batches in the order of the rows, for trainers that are given them."""
    return DataLoader(rows, batch_size=BATCH, collate_fn=pad)  # type: ignore[arg-type]  # a list is a data set


def steps(recipe: Recipe, rows: Sequence[Row]) -> int:
    """Of the optimizer."""
    return recipe.epochs * -(-len(rows) // BATCH)


def ours(given: Given, recipe: Recipe, seed: int, output: Path) -> None:
    """The Trainer with a callback."""
    _callback(given, recipe, seed, output, given.teacher)


def ours_cached(given: Given, recipe: Recipe, seed: int, output: Path) -> None:
    """The same, with the teacher run once for each row, before training."""
    cache = output / "cache"
    CacheTeacher(cache, given.teacher, dtype="float32").fill(loader(drawn(given.train, seed)))
    _callback(given, recipe, seed, output, CacheTeacher(cache, dtype="float32"))


def _callback(given: Given, recipe: Recipe, seed: int, output: Path, teacher: Any) -> None:
    soft = KD(temperature=recipe.temperature, weight=recipe.soft / recipe.temperature**2)  # kd has T² of its own
    trainer = Trainer(
        model=given.student,
        args=_arguments(output, 1, seed, clip=recipe.clip),
        train_dataset=in_order(given.train, seed, recipe.epochs),
        data_collator=pad,
        callbacks=[DistillCallback(teacher, soft, task_weight=recipe.hard)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is a command's result
    trainer.train()
    trainer.save_model(output)


def figures(side: Side, recipe: Recipe, folder: Path, *, on: Machine, seed: int) -> Figures:
    """Accuracy on the test rows, seconds of training and megabytes that it took.

    Seconds are from models and rows in memory to the student's weights on disk.
    """
    on.begin()
    given = Given.read(folder)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as output, _clock() as seconds, on.highest() as memory:
        side(given, recipe, seed, Path(output))
    return {
        "accuracy": accuracy(given.student, given.test),
        "seconds": seconds[0],
        "megabytes": memory[0] / 2**20,
    }


@contextmanager
def _clock() -> Iterator[list[float]]:
    found = [0.0]
    begun = time.perf_counter()
    yield found
    found[0] = time.perf_counter() - begun


@torch.no_grad()
def accuracy(model: nn.Module, rows: Sequence[Row]) -> float:
    """Part of the rows whose class is found, 0 … 1."""
    model.eval()
    right = 0
    for few in _batches(sorted(rows, key=lambda row: len(row["input_ids"]))):
        batch = pad(few)
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def before(folder: Path, losses: Mapping[str, Soft], on: Machine) -> Figures:
    """Accuracy of the models that all start from, and norms of the soft losses' gradients on the first batch.

    Args:
        folder: that was prepared.
        losses: the others' by name, each at its weight 1.
        on: what it runs on.
    """
    on.begin()
    given = Given.read(folder)
    found = {"teacher's accuracy": accuracy(given.teacher, given.test)}
    found["student's accuracy"] = accuracy(given.student, given.test)
    batch = pad(given.train[:BATCH])
    labels = batch.pop("labels")
    with torch.no_grad():
        teacher_logits = given.teacher(**batch).logits
    for temperature in TEMPERATURES:
        student_logits = given.student(**batch).logits
        for name, soft in {"ours": _own, **losses}.items():
            loss = soft(student_logits, teacher_logits, labels, temperature)
            found[gradient(name, temperature)] = norm(loss, given.student)
    return found


def _own(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    del labels
    return kd(student_logits, teacher_logits, temperature=temperature).mean()


def norm(loss: Tensor, model: nn.Module) -> float:
    """Of the loss's gradient, over all parameters."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return float(torch.stack([one.norm() for one in gradients if one is not None]).norm())


def gradient(side: str, temperature: float) -> str:
    """Name of a figure."""
    return f"gradient at T = {temperature:g}, {side}"


def swept(side: str, temperature: float) -> str:
    """Name of a part."""
    return f"{side}, T = {temperature:g}"


def sweep(peer: str) -> tuple[str, ...]:
    """Names of the parts of the sweep."""
    return tuple(swept(side, temperature) for temperature in TEMPERATURES for side in ("ours", peer))


def beside(
    found: Mapping[str, Figures], peer: str, *, ways: Sequence[str] = ("",), losses: Sequence[str] = ()
) -> Figures:
    """What is compared: accuracy, time and memory of each way, and the sweep with the peer's losses."""
    start = found[START]
    ratios = dict[str, float]()
    for way in ways:
        own, theirs = found[f"ours{way}"], found[f"{peer}{way}"]
        ratios |= {
            f"accuracy{way}, ours": own["accuracy"],
            f"accuracy{way}, {peer}": theirs["accuracy"],
            f"accuracy{way}, {peer} - ours": theirs["accuracy"] - own["accuracy"],
            f"time{way}, ours / {peer}": own["seconds"] / theirs["seconds"],
            f"memory{way}, ours / {peer}": own["megabytes"] / theirs["megabytes"],
        }
    ratios |= {name: start[name] for name in ("teacher's accuracy", "student's accuracy")}
    for temperature in TEMPERATURES:
        name, size = f"T = {temperature:g}", start[gradient("ours", temperature)]
        ratios[f"gradient at {name}, ours"] = size
        for loss in losses or (peer,):
            ratios[f"gradient at {name}, ours / {loss}"] = size / start[gradient(loss, temperature)]
        for side in ("ours", peer):
            ratios[f"accuracy at {name}, {side}"] = found[swept(side, temperature)]["accuracy"]
    return ratios
