"""Measures a student's folder beside its teacher and a baseline, and appends what was found to its record."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_compress import bars, facts
from hf_compress.facts import Setting

from . import cost as costs
from . import latency, quality, scoring
from .candidates import Candidate, beside, load_variants, timed_call
from .task import Task, read_task

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
        MismatchError: if teacher, baseline and student do not have the same classes in the same order, or do not fit
            the task, or weights are missing.
    """
    folder = Path(folder)
    task = task if isinstance(task, Task) else read_task(task)
    if variants is None:
        variants = ("torch", *sorted(path.parent.name for path in folder.glob("onnx*/model.onnx")))
    auto = scoring.AUTO[task.task]
    with latency.torch_threads(threads):
        subjects = {"teacher": teacher, "alone": alone, **(others or {})}
        candidates = [
            candidate
            for subject, source in subjects.items()
            if source is not None
            for candidate in beside(subject, source, variants, device, threads, auto)
        ]
        candidates += load_variants("student", folder, variants, device, threads, auto)
        found = [*_scores(candidates, task, seed, progress), *_sizes(candidates)]
        found += _latencies(candidates, timing or Timing(), threads, seed, progress)
        if cost:
            found += _costs(candidates, timing or Timing(), threads, device, seed, progress)
    facts.append(folder, *found)
    if any((one.subject, one.variant) == ("student", "torch") for one in candidates):
        facts.register(folder, _weights(folder))
    return tuple(found)


def _scores(candidates: Sequence[Candidate], task: Task, seed: int, progress: bool) -> list[facts.Measurement]:
    scorer = scoring.scorer(task.task, candidates[-1].model.config)
    scorer.check(candidates)
    rows = scorer.load(task, candidates[-1].model.config)
    student = candidates[-1]
    said = {one.name: scorer.predict(one, rows, task, progress=progress) for one in candidates}
    teacher, alone = said.get("teacher torch"), said.get("alone torch")
    found: list[facts.Measurement] = []
    for one in candidates:
        beside = {} if one.subject == "teacher" else {"teacher": teacher}
        beside |= {} if one.subject in ("teacher", "alone") else {"alone": alone}
        found += scorer.measure(one, said[one.name], rows, task, student=student, seed=seed, **beside)
    return found


def _weights(folder: Path) -> list[Path]:
    """The files of the torch weights, whose hashes tell later that these were measured; not links out of the folder."""
    root = folder.resolve()
    return [path for path in sorted(folder.glob("model*.safetensors")) if path.resolve().is_relative_to(root)]


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
    with bars.shown("memory and energy", len(candidates), bar=progress) as advance:
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
