"""`python -m hf_compress_evaluation.bench NAME …`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from hf_compress.errors import HfCompressError

from . import ROUNDS, measure, names, table
from ._machine import Machine


def main(
    benches: Annotated[list[str] | None, typer.Argument(help="Benchmarks; none: list them.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="So many; a seed each where a bench is seeded.")] = ROUNDS,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="Of a step: float32, bfloat16 or float16.")] = "float32",
    output: Annotated[Path, typer.Option(help="Results file.")] = Path("evaluation/results/bench.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written.")] = False,
) -> None:
    """Measures what a step costs, side by side, alternating."""
    if not benches:
        typer.echo("\n".join(names()))
        return
    rows = {}
    for name in benches:
        try:
            on = Machine(threads=threads, device=cast(Any, device), precision=cast(Any, precision))
            rows[name] = measure(name, output, rounds=rounds, on=on, progress=lambda line: typer.echo(line, err=True))
        except HfCompressError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    header, *lines = table(rows)
    shown = Table(*header)
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
