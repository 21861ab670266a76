"""Queries with their passages: how texts become groups of rows, and how an objective reads the groups' scores.

A row of the data set is one query with n passages, the relevant one first. `GroupCollator` lays them one after another,
so that a batch of B queries is B · n rows for the models; the column `group` tells which query a row belongs to and
never reaches the student. `per_device_train_batch_size` therefore counts queries, as in the papers. All queries of a
batch have one n, and a query is never split: accumulation and processes then change nothing.

The Trainer's own `predict` cuts the last batch to as many rows as queries are left: score with `scores_of` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step

GROUP = "group"
"""Batch column, (row,): the place of the row's query in the batch; rows of one query are neighbours."""
SCORES = "teacher_scores"
"""Column of stored scores, (query, passage) float32 in a batch."""
TEACHER = "teacher_"
"""Before the names of the columns that the teacher alone reads."""
THEIRS = frozenset({f"{TEACHER}input_ids", f"{TEACHER}attention_mask"})


@dataclass(frozen=True, kw_only=True)
class Texts:
    """How a query and a passage become what a model reads."""

    query_length: int
    """Tokens kept of a query, its prefix included."""
    passage_length: int
    """Tokens kept of a passage, its prefix included."""
    query_prefix: str = ""
    passage_prefix: str = ""
    joined: bool = False
    """True: query, space, passage as one text, so that a tokenizer that begins each text with a token begins once;
    False: as the tokenizer's own pair of texts."""

    def __post_init__(self) -> None:
        if min(self.query_length, self.passage_length) < 1:
            raise ConfigurationError(
                f"Texts: lengths must be at least 1 token, got {self.query_length} and {self.passage_length}."
            )


def shortened(tokenizer: Any, texts: Sequence[str], length: int) -> list[str]:
    """Each text up to the end of its `length`-th token.

    Raises:
        ConfigurationError: for a tokenizer that does not tell where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in a text. Load it with use_fast=True."
        )
    settings = {"add_special_tokens": False, "truncation": True, "max_length": length, "padding": False}
    places = tokenizer(list(texts), return_offsets_mapping=True, **settings)["offset_mapping"]
    return [text[: own[-1][1]] if own else "" for text, own in zip(texts, places, strict=True)]


def ranking_groups(
    dataset: datasets.Dataset,
    *,
    tokenizer: Any,
    texts: Texts,
    teacher_tokenizer: Any = None,
    apart: bool = False,
) -> datasets.Dataset:
    """Queries with passages as token ids, for `GroupCollator`.

    Both models read the same texts: cut once, by the student's tokenizer.

    Args:
        dataset: columns `query` (text) and `passages` (texts, the relevant one first); `teacher_scores` (a number for
            each passage) is kept if it is there, everything else is left out.
        tokenizer: the student's, a fast one.
        texts: lengths and prefixes.
        teacher_tokenizer: makes the teacher's own columns; None: it reads the student's.
        apart: True: the student reads the query and each passage alone, the query first; False: query and passage
            together.

    Returns:
        what the tokenizer gives (input_ids, attention_mask, …), each a list of n rows, of n + 1 with `apart`; the
        teacher's of n.

    Raises:
        MismatchError: for a query without two passages, or with another number of scores.
        ConfigurationError: if the student reads texts alone and nothing tells the teacher's scores.
    """
    if apart and teacher_tokenizer is None and SCORES not in dataset.column_names:
        raise ConfigurationError(
            f"a student that reads query and passage apart needs the teacher's scores ({SCORES}) or a "
            "teacher_tokenizer, with which pairs are made for it."
        )

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        _check(row)
        (query,) = shortened(tokenizer, [texts.query_prefix + row["query"]], texts.query_length)
        prefixed = [texts.passage_prefix + passage for passage in row["passages"]]
        passages = shortened(tokenizer, prefixed, texts.passage_length)
        found = dict(_alone(tokenizer, [query, *passages]) if apart else _pairs(tokenizer, query, passages, texts))
        if teacher_tokenizer is not None:
            theirs = _pairs(teacher_tokenizer, query, passages, texts)
            found |= {TEACHER + name: value for name, value in theirs.items()}
        return found

    kept = [SCORES] if SCORES in dataset.column_names else []
    return dataset.map(encode, remove_columns=[name for name in dataset.column_names if name not in kept])


def _check(row: Mapping[str, Any]) -> None:
    count = len(row["passages"])
    if count < 2 or len(row.get(SCORES, row["passages"])) != count:
        raise MismatchError(
            f"query {row['query']!r} has {count} passages and {len(row.get(SCORES, row['passages']))} scores; at least "
            "two passages, the relevant one first, and a score for each were expected."
        )


def _alone(tokenizer: Any, texts: Sequence[str]) -> Mapping[str, Any]:
    return dict(tokenizer(list(texts), truncation=False, padding=False))


def _pairs(tokenizer: Any, query: str, passages: Sequence[str], texts: Texts) -> Mapping[str, Any]:
    if texts.joined:
        return _alone(tokenizer, [f"{query} {passage}" for passage in passages])
    return dict(tokenizer([query] * len(passages), list(passages), truncation=False, padding=False))


def draw_passages(row: Mapping[str, Any], generator: torch.Generator, *, passages: int) -> dict[str, Any]:
    """A group with its relevant passage and some of the others: the same ones for both models.

    For `hf_compress.data.Augmented`, which draws anew in each epoch: `Augmented(groups, partial(draw_passages,
    passages=8))`.

    Args:
        row: of `ranking_groups`.
        generator: of the draw.
        passages: how many stay, at least 2; a group with fewer stays as it is.

    Returns:
        the row with its columns shortened alike.
    """
    if passages < 2:
        raise ConfigurationError(f"draw_passages: passages must be at least 2, got {passages}.")
    count = min(len(value) for value in row.values())  # a query that is read alone stands before its passages
    if count <= passages:
        return dict(row)
    others = torch.randperm(count - 1, generator=generator)[: passages - 1] + 1
    places = [0, *others.tolist()]
    return {
        name: [*value[: len(value) - count], *(value[len(value) - count + place] for place in places)]
        for name, value in row.items()
    }


@dataclass(frozen=True)
class GroupCollator:
    """Lays the rows of all groups one after another and tells them by `group`."""

    tokenizer: Any
    """Pads what the student reads."""
    teacher_tokenizer: Any = None
    """Pads what the teacher alone reads; None: as the student's."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Inputs:
        own = [name for name in rows[0] if name != GROUP and not name.startswith(TEACHER)]
        theirs = [name for name in rows[0] if name.startswith(TEACHER) and name != SCORES]
        found = _padded(self.tokenizer, rows, {name: name for name in own})
        if theirs:
            names = {name: name.removeprefix(TEACHER) for name in theirs}
            padded = _padded(self.teacher_tokenizer or self.tokenizer, rows, names)
            found |= {TEACHER + name: value for name, value in padded.items()}
        counts = [len(row["input_ids"]) for row in rows]
        if SCORES in rows[0]:
            scores = [row[SCORES] for row in rows]
            _one_size([len(each) for each in scores])
            found[SCORES] = torch.tensor(scores, dtype=torch.float32)
        found[GROUP] = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        return found


