"""What there is, and students before they are trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import shared

if TYPE_CHECKING:
    pass


def methods(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    task: Annotated[str | None, typer.Option(help="Only methods for this task, its default first.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Grouped by algorithm, knowledge or dataset; classes without a method are shown.")
    ] = None,
    as_json: shared.AsJson = False,
) -> None:
    """What there is, and what is the default of a task."""
    from hf_compress import registry

    if by is not None:
        if family is not None or task is not None:
            from hf_compress.errors import ConfigurationError

            raise ConfigurationError("--by groups all methods: leave --family and --task out.")
        classes = registry.by_class(by)
        if as_json:
            print(json.dumps(classes, indent=1))
        else:
            shared.print_table((by, "what it is", "methods"), [
                (name, registry.CLASSES[by][name], ", ".join(own) or "none yet") for name, own in classes.items()
            ])  # fmt: skip
        return
    found = registry.catalogue()
    if task is not None:
        registry.default_for(task)  # an unknown task is an error, not an empty list
    families = {entry.family for entry in found.methods.values()}
    if family is not None and family not in families:
        from hf_compress.errors import UnknownNameError

        raise UnknownNameError("family", family, families)
    chosen = [
        entry
        for entry in found.methods.values()
        if (family is None or entry.family == family) and (task is None or task in entry.tasks)
    ]
    chosen.sort(key=lambda entry: (task is not None and task not in entry.default_for, entry.family, entry.name))
    rows = [
        {
            "method": entry.name,
            "family": entry.family,
            "default": (task in entry.default_for) if task else bool(entry.default_for),
            "tasks": list(entry.tasks),
            "default_for": list(entry.default_for),
            "paper": entry.declared["paper"],
            "summary": entry.declared["summary"],
        }
        for entry in chosen
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        shared.print_table(("method", "family", "default" if task else "default for", "paper", "what it does"), [
            (r["method"], r["family"], ("yes" if r["default"] else "") if task else ", ".join(r["default_for"]),
             r["paper"], r["summary"])
            for r in rows
        ])  # fmt: skip
    for where, reason in found.broken.items():
        print(f"not usable: {where}: {reason}", file=sys.stderr)


def plan(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of the teacher.")],
    layers: Annotated[str, typer.Option(help="Layers of the students to look at, e.g. 3,4,6.")],
    task: Annotated[str, typer.Option(help="Whose methods are listed.")] = "text-classification",
    max_mb: Annotated[
        float | None, typer.Option(min=0, help="Megabytes of the smallest file: int8 ONNX, else safetensors.")
    ] = None,
    max_ms: Annotated[float | None, typer.Option(min=0, help="Milliseconds of a call on one row, in torch.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each operator, while time is taken.")] = 1,
    as_json: shared.AsJson = False,
) -> None:
    """What students would be like before one is trained: size, latency, the cost of a step, which methods apply."""
    from hf_compress_evaluation import planning, table

    from hf_compress.errors import ConfigurationError

    try:
        numbers = [int(each) for each in layers.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--layers {layers}: expected numbers, e.g. 3,4,6.") from error
    shared.quiet()
    found = planning.plan(teacher, numbers, task=task, max_mb=max_mb, max_ms=max_ms, threads=threads, tell=shared.tell)
    if as_json:
        print(planning.as_json(found))
    else:
        shared.print_table(
            planning.COLUMNS, planning.rows(found), [table.plain(line) for line in planning.below(found)]
        )


def shrink(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of the teacher.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; not there, or empty.")],
    layers: Annotated[
        str | None, typer.Option(help="How many to keep, or which: 0,2,5. Of an encoder, if two.")
    ] = None,
    decoder_layers: Annotated[str | None, typer.Option(help="The same of the decoder of an encoder-decoder.")] = None,
    keep: Annotated[str, typer.Option(help="Which layers, where a number is given: even, first or last.")] = "even",
    hidden: Annotated[int | None, typer.Option(help="Hidden dimensions to keep.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads to keep in each layer.")] = None,
    key_value_heads: Annotated[int | None, typer.Option(help="Where several heads share keys and values.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Neurons to keep in each MLP.")] = None,
    by: Annotated[str | None, typer.Option(help="activations on --data, the default with it, or norms.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Most tokens to keep; without it all of the texts.")] = None,
    vocabulary_texts: Annotated[Path | None, typer.Option(help="Rows on which tokens are counted.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Least occurrences of a token that is kept.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Rows for activations, and to compare outputs on.")] = None,
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens kept of a row of --data.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward.")] = 32,
    as_json: shared.AsJson = False,
) -> None:
    """Write a smaller student with the teacher's weights, and show what it gave up before any training."""
    from hf_compress_evaluation.examples import read_texts

    from hf_compress.shrinking import report
    from hf_compress.shrinking.folder import Request, shrink_folder
    from hf_compress.shrinking.width import Width

    shared.quiet()
    width = Width(hidden=hidden, heads=heads, key_value_heads=key_value_heads, intermediate=intermediate)
    request = Request(
        layers=_layers("--layers", layers),
        decoder_layers=_layers("--decoder-layers", decoder_layers),
        keep=keep,  # type: ignore[arg-type]  # checked there
        width=width,
        by=by,  # type: ignore[arg-type]  # checked there
        vocabulary=vocabulary,
        min_count=min_count,
        max_length=max_length,
        batch_size=batch_size,
    )
    counted, rows = (None if path is None else read_texts(path, text) for path in (vocabulary_texts, data))
    bar = not as_json and sys.stderr.isatty()
    changes, outputs = shrink_folder(teacher, output, request, texts=counted, rows=rows, bar=bar)
    if as_json:
        print(json.dumps(report.as_json(changes, outputs), indent=1))
    else:
        shared.print_table(report.COLUMNS, report.rows(changes), report.below(outputs))
    shared.tell(f"wrote {output}")


def _layers(option: str, given: str | None) -> int | list[int] | None:
    """A number of layers, or the layers themselves."""
    try:
        numbers = None if given is None else [int(each) for each in given.split(",")]
    except ValueError as error:
        from hf_compress.errors import ConfigurationError

        raise ConfigurationError(f"{option} {given}: expected a number, or layers as in 0,2,5.") from error
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers
