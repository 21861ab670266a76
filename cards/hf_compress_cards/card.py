"""Renders a model card from a folder's record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from hf_compress import facts, files, licences
from hf_compress.facts import Record, Setting

from . import editing, figures, leaderboards, plot, serving, usage
from .metadata import metadata, to_yaml
from .text import Safe, escape, fence, table

FILE = "README.md"
PLOT = "evidence/quality_latency.png"


def render(folder: Path, *, repo_id: str | None = None) -> str:
    """The text of a model card, front matter included, from `compression.json` and the folder's config files alone.

    Args:
        folder: a model folder.
        repo_id: the hub id that the usage code names; None: the folder's name.

    Raises:
        ForeignFileError: if one of these files is malformed.
    """
    folder = Path(folder).resolve()
    config_file = folder / "config.json"
    config = files.read_json(config_file) if config_file.is_file() else {}
    text = _template().render(_context(facts.load(folder), config, repo_id or folder.name, folder))
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def write(folder: Path, *, repo_id: str | None = None) -> Path:
    """Writes README.md, the plot that it shows as recorded evidence, and results for the hub's leaderboards, each whole
    or not at all. What a maker has added to the card outside of the generated parts stays.

    Raises:
        ForeignFileError: as `render`; nothing is written then.
        OSError: if the folder cannot be written; the old card is untouched.
    """
    folder = Path(folder)
    if drawn := plot.draw(facts.load(folder), folder / PLOT):
        facts.register(folder, [drawn])
    leaderboards.write(folder, facts.load(folder))
    existing = files.read_text(folder / FILE) if files.is_file(folder / FILE) else None
    files.write_text(folder / FILE, editing.merge(existing, render(folder, repo_id=repo_id)))
    return folder / FILE


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("hf_compress_cards"),
        undefined=StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"begin": editing.begin, "end": editing.end}
    return environment.get_template("card.md.jinja")


def _context(record: Record, config: dict[str, Any], model: str, folder: Path) -> dict[str, Any]:
    """What the template prints. Texts are as they came; the environment escapes each when it is printed."""
    architecture = architecture_of(record, config)
    tag = usage.pipeline_tag(record, architecture)
    variants = usage.onnx_variants(record)
    name = model.rsplit("/", 1)[-1]
    onnx = usage.onnx_code(model, tag, variants[0], architecture) if variants else None
    optimum = usage.optimum_code(model, tag, variants[0], architecture) if variants else None
    served = serving.variant(record, tag)
    serve = serving.code(model, tag, folder / served, config) if served else None
    packages, installed = serving.needs(tag)
    licence, why = licences.of(folder)
    return {
        "metadata": Safe(to_yaml(metadata(record, name=name, tag=tag, licence=licence))),
        "name": name,
        "model": model,
        "architecture": architecture,
        "record": record,
        "training": record.training,
        "find": record.find,
        "show": figures.show,
        "count": figures.count,
        "layers": figures.layers,
        "settings": settings,
        "quality": _table(figures.quality_cells(record)),
        "speed": _table(figures.speed_cells(record)),
        "other": _table(figures.other_cells(record)),
        "derived": figures.derived(record),
        "measured_on": figures.measured_on(record),
        "missing": figures.missing(record),
        "plot": Safe(PLOT) if any(entry.file == PLOT for entry in record.evidence) else None,
        "variants": variants,
        "torch_code": fence(usage.torch_code(model, tag, architecture), "python"),
        "onnx_code": fence(onnx, "python") if onnx else None,
        "optimum_code": fence(optimum, "python") if optimum else None,
        "serve_code": fence(serve, "python") if serve else None,
        "serve_variant": served,
        "serve_packages": packages,
        "serve_installed": installed,
        "methods": _methods(record),
        "citations": [fence(text, "bibtex") for text in _citations(record)],
        "licence": licence,
        "licence_why": why,
    }


def _table(cells: figures.Cells | None) -> Safe | None:
    return table(*cells) if cells else None


def architecture_of(record: Record, config: dict[str, Any]) -> str | None:
    """The class of the model, by its config or by what trained it."""
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    return record.training.student.architecture if record.training else None


def _methods(record: Record) -> Safe | None:
    methods = record.training.methods if record.training else ()
    rows = [(method.name, f"{method.weight:g}", settings(method.settings)) for method in methods]
    return table(("method", "weight", "settings"), rows) if rows else None


def _citations(record: Record) -> Iterable[str]:
    methods = record.training.methods if record.training else ()
    return dict.fromkeys(method.citation for method in methods if method.citation)


def _setting(value: Setting) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def settings(values: dict[str, Setting]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{key} = {_setting(value)}" for key, value in values.items())
