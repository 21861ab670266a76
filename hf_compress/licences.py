"""Which licence a student may be passed on under: as its maker says, else as teacher and data allow.

The record keeps what is known of teacher and data. If all of it is known and permissive, the student has the teacher's
licence; if one alone is not permissive, that one; if two that are not differ, nobody but the maker can say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from . import files
from .errors import ConfigurationError, ForeignFileError
from .facts import Record, Training, load, save

CARD = "README.md"
AS_SAID = "as its maker says"
PERMISSIVE = frozenset(
    {
        "mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "wtfpl", "cc0-1.0",
        "pddl", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by", "afl-3.0", "ms-pl", "bsl-1.0", "ncsa",
        "artistic-2.0",
    }
)  # fmt: skip
"""Identifiers of the hub whose works may be passed on under another licence, as long as theirs is named."""


def identifier(text: object) -> str | None:
    """The hub's identifier for a licence's name: lower case, letters, digits, dots and hyphens; None if it is none."""
    name = text.strip().lower().replace(" ", "-") if isinstance(text, str) else ""
    return name if re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", name) and name != "unknown" else None


def of(folder: Path) -> tuple[str | None, str]:
    """The licence of a model folder and where it comes from, or None and why nobody knows it.

    What its maker has said comes first: in the record (`state`), in the card, in the config.

    Raises:
        ForeignFileError: if the record or the config are malformed.
    """
    record = load(folder)
    config = files.read_json(folder / "config.json") if files.is_file(folder / "config.json") else {}
    said = identifier(record.licence) or of_maker(folder / CARD) or identifier(config.get("license"))
    return (said, AS_SAID) if said else inherited(record)


def state(folder: Path, licence: str) -> None:
    """Writes down under which licence a model folder is passed on; errors as `valid`."""
    save(folder, load(folder).model_copy(update={"licence": valid(licence)}))


def valid(licence: str) -> str:
    """The identifier of a licence.

    Raises:
        ConfigurationError: for what can be none.
    """
    if (known := identifier(licence)) is None:
        raise ConfigurationError(
            f"{licence!r} is no identifier of a licence. The hub knows apache-2.0, mit, cc-by-4.0, other and more."
        )
    return known


def inherited(record: Record) -> tuple[str | None, str]:
    """The licence that follows from teacher and data, and a sentence why, or why none follows."""
    if record.training is None:
        return None, "how the model was trained is not recorded"
    found: dict[str, str | None] = {}
    for number, stage in enumerate((record.training, *record.training.before[::-1])):
        for who, licence in _sources(stage).items():
            another = found.get(who, licence) != licence  # of one name, in an earlier stage
            found[f"{who}, {number} stages before" if another else who] = licence
    return combined(found)


def combined(sources: Mapping[str, str | None]) -> tuple[str | None, str]:
    """The licence that follows from those of several works by name, the teacher's first; else why none follows."""
    known = {who: identifier(licence) for who, licence in sources.items()}
    if unknown := [who for who, licence in known.items() if licence is None]:
        return None, f"the licence of {' and of '.join(unknown)} is not known"
    said = ", ".join(f"{licence} of {who}" for who, licence in known.items())
    bound = {licence for licence in known.values() if licence not in PERMISSIVE}
    if len(bound) > 1:
        return None, f"{said} do not go together"
    return next(iter(bound or known.values())), said


def _sources(stage: Training) -> dict[str, str | None]:
    data = {f"the data {stage.data.name!r}": stage.data.licence}
    if stage.teacher is None:
        return data
    return {f"the teacher {stage.teacher.name}" if stage.teacher.name else "the teacher": stage.teacher.licence} | data


def of_source(source: object) -> str | None:
    """The licence that the card of a model folder or hub id names; None where there is none to read.

    A hub id is looked up in the cache, then on the hub; that neither answers is no error.
    """
    if not isinstance(source, str | Path) or not str(source):
        return None
    path = Path(source) / CARD
    if not Path(source).is_dir():
        try:
            cached = try_to_load_from_cache(str(source), CARD)
            path = Path(cached if isinstance(cached, str) else hf_hub_download(str(source), CARD, etag_timeout=5))
        except Exception:  # offline, private, no card, no hub id: each raises types of its own, and none matters here
            return None
    return of_card(path)


def of_card(path: Path) -> str | None:
    """The licence in a card's front matter; None without a card, or with one that cannot be read."""
    return identifier(front_matter(path).get("license"))


def of_maker(path: Path) -> str | None:
    """The licence in a card's front matter, unless the card itself says that it followed from teacher and data.

    A generated card that repeats what followed must not be taken for its maker's word when it is written again.
    """
    if (licence := of_card(path)) is None:
        return None
    text = files.read_text(path)
    repeated = f"- Licence: {licence} (" in text and f"- Licence: {licence} ({AS_SAID})" not in text
    return None if repeated else licence


def front_matter(path: Path) -> dict[str, Any]:
    """A card's metadata; empty without a card, or with one that cannot be read."""
    if not files.is_file(path):
        return {}
    try:
        found = REGEX_YAML_BLOCK.search(files.read_text(path))
        return {} if found is None else files.parse_yaml(path, found.group(2))
    except ForeignFileError:
        return {}
