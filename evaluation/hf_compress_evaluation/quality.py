"""Predictions of a model, and what they and its folder are worth, as facts.

| metric | unit | needs |
|---|---|---|
| `accuracy`, `f1_macro` | fraction | labels |
| `f1_micro`, `calibration_error` | fraction | labels; if asked for |
| `matthews_correlation` | correlation | labels; if asked for |
| `kl` | nats | the teacher's logits; if asked for |
| `accuracy_by_class`, `accuracy_by_length` | fraction | labels; if slices are asked for |
| `label_loyalty`, `probability_loyalty` | fraction | the teacher's logits |
| `retention`, `gap_closed` | ratio | the teacher's logits (and the baseline's) and labels; of the accuracy |
| `gain` | fraction | the baseline's logits and labels; of the accuracy |
| `bytes`, `parameters` | bytes, count | a folder |

Of time, memory and energy: `latency.py` and `cost.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase

from hf_compress import foreign
from hf_compress.errors import ConfigurationError, ForeignFileError, MismatchError, NumericalError, UnknownNameError
from hf_compress.facts import FILE, Data, Measurement, Setting, Text

from . import agreement, calibration, intervals

logger = logging.getLogger(__name__)

Logits = NDArray[np.float32]
Labels = NDArray[np.int64]

QUALITY = ("accuracy", "f1_macro")
"""Measured unless a task asks for others."""
OF_LABELS = (*QUALITY, "f1_micro", "matthews_correlation", "calibration_error")
METRICS = (*OF_LABELS, "kl")
"""What a task may ask for."""
LENGTH = 512
"""Tokens kept of a row where neither the tokenizer nor the config sets a limit."""
_NOT_THE_MODEL = {FILE, "README.md", "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt"}


class _Fact(Protocol):
    """`_fact` of one subject, variant and data set."""

    def __call__(self, name: str, estimate: intervals.Estimate, unit: str, **how: Setting) -> Measurement | None:
        """Arguments as `_fact`."""


class Classifier(Protocol):
    """A torch classifier or an exported one."""

    @property
    def config(self) -> PretrainedConfig | None:
        """With `num_labels` and `id2label`."""

    @property
    def device(self) -> torch.device:
        """Where inputs are brought."""

    def __call__(self, **inputs: Any) -> Any:
        """From `input_ids`, `attention_mask` and the like, (batch, time), to an object with `logits`."""


def longest(model: Classifier, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest row that both take; `LENGTH` where neither says."""
    limit = getattr(model.config, "max_position_embeddings", None) or LENGTH
    return int(min(tokenizer.model_max_length, limit))


def predict(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = False,
) -> Logits:
    """Logits of each text, in the order of the texts.

    Rows of like length share a batch, so little is padded. The model computes in eval mode without gradients; the
    mode of each of its modules returns afterwards.

    Args:
        model: a classifier of (batch, class) logits.
        tokenizer: the model's own.
        texts: at least one.
        batch_size: rows of one forward.
        max_length: tokens kept of each row, at most `longest(model, tokenizer)`; None: as many.
        progress: show a bar.

    Returns:
        (row, class) float32.

    Raises:
        ConfigurationError: if there is no text, or one is no string (the message names its row).
        NumericalError: if a logit is NaN or infinite (likewise).
        MismatchError: if the logits are not (batch, class).
    """
    check_texts(texts)
    rows = encoded(model, tokenizer, texts, max_length)
    parts = outputs(model, tokenizer, rows, lambda output, _: output.logits, batch_size=batch_size, progress=progress)
    if parts[0].ndim != 1:
        raise MismatchError(
            f"predict: logits of shape {parts[0].shape} for a row, expected (class,). Use a classifier."
        )
    return np.stack(parts)


