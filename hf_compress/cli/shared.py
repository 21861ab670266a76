"""What all commands share: their arguments, and how they speak."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Folder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="A model folder, as save_pretrained writes it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def quiet() -> None:
    """Leaves the bars of training, measuring, fetching and pushing, where somebody watches.

    Those of loading a file, and advice to developers, are noise.
    """
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import enable_progress_bars

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # those of the hub too
    transformers.utils.logging.set_verbosity_error()
    if sys.stderr.isatty():
        enable_progress_bars()


def tell(line: str) -> None:
    """A line for whoever watches, beside the command's result."""
    print(line, file=sys.stderr, flush=True)


def console() -> Any:
    """The terminal; tables that go to a file or a pipe are not squeezed into 80 columns."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=150)


def print_table(
    columns: tuple[str, ...], rows: list[tuple[str, ...]], below: Sequence[str] = (), *, whole: str | None = None
) -> None:
    """Rows under their columns, lines below them; `whole`: a column whose cells are neither broken nor cut."""
    from rich.table import Table

    table = Table(caption="\n".join(below) or None, caption_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=column == whole)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def holds_a_model(folder: Path) -> None:
    """Raises ForeignFileError for a folder without a config."""
    if not (folder / "config.json").is_file():
        from hf_compress.errors import ForeignFileError

        raise ForeignFileError(folder, "holds no config.json.", "Give the folder that save_pretrained wrote.")


def show(folder: Path, as_json: bool) -> None:
    """A folder's record, as a table or JSON."""
    from hf_compress_evaluation import table

    from hf_compress import facts

    record = facts.load(folder)
    if as_json:
        print(table.as_json(record))
    else:
        screen = console()
        screen.print(table.table(record, width=screen.width))
