"""How a text of unknown origin becomes part of a card: here and nowhere else.

Everything that a template prints passes `escape`, except what is `Safe`: front matter from a YAML writer, and code
blocks from `fence`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LONGEST = 500
"""Characters of one foreign text in the body of a card."""
_DIRECTION = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: "\\" + c for c in "\\`*_[]|~$#"})


class Safe(str):
    """Text that a template may print as it is."""


def plain(value: object, longest: int = LONGEST) -> str:
    """The value in one line: runs of white space and control characters become a blank, direction marks are dropped.

    A right-to-left override would let a name reorder the text around it.
    """
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in str(value))
    text = "".join(c for c in text if unicodedata.category(c) != "Cs" and c not in _DIRECTION)
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def escape(value: object) -> str:
    """Any value as literal text inside a line or a table cell of Markdown: no markup, no HTML, no link."""
    if isinstance(value, Safe):
        return value
    text = re.sub(
        r"^(\d{0,9})([-+.)])(?=\s|$)", r"\1\\\2", plain(value).translate(_ENTITIES)
    )  # no list at a line's start
    # a bare address would be made a link, so its colon is written as an entity
    return re.sub(r"(?i)\b(https?|ftp|www)([:.])", _no_link, text)


def _no_link(found: re.Match[str]) -> str:
    return f"{found[1]}&#{ord(found[2])};"


def fence(code: str, language: str = "") -> Safe:
    """A code block that its content cannot leave.

    Content lines of nothing but dashes are indented, so that no reader takes one for the end of the front matter, and
    angle brackets before a letter, which some sanitizers take for HTML even here, are set apart by a blank.
    """
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    code = "".join(c for c in code if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")).strip(
        "\n"
    )
    code = re.sub(r"<(?=[A-Za-z/!?])", "< ", re.sub(r"(?m)^(?=\s*---)", " ", code))
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    return Safe(f"{marks}{language}\n{code}\n{marks}")


def table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> Safe:
    """A Markdown table of escaped cells."""
    head, *body = [f"| {' | '.join(map(escape, cells))} |" for cells in (columns, *rows)]
    return Safe("\n".join([head, re.sub(r"[^|]+", "---", head.replace("\\|", "")), *body]))


def literal(value: str) -> str:
    """A Python string literal without a line break, a backtick or an angle bracket in it."""
    text = repr(plain(value))
    text = text if '"' in text else f'"{text[1:-1]}"'
    return text.replace("<", "\\x3c").replace("`", "\\x60")
