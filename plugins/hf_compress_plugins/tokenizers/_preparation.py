"""Texts as two models read them, with the chunks that they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import datasets

from hf_compress import chat
from hf_compress.errors import MismatchError
from hf_compress.objective import IGNORED
from hf_compress_plugins.tokenizers._alignment import Roles, align, byte_forms, roles_of


def two_tokenizations(
    dataset: Any,
    *,
    tokenizer: Any,
    teacher_tokenizer: Any,
    max_length: int,
    teacher_max_length: int | None = None,
    column: str = "text",
    prompt: str | None = None,
    roles: Roles | str | None = None,
    teacher_roles: Roles | str | None = None,
) -> datasets.Dataset:
    """Texts with both models' tokens and the chunks that they share, padded to one length for the default collator.

    Args:
        dataset: a `datasets.Dataset` with texts in `column`, or with lists of messages, which each side writes by its
            own chat template; of those only the last message is learned.
        tokenizer: the student's, byte-level or SentencePiece.
        teacher_tokenizer: the teacher's.
        max_length: tokens kept of a text for the student.
        teacher_max_length: for the teacher; None: the same.
        column: name of the texts.
        prompt: name of a column with what each text begins with and is not to be learned; None: all is learned.
        roles: the student's special tokens by role, or the name of their family; None: beginning and end of a text.
        teacher_roles: the teacher's.

    Returns:
        input_ids, attention_mask, labels, teacher_input_ids, teacher_attention_mask and chunks. A token that begins
        inside the prompt has no label, and no chunk holds one, of either side.
    """
    lengths = (teacher_max_length or max_length, max_length)
    sides = [_Side(teacher_tokenizer, teacher_roles, lengths[0]), _Side(tokenizer, roles, lengths[1])]

    def both(row: Mapping[str, Any]) -> dict[str, Any]:
        theirs, own = (side.read(row[column], row[prompt] if prompt else "") for side in sides)
        chunks = [
            list(chunk)
            for chunk in align(theirs.forms, own.forms, sides[0].roles, sides[1].roles)
            if chunk[0] >= theirs.prompt and chunk[2] >= own.prompt
        ]
        return {
            "input_ids": own.ids,
            "attention_mask": own.mask,
            "labels": [
                token if real and place >= own.prompt else IGNORED
                for place, (token, real) in enumerate(zip(own.ids, own.mask, strict=True))
            ],
            "teacher_input_ids": theirs.ids,
            "teacher_attention_mask": theirs.mask,
            "chunks": chunks + [[-1] * 4] * (min(lengths) - len(chunks)),
        }

    return dataset.map(both, remove_columns=dataset.column_names)


@dataclass(frozen=True)
class _Read:
    """A text as one side reads it, padded."""

    ids: list[int]
    mask: list[int]
    forms: list[str]
    """Of the real tokens."""
    prompt: int
    """Tokens that begin inside the prompt."""


class _Side:
    """One model's tokenizer."""

    def __init__(self, tokenizer: Any, roles: Roles | str | None, length: int) -> None:
        self.tokenizer, self.length, self.roles = tokenizer, length, roles_of(roles, tokenizer)
        self.forms = byte_forms(tokenizer)

    def read(self, text: Any, prompt: str) -> _Read:
        """A text, or messages, of which all but the last are the prompt."""
        written, ids = text, None
        if not isinstance(text, str):
            written, prompt = (
                chat.render(self.tokenizer, messages, add_generation_prompt=opened)
                for messages, opened in ((text, False), (text[:-1], True))
            )
            ids = self._plain(written)  # the template has written the beginning itself
        ids = self.tokenizer(written)["input_ids"] if ids is None else ids
        hidden = self._inside(written, prompt, ids) if prompt else 0
        ids = ids[: self.length]
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.tokenizer.eos_token_id or 0
        rest = self.length - len(ids)
        forms = [self.forms[index] for index in ids]
        return _Read(ids + [pad] * rest, [1] * len(ids) + [0] * rest, forms, hidden)

    def _plain(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _inside(self, text: str, prompt: str, ids: list[int]) -> int:
        """How many tokens begin inside the prompt, by bytes: the token across its end is another one in each side."""
        if not text.startswith(prompt):
            raise MismatchError(f"alm: the text {text[:40]!r}… does not begin with its prompt {prompt[:40]!r}….")
        plain = self._plain(text)
        added = next((k for k in range(len(ids)) if ids[k : k + len(plain)] == plain), 0)
        end = sum(len(self.forms[index]) for index in self._plain(prompt))
        starts = accumulate((len(self.forms[index]) for index in plain), initial=0)
        return added + sum(start < end for start in starts)
