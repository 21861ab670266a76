"""What fewer bits may cost, and the data on which it is measured: decisions, accuracy, perplexity, similarity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from hf_compress import facts, foreign
from hf_compress.errors import ConfigurationError, GateError

from .models import OnnxCausalLM, OnnxModel, OnnxSeq2SeqLM
from .parity import Inputs

Row = str | tuple[str, str] | Mapping[str, Any]
Model = OnnxModel | OnnxCausalLM | OnnxSeq2SeqLM
Measured = list[tuple[str, float, str, dict[str, facts.Setting]]]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a variant may lose against float32.

    | model | what is compared |
    |---|---|
    | classes of rows, tokens or spans | equal decisions; accuracy where labels are given |
    | several labels a row | equal decisions, label by label |
    | language model | equal next tokens, and perplexity |
    | encoder-decoder | equal next tokens after what float32 generates |
    | embeddings, hidden states, one number a row | cosine, over rows that have one number their correlation |
    """

    features: Sequence[Row]
    """Texts, pairs of texts, or rows that hold the model's inputs by name."""
    labels: Sequence[int] | None = None
    """One class per row; None: agreement alone decides."""
    max_drop: float = 0.01
    """Of accuracy, as a fraction: 0.01 is one point."""
    min_agreement: float = 0.95
    """Fraction of decisions (rows, real tokens, span ends) that equal those of the float32 graph. MiniLM: 0.991."""
    max_rise: float = 0.02
    """Of a language model's perplexity, as a fraction of the float32 graph's."""
    min_similarity: float = 0.98
    """Mean cosine of embeddings or hidden states; correlation of single numbers."""
    batch_size: int = 32
    new_tokens: int = 32
    """That an encoder-decoder generates for each row."""

    def __post_init__(self) -> None:
        if not len(self.features):
            raise ConfigurationError("Gate: no features, so nothing would be measured. Give rows of held-out data.")
        if self.labels is not None and len(self.labels) != len(self.features):
            raise ConfigurationError(f"Gate: {len(self.features)} features and {len(self.labels)} labels; one per row.")
        fractions = (self.max_drop, self.min_agreement, self.min_similarity)
        if not (all(0 <= one <= 1 for one in fractions) and self.max_rise >= 0):
            raise ConfigurationError(
                f"Gate: max_drop={self.max_drop}, min_agreement={self.min_agreement} and min_similarity="
                f"{self.min_similarity} are fractions, max_rise={self.max_rise} is at least 0."
            )
        if self.batch_size < 1 or self.new_tokens < 1:
            raise ConfigurationError(f"Gate: batch_size={self.batch_size}, new_tokens={self.new_tokens}: at least 1.")


def compare(gate: Gate, full: Model, small: Model, processing_class: Any) -> Measured:
    """What the variant loses against float32 on the gate's rows.

    Args:
        gate: rows and limits.
        full: the float32 graphs.
        small: the variant's.
        processing_class: the tokenizer or processor, for rows that are texts.

    Returns:
        metric, value, unit and conditions.

    Raises:
        GateError: if it is more than the gate allows: how much of what.
        ConfigurationError: if rows or labels do not fit the model.
    """
    batches = list(_batches(gate, full, processing_class))
    how: dict[str, facts.Setting] = {"rows": len(gate.features), "fingerprint": facts.fingerprint(gate.features)}
    how["provider"] = small.provider
    if isinstance(full, OnnxModel) and _is_continuous(full, batches[0]):
        return _similarity(gate, full, small, batches, how)
    pairs, losses = [], []
    for inputs in batches:
        given = _forced(full, inputs, gate.new_tokens)
        outputs = [model(**given) for model in (full, small)]
        pairs.append([_decisions(one, given, full, broken) for one, broken in zip(outputs, (-1, -2), strict=True)])
        if isinstance(full, OnnxCausalLM):
            losses.append([_loss(one.logits, given) for one in outputs])
    expected, found = (torch.cat(side) for side in zip(*pairs, strict=True))
    how["decisions"] = len(expected)
    agreement = (expected == found).double().mean().item()
    measured: Measured = [("agreement_with_fp32", agreement, "fraction", how)]
    said = [f"decides like float32 in {agreement:.4f} of {len(expected)} cases (at least {gate.min_agreement})"]
    failed = agreement < gate.min_agreement
    if gate.labels is not None:
        drop = _accuracy(expected, gate.labels) - _accuracy(found, gate.labels)
        measured.append(("accuracy_drop", drop, "fraction", how))
        said.append(f"loses {drop:.4f} of accuracy (at most {gate.max_drop})")
        failed |= drop > gate.max_drop
    elif losses:
        count = sum(tokens for (_, tokens), _ in losses)
        before, after = (sum(pair[side][0] for pair in losses) / count for side in (0, 1))
        rise = math.expm1(after - before)
        measured.append(("perplexity_rise", rise, "ratio", how))
        said.append(f"raises perplexity by {rise:.4f} of it (at most {gate.max_rise})")
        failed |= not rise <= gate.max_rise
    else:
        said.append("loses an unmeasured part of accuracy")
    if failed:
        raise GateError(f"{' and '.join(said)} on {len(gate.features)} rows.")
    return measured


