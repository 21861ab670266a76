"""A card that somebody has edited: what is generated is replaced, what stands around it is kept.

Each generated part lies between two comments that name it. Texts of a record cannot make such a comment: they pass
`text.escape`, and code passes `text.fence`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_compress import files
from hf_compress.errors import ForeignFileError

from .metadata import to_yaml
from .text import Safe

_BLOCK = re.compile(r"<!-- hf-compress: (?P<name>\w+) -->\n.*?<!-- hf-compress: end (?P=name) -->\n?", re.DOTALL)
_OTHERS = ("generated from Trainer", "generated automatically according to the information the Trainer had access to")
"""What the Trainer's own card says of itself: nobody has written that one."""
LISTS = ("tags", "datasets", "language", "metrics")
"""Metadata to which a maker may add."""
STATED = ("license_name", "license_link", "pipeline_tag")
"""Metadata that a maker's word decides."""
DECIDED = ("license",)
"""Metadata for which the existing card has been read before this one was rendered; `licences.of` says which counts."""


def begin(name: str) -> Safe:
    """The comment before a generated part."""
    return Safe(f"<!-- hf-compress: {name} -->\n")


def end(name: str) -> Safe:
    """The comment after it."""
    return Safe(f"<!-- hf-compress: end {name} -->\n")


def is_generated(text: str) -> bool:
    """Whether a card holds parts of ours, or is all the Trainer's: what may be rendered again without being asked."""
    return bool(_BLOCK.search(text)) or any(mark in text for mark in _OTHERS)


def merge(existing: str | None, rendered: str) -> str:
    """The rendered card with what a maker has added to the existing one.

    Args:
        existing: the card in the folder; None: there is none. One without any generated part is kept whole, and the
            generated parts come after it.
        rendered: as the record gives it, all of it between comments.
    """
    if existing is None or (not _BLOCK.search(existing) and is_generated(existing)):
        return rendered
    data, new = _split(rendered)
    theirs, body = _split(existing)
    blocks = {match["name"]: match[0] for match in _BLOCK.finditer(new)}
    if not _BLOCK.search(body):
        merged = f"{body.strip()}\n\n{new.strip()}\n"
    else:
        placed = {match["name"] for match in _BLOCK.finditer(body)}
        merged = _BLOCK.sub(lambda match: blocks.get(match["name"], ""), body)
        for name, before in _following(blocks):
            if name not in placed:
                merged = _inserted(merged, blocks[name], before)
    return f"---\n{_metadata(theirs, data)}\n---\n\n{re.sub(chr(10) + '{3,}', chr(10) * 2, merged).strip()}\n"


def _following(blocks: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """Each part with the one before it."""
    before = None
    for name in blocks:
        yield name, before
        before = name


def _inserted(body: str, block: str, before: str | None) -> str:
    place = 0
    for match in _BLOCK.finditer(body):
        if match["name"] == before:
            place = match.end()
    return f"{body[:place].rstrip()}\n\n{block}\n{body[place:].lstrip()}".lstrip()


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body; a front matter that cannot be read counts as none, and is left behind."""
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}, text
    try:
        return files.parse_yaml(Path("README.md"), match.group(2)), text[match.end() :]
    except ForeignFileError:
        return {}, text[match.end() :]


def _metadata(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    merged = {name: value for name, value in theirs.items() if name not in DECIDED} | ours
    for name in STATED:
        if name in theirs:
            merged[name] = theirs[name]
    for name in LISTS:
        both = [*_listed(ours.get(name)), *_listed(theirs.get(name))]
        if both:
            merged[name] = list(dict.fromkeys(both))
    return to_yaml(ModelCardData(ignore_metadata_errors=True, **merged))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [one for one in value or () if isinstance(one, str)]
