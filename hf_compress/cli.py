"""The command `hf-compress`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .recipe import Recipe
    from .verifying import Finding

app = typer.Typer(
    help="Distillation for the Hugging Face stack: train with one callback, then export, measure, describe and push.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="A model folder, as save_pretrained writes it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    task: Annotated[str | None, typer.Option(help="Only methods for this task, its default first.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Grouped by algorithm, knowledge or dataset; classes without a method are shown.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What there is, and what is the default of a task."""
    from . import registry

    if by is not None:
        if family is not None or task is not None:
            from .errors import ConfigurationError

            raise ConfigurationError("--by groups all methods: leave --family and --task out.")
        classes = registry.by_class(by)
        if as_json:
            print(json.dumps(classes, indent=1))
        else:
            _print_table((by, "what it is", "methods"), [
                (name, registry.CLASSES[by][name], ", ".join(own) or "none yet") for name, own in classes.items()
            ])  # fmt: skip
        return
    found = registry.catalogue()
    if task is not None:
        registry.default_for(task)  # an unknown task is an error, not an empty list
    families = {entry.family for entry in found.methods.values()}
    if family is not None and family not in families:
        from .errors import UnknownNameError

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
        _print_table(("method", "family", "default" if task else "default for", "paper", "what it does"), [
            (r["method"], r["family"], ("yes" if r["default"] else "") if task else ", ".join(r["default_for"]),
             r["paper"], r["summary"])
            for r in rows
        ])  # fmt: skip
    for where, reason in found.broken.items():
        print(f"not usable: {where}: {reason}", file=sys.stderr)


