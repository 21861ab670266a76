"""`python -m hf_compress_evaluation.gallery NAME`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_compress.errors import HfCompressError, UnknownNameError

from . import COMMANDS, RESULTS, keep, make


def main(
    name: Annotated[str, typer.Argument(help="entities, embeddings; sentiment with --keep.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the run; without it gallery/NAME.")] = None,
    kept: Annotated[
        Path | None, typer.Option("--keep", help="Make nothing: keep card and record of this student's folder.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Where card and record are kept.")] = RESULTS,
) -> None:
    """Makes one student of the gallery, measures it, and keeps its card and record."""
    try:
        if name not in COMMANDS or (name == "sentiment" and kept is None):
            raise UnknownNameError("student of the gallery", name, [key for key in COMMANDS if key != "sentiment"])
        target = output or Path("gallery") / name
        keep(name, kept or make(name, target, tell=_tell, progress=sys.stderr.isatty()), results)
    except HfCompressError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _tell(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    typer.run(main)
