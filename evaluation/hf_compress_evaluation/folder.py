"""Measures a student's folder beside its teacher and a baseline, and appends what was found to its record."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from hf_compress import facts, fitting, foreign
from hf_compress.errors import ForeignFileError, MismatchError
from hf_compress.facts import Setting

from . import cost as costs
from . import latency, quality
from .examples import Examples
from .task import Task, load_examples, read_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Which calls are timed, and how often."""

    batches: tuple[int, ...] = (1, 32)
    """Rows of a call; empty: no latency."""
    length: int = 64
    """Padded tokens of a row, at most what every model takes. Sentences and short paragraphs."""
    runs: int = 20
    warmup: int = 3


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


def evaluate_folder(
    folder: Path,
    *,
    task: Task | Path,
    teacher: str | Path | None = None,
    alone: str | Path | None = None,
    others: Mapping[str, str | Path] | None = None,
    variants: Sequence[str] | None = None,
    threads: int = 1,
    timing: Timing | None = None,
    cost: bool = False,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> tuple[facts.Measurement, ...]:
    """Measures quality, agreement, size and latency of a student's folder and appends them to its record.

    Args:
        folder: the student: torch files at its top, exported variants in subfolders.
        task: a task, or its file.
        teacher: folder or hub id; measured too, and what agreement and retention refer to.
        alone: folder or hub id of the student's start trained without a teacher; what `gap_closed` refers to.
        others: further subjects by name, e.g. {"student-labelled": folder}.
        variants: of the student; one that the folder does not hold is skipped with a log line. None: all that it
            holds. Exported variants of the other subjects are measured where their folders hold them.
        threads: inside an operator, of torch and ONNX Runtime alike.
        timing: what is timed; None: `Timing()`.
        cost: also the peak memory of a fresh process and, where codecarbon is installed, energy; some seconds a model.
        device: "cpu" or "cuda"; exported variants open on the same.
        seed: of resampled intervals and timed inputs.
        progress: show bars.

    Returns:
        what was appended, in order. The hashes of the student's torch weights are recorded beside it.

    Raises:
        ForeignFileError: if none of the variants is there, or a file is malformed.
        MismatchError: if teacher, baseline and student do not have the same classes in the same order, or are no
            single-label classifiers, or weights are missing.
    """
    folder = Path(folder)
    task = task if isinstance(task, Task) else read_task(task)
    if variants is None:
        variants = ("torch", *sorted(path.parent.name for path in folder.glob("onnx*/model.onnx")))
    with latency.torch_threads(threads):
        beside = {"teacher": teacher, "alone": alone, **(others or {})}
        candidates = [
            candidate
            for subject, source in beside.items()
            if source is not None
            for candidate in _beside(subject, source, variants, device, threads)
        ]
        candidates += load_variants("student", folder, variants, device, threads)
        check_classes(candidates)
        rows = load_examples(task, candidates[-1].model.config.label2id)
        found = [*_scores(candidates, rows, task, seed, progress), *_sizes(candidates)]
        found += _latencies(candidates, timing or Timing(), threads, seed, progress)
        if cost:
            found += _costs(candidates, timing or Timing(), threads, device, seed, progress)
    facts.append(folder, *found)
    if any((one.subject, one.variant) == ("student", "torch") for one in candidates):
        facts.register(folder, _weights(folder))
    return tuple(found)


def _weights(folder: Path) -> list[Path]:
    """The files of the torch weights, whose hashes tell later that these were measured; not links out of the folder."""
    root = folder.resolve()
    return [path for path in sorted(folder.glob("model*.safetensors")) if path.resolve().is_relative_to(root)]


def torch_candidate(subject: str, source: str | Path, device: str) -> Candidate:
    """The torch classifier of a folder or hub id."""
    with foreign.loading(source, f"as {subject}", "Evaluate a trained classifier."):
        config = foreign.config(source)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, output_loading_info=True, **foreign.SAFE
        )
    if loading["missing_keys"]:
        raise MismatchError(
            f"{subject}: the weights lack {', '.join(sorted(loading['missing_keys'])[:3])}, which would be random. "
            "Evaluate a trained classifier."
        )
    tokenizer = foreign.tokenizer(source)
    folder = Path(source) if Path(source).is_dir() else None
    model = model.eval().to(device)
    return Candidate(
        subject=subject, variant="torch", model=model, tokenizer=tokenizer, provider=f"torch-{device}", folder=folder
    )


def _beside(subject: str, source: str | Path, variants: Sequence[str], device: str, threads: int) -> list[Candidate]:
    """Another subject: what its folder holds of the variants, or the torch model of a hub id."""
    if not Path(source).is_dir():
        return [torch_candidate(subject, source, device)]
    return load_variants(subject, Path(source), variants, device, threads)


def load_variants(subject: str, folder: Path, variants: Sequence[str], device: str, threads: int) -> list[Candidate]:
    """The models of a folder, those of the variants that it holds; ForeignFileError if it holds none of them."""
    found = []
    for variant in variants:
        marker = folder / "config.json" if variant == "torch" else folder / variant / "model.onnx"
        if not marker.is_file():
            if subject == "student":  # of the others an export is welcome, not expected
                logger.info("%s holds no %s variant (%s): skipped.", folder.name, variant, marker.relative_to(folder))
        elif variant == "torch":
            found.append(torch_candidate(subject, folder, device))
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


