"""A page's words as text that keeps their places, and marks that carry it through a tokenizer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from tokenizers import AddedToken

from hf_compress.errors import ConfigurationError

Box = Sequence[float]
"""x0, y0, x1, y1 of a word, in any one unit; y grows downwards."""

LINE = "<layout:line>"
"""A line break."""
SPACES = {2**power: f"<layout:{2**power}>" for power in range(6, -1, -1)}
"""So many spaces, largest first: a run is written with as few as there can be."""
MARKS = (LINE, *SPACES.values())
_RUN = re.compile(r"[ \n]+")
_MARK = re.compile(rf" *({'|'.join(map(re.escape, MARKS))}) *")
PROBE = "\n".join(["   ab", "", *(f"ab{' ' * count}ab" for count in (1, 2, 3, 4, 7, 16, 100)), ""])
"""What a tokenizer must give back for the layout to survive."""


def character_width(words: Sequence[str], boxes: Sequence[Box]) -> float:
    """c, the median over words of their width by their characters."""
    return float(median((x1 - x0) / len(word) for word, (x0, _, x1, _) in zip(words, boxes, strict=True)))


def lines_of(boxes: Sequence[Box]) -> list[list[int]]:
    """Places of the words of each line, lines from the top, words from the left.

    Words are taken by their vertical middle. One joins the line whose first word it overlaps most, if the overlap is at
    least half of the smaller height; else it begins a line.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(boxes)), key=lambda place: (boxes[place][1] + boxes[place][3], boxes[place][0])):
        overlaps = [_overlap(boxes[place], boxes[line[0]]) for line in found]
        best = max(overlaps, default=0.0)
        if best >= 0.5:
            found[overlaps.index(best)].append(place)
        else:
            found.append([place])
    return [sorted(line, key=lambda place: boxes[place][0]) for line in found]


def _overlap(one: Box, other: Box) -> float:
    """Common height by the smaller height, at most 1."""
    common = min(one[3], other[3]) - max(one[1], other[1])
    return common / min(one[3] - one[1], other[3] - other[1])


def spatial_text(words: Sequence[str], boxes: Sequence[Box]) -> str:
    """The page as text: spaces and line breaks stand for the places of its words.

    A word begins in column round(x0 / c), c the width of a character, or one space behind the word before it. Between
    lines that are further apart than 1.5 median line heights stands one empty line.

    Args:
        words: as recognised, in any order; empty ones are left out.
        boxes: of each.

    Returns:
        lines without spaces at their ends; empty for a page without words.

    Raises:
        ConfigurationError: if there is not one box a word, or a box has no width, height or finite place.

    >>> print(spatial_text(["B", "A", "below"], [(50, 0, 60, 10), (0, 0, 10, 10), (0, 12, 50, 22)]))
    A    B
    below
    """
    if len(words) != len(boxes):
        raise ConfigurationError(f"document_curriculum: {len(words)} words have {len(boxes)} boxes; each needs one.")
    for word, box in zip(words, boxes, strict=True):
        if len(box) != 4 or not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
            raise ConfigurationError(
                f"document_curriculum: the box of {word!r} is {tuple(box)}; it must be x0, y0, x1, y1 with x0 < x1 and "
                "y0 < y1. Leave the word out, or mend its box."
            )
    pairs = [(text, box) for word, box in zip(words, boxes, strict=True) if (text := " ".join(word.split()))]
    if not pairs:
        return ""
    texts, places = [text for text, _ in pairs], [box for _, box in pairs]
    width, lines = character_width(texts, places), lines_of(places)
    ends = [(min(places[i][1] for i in line), max(places[i][3] for i in line)) for line in lines]
    height = median(bottom - top for top, bottom in ends)
    written: list[str] = []
    for number, line in enumerate(lines):
        if number and ends[number][0] - ends[number - 1][1] > 1.5 * height:
            written.append("")
        written.append(_written(line, texts, places, width))
    return "\n".join(written)


def _written(line: Sequence[int], words: Sequence[str], boxes: Sequence[Box], width: float) -> str:
    text = ""
    for place in line:
        column = math.floor(boxes[place][0] / width + 0.5)
        text += " " * max(column - len(text), int(text != "")) + words[place]
    return text


def encode_layout(text: str) -> str:
    """The text with a mark for each line break and for each power of two of a run's spaces; single spaces stay.

    A space that stands beside a line break, or at an end of the text, is a mark too: tokenizers drop those.

    >>> encode_layout("a b      c")
    'a b<layout:4><layout:2>c'
    """

    def marks(run: re.Match[str]) -> str:
        inside = run.start() > 0 and run.end() < len(text)
        if run.group() == " " and inside:
            return " "
        return "".join(LINE if part == "\n" else _spaces(len(part)) for part in re.findall(r"\n| +", run.group()))

    return _RUN.sub(marks, text)


def _spaces(count: int) -> str:
    found = ""
    for size, mark in SPACES.items():
        times, count = divmod(count, size)
        found += times * mark
    return found


def decode_layout(text: str) -> str:
    """What `encode_layout` was given; spaces that a tokenizer has put beside a mark are dropped.

    >>> decode_layout(encode_layout("a b\\n    c")) == "a b\\n    c"
    True
    """
    sizes = {mark: " " * size for size, mark in SPACES.items()}
    return _MARK.sub(lambda found: sizes.get(found.group(1), "\n"), text)


def add_layout_marks(tokenizer: Any, model: Any = None) -> int:
    """Makes each mark one token, and its row of the model's embeddings if these are too few.

    T5's SentencePiece drops line breaks and runs of spaces; its embeddings have 28 rows to spare.

    Args:
        tokenizer: changed in place; saved with it, the marks are there again.
        model: changed in place; None: its embeddings are large enough, or the caller's.

    Returns:
        how many tokens were added.
    """
    marks = [AddedToken(mark, normalized=False, special=False) for mark in MARKS]
    added = int(tokenizer.add_tokens(marks))
    if model is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return added


def has_marks(tokenizer: Any) -> bool:
    """Whether the tokenizer knows all marks."""
    return set(MARKS) <= set(tokenizer.get_vocab())


def for_tokenizer(text: str, tokenizer: Any) -> str:
    """The text as this tokenizer is to be given it: with marks if it has them."""
    return encode_layout(text) if has_marks(tokenizer) else text


def keeps_layout(tokenizer: Any) -> bool:
    """Whether spaces and line breaks of a text survive, as they stand or as marks; letters do not matter."""
    ids = tokenizer(for_tokenizer(PROBE, tokenizer), add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    read = decode_layout(text) if has_marks(tokenizer) else text
    return re.sub(r"[^ \n]+", "x", read) == re.sub(r"[^ \n]+", "x", PROBE)


def check_layout(tokenizer: Any) -> None:
    """Refuses a tokenizer that would destroy the layout.

    Raises:
        ConfigurationError: with what makes it keep it.
    """
    if not keeps_layout(tokenizer):
        had = "although it has the marks" if has_marks(tokenizer) else "and has no marks for them"
        raise ConfigurationError(
            f"document_curriculum: {type(tokenizer).__name__} drops line breaks or runs of spaces {had}, so the page's "
            "layout would be lost. Call add_layout_marks(tokenizer, model) first, or pass layout='reading'."
        )
