"""The Python code of a card as a reader finds it: each block, what it must be run with, and the files that it names."""

from __future__ import annotations

import ast
import re
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markdown_it import MarkdownIt
from PIL import Image

WHEEL, OPTIMUM, BARE = "hf-compress[cpu]", "optimum", "bare"
HOMES = {"optimum": OPTIMUM, "hf_compress": WHEEL, "transformers": WHEEL, "onnxruntime": BARE}
"""What a block is run in, by what it imports; the first that it imports decides."""


@dataclass(frozen=True)
class Block:
    """One piece of code that a reader copies."""

    code: str
    shows: str
    """The package that it is about, a key of `HOMES`."""
    packages: tuple[str, ...] = ()
    """What the card says to install for it, of a block for `BARE`."""

    @property
    def home(self) -> str:
        """`WHEEL`, `OPTIMUM` or `BARE`."""
        return HOMES[self.shows]


def python(card: str) -> list[tuple[str, str]]:
    """Each Python block of a card in order, and the text between it and the block before."""
    found, said = [], ""
    for token in MarkdownIt("commonmark").parse(card):
        if token.type == "fence":
            if token.info.split()[:1] == ["python"]:
                found.append((token.content, said))
            said = ""
        elif token.type == "inline":
            said = f"{said}\n{token.content}"
    return found


def blocks(card: str) -> list[Block]:
    """The Python blocks of a card.

    Raises:
        ValueError: for a block of which nothing says where it runs, or with which packages.
    """
    return [_block(code, said) for code, said in python(card)]


def _block(code: str, said: str) -> Block:
    names = set(imported(code))
    shows = next((name for name in HOMES if name in names), None)
    if shows is None:
        raise ValueError(f"no environment is for a block that imports {', '.join(sorted(names)) or 'nothing'}:\n{code}")
    if HOMES[shows] != BARE:
        return Block(code, shows)
    lines = re.findall(r"`pip install ([^`]+)`", said)
    if len(lines) != 1:
        raise ValueError(f"one line of pip was expected before a block for a bare environment, not {lines}:\n{code}")
    packages = tuple(lines[0].split())
    if odd := [each for each in packages if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", each)]:
        raise ValueError(f"{odd[0]!r} is no name of a package, in `pip install {lines[0]}`")
    return Block(code, shows, packages)


def imported(code: str) -> Iterator[str]:
    """The packages that code imports, anywhere in it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def write_inputs(code: str, folder: Path) -> list[str]:
    """Writes the images and sounds that the code names into its working folder, and returns their names."""
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    found = sorted({text for text in texts if isinstance(text, str) and re.fullmatch(r"\w+\.(png|wav)", text)})
    for name in found:
        _WRITERS[name.rpartition(".")[2]](folder / name)
    return found


def _image(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)


def _sound(path: Path) -> None:
    """Half a second at 16 kHz."""
    samples = (8000 * np.sin(np.arange(8000) ** 1.3)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())


_WRITERS: dict[str, Callable[[Path], None]] = {"png": _image, "wav": _sound}
