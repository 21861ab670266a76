"""A task file says what to score a model on.

task: text-classification         # or token-classification, sentence-similarity
data: test.csv            # relative to this file; csv, jsonl (also .gz), parquet
text: text                # column; of words: tokens; of pairs: sentence1, with text_pair: sentence2
label: label              # column of class ids or names, of numbers (score), of tags; null: no labels
metrics: [accuracy, f1_macro]     # the default; what else there is says an error's list of names
slices: false             # true: accuracy also by class and by quarter of the texts' lengths
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import datasets
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hf_compress import facts, files
from hf_compress.errors import ForeignFileError, UnknownNameError
from hf_compress.facts import Text
from hf_compress.recipe import Count, Place

from . import examples

COLUMNS: dict[str, tuple[str, str | None, str]] = {
    "text-classification": ("text", None, "label"),
    "token-classification": ("tokens", None, "tags"),
    "sentence-similarity": ("sentence1", "sentence2", "score"),
}
"""Columns of text, second text and label that a task file need not name."""
METRICS: dict[str, tuple[str, ...]] = {
    "text-classification": (
        "accuracy",
        "f1_macro",
        "f1_micro",
        "matthews_correlation",
        "calibration_error",
        "kl",
        "pearsonr",
        "spearmanr",
        "mean_squared_error",
    ),
    "token-classification": ("seqeval_f1", "accuracy", "seqeval_precision", "seqeval_recall"),
    "sentence-similarity": ("spearmanr", "pearsonr"),
}
"""What a task may ask for; the last three of texts are for models that give one number."""


class Task(BaseModel):
    """What a task file may say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["text-classification", "token-classification", "sentence-similarity"]
    data: Place = Field(description="file, relative to the task file")
    text: str | None = Field(default=None, description="column; None: the usual one of the task")
    text_pair: str | None = Field(default=None, description="column of second texts; None: the usual one of the task")
    label: str | None = Field(default="", description="column; empty: the usual one of the task; None: unlabelled")
    split: str | None = Field(default=None, description="slice in the notation of datasets, e.g. train[:500]")
    rows: int | None = Field(default=None, ge=1, description="the first so many; None: all")
    metrics: tuple[str, ...] = Field(default=(), description="empty: the usual ones of the task")
    slices: bool = Field(default=False, description="accuracy also by class and by length of the text")
    max_length: Count | None = Field(default=None, description="tokens kept; None: what the model takes")
    batch_size: Count = 32
    pooling: Literal["mean", "cls"] = Field(default="mean", description="of the tokens, where a text is embedded")
    name: Text | None = Field(default=None, description="of the data, for the record; None: the file's name")
    hub_id: Text | None = Field(default=None, description="of the data set on the hub that the rows are from")
    config: Text | None = Field(default=None, description="configuration of that data set, e.g. sst2")
    licence: Text | None = None

    @model_validator(mode="after")
    def _fits(self) -> Task:
        for name in self.metrics:
            if name not in METRICS[self.task]:
                raise ValueError(str(UnknownNameError("metric", name, METRICS[self.task])))
        if self.slices and self.task != "text-classification":
            raise ValueError("slices by class and by length are of text-classification")
        if self.text_pair is not None and COLUMNS[self.task][1] is None:
            raise ValueError(f"second texts are of sentence-similarity; models of {self.task} would not be given them")
        if self.slices and self.label is None:
            raise ValueError("an accuracy by class and length needs labels, and label is null")
        return self

    @property
    def columns(self) -> tuple[str, str | None, str | None]:
        """Of the texts, of the second texts, of the labels."""
        text, other, label = COLUMNS[self.task]
        return self.text or text, self.text_pair or other, label if self.label == "" else self.label


def read_task(path: Path) -> Task:
    """The task file at `path`, its data path made absolute.

    Raises:
        UnknownNameError: for a key that a task file does not have, with the nearest ones.
        ForeignFileError: if the file is missing or malformed, naming the key and the fault.
    """
    value = files.read_yaml(path)
    try:
        task = Task.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UnknownNameError(f"key in {path.name}", key, Task.model_fields) from error
        raise ForeignFileError(path, f"{key}: {first['msg']}.".removeprefix(": "), "Mend the file.") from error
    return task.model_copy(update={"data": str(path.parent.absolute() / task.data)})


def describe(task: Task, name: str, rows: int, *, labelled: bool, content: Iterable[Any]) -> facts.Data:
    """The rows of a task for the record.

    Args:
        task: where they are from.
        name: as `read_data` gives it.
        rows: their number.
        labelled: whether all have a label; else none has.
        content: each row, for the fingerprint.
    """
    return facts.Data(
        name=name,
        rows=rows,
        labelled=rows if labelled else 0,
        fingerprint=facts.fingerprint(content),
        licence=task.licence,
        hub_id=task.hub_id,
        config=task.config,
        split=task.split,
    )


def read_data(task: Task) -> tuple[datasets.Dataset, str]:
    """The task's rows, and their name in a record; errors as `examples.read_rows`."""
    path = Path(task.data)
    rows = examples.read_rows(path, split=task.split)
    if task.rows is not None:
        rows = rows.select(range(min(task.rows, len(rows))))
    return rows, task.name or path.name.split(".")[0]
