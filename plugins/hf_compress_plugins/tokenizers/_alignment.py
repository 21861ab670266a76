"""Tokens of two tokenizers as strings of bytes, and the pieces of text that both can spell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_compress.errors import ConfigurationError, UnknownNameError

Roles = Mapping[str, Sequence[str]]
"""Role of special tokens (bos, start_header, end_header, eot, …) to the tokens that play it, in the byte-level form."""
Chunk = tuple[int, int, int, int]
"""Start and end among the teacher's tokens, start and end among the student's; ends excluded."""

_NAMES: dict[str, Sequence[str]] = {"system": ("system",), "user": ("user",), "assistant": ("assistant",)}
FAMILIES: Mapping[str, Roles] = {
    "gpt2": {"eos": ("<|endoftext|>",)},
    "llama2": {"bos": ("<s>",), "eos": ("</s>",)},
    "llama3": {
        "bos": ("<|begin_of_text|>",),
        "start_header": ("<|start_header_id|>",),
        "end_header": ("<|end_header_id|>", "ĊĊ"),
        "eot": ("<|eot_id|>",),
        "eos": ("<|end_of_text|>",),
        **_NAMES,
    },
    "qwen2": {
        "start_header": ("<|im_start|>",),
        "end_header": ("Ċ",),
        "eot": ("<|im_end|>", "Ċ"),
        "eos": ("<|endoftext|>",),
        **_NAMES,
    },
    "gemma2": {
        "bos": ("<bos>",),
        "start_header": ("<start_of_turn>",),
        "end_header": ("Ċ",),
        "eot": ("<end_of_turn>", "Ċ"),
        "eos": ("<eos>",),
        "user": ("user",),
        "assistant": ("model",),
    },
}
"""Roles by family of models; Qwen 2.5, Qwen 3 and other users of ChatML are "qwen2", Gemma 1 to 3 are "gemma2"."""


def roles_of(roles: Roles | str | None, tokenizer: Any) -> Roles:
    """Roles as given, those of a family by its name, or the tokenizer's own beginning and end of a text.

    Raises:
        UnknownNameError: for a family that is not in `FAMILIES`.
    """
    if isinstance(roles, str):
        if roles not in FAMILIES:
            raise UnknownNameError("family of special tokens", roles, FAMILIES)
        return FAMILIES[roles]
    if roles is not None:
        return roles
    found = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    return {role: (token,) for role, token in found.items() if token is not None}


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens; added ones that are ordinary text are none."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def sentence_pieces(tokenizer: Any) -> bool:
    """Whether a tokenizer writes spaces as ▁ (SentencePiece), not each byte as a letter (GPT-2).

    Raises:
        ConfigurationError: for tokens that are neither.
    """
    kind = type(tokenizer.backend_tokenizer.model).__name__
    plain = tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if kind in ("BPE", "Unigram") and any("▁" in token for token in plain):
        return True
    letters = set(bytes_to_unicode().values())
    odd = next((token for token in sorted(plain) if not letters.issuperset(token)), None)
    if kind != "BPE" or odd is not None:
        problem = f"token {odd!r} has letters that stand for no byte" if odd else f"its model is {kind}"
        raise ConfigurationError(
            f"{type(tokenizer).__name__} is neither a byte-level nor a SentencePiece tokenizer: {problem}. Its tokens "
            "cannot be told as strings of bytes."
        )
    return False


def byte_forms(tokenizer: Any) -> dict[int, str]:
    """Every token by id, one letter a byte in GPT-2's alphabet; special ones by their names.

    Raises:
        ConfigurationError: for a tokenizer that is neither byte-level nor SentencePiece.
    """
    pieces, special, added = sentence_pieces(tokenizer), special_ids(tokenizer), tokenizer.added_tokens_decoder
    letters: dict[int, str] = bytes_to_unicode()
    return {
        index: token if index in special or not (pieces or index in added) else _form(token, letters)
        for token, index in tokenizer.get_vocab().items()
    }


def _form(token: str, letters: dict[int, str]) -> str:
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
        return letters[int(byte[1], 16)]
    return "".join(letters[byte] for byte in token.replace("▁", " ").encode())


def space_mask(tokenizer: Any, vocab: int) -> Tensor:
    """(vocab,) bool: tokens that begin with a space, a tab or a newline, and special or added ones.

    Args:
        tokenizer: byte-level or SentencePiece.
        vocab: size of the model's logits.
    """
    special = special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    mask = torch.zeros(vocab, dtype=torch.bool)
    for index, form in byte_forms(tokenizer).items():
        if index < vocab:
            mask[index] = index in special or form[:1] in ("Ġ", "Ċ", "ĉ")
    return mask


def align(
    teacher: Sequence[str],
    student: Sequence[str],
    teacher_roles: Roles | None = None,
    student_roles: Roles | None = None,
) -> list[Chunk]:
    """Chunks of two tokenizations of one text.

    Args:
        teacher: its tokens, in the byte-level alphabet.
        student: its tokens.
        teacher_roles: its special tokens by role.
        student_roles: of the student.

    Returns:
        (teacher start, end, student start, end) of each chunk, ends excluded. Tokens of one role on both sides are a
        chunk; a special token whose role only one side has, or writes, joins the next chunk. What is left open at the
        end is no chunk.
    """
    own, other = dict(teacher_roles or {}), dict(student_roles or {})
    left, right = _equal_spaces(list(teacher), list(student), own, other)
    found = list[Chunk]()
    i = j = start_i = start_j = long_i = long_j = 0
    spelled = ["", ""]
    while i < len(left) and j < len(right):
        if long_i == long_j:
            theirs, ours = _standing(left, i, own), _standing(right, j, other)
            if both := [role for role in theirs if role in ours]:
                i, j = i + len(own[both[0]]), j + len(other[both[0]])
                found.append((start_i, i, start_j, j))
                start_i, start_j = i, j
                continue
            if passed := _passed(ours, other, own, left[i:]):
                j += passed
                continue
            if passed := _passed(theirs, own, other, right[j:]):
                i += passed
                continue
        ahead_i, ahead_j = long_i + len(left[i]), long_j + len(right[j])
        if ahead_i <= ahead_j:
            spelled[0], i, long_i = spelled[0] + left[i], i + 1, ahead_i
        if ahead_j <= ahead_i:
            spelled[1], j, long_j = spelled[1] + right[j], j + 1, ahead_j
        if ahead_i == ahead_j:
            found += [(start_i, i, start_j, j)] * (spelled[0] == spelled[1])
            start_i, start_j, spelled = i, j, ["", ""]
    return found


def _standing(tokens: Sequence[str], place: int, roles: Roles) -> list[str]:
    """The roles whose tokens begin at that place."""
    return [role for role, wanted in roles.items() if list(tokens[place : place + len(wanted)]) == list(wanted)]


def _passed(standing: Sequence[str], roles: Roles, others: Roles, ahead: Sequence[str]) -> int:
    """Tokens of a role that the other side lacks, or has and does not write ahead; 0 for none. Names and newlines are
    text that it can spell, and so is a special token's name that stands in the text."""

    def lacking(role: str) -> bool:
        written = any(role in _standing(ahead, place, others) for place in range(len(ahead)))
        return role not in others or not (written or "".join(ahead).startswith("".join(roles[role])))

    alone = (roles[role] for role in standing if lacking(role))
    return next((len(wanted) for wanted in alone if not wanted[0].isalpha()), 0)


def _equal_spaces(
    teacher: list[str], student: list[str], teacher_roles: Roles, student_roles: Roles
) -> tuple[list[str], list[str]]:
    """Leading spaces of the first plain token made as many on both sides."""
    sides = []
    for tokens, roles in ((teacher, teacher_roles), (student, student_roles)):
        special = {token for wanted in roles.values() for token in wanted}
        sides.append((tokens, next((k for k, token in enumerate(tokens) if token not in special), None)))
    (left, first), (right, second) = sides
    if first is not None and second is not None:
        spaces = [len(tokens[k]) - len(tokens[k].lstrip("Ġ")) for tokens, k in ((left, first), (right, second))]
        left[first] = "Ġ" * max(spaces[1] - spaces[0], 0) + left[first]
        right[second] = "Ġ" * max(spaces[0] - spaces[1], 0) + right[second]
    return left, right
