"""Spans of a text by its tokens: those of a chunker, or words. All tokens of one word lie in one span."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import datasets
import torch
from tokenizers.models import WordPiece
from torch import Tensor

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED

SPANS = "span_ids"
"""Column: (batch, time) number of the span of each token, -1 for none."""
Chunker: TypeAlias = Callable[[str], Iterable[tuple[int, int]]]
"""From a text to (start, end) characters of its spans, which do not overlap; a parser's noun phrases, for instance."""

INSIDE, BEGINS, ALONE = 0, 1, 2
"""What a token does: goes on with a word, begins one, or stands outside of any."""
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
_MARKS = ("Ġ", "▁", "Ċ")
"""With which byte-level and SentencePiece tokenizers write a space or a line break before a word."""


def words(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word: letters and digits with inner hyphens and apostrophes."""
    return [found.span() for found in _WORD.finditer(text)]


def boundaries(tokenizer: Any, vocab: int | None = None) -> Tensor:
    """What each token of a vocabulary does, for spans in texts that the student writes itself.

    Args:
        tokenizer: byte-level, SentencePiece, WordPiece, or of single characters.
        vocab: classes of the model's logits, where it has more than the tokenizer has tokens.

    Returns:
        (vocab,) int8: 0 goes on with a word, 1 begins one, 2 stands outside of words, as spaces, punctuation and
        special tokens do.
    """
    count = len(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(count)))
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    pieces = isinstance(model, WordPiece)  # "##" alone tells nothing: headings make it a token of others
    special = set(tokenizer.all_special_ids)
    found = torch.full((max(count, vocab or 0),), ALONE, dtype=torch.int8)
    for index, name in enumerate(names):
        text = tokenizer.decode([index]) if isinstance(name, str) and index not in special else ""
        if not any(letter.isalnum() or letter == "\N{REPLACEMENT CHARACTER}" for letter in text):
            continue  # of a character in several tokens the replacement is all that one of them shows
        begins = not name.startswith("##") if pieces else name.startswith(_MARKS)
        found[index] = BEGINS if begins else INSIDE
    return found


def with_spans(
    dataset: Any,
    *,
    tokenizer: Any,
    max_length: int,
    column: str = "text",
    prompt: str | None = None,
    chunker: Chunker = words,
) -> datasets.Dataset:
    """Texts as tokens with the number of the span that each lies in, padded to one length for the default collator.

    Args:
        dataset: a `datasets.Dataset` with texts in `column`.
        tokenizer: a fast one, which tells where tokens stand in the text; with a padding token.
        max_length: tokens kept of a text.
        column: name of the texts.
        prompt: name of a column with what each text begins with and is not to be learned; None: all is learned.
        chunker: finds the spans.

    Returns:
        input_ids, attention_mask, labels and span_ids. A token that begins inside the prompt has no label; one lies in
        the span that its first character that is no space lies in, a special token in none.

    Raises:
        ConfigurationError: for a tokenizer that is not fast, or has no padding token.
        MismatchError: for a text that does not begin with its prompt.
    """
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise ConfigurationError(
            "semantic_revision: with_spans needs a fast tokenizer with a padding token: set "
            "tokenizer.pad_token = tokenizer.eos_token, or load it with use_fast=True."
        )

    def one(row: Mapping[str, Any]) -> dict[str, Any]:
        text, before = row[column], row[prompt] if prompt else ""
        if not text.startswith(before):
            raise MismatchError(f"semantic_revision: the text {text[:40]!r}… does not begin with {before[:40]!r}….")
        read = tokenizer(
            text, truncation=True, max_length=max_length, padding="max_length", return_offsets_mapping=True
        )
        spans = list(chunker(text))
        numbers, labels, begun = [], [], not before
        for index, real, (start, end) in zip(
            read["input_ids"], read["attention_mask"], read["offset_mapping"], strict=True
        ):
            place = start + len(text[start:end]) - len(text[start:end].lstrip())
            number = next((n for n, (a, b) in enumerate(spans) if a <= place < b), -1)
            numbers.append(number if place < end else -1)
            begun = begun or (end > start and start >= len(before))
            labels.append(index if real and begun else IGNORED)
        return {
            "input_ids": read["input_ids"],
            "attention_mask": read["attention_mask"],
            "labels": labels,
            SPANS: numbers,
        }

    return dataset.map(one, remove_columns=dataset.column_names)