def _padded(tokenizer: Any, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Inputs:
    flat = [
        {new: row[old][place] for old, new in names.items()}
        for row in rows
        for place in range(len(row[next(iter(names))]))
    ]
    return dict(pad_without_fast_tokenizer_warning(tokenizer, flat, return_tensors="pt"))


def _one_size(counts: Sequence[int]) -> int:
    if len(set(counts)) != 1:
        raise MismatchError(
            f"queries of one batch have {sorted(set(counts))} passages; one number was expected. Cut or draw them: "
            "Augmented(groups, partial(draw_passages, passages=…))."
        )
    return counts[0]


def grouped(rows: Tensor, group: Tensor) -> Tensor:
    """Rows by their query.

    Args:
        rows: (row, …).
        group: (row,) as `GROUP`.

    Returns:
        (query, row of the query, …)

    Raises:
        MismatchError: if queries have unequal numbers of rows, or there is another number of rows than of places.
    """
    if len(rows) != len(group):
        raise MismatchError(f"{len(rows)} rows cannot be told by {len(group)} places of queries; use GroupCollator.")
    _, counts = torch.unique_consecutive(group, return_counts=True)
    return rows.view(-1, _one_size(counts.tolist()), *rows.shape[1:])


def dot_scores(vectors: Tensor) -> Tensor:
    """(query, passage) products of a query's vector with those of its passages.

    Args:
        vectors: (query, 1 + passage, dim), the query's first; neither projected nor normalised.
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return (wide[:, :1] * wide[:, 1:]).sum(-1)


def first_token(states: Tensor, tokens: Tensor) -> Tensor:
    """(row, dim) states of each row's first real token, the [CLS] of an encoder.

    Args:
        states: (row, time, dim).
        tokens: (row, time) bool, the real ones.
    """
    return states[torch.arange(len(states), device=states.device), tokens.int().argmax(1)]


def mean_of_tokens(states: Tensor, tokens: Tensor) -> Tensor:
    """(row, dim) mean over each row's real tokens; arguments as of `first_token`."""
    kept = states.masked_fill(~tokens[..., None], 0.0)  # what padding holds may be NaN
    return kept.sum(1) / tokens.sum(1, keepdim=True).clamp(min=1)


def scores_of(model: Any, groups: Any, collator: GroupCollator, *, batch: int = 32) -> list[list[float]]:
    """What a model with one logit gives for each passage of each group; in eval mode, modes restored.

    Args:
        model: reads query and passage together.
        groups: rows of `ranking_groups`, in which the model's own columns are the student's.
        collator: pads them.
        batch: groups at a time.

    Returns:
        for each group its scores.
    """
    found: list[list[float]] = []
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in range(0, len(groups), batch):
            rows = [groups[place] for place in range(start, min(start + batch, len(groups)))]
            inputs = {k: v.to(device) for k, v in collator(rows).items() if k != GROUP and not k.startswith(TEACHER)}
            with torch.no_grad():
                flat = model(**inputs).logits.float().flatten().tolist()
            for row in rows:
                count = len(row["input_ids"])
                found.append(flat[:count])
                flat = flat[count:]
    finally:
        model.train(training)
    return found


class RankingObjective(Objective):
    """Reads the scores of both models by query, and averages over the queries of the window.

    Without a teacher the scores are read from the column `teacher_scores`. `Config` has `teacher_tokens`.
    """

    task_weight: ClassVar[float | None] = 0.0

    @property
    def apart(self) -> bool:
        """Whether the student reads query and passages alone."""
        return False

    def vectors(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(row, dim) of the texts that a student reads alone; arguments as of `first_token`."""
        return first_token(states, tokens)

    @property
    def _own_tokens(self) -> bool:
        return self.apart or bool(self.config.teacher_tokens == "own")

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        for who, sizes in (("student", None if self.apart else student), ("teacher", teacher)):
            if sizes is not None and sizes.kind != "none":
                raise MismatchError(
                    f"{self.name}: the {who} gives {sizes.vocab or 'no'} scores of classes; one logit for query and "
                    "passage was expected. Load it with AutoModelForSequenceClassification and num_labels=1."
                )
        stored = teacher is None
        columns = {GROUP} | ({SCORES} if stored else set())
        if self._own_tokens and teacher is not None:
            columns |= THEIRS
            if getattr(teacher.config, "type_vocab_size", 0) > 1:  # the Trainer would drop what is not asked for
                columns |= {f"{TEACHER}token_type_ids"}
        return Needs(
            student=frozenset({"hidden:-1" if self.apart else "logits"}),
            teacher=None if stored else frozenset({"logits"}),
            columns=frozenset(columns),
            same_tokens=not self._own_tokens,
            mean_over="examples",
        )

    def count(self, inputs: Inputs) -> int | None:
        group = inputs.get(GROUP)
        return None if group is None else len(torch.unique_consecutive(group))

    def overrides(self, method: str) -> bool:
        return super().overrides(method) and (method != "teacher_batch" or self._own_tokens)

    def teacher_batch(self, inputs: Inputs, step: Step) -> Inputs:
        if not self._own_tokens:
            return inputs
        return {name.removeprefix(TEACHER): inputs[name] for name in inputs if name.startswith(TEACHER)}

    def scores(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """(query, passage) of student and teacher, in float32 or wider."""
        group = signals.inputs[GROUP]
        if self.apart:
            own = dot_scores(grouped(self.vectors(signals.student["hidden:-1"], signals.tokens), group))
        else:
            own = grouped(self._one_logit(signals.student["logits"]), group)
        theirs = signals.inputs.get(SCORES)
        if (live := signals.teacher.get("logits")) is not None:
            theirs = self._one_logit(live)
            if len(theirs) % len(own):
                raise MismatchError(f"{self.name}: the teacher gives {len(theirs)} scores for {len(own)} queries.")
            theirs = theirs.view(len(own), -1)
        assert theirs is not None  # a required column without a teacher
        dtype = torch.promote_types(own.dtype, torch.float32)
        return own.to(dtype), theirs.to(dtype)

    def _one_logit(self, logits: Tensor) -> Tensor:
        if logits.numel() != len(logits):
            raise MismatchError(f"{self.name}: one logit a row was expected, got {tuple(logits.shape)}.")
        return logits.flatten()

    def over_rows(self, values: Tensor, signals: Signals) -> Tensor:
        """(query,) values as the (row,) that an objective returns: each row has its part of its query's."""
        rows = signals.examples // len(values)
        return values.repeat_interleave(rows) / rows
