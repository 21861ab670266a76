"""What a sweep compares, as its command names it: `kd,kd:temperature=4,kd+features:layers=[1,2],default`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .errors import ConfigurationError, ForeignFileError
from .recipe import Use, validated

DEFAULT, ALONE = "default", "alone"
"""The default of the recipe's task; and the student's start, trained on the labels without a teacher."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is compared with others: one or several objectives, the default of the task, or no teacher at all."""

    name: str
    uses: tuple[Use, ...] = ()
    """Empty: the default, or alone."""

    @property
    def taught(self) -> bool:
        return self.name != ALONE


def read(text: str) -> tuple[Entry, ...]:
    """The entries of a list with commas.

    `+` joins methods, `:setting=value` sets one of the last method's settings, or its weight; values are YAML.

    Raises:
        ConfigurationError: for an entry that cannot be read, or is there twice.
    """
    names = [each.strip() for each in re.split(r",(?![^\[]*\])", text)]
    if len(set(names)) < len(names) or "" in names:
        raise ConfigurationError(f"--methods {text}: an entry is empty or there twice. Name each once, e.g. a,b,a+b.")
    return tuple(Entry(name=name, uses=() if name in (DEFAULT, ALONE) else _uses(name)) for name in names)


def _uses(name: str) -> tuple[Use, ...]:
    return tuple(_use(each) for each in re.split(r"\+(?=[A-Za-z_])", name))


def _use(text: str) -> Use:
    method, *settings = text.split(":")
    values: dict[str, Any] = {"name": method}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals) or key in values:
            raise ConfigurationError(
                f"--methods: {text!r} cannot be read at {setting!r}. Write :setting=value, each once."
            )
        try:
            values[key] = files.parse_yaml(Path("--methods"), f"value: {value}")["value"]
        except ForeignFileError as error:
            raise ConfigurationError(
                f"--methods: the value in {setting[:80]!r} is no YAML. Write a number or text."
            ) from error
    return validated(Use, values, f"--methods, {text}")
