"""A recipe small enough to run in seconds: an invented encoder, a few sentences of two classes, and its baseline."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from tiny import tiny_bert_classifier, tiny_tokenizer
from transformers import BertForSequenceClassification

LABELS = ("negative", "positive")
WORDS = ("the film", "a book", "the story", "an actor", "the music", "the end")
ROWS = {"train": 24, "unlabelled": 12, "choice": 10, "test": 20}


def write_rows(path: Path, rows: int, *, labelled: bool = True, seed: int = 0) -> Path:
    """Sentences whose last word decides their label, as csv."""
    chosen = random.Random(f"{path.name}{seed}")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"] if labelled else ["text"])
        for row in range(rows):
            said = f"{chosen.choice(WORDS)} was {'very ' * chosen.randrange(3)}{('bad', 'good')[row % 2]}"
            writer.writerow([said, LABELS[row % 2]] if labelled else [said])
    return path


def write_teacher(folder: Path) -> BertForSequenceClassification:
    """A classifier of three layers with the two classes, and its tokenizer."""
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    teacher = tiny_bert_classifier(num_labels=2, num_hidden_layers=3, **names)
    teacher.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return teacher


def write_inputs(folder: Path) -> dict[str, Any]:
    """The values of a recipe, and below `folder` the files that it names, relative to it."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in ROWS.items():
        write_rows(folder / f"{part}.csv", rows, labelled=part != "unlabelled")
    write_teacher(folder / "big")
    return {
        "task": "text-classification",
        "teacher": "big",
        "data": {**{part: f"{part}.csv" for part in ROWS}, "max_length": 16, "name": "sentences", "licence": "mit"},
        "student": {"layers": 2},
        "training": {"epochs": 2, "batch_size": 12, "learning_rate": 1e-3},
        "export": {"max_drop": 1.0, "min_agreement": 0.0},
        "measure": {"batches": [1], "length": 8, "runs": 2},
        "output": "made",
    }