@app.command()
def plan(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of the teacher.")],
    layers: Annotated[str, typer.Option(help="Layers of the students to look at, e.g. 3,4,6.")],
    task: Annotated[str, typer.Option(help="Whose methods are listed.")] = "text-classification",
    max_mb: Annotated[
        float | None, typer.Option(min=0, help="Megabytes of the smallest file: int8 ONNX, else safetensors.")
    ] = None,
    max_ms: Annotated[float | None, typer.Option(min=0, help="Milliseconds of a call on one row, in torch.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each operator, while time is taken.")] = 1,
    as_json: AsJson = False,
) -> None:
    """What students would be like before one is trained: size, latency, the cost of a step, which methods apply."""
    from hf_compress_evaluation import planning, table

    from .errors import ConfigurationError

    try:
        numbers = [int(each) for each in layers.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--layers {layers}: expected numbers, e.g. 3,4,6.") from error
    _quiet()
    found = planning.plan(teacher, numbers, task=task, max_mb=max_mb, max_ms=max_ms, threads=threads, tell=_tell)
    if as_json:
        print(planning.as_json(found))
    else:
        _print_table(planning.COLUMNS, planning.rows(found), [table.plain(line) for line in planning.below(found)])


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Write a smaller student with the teacher's weights, and show what it gave up before any training."""
    from hf_compress_evaluation.examples import read_texts

    from .shrinking import report
    from .shrinking.folder import Request, shrink_folder
    from .shrinking.width import Width

    _quiet()
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
        _print_table(report.COLUMNS, report.rows(changes), report.below(outputs))
    _tell(f"wrote {output}")


def _layers(option: str, given: str | None) -> int | list[int] | None:
    """A number of layers, or the layers themselves."""
    try:
        numbers = None if given is None else [int(each) for each in given.split(",")]
    except ValueError as error:
        from .errors import ConfigurationError

        raise ConfigurationError(f"{option} {given}: expected a number, or layers as in 0,2,5.") from error
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers


@app.command()
def export(
    folder: Folder,
    quantize: Annotated[list[str] | None, typer.Option(help="Write fewer bits too: fp16, int8, int4.")] = None,
    data: Annotated[Path | None, typer.Option(help="Task file whose rows they are measured on.")] = None,
    max_drop: Annotated[float, typer.Option(min=0, max=1, help="Accuracy that they may cost, as a fraction.")] = 0.01,
    min_agreement: Annotated[float, typer.Option(min=0, max=1, help="Least fraction of equal decisions.")] = 0.95,
) -> None:
    """Write ONNX, compare it with torch, and quantise it if its quality holds."""
    from .errors import ConfigurationError, UnknownNameError
    from .onnx import PRECISIONS, export_onnx, quantize_onnx

    _holds_a_model(folder)
    for precision in quantize or ():
        if precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
    if quantize and data is None:
        raise ConfigurationError(
            f"{', '.join(quantize)}: kept only if its quality holds. Give --data task.yaml to measure it on."
        )
    if data is not None and not quantize:
        raise ConfigurationError("--data is what int8 is measured on: give --quantize int8 too, or leave it out.")
    _quiet()
    gate = None if data is None else _gate(folder, data, max_drop, min_agreement)
    done = export_onnx(folder, progress=_tell)
    _tell(f"{done.folder.name}: {done.bytes:,} bytes, at most {done.value('parity_max_abs_diff'):.1e} from torch")
    for precision in quantize or ():
        quantized = quantize_onnx(folder, gate=gate, precision=precision, progress=_tell)
        said = ", ".join(f"{one.metric} {one.value:.4f}" for one in quantized.measurements if one.metric != "bytes")
        _tell(f"{quantized.folder.name}: {quantized.bytes:,} bytes, {said}")


def _holds_a_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        from .errors import ForeignFileError

        raise ForeignFileError(folder, "holds no config.json.", "Give the folder that save_pretrained wrote.")


def _gate(folder: Path, data: Path, max_drop: float, min_agreement: float) -> Any:
    from hf_compress_evaluation import scoring
    from hf_compress_evaluation.task import read_task

    from . import foreign
    from .onnx import Gate

    task, config = read_task(data), foreign.config(folder, use="to be exported")
    scorer = scoring.scorer(task.task, config)
    features, labels = scorer.gate(scorer.load(task, config))
    return Gate(features=features, labels=labels, max_drop=max_drop, min_agreement=min_agreement)


@app.command()
def evaluate(
    folder: Folder,
    task: Annotated[Path, typer.Option(help="Task file: data, columns, metrics.")],
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id.")] = None,
    alone: Annotated[str | None, typer.Option(help="The same student trained without the teacher.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each operator, while latency is taken.")] = 1,
    cost: Annotated[
        bool, typer.Option("--cost", help="Also the memory of a process that serves and, by codecarbon, energy.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure quality, agreement, size and latency, and add them to the folder's record."""
    from hf_compress_evaluation.folder import evaluate_folder

    _quiet()
    progress = not as_json and sys.stderr.isatty()
    evaluate_folder(folder, task=task, teacher=teacher, alone=alone, threads=threads, cost=cost, progress=progress)
    _show(folder, as_json)


@app.command()
def verify(
    folder: Folder,
    measure: Annotated[bool, typer.Option("--measure", help="Also measure again what the record says.")] = False,
    task: Annotated[Path | None, typer.Option(help="Task file that names the rows of the record's scores.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id; without it loyalty is not measured.")] = None,
    tolerance_latency: Annotated[
        float, typer.Option(min=0, help="0.5: half as long again, or as much faster, still holds.")
    ] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Check a folder against its record, hashes and loading; exit code 1 and a list of what does not hold.

    With --measure a score holds within its recorded 95 % interval, a size if it is equal, a latency within a factor.
    A folder without a record fails; files that the record does not name are told.
    """
    from . import verifying
    from .errors import ConfigurationError

    if measure and task is None:
        raise ConfigurationError("--measure needs the rows that were measured on: give --task task.yaml.")
    if not measure and (task or teacher):
        raise ConfigurationError("--task and --teacher are for measuring: give --measure too, or leave them out.")
    _quiet()
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

    from . import files, verifying

    if as_json:
        print(verifying.as_json(found))
    else:
        below = [plain(line) for line in verifying.not_checked(found)]
        rows = [tuple(plain(cell) for cell in row) for row in verifying.rows(found)]
        _print_table(("what", "of", "recorded", "found", "state", ""), rows, below)
    _tell(files.printable(verifying.summary(found)))


def _show(folder: Path, as_json: bool) -> None:
    from hf_compress_evaluation import table

    from . import facts

    record = facts.load(folder)
    if as_json:
        print(table.as_json(record))
    else:
        console = _console()
        console.print(table.table(record, width=console.width))


@app.command()
def card(
    folder: Folder,
    licence: Annotated[str | None, typer.Option("--license", help="Of the model, e.g. apache-2.0; recorded.")] = None,
) -> None:
    """Render README.md from what was measured; what you have added outside of its generated parts stays."""
    from hf_compress_cards import card as cards

    from . import licences

    _holds_a_model(folder)
    if licence is not None:
        licences.state(folder, licence)
    _tell(f"wrote {cards.write(folder).name}")


@app.command()
def report(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="The page to write; its name ends in .html.")] = Path("report.html"),
    task: Annotated[Path | None, typer.Option(help="Task file: rows on which both are run.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub id; goes with --task.")] = None,
    history: Annotated[Path | None, typer.Option(help="A trainer_state.json; without it the folder's own.")] = None,
) -> None:
    """Write one page for yourself: what was measured, training curves, rows where student and teacher differ."""
    from hf_compress_cards import curves
    from hf_compress_cards import report as reports

    from .errors import ConfigurationError

    _holds_a_model(folder)
    if (task is None) != (teacher is None):
        raise ConfigurationError("--task and --teacher go together: both models are run on the task's rows.")
    reports.check_name(output)
    if history is not None:
        curves.panels(history)  # what is malformed is found before anything runs
    compared = None
    if task is not None and teacher is not None:
        from hf_compress_evaluation.report import compare

        _quiet()
        compared = compare(folder, task=task, teacher=teacher, progress=sys.stderr.isatty())
    _tell(f"wrote {reports.write(folder, output, history=history, comparison=compared)}, which is never pushed")


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Look for why a distillation did not help: each figure with a verdict and a remedy, worst first.

    RUN is a student's folder, the output folder of a recipe, or that of a Trainer with checkpoints. What was not looked
    at is listed with the option that would. Nothing is written, and no text of your rows is shown.
    """
    from hf_compress_evaluation.doctor import examining, findings
    from hf_compress_evaluation.table import plain

    from . import files

    _quiet()
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
        _print_table(findings.COLUMNS, shown, [plain(line) for line in findings.left_out(found)])
    _tell(files.printable(findings.summary(found)))


@app.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME, or the repository's URL.")],
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Propose the commit as a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    tag: Annotated[str | None, typer.Option(help="A name for the commit that stays, e.g. v1.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Of the model, where nothing says it.")] = None,
) -> None:
    """Push weights, ONNX, evidence and card in one commit."""
    from . import hub, licences

    _holds_a_model(folder)
    name, endpoint = hub.repository_of(repository)
    _quiet()
    if licence is None and sys.stdin.isatty() and licences.of(folder)[0] is None:
        licence = typer.prompt(f"License of the model ({licences.of(folder)[1]})", default="other", err=True)
    if licence is not None:
        licences.state(folder, licence)
    _name_in_card(folder, name)
    pushed = hub.push(
        folder, name, endpoint=endpoint, private=private, create_pr=pull_request, message=message, tag=tag
    )
    _tell(pushed.describe())


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME, or the repository's URL.")],
    folder: Annotated[Path | None, typer.Argument(help="To make; without it one of the repository's name.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
) -> None:
    """Bring a model folder here, compared with its record before it appears; no pickles."""
    from . import files, hub
    from .pulling import pull as pull_folder

    name, endpoint = hub.repository_of(repository)
    _quiet()
    pulled = pull_folder(name, folder, revision=revision, endpoint=endpoint)
    _tell(files.printable(pulled.describe()))


def _name_in_card(folder: Path, repository: str) -> None:
    """Writes the card with the repository's name, unless the folder holds one that is all its maker's."""
    from hf_compress_cards import card as cards
    from hf_compress_cards import editing

    from . import files

    path = folder / cards.FILE
    if not path.exists() or editing.is_generated(files.read_text(path)):
        cards.write(folder, repo_id=repository)


@app.command()
def compress(
    recipe: Annotated[Path, typer.Argument(help="Its file, e.g. recipe.yaml; paths in it are relative to it.")],
    as_json: AsJson = False,
) -> None:
    """Run a whole recipe; what is done already is not done again."""
    from .recipe import read_recipe

    _ship(read_recipe(recipe), as_json)


@app.command()
def sweep(
    recipe: Annotated[
        Path, typer.Argument(help="Its file: data, teacher, student, training; its methods are left out.")
    ],
    methods: Annotated[
        str, typer.Option(help="A list with commas: methods, + joins them, :name=value sets; or default.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, from the recipe's seed on.")] = 1,
    learning_rates: Annotated[
        str | None, typer.Option(help="A list with commas, the same for each method; chosen on data.choice.")
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone/--no-alone", help="Compare with training without the teacher.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Folder to write; without it the recipe's with -sweep.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="Print markdown, csv or latex.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods at an equal budget, with paired tests; exit code 1 if a run failed, the others go on.

    What is finished is not done again. The folder holds sweep.json, and the same numbers as sweep.md, sweep.csv,
    sweep.tex and sweep.svg.
    """
    from hf_compress_evaluation import table
    from hf_compress_evaluation.sweep import tables

    from . import entries, files, sweeping
    from .errors import ConfigurationError, UnknownNameError
    from .recipe import read_recipe

    if form is not None and form not in tables.FORMATS:
        raise UnknownNameError("format", form, tables.FORMATS)
    try:
        rates = [float(each) for each in learning_rates.split(",")] if learning_rates else []
    except ValueError as error:
        raise ConfigurationError(f"--learning-rates {learning_rates}: expected numbers, e.g. 2e-5,5e-5.") from error
    given = {"--methods": methods, "--seeds": seeds, "--learning-rates": learning_rates}
    told = [f"{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    _quiet()
    swept = sweeping.run(
        read_recipe(recipe),
        entries.read(methods),
        seeds=seeds,
        learning_rates=rates,
        alone=alone,
        output=output,
        command=" ".join(["hf-compress sweep", shlex.quote(recipe.name), *told, *([] if alone else ["--no-alone"])]),
        tell=_tell,
        progress=not as_json and sys.stderr.isatty(),
    )
    if as_json:
        print(json.dumps(swept.found, indent=1))
    elif form is not None:
        print(tables.FORMATS[form][1](swept.found), end="")
    else:
        rows = [tuple(map(table.plain, row.values())) for row in tables.rows(swept.found)]
        below = [table.plain(line) for line in tables.below(swept.found)]
        _print_table(tuple(map(table.plain, tables.columns(swept.found))), rows, below, whole="method")
    _tell(f"wrote sweep.json, its tables and its plot to {swept.folder.name}/")
    if swept.failed:
        _tell(f"failed: {files.printable(', '.join(swept.failed))}")
        raise typer.Exit(1)


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of a fine-tuned model.")],
    task: Annotated[str, typer.Option(help="text-classification")],
    data: Annotated[Path, typer.Option(help="Labelled rows: csv, jsonl or parquet.")],
    layers: Annotated[int, typer.Option(min=1, help="How many of the teacher's layers to keep.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    unlabelled: Annotated[Path | None, typer.Option(help="Further rows without labels.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows for the reported numbers.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; may be given more than once.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="Times that all rows are seen.")] = 3.0,
    learning_rate: Annotated[float, typer.Option(min=1e-8, help="Of the student.")] = 5e-5,
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same student.")] = 0,
    push: Annotated[str | None, typer.Option(help="Repository or its URL; without it the commit is a folder.")] = None,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Of the student, where nothing says it.")] = None,
    as_json: AsJson = False,
) -> None:
    """A smaller student of a fine-tuned teacher, exported, measured, with its card: a recipe without YAML."""
    from .recipe import Recipe, validated

    rows = {name: str(path.absolute()) for name, path in (("unlabelled", unlabelled), ("test", test)) if path}
    values = {
        "task": task,
        "teacher": str(Path(teacher).absolute()) if Path(teacher).is_dir() else teacher,
        "data": {"train": str(data.absolute()), **rows, "text": text, "label": label, "name": data.name.split(".")[0]},
        "student": {"layers": layers},
        "output": str(output.absolute()),
        "methods": tuple(method or ()),
        "training": {"epochs": epochs, "learning_rate": learning_rate},
        "export": {"quantize": "int8" if test else None},
        "seed": seed,
        "push": push,
        "private": private,
        "licence": licence,
    }
    _ship(validated(Recipe, values, "the options"), as_json)


@app.command()
def cache(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of the teacher.")],
    data: Annotated[Path, typer.Option(help="Rows: csv, jsonl or parquet.")],
    output: Annotated[Path, typer.Option(help="Folder of the cache; what it holds already is kept.")],
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens kept of a text, as in the training.")] = 128,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Likeliest tokens kept of a position; without it all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of a forward.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Run a teacher once over all rows: `DistillCallback(CacheTeacher(output))` reads the folder.

    `accelerate launch --module hf_compress.cli cache …` shares the rows among processes; a killed run goes on.
    """
    import torch
    from accelerate import PartialState
    from hf_compress_evaluation.examples import read_texts
    from transformers import DataCollatorWithPadding

    from . import foreign
    from .fitting import encode, shown
    from .teachers.cache import CacheTeacher
    from .teachers.model import load_teacher

    _quiet()
    state = PartialState(cpu=not torch.accelerator.is_available())  # else it overlooks other processes without a GPU
    model, tokenizer = load_teacher(teacher).to(state.device), foreign.tokenizer(teacher)
    rows = read_texts(data, text)
    encoded = encode(tokenizer, rows, None, max_length).remove_columns("labels")
    foreign.check_ids(encoded["input_ids"], model, tokenizer)
    own = encoded.shard(state.num_processes, state.process_index)
    collate, starts = DataCollatorWithPadding(tokenizer), range(0, len(own), batch_size)
    filled = CacheTeacher(output, model, top_k=top_k)
    with shown("cache", len(starts), bar=sys.stderr.isatty() and state.is_main_process) as step:
        for start in starts:
            batch = collate([own[row] for row in range(start, min(start + batch_size, len(own)))])
            filled.fill([{name: values.to(state.device) for name, values in batch.items()}], flush=False)
            step()
    filled.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        count = sum(len(row) for row in encoded["input_ids"])
        found = {"examples": len(rows), "bytes": size, "bytes_per_token": round(size / max(count, 1), 1)}
        print(json.dumps(found, indent=1) if as_json else f"{len(rows):,} examples in {size:,} bytes of {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo-output"),
    push: Annotated[str | None, typer.Option(help="Repository or its URL; without it the commit is a folder.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Invented weights and few rows: the same in a minute.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with so many seeds and summarise.")] = 1,
    as_json: AsJson = False,
) -> None:
    """All of it on a real small model and real data that packages ship."""
    from hf_compress_evaluation.demo import recipe as demo_recipe
    from hf_compress_evaluation.demo import summary

    from . import facts, files
    from .recipe import Recipe, validated

    _quiet()
    folders = []
    for seed in range(seeds):
        target = output.absolute() if seeds == 1 else output.absolute() / f"seed-{seed}"
        values = demo_recipe.values(target, tiny=tiny, seed=seed, push=push if seed == 0 else None)
        _ship(validated(Recipe, values, "the demo's recipe"), as_json)
        folders.append(target / "student")
    found = summary.summarise([facts.load(folder) for folder in folders])
    files.write_text(output / "summary.json", json.dumps(found, indent=1) + "\n")
    if seeds > 1:
        print(json.dumps(found, indent=1) if as_json else summary.markdown(found))


def _ship(recipe: Recipe, as_json: bool) -> None:
    from . import ship

    progress = not as_json and sys.stderr.isatty()
    _quiet()
    made = ship.run(recipe, tell=_tell, progress=progress)
    _show(made.folder, as_json)
    _tell(made.destination)


def _quiet() -> None:
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


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _console() -> Any:
    """The terminal; tables that go to a file or a pipe are not squeezed into 80 columns."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=150)


def _print_table(
    columns: tuple[str, ...], rows: list[tuple[str, ...]], below: Sequence[str] = (), *, whole: str | None = None
) -> None:
    """`whole`: a column whose cells are neither broken nor cut."""
    from rich.table import Table

    table = Table(caption="\n".join(below) or None, caption_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=column == whole)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def main() -> None:
    """Entry point: an error of ours is one message and exit code 1; HF_COMPRESS_DEBUG=1 shows its traceback."""
    from . import files
    from .errors import HfCompressError

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


if __name__ == "__main__":
    main()
