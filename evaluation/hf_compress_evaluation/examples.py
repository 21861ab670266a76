"""Texts and labels from a file of the user's: csv, jsonl or parquet, also gzipped where the format allows."""

from __future__ import annotations

import gzip
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_compress import facts, files
from hf_compress.errors import ConfigurationError, ForeignFileError, MismatchError, UnknownNameError

FORMATS = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".parquet": "parquet",
}

MAX_COLUMNS = 10_000
"""Of a csv or json file. Reading takes a sixth of a millisecond for each, however short the file."""
_FREE_BYTES, _MOST_PACKED = 64 * 2**20, 200
"""Bytes that any gzipped file may unpack to, and further ones for each of its own. Text packs to a third or a tenth."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows to score a classifier on."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64] | None
    """(row,) class ids in [0, num_labels); None: unlabelled."""
    data: facts.Data


def read_rows(path: Path, *, split: str | None = None) -> datasets.Dataset:
    """The rows of one file, in memory; an empty field of a csv is an empty text, not a missing value.

    Args:
        path: a file whose name ends like one of `FORMATS`.
        split: a slice in the notation of `datasets`, e.g. "train[:500]"; a single file is one split, "train".

    Raises:
        ForeignFileError: if the file does not exist, cannot be read, or holds no row.
        UnknownNameError: if its name ends in something else.
    """
    if not files.is_file(path):
        raise ForeignFileError(path, "does not exist.", "Data paths are relative to the task file.")
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if ending not in FORMATS:
        raise UnknownNameError("reader for files ending in", ending, FORMATS)
    builder = FORMATS[ending]
    settings: dict[str, Any] = {"keep_default_na": False} if builder == "csv" else {}
    read = getattr(datasets.Dataset, f"from_{builder}")  # load_dataset would tell the hub that a file is being read
    with tempfile.TemporaryDirectory() as cache:  # no copy of the user's rows stays behind
        try:
            _check_bounds(path, builder)
            rows = _slice(read(str(path), cache_dir=cache, keep_in_memory=True, **settings), split or "train")
            rows.data.table.validate(full=True)  # bytes that are no UTF-8, which would raise when a row is looked at
        except ForeignFileError:
            raise
        except Exception as error:  # pandas, Arrow, gzip and datasets each raise types of their own
            cause = error.__cause__ or error
            if "corresponds to no data" in str(cause):
                raise ForeignFileError(path, "holds no row.", "Check the file.") from error
            raise ForeignFileError(path, f"cannot be read as {builder} ({cause}).", "Mend the file.") from error
    if not len(rows):
        raise ForeignFileError(path, f"holds no row{f' in {split}' if split else ''}.", "Check the file and the split.")
    return rows


def read_texts(path: Path, wanted: str) -> tuple[str, ...]:
    """The texts of a column of one file; errors as `read_rows` and `texts`."""
    return texts(read_rows(path), wanted, name=path.name)


def _check_bounds(path: Path, builder: str) -> None:
    """Refuses a text file of absurdly many columns, or one that unpacks to far more than text does."""
    if builder == "parquet":
        return
    most = _FREE_BYTES + _MOST_PACKED * path.stat().st_size
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        first = file.readline(_FREE_BYTES)
        columns = first.count(b",") if builder == "csv" else first.count(b'":') - first.count(b'\\":')
        if columns > MAX_COLUMNS:
            raise ForeignFileError(
                path, f"has {columns} columns in its first line.", f"At most {MAX_COLUMNS} are read."
            )
        size = len(first)
        while path.suffix == ".gz" and (block := file.read(2**20)):
            size += len(block)
            if size > most:
                raise ForeignFileError(path, f"unpacks to more than {most} bytes.", "Check where it comes from.")


def _slice(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return rows.select([row for part in parts for row in range(part.from_, part.to)])


def examples(
    rows: datasets.Dataset,
    *,
    name: str,
    text: str,
    label: str | None,
    label2id: dict[str, int],
    licence: str | None = None,
    split: str | None = None,
    hub_id: str | None = None,
    config: str | None = None,
) -> Examples:
    """Texts and class ids from the columns of a data set.

    Args:
        rows: at least one.
        name: of the data, for the record.
        text: column of the texts.
        label: column of the labels: class ids, or names in `label2id`; None: unlabelled.
        label2id: the model's classes.
        licence: of the data, for the record.
        split, hub_id, config: for the record.

    Raises:
        ConfigurationError: if there is no row, or a text is missing (the message names its row).
        UnknownNameError: for a column or a label's name that does not exist.
        MismatchError: for a label that is no class id, or is out of range.
    """
    if label is not None:
        column(rows, label, name=name)
    own = texts(rows, text, name=name)
    ids = None if label is None else label_ids(label_values(rows, label), label2id, name=name)
    data = facts.Data(
        name=name,
        rows=len(own),
        labelled=0 if ids is None else len(ids),
        fingerprint=facts.fingerprint(own if ids is None else zip(own, ids.tolist(), strict=True)),
        licence=licence,
        split=split,
        hub_id=hub_id,
        config=config,
    )
    return Examples(texts=own, labels=ids, data=data)


def column(rows: datasets.Dataset, wanted: str, *, name: str) -> list[Any]:
    """The values of a column of a data set of that name, at least one.

    Raises:
        ConfigurationError: if there is no row.
        UnknownNameError: for a column that does not exist.
    """
    if not len(rows):
        raise ConfigurationError(f"{name}: no rows to evaluate on.")
    if wanted not in rows.column_names:
        raise no_column(wanted, rows.column_names, name)
    return list(rows[wanted])


def texts(rows: datasets.Dataset, wanted: str, *, name: str) -> tuple[str, ...]:
    """The texts of a column; errors as `column`, and ConfigurationError for a missing one (naming its row)."""
    found = column(rows, wanted, name=name)
    for row, value in enumerate(found):
        if not isinstance(value, str):
            raise ConfigurationError(
                f"{name}: {wanted!r} of row {row} is {value!r}, not a text. Fill it in or drop the row."
            )
    return tuple(found)


def numbers(rows: datasets.Dataset, wanted: str, *, name: str) -> NDArray[np.float64]:
    """(row,) numbers of a column; errors as `column`, and MismatchError for what is none (naming its row)."""
    found = column(rows, wanted, name=name)
    for row, value in enumerate(found):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MismatchError(f"{name}: {wanted!r} of row {row} is {value!r}, no number. Mend or drop the row.")
    return np.array(found, np.float64)


def classes(rows: datasets.Dataset, label: str, *, name: str) -> dict[str, int]:
    """Names of the classes to ids, from the labels themselves: of a ClassLabel, of ids from 0, or sorted names.

    Raises:
        UnknownNameError: for a column that does not exist.
        MismatchError: for a label that is neither name nor id, or an id beyond the number of rows.
    """
    if label not in rows.column_names:
        raise no_column(label, rows.column_names, name)
    feature, values = rows.features[label], list(rows[label])
    if isinstance(feature, datasets.ClassLabel):
        return {each: index for index, each in enumerate(feature.names)}
    if all(isinstance(value, str) for value in values):
        return {each: index for index, each in enumerate(sorted(set(values)))}
    for row, value in enumerate(values):
        if not (isinstance(value, int | float) and float(value).is_integer() and value >= 0):
            raise MismatchError(f"{name}: the label of row {row} is {value!r}, no class id. Mend or drop the row.")
    if max(values) >= len(values):
        raise MismatchError(
            f"{name}: the class id {max(values)} among {len(values)} rows; ids count from 0 without gaps."
        )
    return {f"LABEL_{index}": index for index in range(int(max(values)) + 1)}


def label_ids(values: Sequence[Any], label2id: dict[str, int], *, name: str) -> NDArray[np.int64]:
    """(row,) class ids from class ids (also 1.0 and True) or from names.

    Raises:
        UnknownNameError, MismatchError: as `examples`.
    """
    ids = []
    for row, value in enumerate(values):
        if isinstance(value, str):
            if value not in label2id:
                raise UnknownNameError(f"label ({name}, row {row})", value, label2id)
            ids.append(label2id[value])
        elif isinstance(value, int | float) and float(value).is_integer() and 0 <= value < len(label2id):
            ids.append(int(value))
        else:
            raise MismatchError(
                f"{name}: the label of row {row} is {value!r}; the model has the classes 0 to {len(label2id) - 1} "
                f"({', '.join(label2id)}). Map the labels, or evaluate the model that was trained on them."
            )
    return np.array(ids, np.int64)


def label_values(rows: datasets.Dataset, label: str) -> list[Any]:
    """The labels; those of a ClassLabel column by name, because its order may differ from the model's."""
    values, feature = list(rows[label]), rows.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return [value if value is None or value < 0 else feature.int2str(value) for value in values]
    return values


def no_column(column: str, columns: Sequence[str], name: str) -> UnknownNameError:
    return UnknownNameError(f"column in {name} (which has {', '.join(columns)})", column, columns)
