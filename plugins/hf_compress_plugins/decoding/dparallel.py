"""A masked diffusion model learns to be sure of many tokens at once, from its own answers.

Chen, Fang, Ma, Yu, Wang: dParallel: Learnable Parallel Decoding for dLLMs, 2025, arXiv:2509.26488.

    segment: one block of the answer, drawn; behind it all is masked, before it all is clean
    view A masks each token of the segment with probability ½, view B the other ones; two forwards
    L = Σ_views [ mean over masked of -log p(x_i)  +  β · mean over masked and right of H( softmax(z_i / 0.5) ) ]

A token is right where the argmax is the answer's; that choice carries no gradient. Only the segment's masked tokens
count, not the tail. There is no teacher forward: the model's own slow answers are the data, end tokens behind them
included. Decoding goes block by block and unmasks every token whose entropy is at most a threshold, or the surest one;
or by the probability of the best token, or a fixed number of tokens a step, what it is compared with.

For Dream the segment is the whole answer (`block=None`) and the logits of one place are of the next token (`shifted`).

Differences from the authors' code: segments and masks are drawn for each row, where the code writes those of one row
into all rows of a batch; no segment is empty, where the code draws one behind an answer of whole blocks. Means run over
the masked tokens of a batch, as in their code of one row a batch, so that accumulation changes their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step, tokens
from hf_compress.registry import Method
from hf_compress.taps import unwrap
from hf_compress_plugins.decoding._modeling_masked_diffusion import (
    MaskedDiffusionConfig,
    MaskedDiffusionForMaskedLM,
)

EPSILON = 1e-3
"""Of the masking probability (authors' code)."""
TEMPERATURE = 0.5
"""Of the distribution whose entropy is lowered (authors' code)."""
Certainty = Literal["entropy", "confidence"]
PROMPT = "prompt_length"
"""Column of the batch: (row,) tokens before the answer."""


@dataclass(frozen=True, kw_only=True)
class DParallelConfig:
    """Hyper-parameters of dParallel; the authors' for LLaDA."""

    beta: float = 2.0
    """β ≥ 0; 1 for Dream."""
    block: int | None = 32
    """Tokens of a block; None: the whole answer is one, as for Dream."""
    shifted: bool = False
    """The model's logits are of the next token, as Dream's."""
    mask_token_id: int | None = None
    """Of the token that stands for an unknown one; None: that of the student's config."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf or (self.block is not None and self.block < 1):
            raise ConfigurationError(f"dparallel: beta must be at least 0 and block at least 1, got {self}.")


def segment(prompt: int, length: int, *, block: int | None, draw: torch.Generator) -> tuple[int, int]:
    """(start, end) of one block of an answer, drawn; the last one may be shorter. Without blocks, of the whole answer.

    Raises:
        MismatchError: if there is no answer.
    """
    if prompt >= length:
        raise MismatchError(f"dparallel: a prompt of {prompt} tokens leaves no answer in {length}.")
    if block is None:
        return prompt, length
    blocks = math.ceil((length - prompt) / block)
    start = prompt + block * int(torch.randint(blocks, (), generator=draw, device=draw.device))
    return start, min(start + block, length)


def corrupt(ids: Tensor, chosen: Tensor, end: int, *, mask: int) -> tuple[Tensor, Tensor]:
    """One row with the chosen tokens and everything from `end` on masked.

    Args:
        ids: (time,)
        chosen: (time,) bool, inside the segment.
        end: where the segment ends.
        mask: id of the mask token.

    Returns:
        (time,) ids, and `chosen`.
    """
    tail = torch.arange(len(ids), device=ids.device) >= end
    return ids.masked_fill(chosen | tail, mask), chosen


def certainty_losses(logits: Tensor, labels: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the masked tokens, and the entropy of those that are right.

    Args:
        logits: (batch, time, vocab), any float type; widened to float32.
        labels: (batch, time) the clean ids.
        masked: (batch, time) bool.

    Returns:
        () and () means in nats, 0 over nothing.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows, wanted = logits[masked].to(dtype), labels[masked]
    plain = F.cross_entropy(rows, wanted, reduction="sum") / max(len(wanted), 1)
    right = rows.detach().argmax(-1) == wanted
    probabilities = (rows[right] / TEMPERATURE).softmax(-1)
    entropy = -(probabilities * (probabilities + 1e-12).log()).sum(-1)
    return plain, entropy.sum() / max(int(right.sum()), 1)


def sureness(logits: Tensor, *, by: Certainty) -> Tensor:
    """(…) how sure a model is of its best token, higher is surer: minus the entropy in nats, or the probability.

    Args:
        logits: (…, vocab), any float type; widened to float64.
        by: which of the two.
    """
    probabilities = logits.double().softmax(-1)
    if by == "confidence":
        return probabilities.amax(-1)
    return (probabilities * (probabilities + 1e-12).log()).sum(-1)


def unmask(
    logits: Tensor, ids: Tensor, masked: Tensor, *, threshold: float, by: Certainty = "entropy", strict: bool = False
) -> tuple[Tensor, Tensor]:
    """What one decoding step fills in.

    Args:
        logits: (batch, time, vocab).
        ids: (batch, time) the sequence so far.
        masked: (batch, time) bool, tokens that may be filled in.
        threshold: entropy in nats, at or below which a token is taken, or probability, at or above which it is; the
            surest of a row always is.
        by: which of the two.
        strict: a token at the threshold is not taken, as in Dream's decoding.

    Returns:
        (batch, time) predictions where masked, the sequence elsewhere; and bool, which of them are taken.
    """
    best = torch.where(masked, logits.argmax(-1), ids)
    sure = sureness(logits, by=by).masked_fill(~masked, -math.inf)
    limit = -threshold if by == "entropy" else threshold
    surest = torch.zeros_like(masked).scatter_(1, sure.argmax(1, keepdim=True), True)
    return best, masked & ((sure > limit if strict else sure >= limit) | surest)


def unmask_some(logits: Tensor, ids: Tensor, masked: Tensor, *, counts: Tensor) -> tuple[Tensor, Tensor]:
    """What one decoding step fills in that takes a given number of tokens, the most probable ones.

    Args:
        logits: (batch, time, vocab).
        ids: (batch, time) the sequence so far.
        masked: (batch, time) bool, tokens that may be filled in.
        counts: (batch,) tokens of each row to take.

    Returns:
        as `unmask`.
    """
    best = torch.where(masked, logits.argmax(-1), ids)
    sure = sureness(logits, by="confidence").masked_fill(~masked, -math.inf)
    rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return best, masked & (rank < counts[:, None])


def tokens_each_step(masked: Tensor, steps: int) -> Tensor:
    """(batch, steps) numbers of tokens that fill in (batch,) masked ones; the first steps take what is left over."""
    whole, rest = masked[:, None] // steps, masked[:, None] % steps
    return whole + (torch.arange(steps, device=masked.device) < rest).long()


class DParallel(Objective):
    """Two views of one block, each filled in and made sure of."""

    Config = DParallelConfig
    config: DParallelConfig
    task_weight: ClassVar[float | None] = 0.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(teacher=None, columns=frozenset({PROMPT}), mean_over="batch")

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        ids, draw = inputs["input_ids"], step.generator
        mask = self.config.mask_token_id
        mask = getattr(unwrap(step.student).config, "mask_token_id", None) if mask is None else mask
        if mask is None:
            raise ConfigurationError("dparallel: the student's config has no mask_token_id; give mask_token_id=….")
        lengths = tokens(inputs).sum(1).tolist()
        views = {name: ids.clone() for name in ("input_ids", "other_ids")}
        chosen = {name: torch.zeros_like(ids, dtype=torch.bool) for name in ("masked", "other_masked")}
        for row, (prompt, length) in enumerate(zip(inputs[PROMPT].tolist(), lengths, strict=True)):
            start, end = segment(prompt, length, block=self.config.block, draw=draw)
            inside = torch.zeros(ids.shape[1], dtype=torch.bool, device=ids.device)
            inside[start:end] = True
            drawn = torch.rand(ids.shape[1], generator=draw, device=ids.device) < (1 - EPSILON) * 0.5 + EPSILON
            views["input_ids"][row], chosen["masked"][row] = corrupt(ids[row], inside & drawn, end, mask=mask)
            views["other_ids"][row], chosen["other_masked"][row] = corrupt(ids[row], inside & ~drawn, end, mask=mask)
        return inputs | views | chosen | {"clean_ids": ids}

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        views = signals.inputs if "clean_ids" in signals.inputs else _whole(signals.inputs)
        given = {name: value for name, value in signals.inputs.items() if name == "attention_mask"}
        other = step.run_student(grad=torch.is_grad_enabled(), input_ids=views["other_ids"], **given).logits
        found = [
            certainty_losses(*self._placed(logits, views["clean_ids"], views[name]))
            for logits, name in ((signals.student["logits"], "masked"), (other, "other_masked"))
        ]
        return {
            "cross_entropy": found[0][0] + found[1][0],
            "certainty": self.config.beta * (found[0][1] + found[1][1]),
        }

    def _placed(self, logits: Tensor, labels: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token beside the logits that are of it; the first has none in a shifted model."""
        return (logits[:, :-1], labels[:, 1:], masked[:, 1:]) if self.config.shifted else (logits, labels, masked)


def _whole(inputs: Inputs) -> Inputs:
    """In evaluation nothing is masked: every real token is read and scored."""
    every = tokens(inputs)
    ids = inputs["input_ids"]
    return {"clean_ids": ids, "other_ids": ids, "masked": every, "other_masked": every}


class ParallelDecoding:
    """What `decode` of a masked diffusion model does: block by block, as many tokens a step as it is sure of.

    Args:
        threshold: entropy in nats at or below which a token is taken, or probability at or above which it is.
        block: tokens of a block; None: the whole answer is one.
        by: which of the two.
        steps: forwards of a block that take equal shares of its tokens, the most probable ones first; `threshold` is
            not asked then. None: by threshold.
        shifted: the model's logits are of the next token, as Dream's; the threshold is then a strict one.

    Attributes:
        steps_taken: forwards of the last call.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        block: int | None = 32,
        by: Certainty = "entropy",
        steps: int | None = None,
        shifted: bool = False,
    ) -> None:
        if by not in ("entropy", "confidence") or any(size is not None and size < 1 for size in (block, steps)):
            raise ConfigurationError(
                f"dparallel: by must be entropy or confidence, block and steps at least 1, got {by!r}, {block} and "
                f"{steps}."
            )
        self.threshold, self.block, self.by, self.steps, self.shifted = threshold, block, by, steps, shifted
        self.steps_taken = 0

    def __call__(self, model: Any, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """(batch, time + max_new_tokens) prompts of one length and their answers."""
        mask = model.config.mask_token_id
        answer = torch.full((len(input_ids), max_new_tokens), mask, dtype=input_ids.dtype, device=input_ids.device)
        ids, self.steps_taken = torch.cat([input_ids, answer], 1), 0
        block = self.block or max_new_tokens
        with torch.no_grad():
            for start in range(input_ids.shape[1], ids.shape[1], block):
                inside = torch.zeros_like(ids, dtype=torch.bool)
                inside[:, start : start + block] = True
                ids = self._fill(model, ids, inside, mask)
        return ids

    def _fill(self, model: Any, ids: Tensor, inside: Tensor, mask: int) -> Tensor:
        """The sequence with one block filled in."""
        shares = None if self.steps is None else tokens_each_step((inside & (ids == mask)).sum(1), self.steps)
        step = 0
        while (masked := inside & (ids == mask)).any():
            logits = model(input_ids=ids).logits
            logits[..., mask] = -math.inf
            if self.shifted:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
            if shares is None:
                best, taken = unmask(logits, ids, masked, threshold=self.threshold, by=self.by, strict=self.shifted)
            else:
                best, taken = unmask_some(logits, ids, masked, counts=shares[:, step])
            ids, step = torch.where(taken, best, ids), step + 1
        self.steps_taken += step
        return ids


AutoConfig.register("masked_diffusion", MaskedDiffusionConfig, exist_ok=True)
AutoModelForMaskedLM.register(MaskedDiffusionConfig, MaskedDiffusionForMaskedLM, exist_ok=True)

METHOD = Method(
    title="dParallel: Learnable Parallel Decoding for dLLMs",
    paper="arXiv:2509.26488",
    authors="Zigeng Chen, Gongfan Fang, Xinyin Ma, Ruonan Yu, Xinchao Wang",
    year=2025,
    summary="A masked diffusion model learns from its own answers to be sure of many tokens at once.",
    bibtex="""@misc{chen2025dparallel,
  title = {{dParallel}: Learnable Parallel Decoding for {dLLMs}},
  author = {Chen, Zigeng and Fang, Gongfan and Ma, Xinyin and Yu, Ruonan and Wang, Xinchao},
  year = {2025}, eprint = {2509.26488}, archivePrefix = {arXiv}
}""",
    algorithm=("supervised",),
    knowledge=("self",),
    tasks=("fill-mask",),
    objective=DParallel,
    generation=ParallelDecoding,
)