def check_classes(candidates: Sequence[Candidate]) -> None:
    """Refuses models that are no single-label classifiers of the same classes in the same order as the last one's."""
    config = candidates[-1].model.config
    student = config.id2label
    if len(student) < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise MismatchError(
            f"the student has {len(student)} classes and problem_type {config.problem_type!r}: accuracy and loyalty "
            "need one class of at least two a row. Score regression and multi-label models with metrics of your own."
        )
    for candidate in candidates[:-1]:
        if (other := candidate.model.config.id2label) != student:
            raise MismatchError(
                f"{candidate.name} has the classes {other}, the student {student}. Agreement needs the same classes in "
                "the same order: set id2label and label2id of both configs alike."
            )


def _scores(
    candidates: Sequence[Candidate], rows: Examples, task: Task, seed: int, progress: bool
) -> list[facts.Measurement]:
    logits = {}
    for one in candidates:
        logits[one.name] = quality.predict(
            one.model,
            one.tokenizer,
            rows.texts,
            batch_size=task.batch_size,
            max_length=task.max_length,
            progress=progress,
        )
    student = candidates[-1]
    classes = [name for _, name in sorted(student.model.config.id2label.items())]
    tokens = None
    if task.slices:  # of the student's tokens for all, so that a slice is the same rows of every subject
        tokens = quality.token_counts(student.model, student.tokenizer, rows.texts, max_length=task.max_length)
    teacher, alone = logits.get("teacher torch"), logits.get("alone torch")
    found: list[facts.Measurement] = []
    for one in candidates:
        own = logits[one.name]
        target = None if one.subject == "teacher" else teacher
        found += quality.measure_classification(
            one.subject, one.variant, own, rows.labels, rows.data, target, seed=seed, metrics=task.metrics
        )
        if tokens is not None and rows.labels is not None:
            found += quality.measure_slices(
                one.subject, one.variant, own, rows.labels, rows.data, classes=classes, tokens=tokens, seed=seed
            )
        if one.subject not in ("teacher", "alone") and rows.labels is not None:
            found += quality.measure_derived(
                one.subject,
                one.variant,
                own,
                rows.labels,
                rows.data,
                teacher_logits=teacher,
                alone_logits=alone,
                seed=seed,
            )
    return found


def _sizes(candidates: Sequence[Candidate]) -> list[facts.Measurement]:
    found: list[facts.Measurement] = []
    for one in candidates:
        if one.folder is not None:
            found += quality.measure_size(one.subject, one.variant, one.folder)
        else:  # a hub id: its files lie in a cache that is not ours to count
            count = one.model.num_parameters()
            found.append(
                facts.Measurement(
                    subject=one.subject, variant=one.variant, metric="parameters", value=count, unit="count"
                )
            )
    return found


def _latencies(
    candidates: Sequence[Candidate], timing: Timing, threads: int, seed: int, progress: bool
) -> Iterable[facts.Measurement]:
    length = _length(candidates, timing)
    for batch in timing.batches:
        calls = {one.name: timed_call(one, batch, length, seed) for one in candidates}
        taken = latency.measure_all(
            calls,
            batch=batch,
            length=length,
            runs=timing.runs,
            warmup=timing.warmup,
            threads=threads,
            progress=progress,
        )
        for one in candidates:
            yield from taken[one.name].measurements(one.subject, one.variant, provider=one.provider)
            if batch == max(timing.batches):
                yield from costs.throughput(one.subject, one.variant, taken[one.name], provider=one.provider)


def _length(candidates: Sequence[Candidate], timing: Timing) -> int:
    return min([timing.length, *(quality.longest(one.model, one.tokenizer) for one in candidates)])


def _costs(
    candidates: Sequence[Candidate], timing: Timing, threads: int, device: str, seed: int, progress: bool
) -> Iterable[facts.Measurement]:
    """Memory and energy of the largest batch."""
    if not timing.batches:
        return
    batch, length = max(timing.batches), _length(candidates, timing)
    if not (tells := costs.measures_energy()):
        logger.info("energy is not measured: pip install 'hf-compress[energy]'")
    with fitting.shown("memory and energy", len(candidates), bar=progress) as advance:
        for one in candidates:
            where: dict[str, Setting] = {
                "threads": threads, "batch": batch, "length": length, "provider": one.provider
            }  # fmt: skip
            if (source := _source(one)) is not None:
                yield from costs.peak_memory(one.subject, one.variant, source, device=device, how=where)
            if tells:
                yield from costs.energy(one.subject, one.variant, timed_call(one, batch, length, seed), how=where)
            advance()


def _source(one: Candidate) -> str | Path | None:
    """What a fresh process can load: a folder, or the hub id of a torch model."""
    if one.folder is not None:
        return one.folder if one.variant == "torch" else one.folder / one.variant
    return str(one.model.name_or_path) or None


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
