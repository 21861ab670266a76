"""A card that somebody has edited: what is generated is replaced, what stands around it is kept.

Each generated part lies between two comments that name it. Texts of a record cannot make such a comment: they pass
`text.escape`, and code passes `text.fence`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_compress import files, licences
from hf_compress.errors import ForeignFileError

from .metadata import EMPTY, dumped
from .text import Safe

FILE = "README.md"
_KEY = re.compile(r"(?m)^[^\s#:\-\]}][^\n:]*:(?=\s|$)")
"""Where an entry of the metadata begins."""
_MARK = re.compile(r"<!-- hf-compress: (?P<end>end )?(?P<name>\w+) -->\n?")
_LINES = "\n"
"""All that is added or taken away around a maker's text: a blank before it may make it code."""
LISTS = ("tags", "datasets", "language", "metrics")
"""Metadata to which a maker may add."""
STATED = ("license", "license_name", "license_link", "pipeline_tag")
"""Metadata that a maker's word decides."""


def begin(name: str) -> Safe:
    """The comment before a generated part."""
    return Safe(f"<!-- hf-compress: {name} -->\n")


def end(name: str) -> Safe:
    """The comment after it."""
    return Safe(f"<!-- hf-compress: end {name} -->\n")


def is_generated(text: str) -> bool:
    """Whether a card holds parts of ours, or is all the Trainer's: what may be rendered again without being asked."""
    return bool(_blocks(text)) or licences.is_trainers(text)


@dataclass(frozen=True)
class _Block:
    """A generated part and where it stands, its two comments included."""

    name: str
    start: int
    end: int


def _blocks(text: str) -> list[_Block]:
    """The generated parts in order. No other mark stands within one: a part whose end was deleted is none, and takes
    nothing of what follows it along."""
    marks = list(_MARK.finditer(text))
    return [
        _Block(one["name"], one.start(), other.end())
        for one, other in pairwise(marks)
        if one["name"] == other["name"] and other["end"] and not one["end"] and one[0].endswith("\n")
    ]


def merge(existing: str | None, rendered: str) -> str:
    """The rendered card with what a maker has added to the existing one.

    Args:
        existing: the card in the folder; None: there is none. One without any generated part is kept whole, and the
            generated parts come after it.
        rendered: as the record gives it, all of it between comments.

    Raises:
        ForeignFileError: if the metadata of the existing one cannot be read.
    """
    if existing is None or (not _blocks(existing) and is_generated(existing)):
        return rendered
    data, new = _split(rendered)
    theirs, body = _split(existing.removeprefix("\ufeff"))
    blocks = {one.name: new[one.start : one.end] for one in _blocks(new)}
    if not (held := _blocks(body)):
        merged = f"{body.strip(_LINES)}\n\n{new.strip()}\n"
    else:
        placed = {one.name for one in held}
        ends = [0, *(one.end for one in held)]
        kept = [body[begun : one.start] for begun, one in zip(ends, held, strict=False)]
        parts = [text + blocks.get(one.name, "") for text, one in zip(kept, held, strict=True)]
        merged = "".join([*parts, body[ends[-1] :]])
        for name, before in _following(blocks):
            if name not in placed:
                merged = _inserted(merged, blocks[name], before)
    return f"---\n{_metadata(theirs, data, existing)}\n---\n\n{merged.strip(_LINES)}\n"


def _following(blocks: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """Each part with the one before it."""
    before = None
    for name in blocks:
        yield name, before
        before = name


def _inserted(body: str, block: str, before: str | None) -> str:
    place = 0
    for one in _blocks(body):
        if one.name == before:
            place = one.end
    return f"{body[:place].rstrip(_LINES)}\n\n{block}\n{body[place:].lstrip(_LINES)}".lstrip(_LINES)


def _split(text: str) -> tuple[str, str]:
    """Lines of the front matter, and body; what stands between two rules at the top and has no keys is a text."""
    match = REGEX_YAML_BLOCK.search(text)
    if match is None or not (_KEY.search(match[2]) or not match[2].strip()):
        return "", text
    return match[2], text[match.end() :]


def _read(lines: str) -> dict[str, Any]:
    """The metadata.

    Raises:
        ForeignFileError: if they cannot be read; who wrote them would lose them.
    """
    if not lines.strip() or not _KEY.search(lines):
        return {}
    return files.parse_yaml(Path(FILE), lines)


def _metadata(lines: str, rendered: str, card: str) -> str:
    """The maker's lines as they stand where they say what is to be said, ours for all else."""
    theirs, ours = _read(lines), _read(rendered)
    merged = theirs | ours
    for name in STATED:
        if name in theirs:
            merged[name] = theirs[name]
    if licences.is_filled_in(card, theirs.get("license")):
        merged["license"] = ours.get("license")
    merged["license"] = licences.identifier(merged.get("license")) or merged.get("license")  # the hub refuses capitals
    for name in LISTS:
        both = [*_listed(ours.get(name)), *_listed(theirs.get(name))]
        if both and name in ours:
            merged[name] = list(dict.fromkeys(both))
    kept = _around(lines, theirs, merged)
    expected = {name: value for name, value in merged.items() if value not in EMPTY}
    try:
        same = _read(kept) == expected
    except ForeignFileError:
        same = False
    return kept if same else dumped(merged)  # they stood in braces, or keys over several lines


def _around(lines: str, theirs: dict[str, Any], merged: dict[str, Any]) -> str:
    """The lines with the entries that differ, and those that are new, in place of them."""
    starts = [*(found.start() for found in _KEY.finditer(lines)), len(lines)]
    said, new = [lines[: starts[0]]], dict(merged)
    for name, (begun, ended) in zip(theirs, pairwise(starts), strict=False):
        value = new.pop(name)
        same = value == theirs[name] and value not in EMPTY
        said.append(lines[begun:ended] if same else dumped({name: value}) if value not in EMPTY else "")
    said.append(dumped(new) if new else "")
    return "\n".join(part.strip(_LINES) for part in said if part.strip())


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [one for one in value or () if isinstance(one, str)]
