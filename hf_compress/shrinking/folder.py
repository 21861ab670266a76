"""From a teacher's folder or hub id to a student's folder, with its tokenizer and a table of what was given up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from hf_compress import files, foreign
from hf_compress import objective as o
from hf_compress.bars import shown
from hf_compress.errors import ConfigurationError
from hf_compress.fitting import encode
from hf_compress.teachers.model import load_teacher

from .depth import Keep
from .report import Compared, compared
from .scores import By
from .student import Change, cut
from .vocabulary import cut_vocabulary
from .width import Width

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a student is to be."""

    layers: int | Sequence[int] | None = None
    decoder_layers: int | Sequence[int] | None = None
    keep: Keep = "even"
    width: Width = field(default_factory=Width)
    by: By | None = None
    """None: activations on the rows where there are some, else norms."""
    vocabulary: int | None = None
    """Most tokens that are kept; None: all that the texts hold."""
    min_count: int = 1
    max_length: int = 128
    """Tokens kept of a row."""
    batch_size: int = 32


def shrink_folder(
    teacher: str,
    output: Path,
    request: Request,
    *,
    texts: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    bar: bool = False,
) -> tuple[tuple[Change, ...], Compared | None]:
    """Writes a student, its tokenizer or processor beside it, whole or not at all.

    Args:
        teacher: folder or hub id.
        output: a folder that is not there, or empty.
        request: what is cut.
        texts: what the tokens of a smaller vocabulary are counted on; None: the vocabulary stays.
        rows: texts for activations, and on which the outputs are compared with the teacher's.
        bar: whether progress is shown.

    Returns:
        What each size gave up, and the outputs beside the teacher's where there are rows.

    Raises:
        ConfigurationError: as `shrink` and `shrink_vocabulary`; if the folder holds something.
        ForeignFileError: if the teacher is malformed.
    """
    _check(output, request, texts, rows)
    whole: Any = load_teacher(teacher)
    tokenizer = (
        foreign.tokenizer(teacher) if texts or rows or foreign.fetched(teacher, "tokenizer_config.json") else None
    )
    if rows is not None:
        _check_reads_texts(whole)
    model, smaller, ids, changes = whole, tokenizer, None, []
    if texts is not None:
        found = cut_vocabulary(whole, tokenizer, texts, size=request.vocabulary, min_count=request.min_count)
        model, smaller, ids, changes = found.student, found.tokenizer, torch.tensor(found.ids), [found.change]
    data = None
    if rows is not None and request.width and request.by != "norms":
        data = (batch for batch, _ in _batches(rows, smaller, smaller, request, bar, "activations"))
    made = cut(
        model,
        layers=request.layers,
        decoder_layers=request.decoder_layers,
        width=request.width,
        keep=request.keep,
        data=data,
    )
    if texts is not None:
        first, rest = model.config.compression_start, made.student.config.compression_start
        start = first if rest == "all of the teacher" else f"{first.removesuffix(' of the teacher')}, {rest}"
        made.student.config.compression_start = start
    outputs = None
    if rows is not None and _comparable(whole, made.student):
        pairs = _batches(
            rows, tokenizer, smaller, request, bar, "comparison", alike=o.kind_of(whole) in ("tokens", "causal")
        )
        first_pair = next(pairs, None)  # none where no text keeps all of its tokens
        outputs = None if first_pair is None else compared(whole, made.student, chain([first_pair], pairs), ids=ids)
    with files.atomic_folder(output) as part:
        made.student.save_pretrained(part)
        if smaller is not None:
            smaller.save_pretrained(part)
        for name in _PROCESSORS:
            if path := foreign.fetched(teacher, name):
                shutil.copyfile(path, part / name)
        files.readable(part)
    return (*changes, *made.changes), outputs


def _check(output: Path, request: Request, texts: Sequence[str] | None, rows: Sequence[str] | None) -> None:
    asked = request.layers is not None or request.decoder_layers is not None or request.width or texts is not None
    if not asked:
        raise ConfigurationError(
            "nothing is asked to be smaller. Give layers, hidden, heads, intermediate or texts for a vocabulary."
        )
    if request.by not in (None, *get_args(By)):
        raise ConfigurationError(f"units are chosen by {' or '.join(get_args(By))}, got {request.by!r}.")
    if request.by == "activations" and (rows is None or not request.width):
        raise ConfigurationError(
            "activations choose hidden dimensions, heads and neurons, and are measured on rows. Give such a size and "
            "data, or choose by norms."
        )
    if request.vocabulary is not None and texts is None:
        raise ConfigurationError("tokens of a smaller vocabulary are counted on texts. Give vocabulary texts too.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} holds something already. Choose another folder, or remove it.")


def _check_reads_texts(model: Any) -> None:
    if model.main_input_name != "input_ids" or getattr(model.config, "is_encoder_decoder", False):
        raise ConfigurationError(
            f"rows of text are no inputs of a {type(model).__name__}: it reads something else, or an answer too. Leave "
            "data out, or call shrink(teacher, data=batches)."
        )


def _comparable(teacher: Any, student: Any) -> bool:
    """Whether the outputs have one width; without a head they are as wide as the model."""
    return o.kind_of(teacher) != "none" or student.config.hidden_size == teacher.config.hidden_size


def _batches(
    rows: Sequence[str], tokenizer: Any, smaller: Any, request: Request, bar: bool, name: str, *, alike: bool = False
) -> Iterator[tuple[Inputs, Inputs]]:
    """Inputs of teacher and student; with `alike` only of rows that both cut into the same pieces."""
    theirs = encode(tokenizer, rows, None, request.max_length).remove_columns("labels")
    ours = theirs
    if smaller is not tokenizer:
        ours = encode(smaller, rows, None, request.max_length).remove_columns("labels")
    chosen = [
        place
        for place in range(len(rows))
        if not alike or tokenizer is smaller or _pieces(tokenizer, theirs[place]) == _pieces(smaller, ours[place])
    ]
    size = request.batch_size if tokenizer.pad_token is not None else 1
    starts = range(0, len(chosen), size)
    with shown(name, len(starts), bar=bar) as step:
        for start in starts:
            some = chosen[start : start + size]
            yield (
                _collated(tokenizer, [theirs[place] for place in some]),
                _collated(smaller, [ours[place] for place in some]),
            )
            step()


def _pieces(tokenizer: Any, row: Mapping[str, Any]) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(row["input_ids"])
    return found


def _collated(tokenizer: Any, rows: list[dict[str, Any]]) -> Inputs:
    if tokenizer.pad_token is None:
        return {name: torch.tensor([value]) for name, value in rows[0].items()}
    return dict(DataCollatorWithPadding(tokenizer)(rows))
