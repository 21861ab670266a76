"""`python -m hf_compress_evaluation.encoders TABLE`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_compress.errors import HfCompressError

from . import RESULTS, keep, make


def main(
    name: Annotated[str, typer.Argument(help="sentiment, two-layers, sarcasm, entities, pages, embeddings; sizes.")],
    methods: Annotated[str | None, typer.Option(help="A list with commas, as hf-compress sweep takes it.")] = None,
    headlines: Annotated[Path | None, typer.Option(help="Rows of sarcasm: csv with text and label.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("encoders"),
    results: Annotated[Path, typer.Option(help="Where the table is kept.")] = RESULTS,
) -> None:
    """Compares methods on a real encoder: one table, kept as JSON."""
    try:
        found = make(
            name,
            output.absolute(),
            methods=methods.split(",") if methods else None,
            headlines=headlines,
            tell=_tell,
            progress=sys.stderr.isatty(),
        )
        keep(name, found, results)
    except HfCompressError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _tell(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    typer.run(main)
