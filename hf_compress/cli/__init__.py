"""The command `hf-compress`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import logging
import os
import sys

import typer

from . import after, before, passing, training

app = typer.Typer(
    help="Distillation for the Hugging Face stack: train with one callback, then export, measure, describe and push.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    before.methods, before.plan, before.shrink, after.export, after.evaluate, after.verify, passing.card, after.report,
    after.doctor, passing.push, passing.pull, training.compress, training.sweep, training.distill, training.cache,
    training.demo,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point: an error of ours is one message and exit code 1; HF_COMPRESS_DEBUG=1 shows its traceback."""
    from hf_compress import files
    from hf_compress.errors import HfCompressError

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hf_compress").setLevel(logging.INFO)
    try:
        app()
    except (HfCompressError, OSError) as error:
        if os.environ.get("HF_COMPRESS_DEBUG"):
            raise
        said = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"error: {files.printable(' '.join(said.split()))}", file=sys.stderr)
        sys.exit(1)