def _is_continuous(model: OnnxModel, inputs: Inputs) -> bool:
    """Whether it gives numbers instead of choices."""
    row = {name: value[:1] for name, value in inputs.items()}
    outputs = model(**row)
    if not {"logits", "start_logits"} & set(outputs):
        return True
    return ("logits" in outputs and outputs["logits"].shape[-1] == 1) or _problem(model.config) == "regression"


def _problem(config: PretrainedConfig | None) -> str | None:
    return getattr(config, "problem_type", None)


def _similarity(
    gate: Gate, full: OnnxModel, small: Model, batches: list[Inputs], how: dict[str, facts.Setting]
) -> Measured:
    if gate.labels is not None:
        raise ConfigurationError("Gate: labels are classes, and the graph gives numbers. Leave them out.")
    pairs = [[_numbers(model(**inputs), inputs) for model in (full, small)] for inputs in batches]
    expected, found = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    if expected.shape[-1] == 1:  # one number a row: how the rows differ, not how far they are from zero
        expected, found = (side.flatten()[None] - side.mean() for side in (expected, found))
    similarity = F.cosine_similarity(expected, found, dim=-1).nan_to_num(nan=-1.0).mean().item()
    if similarity < gate.min_similarity:
        raise GateError(
            f"is like float32 to {similarity:.4f} (at least {gate.min_similarity}) on {len(gate.features)} rows."
        )
    return [("similarity_to_fp32", similarity, "fraction", how)]


def _numbers(outputs: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """(row or real token, width) of the first output."""
    values = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
    mask = inputs.get("attention_mask")
    if mask is not None and values.shape[:2] == mask.shape:
        return values[mask.bool()]
    return values.flatten(0, -2) if values.ndim > 1 else values[:, None]


def _forced(model: Model, inputs: Inputs, new_tokens: int) -> Inputs:
    """For an encoder-decoder also what float32 generates greedily, so that both decide after the same tokens."""
    if not isinstance(model, OnnxSeq2SeqLM):
        return inputs
    made = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=new_tokens)
    return {**inputs, "decoder_input_ids": made[:, :-1] if made.shape[1] > 1 else made}


def _accuracy(decisions: Tensor, labels: Sequence[int]) -> float:
    if decisions.shape != (len(labels),):
        raise ConfigurationError(
            f"Gate: {len(labels)} labels and {len(decisions)} decisions; labels are for models that decide once per "
            "row. Leave them out: agreement alone decides."
        )
    return (decisions == torch.as_tensor(list(labels))).double().mean().item()


def _loss(logits: Tensor, inputs: Inputs) -> tuple[float, int]:
    """Summed nats of the next tokens, and their number."""
    mask = inputs.get("attention_mask")
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    scored = real[:, 1:] & real[:, :-1]
    logs = logits[:, :-1].float().log_softmax(-1)
    chosen = logs.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)[scored]
    return -chosen.double().sum().item(), int(scored.sum())


def _decisions(outputs: Mapping[str, Tensor], inputs: Inputs, model: Model, broken: int) -> Tensor:
    """(decision,) classes of the rows or real tokens, or positions of span ends; `broken` at NaN."""
    mask = inputs.get("attention_mask")
    real = None if mask is None or "decoder_input_ids" in inputs else mask.bool()
    found = []
    for name in ("logits", "start_logits", "end_logits"):
        if (logits := outputs.get(name)) is None:
            continue
        if name == "logits" and _problem(model.config) == "multi_label_classification":
            found.append((logits > 0).long().masked_fill(logits.isnan(), broken).flatten())
            continue
        if real is not None and name != "logits":
            logits = logits.masked_fill(~real, -math.inf)
        chosen = logits.argmax(-1).masked_fill(logits.isnan().any(-1), broken)
        found.append(chosen[real] if real is not None and chosen.shape == real.shape else chosen.flatten())
    return torch.cat(found)


def _batches(gate: Gate, model: Model, processing_class: Any) -> Iterator[Inputs]:
    names = model.encoder.input_names if isinstance(model, OnnxSeq2SeqLM) else model.input_names
    for start in range(0, len(gate.features), gate.batch_size):
        rows = list(gate.features[start : start + gate.batch_size])
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if not isinstance(rows[0], Mapping):
            if not callable(tokenizer):
                raise ConfigurationError("Gate: texts need a tokenizer beside the export. Give rows of input tensors.")
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            with foreign.encoding(tokenizer):
                inputs = tokenizer(rows, padding=True, truncation=True, return_tensors="pt")
        else:
            columns = [{name: row[name] for name in names if name in row} for row in rows if isinstance(row, Mapping)]
            if "input_ids" in columns[0] and hasattr(tokenizer, "pad"):
                inputs = tokenizer.pad(columns, return_tensors="pt")
            else:
                inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in columns]) for name in columns[0]}
        yield {name: inputs[name] for name in names if name in inputs}
