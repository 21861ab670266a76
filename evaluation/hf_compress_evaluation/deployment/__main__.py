"""`python -m hf_compress_evaluation.deployment [NAME …]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_compress.errors import HfCompressError, UnknownNameError

from . import CASES, RESULTS, measure


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Models; none: all.")] = None,
    output: Annotated[Path, typer.Option(help="Results file.")] = RESULTS,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    again: Annotated[bool, typer.Option(help="Measure what is there already.")] = False,
) -> None:
    """Exports, compares, quantises and times models of every kind; goes on where an earlier run stopped."""
    for name in models or list(CASES):
        try:
            if name not in CASES:
                raise UnknownNameError("model", name, CASES)
            row = measure(name, output, again=again, device=device, progress=lambda line: typer.echo(line, err=True))
        except HfCompressError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        typer.echo(json.dumps({name: row}, indent=1))


if __name__ == "__main__":
    typer.run(main)
