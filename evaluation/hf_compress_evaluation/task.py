"""A task file says what to score a model on.

task: text-classification
data: test.csv            # relative to this file; csv, jsonl (also .gz), parquet
text: text                # column
label: label              # column of class ids or names; null: unlabelled, agreement with the teacher only
metrics: [accuracy, f1_macro]     # the default; also f1_micro, matthews_correlation, calibration_error, kl
slices: false             # true: accuracy also by class and by quarter of the texts' lengths
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from hf_compress import files
from hf_compress.errors import ForeignFileError, UnknownNameError
from hf_compress.facts import Text
from hf_compress.recipe import Count, Place

from . import examples, quality


class Task(BaseModel):
    """What a task file may say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["text-classification"]
    data: Place = Field(description="file, relative to the task file")
    text: str = "text"
    label: str | None = "label"
    split: str | None = Field(default=None, description="slice in the notation of datasets, e.g. train[:500]")
    rows: int | None = Field(default=None, ge=1, description="the first so many; None: all")
    metrics: tuple[str, ...] = quality.QUALITY
    slices: bool = Field(default=False, description="accuracy also by class and by length of the text")
    max_length: Count | None = Field(default=None, description="tokens kept; None: what the model takes")
    batch_size: Count = 32
    name: Text | None = Field(default=None, description="of the data, for the record; None: the file's name")
    licence: Text | None = None

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in quality.METRICS:
                raise ValueError(str(UnknownNameError("metric", name, quality.METRICS)))
        return names

    @field_validator("slices")
    @classmethod
    def _labelled(cls, slices: bool, info: ValidationInfo) -> bool:
        if slices and "label" in info.data and info.data["label"] is None:
            raise ValueError("an accuracy by class and length needs labels, and label is null")
        return slices


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
        raise ForeignFileError(path, f"{key}: {first['msg']}.", "Mend the file.") from error
    return task.model_copy(update={"data": str(path.parent.absolute() / task.data)})


def load_examples(task: Task, label2id: dict[str, int]) -> examples.Examples:
    """The task's rows with labels as ids of the model's classes; errors as `examples.read_rows` and `examples`."""
    path = Path(task.data)
    rows = examples.read_rows(path, split=task.split)
    if task.rows is not None:
        rows = rows.select(range(min(task.rows, len(rows))))
    return examples.examples(
        rows,
        name=task.name or path.name.split(".")[0],
        text=task.text,
        label=task.label,
        label2id=label2id,
        licence=task.licence,
        split=task.split,
    )
