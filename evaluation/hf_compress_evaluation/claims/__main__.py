"""`python -m hf_compress_evaluation.claims NAME …`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hf_compress.errors import HfCompressError

from . import measure, names, table


def main(
    claims: Annotated[list[str] | None, typer.Argument(help="Methods; none: list them.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Rows a variant.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder of the results files.")] = Path("evaluation/results/claims"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what the files hold.")] = False,
) -> None:
    """Runs the claims of methods at small scale; goes on where an earlier run stopped."""
    if not claims:
        typer.echo("\n".join(names()))
        return
    for name in claims:
        try:
            found = measure(
                name, output / f"{name}.json", seeds=range(seeds), progress=lambda line: typer.echo(line, err=True)
            )
        except HfCompressError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        if as_json:
            typer.echo(json.dumps(found))
            continue
        header, *lines = table(found)
        shown = Table(*header, title=name)
        for line in lines:
            shown.add_row(*line)
        Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
