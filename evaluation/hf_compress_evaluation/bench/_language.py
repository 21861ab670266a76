"""Small language models with a real vocabulary, and rows for them, for benches beside others' trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_compress.objective import IGNORED

from . import Figures
from ._gradients import after_accumulation
from ._machine import Machine
from ._steps import texts, train
from .chunked import LENGTH, ROWS, STEPS, VOCABULARY, model

PROMPT, ANSWER = 64, 32
"""Tokens of what the student answers, and of its answers."""
VALUES, DATA, PARTS = "values", "on the data", "micro-batches"
"""The first is a part; the others are ways in which a side goes, a part each: "ours, on the data"."""
OURS = "ours"
Side = Callable[[Any, str], Mapping[str, Any]]
"""From a teacher and a way to what `train` gets."""
DIFFERENCE = "relative difference"


def models() -> tuple[Any, Any]:
    """A student and its teacher, whose answers have no end."""
    made = model(64, 1), model(128, 2)
    for one in made:
        one.config.eos_token_id = one.generation_config.eos_token_id = None
        one.config.pad_token_id = one.generation_config.pad_token_id = 0
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """Names of ids, "5 17 3", which some trainers ask for; no text has its end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {"[PAD]": 0, "[END]": 1, **{str(place): place for place in range(2, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(ids, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", eos_token="[END]", padding_side="left", truncation_side="left"
    )


def prompts() -> list[dict[str, Any]]:
    """Rows of which the first tokens are the prompt; each has an answer as long as the student's."""
    rows = texts(ROWS, PROMPT + ANSWER, VOCABULARY)
    return [row | {"labels": [IGNORED] * PROMPT + row["input_ids"][PROMPT:]} for row in rows]


def read(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows of one length, with what TRL's trainer reads of prompts."""
    found = {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    found["prompts"] = found["input_ids"][:, :PROMPT]
    found["prompt_attention_mask"] = torch.ones_like(found["prompts"])
    return found


def run(
    part: str,
    on: Machine,
    *,
    sides: Mapping[str, Side],
    values: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    rows: Callable[[str], list[dict[str, Any]]] | None = None,
    collator: Callable[[Any], Any] | None = None,
) -> Figures:
    """Seconds and megabytes of steps, the largest difference of values, or that of gradients.

    Args:
        part: `VALUES`, or a side and its way.
        on: what it runs on.
        sides: by name.
        values: pairs of one divergence, ours and the other's.
        rows: of a way; None: rows all of whose tokens are scored.
        collator: of steps; None: that of `train`.
    """
    if part == VALUES:
        torch.manual_seed(0)
        return {DIFFERENCE: max(float((own - theirs).abs() / theirs) for own, theirs in values())}
    side, way = part.split(", ")
    student, teacher = models()
    settings = sides[side](teacher, way)
    if way == PARTS:
        return {DIFFERENCE: after_accumulation(student, settings, vocabulary=VOCABULARY, on=on)}
    given = texts(ROWS, LENGTH, VOCABULARY) if rows is None else rows(way)
    return train(student, given, steps=STEPS, batch=ROWS, on=on, collator=collator, **settings)


def ratios(figures: Mapping[str, Figures], what: str, peers: Mapping[str, tuple[str, ...]]) -> Figures:
    """The difference of values, time and memory of ours to a peer's in each of its ways, and gradients of both sides.

    Args:
        figures: of the parts.
        what: the divergence.
        peers: the ways of each peer; the first one's gradients are looked at.
    """
    found = {f"{what}, {DIFFERENCE}": figures[VALUES][DIFFERENCE]}
    for peer, ways in peers.items():
        for way in ways:
            mine, other = figures[f"{OURS}, {way}"], figures[f"{peer}, {way}"]
            found[f"time, {way}, to {peer}"] = mine["seconds"] / other["seconds"]
            found[f"memory, {way}, to {peer}"] = mine["megabytes"] / other["megabytes"]
    for side in (OURS, next(iter(peers))):
        found[f"gradient of 4 micro-batches against 1, {side}"] = figures[f"{side}, {PARTS}"][DIFFERENCE]
    return found


def bars(what: str, peer: str) -> dict[str, tuple[float, float]]:
    """Of those ratios, on the data."""
    return {
        f"{what}, {DIFFERENCE}": (1e-6, 1e-6),
        f"time, {DATA}, to {peer}": (0.6, 0.35),
        f"memory, {DATA}, to {peer}": (0.35, 0.20),
    }
