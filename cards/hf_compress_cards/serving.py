"""Code that serves an exported graph with ONNX Runtime, a tokenizer and numpy, without torch and transformers.

`ci/serving` runs every form of it in an environment that has nothing else, and writes how large that is to
`serving.json` beside this file. What is not certain from the variant's own files gets no code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_compress import files
from hf_compress.facts import Record

from .text import literal, plain

FIGURES = "serving.json"
NEEDS = {"text": ("onnxruntime", "tokenizers", "numpy"), "images": ("onnxruntime", "pillow", "numpy")}
"""What is installed, by what a model reads."""
_VARIANTS = ("onnx_int8", "onnx")
"""Those that a CPU runs as they are, smallest first."""
_TOKENS = ("text-classification", "token-classification", "question-answering", "fill-mask", "feature-extraction")
_LABELLED = ("text-classification", "token-classification", "image-classification")
_UNLIMITED, _USUAL = 10**6, 512
"""More tokens than this stand for no limit; then so many are taken, where the model takes them."""
_PROCESSORS = ("ViTImageProcessor", "DeiTImageProcessor", "BitImageProcessor", "CLIPImageProcessor")
"""Image processors that resize, crop, rescale and normalise, in this order, and nothing else."""
_RESAMPLING = dict(enumerate(("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING")))
"""PIL's names by its numbers."""


def variant(record: Record, tag: str | None) -> str | None:
    """The folder to serve on a CPU: with one graph and the tokenizer or image processor that its task needs."""
    recorded = {entry.file for entry in record.evidence}
    beside = "preprocessor_config.json" if kind(tag) == "images" else "tokenizer.json"
    return next((name for name in _VARIANTS if {f"{name}/model.onnx", f"{name}/{beside}"} <= recorded), None)


def kind(tag: str | None) -> str:
    """What a model of that task reads, a key of `NEEDS`."""
    return "images" if tag == "image-classification" else "text"


def code(model: str, tag: str | None, folder: Path, config: Mapping[str, Any]) -> str | None:
    """A whole program, or None where it is not certain to give the model's answers.

    Args:
        model: the hub id or name that the card gives; the code reads from a local copy of that name.
        tag: the hub's name of the task.
        folder: the variant's folder, of which the settings of tokenizer, processor and generation are read.
        config: the model's config.json.

    Raises:
        ForeignFileError: if one of these files is malformed.
    """
    settings = _settings(tag, folder, config)
    if settings is None:
        return None
    settings["folder"] = literal(f"{model.rsplit('/', 1)[-1]}/{folder.name}")
    return _environment().get_template(f"{tag}.jinja").render(settings).rstrip() + "\n"


def needs(tag: str | None) -> tuple[str, str | None]:
    """What to install for a task, and how large it was when it was measured, on what; None where it was not."""
    packages, found = NEEDS[kind(tag)], figures()
    if found is None:
        return " ".join(packages), None
    own = found[kind(tag)]
    versions = ", ".join(f"{name} {own['packages'][name]}" for name in packages)
    return " ".join(packages), f"{own['megabytes']:.0f} MB installed, measured on {found['platform']} with {versions}"


@cache
def figures() -> Mapping[str, Any] | None:
    """What `ci/serving` measured: for each of `NEEDS` `megabytes` and `packages`; None before its first run."""
    path = resources.files(__package__) / FIGURES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("hf_compress_cards", "programs"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _settings(tag: str | None, folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the template of a task prints; None where one thing of it is not known."""
    common: dict[str, Any] = {
        "labels": None,
        "problem": _problem(config),
        "images": kind(tag) == "images",
        "pair": False,
    }
    if tag in _LABELLED:
        common["labels"] = _labels(config)
        if common["labels"] is None:
            return None
    if tag == "text-generation":
        return common | {"ends": _ends(_read(folder / "generation_config.json"))}
    if tag == "image-classification":
        processing = _processing(_read(folder / "preprocessor_config.json"), config)
        return None if processing is None else common | processing
    if tag not in _TOKENS:
        return None
    tokenizer = _read(folder / "tokenizer_config.json")
    pad, mask = tokenizer.get("pad_token"), tokenizer.get("mask_token")
    if not _is_token(pad) or (tag == "fill-mask" and not _is_token(mask)):
        return None
    common |= {"pad": literal(pad), "mask": literal(str(mask)), "length": _length(tokenizer, config)}
    if tag not in _LABELLED:
        common["problem"] = None
    return common | {"pair": tag == "question-answering"}


def _read(path: Path) -> Mapping[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _problem(config: Mapping[str, Any]) -> str | None:
    """As transformers' pipelines decide it: one label without a word on the problem is a yes or no."""
    named, labels = config.get("problem_type"), config.get("id2label")
    if named is None and isinstance(labels, dict) and len(labels) == 1:
        return "multi_label_classification"
    return named if isinstance(named, str) else None


def _labels(config: Mapping[str, Any]) -> str | list[str] | None:
    """Labels in config.json, a list of transformers' own where it leaves them out, or None: not in order."""
    named = config.get("id2label")
    if named is None:
        return ["LABEL_0", "LABEL_1"]
    in_order = isinstance(named, dict) and [*named] == [str(at) for at in range(len(named))]
    return "config.json" if in_order else None


def _is_token(value: object) -> TypeGuard[str]:
    """A text that `literal` keeps as it is."""
    return isinstance(value, str) and plain(value) == value


def _length(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """The most tokens that tokenizer and model take."""
    known = (tokenizer.get("model_max_length"), config.get("max_position_embeddings"))
    limits = [limit for limit in known if isinstance(limit, int) and 0 < limit < _UNLIMITED]
    named = isinstance(known[0], int) and known[0] in limits  # a table of positions may have rows that are not for text
    return min(limits if named else [*limits, _USUAL])


def _ends(generation: Mapping[str, Any]) -> list[int]:
    ends = generation.get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def _processing(processor: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Resizing, cropping, rescaling and normalising as numbers; None for anything else."""
    name = str(processor.get("image_processor_type")).removesuffix("Pil").removesuffix("Fast")
    if (
        name not in _PROCESSORS
        or not processor.get("do_resize")
        or processor.get("do_pad")
        or config.get("num_channels", 3) != 3
    ):
        return None
    found: dict[str, Any] = dict.fromkeys(("edge", "size", "resample", "crop", "rescale", "mean", "std"))
    try:
        found |= _resizing(processor["size"]) | {"resample": _RESAMPLING[processor["resample"]]}
        if processor.get("do_center_crop"):
            found["crop"] = _pair(processor["crop_size"])
        if processor.get("do_rescale"):
            factor = float(processor["rescale_factor"])
            found["rescale"] = "/ 255" if math.isclose(factor, 1 / 255) else f"* {factor}"
        if processor.get("do_normalize"):
            found["mean"], found["std"] = _three(processor["image_mean"]), _three(processor["image_std"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    least = min(found["size"] or (found["edge"],))
    fits = found["crop"] is None or least >= max(found["crop"])
    return found if fits else None  # else the processor would pad


def _resizing(size: Mapping[str, Any]) -> dict[str, Any]:
    return {"edge": int(size["shortest_edge"])} if [*size] == ["shortest_edge"] else {"size": _pair(size)}


def _pair(size: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height), as PIL has it."""
    return int(size["width"]), int(size["height"])


def _three(values: Any) -> list[float]:
    red, green, blue = map(float, values)
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError("not finite")
    return [red, green, blue]
