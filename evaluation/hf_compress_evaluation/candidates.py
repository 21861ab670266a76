"""The models that are scored and timed: torch and exported ones, opened as safely as a stranger's files are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from hf_compress import foreign
from hf_compress.errors import ForeignFileError, MismatchError

from . import latency, quality

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model that is scored and timed."""

    subject: str
    variant: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    provider: str
    folder: Path | None

    @property
    def name(self) -> str:
        return f"{self.subject} {self.variant}"


def torch_candidate(
    subject: str, source: str | Path, device: str, auto: Any = AutoModelForSequenceClassification
) -> Candidate:
    """The torch model of a folder or hub id, of the Auto class."""
    with foreign.loading(source, f"as {subject}", "Evaluate a trained model."):
        config = foreign.config(source)
        model, loading = auto.from_pretrained(source, config=config, output_loading_info=True, **foreign.SAFE)
    if loading["missing_keys"]:
        raise MismatchError(
            f"{subject}: the weights lack {', '.join(sorted(loading['missing_keys'])[:3])}, which would be random. "
            "Evaluate a trained model."
        )
    tokenizer = foreign.tokenizer(source)
    folder = Path(source) if Path(source).is_dir() else None
    model = model.eval().to(device)
    return Candidate(
        subject=subject, variant="torch", model=model, tokenizer=tokenizer, provider=f"torch-{device}", folder=folder
    )


def beside(
    subject: str, source: str | Path, variants: Sequence[str], device: str, threads: int, auto: Any
) -> list[Candidate]:
    """Another subject: what its folder holds of the variants, or the torch model of a hub id."""
    if not Path(source).is_dir():
        return [torch_candidate(subject, source, device, auto)]
    return load_variants(subject, Path(source), variants, device, threads, auto)


def load_variants(
    subject: str,
    folder: Path,
    variants: Sequence[str],
    device: str,
    threads: int,
    auto: Any = AutoModelForSequenceClassification,
) -> list[Candidate]:
    """The models of a folder, those of the variants that it holds; ForeignFileError if it holds none of them."""
    found = []
    for variant in variants:
        marker = folder / "config.json" if variant == "torch" else folder / variant / "model.onnx"
        if not marker.is_file():
            if subject == "student":  # of the others an export is welcome, not expected
                logger.info("%s holds no %s variant (%s): skipped.", folder.name, variant, marker.relative_to(folder))
        elif variant == "torch":
            found.append(torch_candidate(subject, folder, device, auto))
        else:
            from hf_compress.onnx.loading import check_hashes

            check_hashes(folder / variant)
            found.append(onnx_candidate(subject, folder, variant, device, threads))
    if not found:
        raise ForeignFileError(folder, f"holds none of {', '.join(variants)}.", "Save or export the model first.")
    return found


def onnx_candidate(subject: str, folder: Path, variant: str, device: str, threads: int) -> Candidate:
    """An exported variant of a folder, whose bytes are not compared with its record."""
    from hf_compress.onnx.loading import open_folder

    model = open_folder(folder / variant, provider=device, threads=threads)
    model.name_or_path = variant
    if model.config is None:
        raise ForeignFileError(folder / variant, "holds no config.json.", "Export the student again.")
    tokenizer = foreign.tokenizer(folder / variant)
    return Candidate(
        subject=subject, variant=variant, model=model, tokenizer=tokenizer, provider=model.provider, folder=folder
    )


def timed_call(one: Candidate, batch: int, length: int, seed: int) -> latency.Call:
    """A forward pass on random ids without padding, made beforehand on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, one.model.config.vocab_size, (batch, length), generator=generator)
    every = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    inputs = {
        name: value.to(one.model.device)
        for name, value in every.items()
        if name in one.tokenizer.model_input_names and quality.takes(one.model, name)
    }
    return lambda: one.model(**inputs)
