"""What is done with a trained folder on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import shared

if TYPE_CHECKING:
    from hf_compress.verifying import Finding


def export(
    folder: shared.Folder,
    quantize: Annotated[list[str] | None, typer.Option(help="Write fewer bits too: fp16, int8, int4.")] = None,
    data: Annotated[Path | None, typer.Option(help="Task file whose rows they are measured on.")] = None,
    max_drop: Annotated[float, typer.Option(min=0, max=1, help="Accuracy that they may cost, as a fraction.")] = 0.01,
    min_agreement: Annotated[float, typer.Option(min=0, max=1, help="Least fraction of equal decisions.")] = 0.95,
) -> None:
    """Write ONNX, compare it with torch, and quantise it if its quality holds."""
    from hf_compress.errors import ConfigurationError, UnknownNameError
    from hf_compress.onnx import PRECISIONS, export_onnx, quantize_onnx

    shared.holds_a_model(folder)
    for precision in quantize or ():
        if precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
    if quantize and data is None:
        raise ConfigurationError(
            f"{', '.join(quantize)}: kept only if its quality holds. Give --data task.yaml to measure it on."
        )
    if data is not None and not quantize:
        raise ConfigurationError("--data is what int8 is measured on: give --quantize int8 too, or leave it out.")
    shared.quiet()
    gate = None if data is None else _gate(folder, data, max_drop, min_agreement)
    done = export_onnx(folder, progress=shared.tell)
    shared.tell(f"{done.folder.name}: {done.bytes:,} bytes, at most {done.value('parity_max_abs_diff'):.1e} from torch")
    for precision in quantize or ():
        quantized = quantize_onnx(folder, gate=gate, precision=precision, progress=shared.tell)
        said = ", ".join(f"{one.metric} {one.value:.4f}" for one in quantized.measurements if one.metric != "bytes")
        shared.tell(f"{quantized.folder.name}: {quantized.bytes:,} bytes, {said}")


def _gate(folder: Path, data: Path, max_drop: float, min_agreement: float) -> Any:
    from hf_compress_evaluation import scoring
    from hf_compress_evaluation.task import read_task

    from hf_compress import foreign
    from hf_compress.onnx import Gate

    task, config = read_task(data), foreign.config(folder, use="to be exported")
    scorer = scoring.scorer(task.task, config)
    features, labels = scorer.gate(scorer.load(task, config))
    return Gate(features=features, labels=labels, max_drop=max_drop, min_agreement=min_agreement)


def evaluate(
    folder: shared.Folder,
    task: Annotated[Path, typer.Option(help="Task file: data, columns, metrics.")],
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id.")] = None,
    alone: Annotated[str | None, typer.Option(help="The same student trained without the teacher.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each operator, while latency is taken.")] = 1,
    cost: Annotated[
        bool, typer.Option("--cost", help="Also the memory of a process that serves and, by codecarbon, energy.")
    ] = False,
    as_json: shared.AsJson = False,
) -> None:
    """Measure quality, agreement, size and latency, and add them to the folder's record."""
    from hf_compress_evaluation.folder import evaluate_folder

    shared.quiet()
    progress = not as_json and sys.stderr.isatty()
    evaluate_folder(folder, task=task, teacher=teacher, alone=alone, threads=threads, cost=cost, progress=progress)
    shared.show(folder, as_json)


