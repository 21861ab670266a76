"""Whole runs, and what saves their time."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import shared

if TYPE_CHECKING:
    from hf_compress.recipe import Recipe


def compress(
    recipe: Annotated[Path, typer.Argument(help="Its file, e.g. recipe.yaml; paths in it are relative to it.")],
    as_json: shared.AsJson = False,
) -> None:
    """Run a whole recipe; what is done already is not done again."""
    from hf_compress.recipe import read_recipe

    _ship(read_recipe(recipe), as_json)


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
    choose_once: Annotated[
        bool, typer.Option("--choose-once", help="Try the rates with the first seed alone, the others at the chosen.")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache", help="Run the teacher once for each row and method; its outputs go to disk.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone/--no-alone", help="Compare with training without the teacher.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Folder to write; without it the recipe's with -sweep.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="Print markdown, csv or latex.")] = None,
    as_json: shared.AsJson = False,
) -> None:
    """Compare methods at an equal budget, with paired tests; exit code 1 if a run failed, the others go on.

    What is finished is not done again. The folder holds sweep.json, and the same numbers as sweep.md, sweep.csv,
    sweep.tex and sweep.svg.
    """
    from hf_compress_evaluation import table
    from hf_compress_evaluation.sweep import tables

    from hf_compress import entries, files, sweeping
    from hf_compress.errors import ConfigurationError, UnknownNameError
    from hf_compress.recipe import read_recipe

    if form is not None and form not in tables.FORMATS:
        raise UnknownNameError("format", form, tables.FORMATS)
    try:
        rates = [float(each) for each in learning_rates.split(",")] if learning_rates else []
    except ValueError as error:
        raise ConfigurationError(f"--learning-rates {learning_rates}: expected numbers, e.g. 2e-5,5e-5.") from error
    given = {"--methods": methods, "--seeds": seeds, "--learning-rates": learning_rates}
    told = [f"{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    flags = {"--choose-once": choose_once, "--cache": cache, "--no-alone": not alone}
    told += [name for name, wanted in flags.items() if wanted]
    shared.quiet()
    swept = sweeping.run(
        read_recipe(recipe),
        entries.read(methods),
        seeds=seeds,
        learning_rates=rates,
        choose_once=choose_once,
        cache=cache,
        alone=alone,
        output=output,
        command=" ".join(["hf-compress sweep", shlex.quote(recipe.name), *told]),
        tell=shared.tell,
        progress=not as_json and sys.stderr.isatty(),
    )
    if as_json:
        print(json.dumps(swept.found, indent=1))
    elif form is not None:
        print(tables.FORMATS[form][1](swept.found), end="")
    else:
        rows = [tuple(map(table.plain, row.values())) for row in tables.rows(swept.found)]
        below = [table.plain(line) for line in tables.below(swept.found)]
        shared.print_table(tuple(map(table.plain, tables.columns(swept.found))), rows, below, whole="method")
    shared.tell(f"wrote sweep.json, its tables and its plot to {swept.folder.name}/")
    if swept.failed:
        shared.tell(f"failed: {files.printable(', '.join(swept.failed))}")
        raise typer.Exit(1)


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
    as_json: shared.AsJson = False,
) -> None:
    """A smaller student of a fine-tuned teacher, exported, measured, with its card: a recipe without YAML."""
    from hf_compress.recipe import Recipe, validated

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
    as_json: shared.AsJson = False,
) -> None:
    """Run a teacher once over all rows: `DistillCallback(CacheTeacher(output))` reads the folder.

    `accelerate launch --module hf_compress.cli cache …` shares the rows among processes; a killed run goes on.
    """
    import torch
    from accelerate import PartialState
    from hf_compress_evaluation.examples import read_texts
    from transformers import DataCollatorWithPadding

    from hf_compress import foreign
    from hf_compress.bars import shown
    from hf_compress.fitting import encode
    from hf_compress.teachers.cache import CacheTeacher
    from hf_compress.teachers.model import load_teacher

    shared.quiet()
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


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo-output"),
    push: Annotated[str | None, typer.Option(help="Repository or its URL; without it the commit is a folder.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Invented weights and few rows: the same in a minute.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with so many seeds and summarise.")] = 1,
    as_json: shared.AsJson = False,
) -> None:
    """All of it on a real small model and real data that packages ship."""
    from hf_compress_evaluation.demo import recipe as demo_recipe
    from hf_compress_evaluation.demo import summary

    from hf_compress import facts, files
    from hf_compress.recipe import Recipe, validated

    shared.quiet()
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
    from hf_compress import ship

    progress = not as_json and sys.stderr.isatty()
    shared.quiet()
    made = ship.run(recipe, tell=shared.tell, progress=progress)
    shared.show(made.folder, as_json)
    shared.tell(made.destination)
