"""Small language models with a real vocabulary, and rows for them, for benches beside others' trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_compress.objective import IGNORED

from . import Figures
from ._steps import texts
from .chunked import LENGTH, ROWS, STEPS, VOCABULARY, model

__all__ = ["LENGTH", "PROMPT", "ROWS", "STEPS", "VOCABULARY", "beside", "models", "prompts", "read", "tokenizer"]

PROMPT, ANSWER = 64, 32
"""Tokens of what the student answers, and of its answers."""


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


def beside(figures: Mapping[str, Figures], peers: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """Time and memory of ours to a peer's.

    Args:
        figures: of parts "ours, WAY" and "PEER, WAY".
        peers: the ways of each peer.
    """
    found = {}
    for peer, ways in peers.items():
        for way in ways:
            mine, other = figures[f"ours, {way}"], figures[f"{peer}, {way}"]
            of = f"{way}, to {peer}"
            found[f"time, {of}"] = mine["seconds"] / other["seconds"]
            found[f"memory, {of}"] = mine["megabytes"] / other["megabytes"]
    return found
