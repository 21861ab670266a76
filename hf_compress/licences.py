"""Which licence a student may be passed on under: as its maker says, else as teacher and data allow.

The record keeps what is known of teacher and data. If all of it is known and permissive, the student has the teacher's
licence; if one alone is not permissive, that one; if two that are not differ, nobody but the maker can say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from . import files
from .errors import ConfigurationError, ForeignFileError
from .facts import Record, Training, load, save

CARD = "README.md"
MAKER = "as its maker says"
_FOLLOWED = re.compile(rf"(?m)^- Licence: (\S+) \((?!{MAKER}\))")
"""What a card of ours says of a licence that it was given without its maker."""
_TRAINERS = "generated automatically according to the information the Trainer had access to"
_OPEN, _OPEN_PARTS = "More information needed", 3
"""What the Trainer's own card says of itself, and at least so often where nobody has written anything yet."""
PERMISSIVE = frozenset(
    {
        "mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "wtfpl", "cc0-1.0",
        "pddl", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by", "afl-3.0", "ms-pl", "bsl-1.0", "ncsa",
        "artistic-2.0",
    }
)  # fmt: skip
"""Identifiers of the hub whose works may be passed on under another licence, as long as theirs is named."""
PATIENCE = 5.0
"""Seconds that the hub is waited for, where nothing but a licence depends on its answer."""
OTHER = "other"
"""The hub's word for a licence that it has none for: two of them need not be the same."""


def identifier(text: object) -> str | None:
    """The hub's identifier for a licence's name: lower case, letters, digits, dots and hyphens; None if it is none."""
    name = text.strip().lower().replace(" ", "-") if isinstance(text, str) else ""
    return name if re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", name) and name != "unknown" else None


def of(folder: Path) -> tuple[str | None, str]:
    """The licence of a model folder and where it comes from, or None and why nobody knows it.

    What its maker has said comes first: in the card, in the record (`state` writes both), in the config.

    Raises:
        ForeignFileError: if the record or the config are malformed.
    """
    record = load(folder)
    config = files.read_json(folder / "config.json") if files.is_file(folder / "config.json") else {}
    written = _of_maker(folder / CARD)
    if written is not None and identifier(written) is None:
        return None, f"its card names {str(written)[:80]!r}, which is no one identifier"
    said = identifier(written) or identifier(record.licence) or identifier(config.get("license"))
    return (said, MAKER) if said else inherited(record)


def said_in(path: Path) -> str | None:
    """The licence that the maker has written into a card of his own."""
    return identifier(_of_maker(path))


def _of_maker(path: Path) -> object:
    """What the maker has written into a card as its licence; None for what was filled in without being asked."""
    written = _single(front_matter(path).get("license"))
    if written is None:
        return None
    return None if is_filled_in(files.read_text(path), written) else written


def is_trainers(card: str) -> bool:
    """Whether a card is the Trainer's, as it came; it names the licence of the model that training began with."""
    return _TRAINERS in card and card.count(_OPEN) >= _OPEN_PARTS


def is_filled_in(card: str, licence: object) -> bool:
    """Whether a card was given its licence by the Trainer or by us, without its maker's word."""
    return is_trainers(card) or identifier(_single(licence)) in _FOLLOWED.findall(card)


def state(folder: Path, licence: str) -> None:
    """Writes down under which licence a model folder is passed on, in the record and in the card if there is one.

    Raises:
        ConfigurationError: as `valid`.
        ForeignFileError: if the record or the card's metadata cannot be read.
    """
    stated = valid(licence)
    if files.is_file(folder / CARD):
        text = files.read_text(folder / CARD)
        if (changed := _with_licence(folder / CARD, text, stated)) != text:
            files.write_text(folder / CARD, changed)
    save(folder, load(folder).model_copy(update={"licence": stated}))


def _with_licence(path: Path, text: str, licence: str) -> str:
    """The card with that licence; all else stays to the letter."""
    found = REGEX_YAML_BLOCK.match(text.removeprefix("\ufeff"))
    if found is None:
        return f"---\nlicense: {licence}\n---\n\n{text}"
    if identifier(files.parse_yaml(path, found[2]).get("license")) == licence:
        return text
    kept = _ENTRIES.sub("", f"{found[2]}\n").strip("\n")
    changed = "\n".join(part for part in (f"license: {licence}", kept) if part)
    if identifier(files.parse_yaml(path, changed).get("license")) != licence:
        raise ForeignFileError(path, "names its licence in a way that is not understood.", "Write it in a line.")
    return text.replace(found[2], changed, 1)


_ENTRIES = re.compile(r"(?m)^license(?:_name|_link)?:.*\n(?:[ \t-].*\n)*")
"""The lines of a front matter that say a licence, with those of their lists."""


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
    if OTHER in bound:
        return None, f"{said}: what the licence {OTHER!r} allows is not known"
    if without := next((licence for licence in bound if licence is not None and "-nd-" in licence), None):
        return None, f"{said}: {without} allows no derived works"
    return next(iter(bound or known.values())), said


def _sources(stage: Training) -> dict[str, str | None]:
    """The licences of what a stage was made of: models, and data."""
    models = {"the teacher": stage.teacher} | {f"the {role} model": model for role, model in stage.frozen.items()}
    found = {
        f"{who} {model.name}" if model.name else who: model.licence
        for who, model in models.items()
        if model is not None
    }
    if stage.student.name is not None or stage.student.licence is not None:
        found[f"the student's start {stage.student.name or ''}".strip()] = stage.student.licence
    return found | {f"the data {stage.data.name!r}": stage.data.licence}


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
            path = Path(cached) if isinstance(cached, str) else _fetched(str(source))
        except Exception:  # offline, private, no card, no hub id: each raises types of its own, and none matters here
            return None
    return of_card(path)


def _fetched(repo_id: str) -> Path:
    """The card of a hub id. Asked once whether it is there: a download tries six times, for half a minute."""
    found = get_hf_file_metadata(hf_hub_url(repo_id, CARD), timeout=PATIENCE)
    if found.size is not None and found.size > files.MAX_TEXT_BYTES:
        raise ForeignFileError(Path(CARD), f"has {found.size} bytes.", "A card is a text.")
    return Path(hf_hub_download(repo_id, CARD, etag_timeout=PATIENCE))


def of_card(path: Path) -> str | None:
    """The licence in a card's front matter; None without a card, or with one that cannot be read."""
    return identifier(_single(front_matter(path).get("license")))


def _single(written: object) -> object:
    return written[0] if isinstance(written, list) and len(written) == 1 else written


def front_matter(path: Path) -> dict[str, Any]:
    """A card's metadata; empty without a card, or with one that cannot be read."""
    if not files.is_file(path):
        return {}
    try:
        found = REGEX_YAML_BLOCK.search(files.read_text(path).removeprefix("\ufeff"))
        return {} if found is None else files.parse_yaml(path, found.group(2))
    except ForeignFileError:
        return {}