def check_texts(texts: Sequence[str]) -> None:
    """Raises ConfigurationError if there is no text, or one is no string (the message names its row)."""
    if not len(texts):
        raise ConfigurationError("predict: no texts. Check the data set and its row limit.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigurationError(f"predict: row {row} is {text!r}, not a text. Fill it in or drop the row.")


def outputs(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: BatchEncoding,
    read: Callable[[Any, Mapping[str, Tensor]], Tensor],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[NDArray[np.float32]]:
    """What is read of the model's output for each row, in the order of the rows.

    Rows of like length share a batch, so little is padded. The model computes in eval mode without gradients; the
    mode of each of its modules returns afterwards.

    Args:
        model: torch or exported.
        tokenizer: the model's own.
        texts: (row, time) lists of ids and masks, unpadded.
        read: from the output and the padded inputs, (batch, time), to a tensor whose first axis is the row. Where the
            second is time, its padding is cut off.
        batch_size: rows of one forward.
        progress: show a bar.

    Raises:
        NumericalError: if a value is NaN or infinite (the message names its row).
    """
    foreign.check_ids(texts["input_ids"], model, tokenizer)
    lengths = [len(ids) for ids in texts["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # longest first: memory peaks at once
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    names = [name for name in tokenizer.model_input_names if name in texts and takes(model, name)]
    found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(lengths)
    with evaluating(model), torch.inference_mode():
        shown = Console(stderr=True)
        for rows in track(batches, description="  predict", disable=not progress, transient=True, console=shown):
            padded = tokenizer.pad({name: [texts[name][row] for row in rows] for name in names}, return_tensors="pt")
            inputs = {name: padded[name].to(model.device) for name in names}
            values = read(model(**inputs), inputs).float().cpu().numpy()
            by_time = values.ndim > 2
            for row, value in zip(rows, values, strict=True):
                own = slice(-lengths[row], None) if tokenizer.padding_side == "left" else slice(lengths[row])
                found[row] = value[own].copy() if by_time else value
    for row, value in enumerate(found):
        if not np.isfinite(value).all():
            raise NumericalError(f"predict: the outputs of row {row} are {value.ravel()[:8]}. Look for NaN weights.")
    return found


def token_counts(
    model: Classifier, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_length: int | None = None
) -> NDArray[np.int64]:
    """(row,) tokens that `predict` gives the model of each text, special ones included, longer texts cut."""
    rows = encoded(model, tokenizer, texts, max_length)
    return np.array([len(ids) for ids in rows["input_ids"]], np.int64)


def encoded(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Any],
    max_length: int | None,
    **settings: Any,
) -> BatchEncoding:
    """Ids and masks of the texts, longer ones cut; settings of the tokenizer, e.g. `is_split_into_words`."""
    taken = longest(model, tokenizer)
    with foreign.encoding(tokenizer):
        return tokenizer(list(texts), truncation=True, max_length=min(max_length or taken, taken), **settings)


def takes(model: Classifier, name: str) -> bool:
    """Whether the model reads that input: a tokenizer may make more (token_type_ids for DistilBERT)."""
    if (session := getattr(model, "session", None)) is not None:
        return name in {spec.name for spec in session.get_inputs()}
    forward: Callable[..., Any] = getattr(model, "forward", model)
    parameters = inspect.signature(forward).parameters
    if isinstance(model, nn.Module):  # its **kwargs, if any, are for inner layers
        return name in parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Eval mode inside; the mode of each module on its own returns, also after an error."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def measure_classification(
    subject: str,
    variant: str,
    logits: Logits,
    labels: Labels | None,
    data: Data,
    teacher_logits: Logits | None = None,
    *,
    seed: int = 0,
    metrics: Sequence[str] = QUALITY,
) -> tuple[Measurement, ...]:
    """Quality and agreement with the teacher, each with its 95 % interval.

    Args:
        subject: whose logits they are.
        variant: torch, onnx, ...
        logits: (row, class).
        labels: (row,) class ids; None: agreement only.
        data: the rows' name and fingerprint.
        teacher_logits: (row, class); None: quality only.
        seed: of the resampling.
        metrics: which of `METRICS`; those that need labels or a teacher are left out without.

    Returns:
        those of the labels in the order of `metrics`, then agreement with the teacher.

    Raises:
        UnknownNameError: for a metric that is not in `METRICS`.
        MismatchError: if labels and logits do not fit together.
    """
    fact = partial(_fact, subject, variant, data, seed)
    for name in metrics:
        if name not in METRICS:
            raise UnknownNameError("metric", name, METRICS)
    found: list[Measurement | None] = []
    if labels is not None:
        found += [_of_labels(name, fact, logits, labels, seed) for name in metrics if name in OF_LABELS]
    if teacher_logits is not None:
        same = intervals.mean(agreement.label_loyalty_rows(logits, teacher_logits), seed=seed)
        near = intervals.mean(agreement.probability_loyalty_rows(logits, teacher_logits), seed=seed)
        found.append(fact("label_loyalty", same, "fraction"))
        found.append(fact("probability_loyalty", near, "fraction", logarithm="natural"))
        if "kl" in metrics:
            found.append(fact("kl", _kl(logits, teacher_logits, seed), "nats", direction="teacher to student"))
    return tuple(one for one in found if one)


def _of_labels(name: str, fact: _Fact, logits: Logits, labels: Labels, seed: int) -> Measurement | None:
    correct, chosen = right(logits, labels), logits.argmax(-1)
    if name == "f1_macro":
        return fact(name, intervals.macro_f1(chosen, labels, seed=seed), "fraction")
    if name == "matthews_correlation":
        return fact(name, intervals.matthews_correlation(chosen, labels, seed=seed), "correlation")
    if name == "calibration_error":
        estimate = intervals.calibration_error(calibration.confidence_rows(logits), correct, seed=seed)
        return fact(name, estimate, "fraction", bins=calibration.BINS)
    return fact(name, intervals.mean(correct, seed=seed), "fraction")  # accuracy, which of one class a row is micro-F1


def _kl(logits: Logits, teacher_logits: Logits, seed: int) -> intervals.Estimate:
    rows = agreement.kl_rows(logits, teacher_logits)
    if not np.isfinite(rows).all():
        note = "the student excludes a class that the teacher does not, so that it is infinite"
        return intervals.Estimate(value=None, interval=None, note=note)
    return intervals.mean(rows, seed=seed)


def measure_slices(
    subject: str,
    variant: str,
    logits: Logits,
    labels: Labels,
    data: Data,
    *,
    classes: Sequence[str],
    tokens: NDArray[np.int64],
    seed: int = 0,
) -> tuple[Measurement, ...]:
    """Accuracy of the rows of each class, and of each quarter of the rows by length, each with its 95 % interval.

    Args:
        subject, variant, logits, labels, data, seed: as `measure_classification`.
        classes: names, in the order of the logits.
        tokens: (row,) token counts, e.g. of `token_counts`. Rows of one count stay together, so that there may be
            fewer than four quarters.

    Returns:
        `accuracy_by_class` with `how={"class": name}` (`#2` for the third, if its name may not stand in a record),
        then `accuracy_by_length` with `how={"tokens": "1-17"}`, both bounds included. A class without rows is left
        out. Their names are not `accuracy`, so that none of them is taken for that of all rows.

    Raises:
        MismatchError: if labels, counts, names and logits do not fit together.
    """
    correct = right(logits, labels)
    if len(classes) != logits.shape[1] or tokens.shape != correct.shape:
        raise MismatchError(
            f"quality: {len(classes)} class names and token counts {tokens.shape} for logits {logits.shape}, expected "
            "one name a class and one count a row."
        )
    fact = partial(_fact, subject, variant, data, seed)
    found: list[Measurement | None] = []
    for index, name in enumerate(classes):
        if (rows := correct[labels == index]).size:
            how = {"class": _recordable(name, f"#{index}")}
            found.append(fact("accuracy_by_class", intervals.mean(rows, seed=seed), "fraction", **how))
    bounds = np.quantile(tokens, (0.25, 0.5, 0.75), method="inverted_cdf")
    quarter = np.searchsorted(bounds, tokens, side="left")
    for index in np.unique(quarter):
        inside = quarter == index
        low, high = tokens[inside].min(), tokens[inside].max()
        estimate = intervals.mean(correct[inside], seed=seed)
        found.append(fact("accuracy_by_length", estimate, "fraction", tokens=f"{low}-{high}"))
    return tuple(one for one in found if one)


def _recordable(name: str, other: str) -> str:
    """The name, or the other one if a record refuses it, as it does what looks like a path (/m/09x0r)."""
    try:
        return TypeAdapter(Text).validate_python(name)
    except ValidationError:
        return other


def measure_derived(
    subject: str,
    variant: str,
    own: intervals.Statistic,
    data: Data,
    *,
    metric: str,
    unit: str = "fraction",
    teacher: intervals.Statistic | None = None,
    alone: intervals.Statistic | None = None,
    seed: int = 0,
    how: Mapping[str, Setting] = MappingProxyType({}),
) -> tuple[Measurement, ...]:
    """A score beside the teacher's and the baseline's on the same rows: `retention`, `gap_closed`, `gain`.

    Args:
        subject, variant, data, seed: as `measure_classification`.
        own, teacher, alone: the score as a figure of each; alone is the baseline: the student's start, trained on the
            labels without a teacher. What has no value (the teacher does not lead) is left out and logged.
        metric, unit: of the score.
        how: further conditions of the gain.

    Returns:
        nothing for the subjects teacher and alone, which are what others are compared with.
    """
    if subject in ("teacher", "alone"):
        return ()
    fact = partial(_fact, subject, variant, data, seed)
    found: list[Measurement | None] = []
    if teacher is not None:
        found.append(fact("retention", intervals.retention(own, teacher, seed=seed), "ratio", metric=metric))
    if teacher is not None and alone is not None:
        closed = intervals.gap_closed(own, teacher, alone, seed=seed)
        found.append(fact("gap_closed", closed, "ratio", metric=metric))
    if alone is not None:
        found.append(fact("gain", intervals.gain(own, alone, seed=seed), unit, metric=metric, **how))
    return tuple(one for one in found if one)


def measure_figure(
    subject: str,
    variant: str,
    name: str,
    figure: intervals.Statistic,
    data: Data,
    *,
    unit: str = "fraction",
    seed: int = 0,
    how: Mapping[str, Setting] = MappingProxyType({}),
) -> tuple[Measurement, ...]:
    """One figure with its 95 % interval as a fact; nothing, with a log line, where it is undefined."""
    estimate = intervals.estimate(figure, seed=seed)
    found = _fact(subject, variant, data, seed, name, estimate, unit, **how)
    return () if found is None else (found,)


def measure_size(subject: str, variant: str, folder: Path) -> tuple[Measurement, ...]:
    """Size on disk of a variant, and for torch the number of parameters.

    Args:
        subject: whose folder it is.
        variant: "torch": the model, config and tokenizer files at the top of the folder, not the record, the card or
            the Trainer's state; otherwise every file of the subfolder of that name.
        folder: the model's folder.

    Returns:
        `bytes`, and `parameters` where there are safetensors files: the numbers in them, tied ones once, buffers
        that the model saves included.

    Raises:
        ForeignFileError: if there is no file to count.
    """
    place = folder if variant == "torch" else folder / variant
    found = [path for path in (place.iterdir() if variant == "torch" else place.rglob("*")) if path.is_file()]
    if variant == "torch":
        found = [path for path in found if path.name not in _NOT_THE_MODEL and not path.name.startswith((".", "rng_"))]
    if not found:
        raise ForeignFileError(place, "holds no file of the model.", "Save or export it first.")
    total = sum(path.stat().st_size for path in found)
    facts = [Measurement(subject=subject, variant=variant, metric="bytes", value=total, unit="bytes")]
    weights = [path for path in found if path.suffix == ".safetensors"]
    if weights:
        count = sum(map(_numbers, weights))
        facts.append(Measurement(subject=subject, variant=variant, metric="parameters", value=count, unit="count"))
    return tuple(facts)


def right(logits: Logits, labels: Labels) -> NDArray[np.float64]:
    """(row,) 1.0 where the highest logit of (row, class) is the label's, else 0.0."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise MismatchError(
            f"quality: logits {logits.shape} and labels {labels.shape} must be (row, class) and (row,). "
            "Score the rows that the labels belong to."
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise MismatchError(
            f"quality: labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes. "
            "Map them to class ids."
        )
    return np.asarray(logits.argmax(-1) == labels, np.float64)


def _numbers(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118


def _fact(
    subject: str,
    variant: str,
    data: Data,
    seed: int,
    name: str,
    estimate: intervals.Estimate,
    unit: str,
    **how: Setting,
) -> Measurement | None:
    """The estimate as a fact; None, with a log line, if it has no value."""
    if estimate.value is None:
        logger.info("%s of %s (%s) is not recorded: %s.", name, subject, variant, estimate.note)
        return None
    if estimate.note:
        how["interval"] = estimate.note
    return Measurement(
        subject=subject,
        variant=variant,
        metric=name,
        value=estimate.value,
        unit=unit,
        interval=estimate.interval,
        data=data,
        seed=seed,
        how=how,
    )
