"""Episodes: demonstrations of a task, then a query and its answer, in the two layouts in which they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from torch import Tensor

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Inputs

JOINT, END = "\n", "\n\n\n"
"""Between an input and its output, and behind an output; our choice."""
DEMONSTRATED = 0.8
"""Part of a text that stands for demonstrations (section on pre-training)."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Token ids."""

    demonstrations: Sequence[int]
    query: Sequence[int]
    answer: Sequence[int]


def episodes(
    dataset: Any,
    *,
    tokenizer: Any,
    seed: int = 0,
    demonstrations: int = 16,
    max_length: int = 1024,
    demonstration_length: int = 900,
) -> datasets.Dataset:
    """Episodes of a data set of texts, or of tasks, padded to the longest of each column for the default collator.

    Args:
        dataset: a `datasets.Dataset` with a column `text`: the first 80 % of a text's tokens stand for demonstrations,
            the rest is the query, and nothing has labels; or with `task`, `input` and `output`: each row is a query
            behind others of its task.
        tokenizer: of the language model.
        seed: of the draws.
        demonstrations: other rows of the task that are drawn for a query, fewer where it has no more.
        max_length: tokens of demonstrations, query and answer; the teacher's.
        demonstration_length: tokens of the demonstrations.

    Returns:
        input_ids, attention_mask, labels (of tasks), demonstration_ids, demonstration_mask, teacher_input_ids,
        teacher_attention_mask and teacher_demonstrations, 1 where the teacher's token is one of a demonstration.

    Raises:
        MismatchError: for other columns, a task of one row, or a query and answer that leave no room.
    """
    if not 0 < demonstration_length < max_length or demonstrations < 1:
        raise ConfigurationError(
            "mend: needs 0 < demonstration_length < max_length and demonstrations above 0, got "
            f"{demonstration_length}, {max_length} and {demonstrations}."
        )
    limits = (max_length, demonstration_length)
    if {"task", "input", "output"} <= set(dataset.column_names):
        found = list(_of_tasks(dataset, tokenizer, seed, demonstrations, limits))
    elif "text" in dataset.column_names:
        found = [_of_text(text, tokenizer, limits) for text in dataset["text"]]
    else:
        raise MismatchError(
            f"mend: a data set needs a column text, or task, input and output; it has {dataset.column_names}."
        )
    columns = padded(found, pad=_pad(tokenizer), labels="task" in dataset.column_names)
    return datasets.Dataset.from_dict({name: value.tolist() for name, value in columns.items()})


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _of_text(text: str, tokenizer: Any, limits: tuple[int, int]) -> Episode:
    ids = _ids(tokenizer, text)[: limits[0]]
    split = int(len(ids) * DEMONSTRATED)
    return Episode(demonstrations=ids[:split][-limits[1] :], query=ids[split:], answer=())


def _of_tasks(dataset: Any, tokenizer: Any, seed: int, count: int, limits: tuple[int, int]) -> Iterable[Episode]:
    rows = [tuple(row[name] for name in ("task", "input", "output")) for row in dataset]
    members: dict[Any, list[int]] = {}
    for place, (task, _, _) in enumerate(rows):
        members.setdefault(task, []).append(place)
    for place, (task, given, output) in enumerate(rows):
        others = [other for other in members[task] if other != place]
        if not others:
            raise MismatchError(f"mend: task {task!r} has one row and no demonstration of it. Leave it out.")
        draw = torch.Generator().manual_seed(seed * 1_000_003 + place)
        drawn = [others[index] for index in torch.randperm(len(others), generator=draw)[:count].tolist()]
        yield episode([rows[other][1:] for other in drawn], given, output, tokenizer=tokenizer, limits=limits)


def episode(
    shown: Sequence[tuple[str, str]], given: str, output: str, *, tokenizer: Any, limits: tuple[int, int] = (1024, 900)
) -> Episode:
    """One episode; demonstrations that do not fit behind those before them are left out as a whole.

    Args:
        shown: inputs and outputs of the demonstrations.
        given: the query's input.
        output: the answer.
        tokenizer: of the language model.
        limits: tokens of the whole and of the demonstrations.

    Raises:
        MismatchError: for a query and answer that leave no room, or if no demonstration fits.
    """
    query, answer = _ids(tokenizer, given + JOINT), _ids(tokenizer, output)
    room = min(limits[1], limits[0] - len(query) - len(answer))
    if room < 1:
        raise MismatchError(
            f"mend: the query {given[:40]!r}… and its answer have {len(query) + len(answer)} tokens and leave no room "
            f"for demonstrations in {limits[0]}. Shorten it, or raise max_length."
        )
    kept: list[int] = []
    for pair in shown:
        ids = [*_ids(tokenizer, pair[0] + JOINT), *_ids(tokenizer, pair[1]), *_ids(tokenizer, END)]
        if len(kept) + len(ids) <= room:
            kept += ids
    if shown and not kept:
        raise MismatchError(
            f"mend: none of {len(shown)} demonstrations fits into {room} tokens. Shorten them, or raise max_length and "
            "demonstration_length."
        )
    return Episode(demonstrations=kept, query=query, answer=answer)


def padded(found: Sequence[Episode], *, pad: int, labels: bool = True) -> Inputs:
    """(episode, longest) columns of episodes in both layouts, padded on the right.

    Args:
        found: episodes.
        pad: id of padding.
        labels: whether the answers are labelled.
    """
    own = [[*one.query, *one.answer] for one in found]
    theirs = [[*one.demonstrations, *ids] for one, ids in zip(found, own, strict=True)]
    columns: dict[str, tuple[list[list[int]], int]] = {
        "input_ids": (own, pad),
        "attention_mask": ([[1] * len(ids) for ids in own], 0),
        "demonstration_ids": ([list(one.demonstrations) for one in found], pad),
        "demonstration_mask": ([[1] * len(one.demonstrations) for one in found], 0),
        "teacher_input_ids": (theirs, pad),
        "teacher_attention_mask": ([[1] * len(ids) for ids in theirs], 0),
        "teacher_demonstrations": ([[1] * len(one.demonstrations) for one in found], 0),
    }
    if labels:
        columns["labels"] = ([[IGNORED] * len(one.query) + list(one.answer) for one in found], IGNORED)
    widths = {name: max(map(len, values)) for name, (values, _) in columns.items()}
    widths["teacher_demonstrations"] = widths["teacher_input_ids"]
    return {
        name: torch.tensor([ids + [fill] * (max(widths[name], 1) - len(ids)) for ids in values])
        for name, (values, fill) in columns.items()
    }


def candidates(
    shown: Sequence[tuple[str, str]], given: str, answers: Sequence[str], *, tokenizer: Any, **settings: Any
) -> Mapping[str, Tensor]:
    """A row for each candidate answer of one query, for `answer_scores`: all behind the same demonstrations, those that
    fit with the longest answer. What the student reads.

    Args:
        shown: inputs and outputs of the demonstrations.
        given: the query's input.
        answers: candidates.
        tokenizer: of the language model.
        **settings: of `episode`.
    """
    own = [_ids(tokenizer, answer) for answer in answers]
    longest = answers[max(range(len(own)), key=lambda place: len(own[place]))]
    one = episode(shown, given, longest, tokenizer=tokenizer, **settings)
    found = [replace(one, answer=ids) for ids in own]
    columns = padded(found, pad=_pad(tokenizer))
    return {name: value for name, value in columns.items() if not name.startswith("teacher_")}
