"""What a run left behind, and the rows that it was trained and measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_compress import facts, files, fitting, trainer_log
from hf_compress.errors import ConfigurationError, ForeignFileError
from hf_compress.facts import Record
from hf_compress.objective import IGNORED
from hf_compress_evaluation.examples import label_values, no_column, read_rows


@dataclass(frozen=True, kw_only=True)
class Place:
    """A student and what lies around it."""

    student: Path
    record: Record
    log: Path | None
    """The Trainer's state of its training."""
    teacher: Path | None = None
    alone: Path | None = None
    """What a recipe's run holds beside the student."""


def find(run: Path) -> Place:
    """The student of a model folder, of a recipe's output (finished or not), or of a Trainer's newest checkpoint.

    Raises:
        ForeignFileError: if there is none, or its record is malformed.
    """
    if (run / "config.json").is_file():
        return Place(student=run, record=facts.load(run), log=trainer_log.find(run))
    student = run / "student"
    if (student / "config.json").is_file():
        beside = {name: run / name if (run / name / "config.json").is_file() else None for name in ("teacher", "alone")}
        return Place(student=student, record=facts.load(student), log=trainer_log.find(student), **beside)
    for folder in (run, fitting.unfinished(student)):
        for checkpoint in trainer_log.checkpoints(folder):
            if (checkpoint / "config.json").is_file():
                log = trainer_log.find(folder)
                return Place(student=checkpoint, record=facts.load(checkpoint), log=log)
    raise ForeignFileError(
        run,
        "holds no config.json, no student/ and no checkpoint-N/ with one.",
        "Give a student's folder, the output folder of a recipe, or that of a Trainer.",
    )


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one file."""

    where: str
    """"training" or "test"."""
    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """(row,) ids of the student's classes, -100 where a row has none that the student knows."""
    names: int
    """Different names of classes; 0: the file has ids, or no labels."""
    unknown: int
    """Different names and ids that are no class of the student's."""

    def sample(self, most: int) -> Table:
        """At most so many rows, evenly spaced; the counts of names stay."""
        if len(self.texts) <= most:
            return self
        at = np.linspace(0, len(self.texts) - 1, most).astype(int)
        return replace(self, texts=tuple(self.texts[index] for index in at), labels=self.labels[at])


def read(
    path: Path,
    *,
    where: str,
    text: str,
    label: str | None,
    label2id: Mapping[str, int],
    split: str | None = None,
    most: int | None = None,
) -> Table:
    """The rows of a file. Names and ids that are no class are counted, not refused: they are what is looked for.

    Args:
        path: csv, jsonl (also .gz) or parquet.
        where: "training" or "test".
        text: column of the texts.
        label: column of the labels; None: there is none.
        label2id: the student's classes.
        split: a slice in the notation of datasets.
        most: rows that are read, the first ones; None: all.

    Raises:
        ForeignFileError, UnknownNameError: as `read_rows`; for a column that is not there.
        ConfigurationError: if a text is none; it is not shown.
    """
    rows = read_rows(path, split=split)
    if most is not None:
        rows = rows.select(range(min(most, len(rows))))
    for column in (text, label):
        if column is not None and column not in rows.column_names:
            raise no_column(column, rows.column_names, path.name)
    texts = list(rows[text])
    if wrong := sum(not isinstance(value, str) for value in texts):
        raise ConfigurationError(
            f"{path.name}: {wrong} of {len(texts)} values of {text!r} are no text. Drop those rows."
        )
    values = [None] * len(texts) if label is None else label_values(rows, label)
    ids = [_class(value, label2id) for value in values]
    unknown = {str(value) for value, found in zip(values, ids, strict=True) if found is None}
    return Table(
        where=where,
        texts=tuple(texts),
        labels=np.array([IGNORED if found is None else found for found in ids], np.int64),
        names=len({value for value in values if isinstance(value, str) and value}),
        unknown=len(unknown),
    )


def _class(value: Any, label2id: Mapping[str, int]) -> int | None:
    """The class of a label, -100 for none, None for a label that is no class."""
    if value is None or value == "" or value != value:
        return IGNORED
    if isinstance(value, str):
        return label2id.get(value)
    if isinstance(value, int | float) and float(value).is_integer():
        return IGNORED if value < 0 else int(value) if value < len(label2id) else None
    return None


def is_text_classifier(folder: Path) -> bool:
    """Whether the config names a class for text classification, the only task whose models are run."""
    names = files.read_json(folder / "config.json", finite=False).get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)