def doctor(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Of a student, a recipe or a Trainer.")],
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id.")] = None,
    task: Annotated[Path | None, typer.Option(help="Task file that names the test rows.")] = None,
    data: Annotated[Path | None, typer.Option(help="The training rows: csv, jsonl or parquet.")] = None,
    alone: Annotated[str | None, typer.Option(help="The same student trained without the teacher.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts; else the task file's, else text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels; else the task file's, else label.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens that training kept of a row.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows, and test rows, that models are run on.")] = 1000,
    as_json: shared.AsJson = False,
) -> None:
    """Look for why a distillation did not help: each figure with a verdict and a remedy, worst first.

    RUN is a student's folder, the output folder of a recipe, or that of a Trainer with checkpoints. What was not looked
    at is listed with the option that would. Nothing is written, and no text of your rows is shown.
    """
    from hf_compress_evaluation.doctor import examining, findings
    from hf_compress_evaluation.table import plain

    from hf_compress import files

    shared.quiet()
    progress = not as_json and sys.stderr.isatty()
    given = examining.Given(
        teacher=teacher, task=task, data=data, alone=alone, text=text, label=label, max_length=max_length,
        rows=rows, progress=progress,
    )  # fmt: skip
    found = examining.examine(run, given)
    if as_json:
        print(findings.as_json(found))
    else:
        shown = [tuple(plain(cell) for cell in row) for row in findings.rows(found)]
        shared.print_table(findings.COLUMNS, shown, [plain(line) for line in findings.left_out(found)])
    shared.tell(files.printable(findings.summary(found)))


def verify(
    folder: shared.Folder,
    measure: Annotated[bool, typer.Option("--measure", help="Also measure again what the record says.")] = False,
    task: Annotated[Path | None, typer.Option(help="Task file that names the rows of the record's scores.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id; without it loyalty is not measured.")] = None,
    tolerance_latency: Annotated[
        float, typer.Option(min=0, help="0.5: half as long again, or as much faster, still holds.")
    ] = 0.5,
    as_json: shared.AsJson = False,
) -> None:
    """Check a folder against its record, hashes and loading; exit code 1 and a list of what does not hold.

    With --measure a score holds within its recorded 95 % interval, a size if it is equal, a latency within a factor.
    A folder without a record fails; files that the record does not name are told.
    """
    from hf_compress import verifying
    from hf_compress.errors import ConfigurationError

    if measure and task is None:
        raise ConfigurationError("--measure needs the rows that were measured on: give --task task.yaml.")
    if not measure and (task or teacher):
        raise ConfigurationError("--task and --teacher are for measuring: give --measure too, or leave them out.")
    shared.quiet()
    found = verifying.verify(folder)
    try:
        if measure and task is not None:
            from hf_compress_evaluation.remeasuring import remeasure

            progress = not as_json and sys.stderr.isatty()
            found += remeasure(
                folder, task=task, teacher=teacher, tolerance_latency=tolerance_latency, progress=progress
            )
    finally:  # what was found before the task or the teacher turned out to be wrong
        _show_findings(found, as_json)
    if verifying.failing(found):
        raise typer.Exit(1)


def _show_findings(found: tuple[Finding, ...], as_json: bool) -> None:
    from hf_compress_evaluation.table import plain

    from hf_compress import files, verifying

    if as_json:
        print(verifying.as_json(found))
    else:
        below = [plain(line) for line in verifying.not_checked(found)]
        rows = [tuple(plain(cell) for cell in row) for row in verifying.rows(found)]
        shared.print_table(("what", "of", "recorded", "found", "state", ""), rows, below)
    shared.tell(files.printable(verifying.summary(found)))


def report(
    folder: shared.Folder,
    output: Annotated[Path, typer.Option(help="The page to write; its name ends in .html.")] = Path("report.html"),
    task: Annotated[Path | None, typer.Option(help="Task file: rows on which both are run.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id; goes with --task.")] = None,
    history: Annotated[Path | None, typer.Option(help="A trainer_state.json; without it the folder's own.")] = None,
) -> None:
    """Write one page for yourself: what was measured, training curves, rows where student and teacher differ."""
    from hf_compress_cards import curves
    from hf_compress_cards import report as reports

    from hf_compress.errors import ConfigurationError

    shared.holds_a_model(folder)
    if (task is None) != (teacher is None):
        raise ConfigurationError("--task and --teacher go together: both models are run on the task's rows.")
    reports.check_name(output)
    if history is not None:
        curves.panels(history)  # what is malformed is found before anything runs
    compared = None
    if task is not None and teacher is not None:
        from hf_compress_evaluation.report import compare

        shared.quiet()
        compared = compare(folder, task=task, teacher=teacher, progress=sys.stderr.isatty())
    shared.tell(f"wrote {reports.write(folder, output, history=history, comparison=compared)}, which is never pushed")
