"""Batches that a model writes: continuations of the data's prompts, mostly the student's own, with labels to be scored.

The prompt is what stands before a row's first label that is not -100. Prompts are padded on the left, as `generate`
asks; labels end at the first end-of-sequence token, which is scored; the prompt never is. No gradient flows through
sampling.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigurationError, MismatchError
from .objective import IGNORED, Inputs, Needs, Objective, Sizes, Step, check_unpacked
from .taps import unwrap


def prompts(inputs: Inputs, pad: int) -> tuple[Tensor, Tensor]:
    """The prompts of a causal batch, padded on the left to the longest.

    Args:
        inputs: input_ids and labels (batch, time), unshifted, and an attention_mask where there is padding.
        pad: id that fills.

    Returns:
        ids and mask, (batch, prompt time).

    Raises:
        MismatchError: if the batch has no labels, a row's labels begin with its first token: it has no prompt, or a
            row holds several documents.
    """
    check_unpacked("on-policy training", inputs)
    ids, labels = inputs["input_ids"], inputs.get("labels")
    remedy = "Give labels that are -100 on the prompt and token ids on the answer."
    if labels is None:
        raise MismatchError(f"on-policy batches need labels that tell the prompt from the answer. {remedy}")
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    prompt = real & ((labels != IGNORED).cumsum(1) == 0)
    lengths = prompt.sum(1)
    if not bool((lengths > 0).all()):
        row = int((lengths == 0).nonzero()[0])
        raise MismatchError(f"on-policy batches need prompts, and row {row} of the batch has none. {remedy}")
    width = int(lengths.max())
    mask = torch.arange(width, device=ids.device) >= (width - lengths)[:, None]
    filled = torch.full_like(mask, pad, dtype=ids.dtype).masked_scatter(mask, ids[prompt])
    return filled, mask.long()


def rebuild(generated: Tensor, prompt_mask: Tensor, ends: Sequence[int]) -> Inputs:
    """A batch from generated sequences: the answer up to and with its first end is labelled, nothing else is.

    Args:
        generated: (batch, time) ids, prompts first.
        prompt_mask: (batch, prompt time), 1 on real tokens.
        ends: ids of end-of-sequence tokens.

    Returns:
        input_ids, attention_mask and labels, each (batch, time).
    """
    answer = generated[:, prompt_mask.shape[1] :]
    end = torch.isin(answer, torch.tensor(list(ends), dtype=answer.dtype, device=answer.device))
    real = end.cumsum(1) - end.long() == 0
    mask = torch.cat([prompt_mask.bool(), real], 1)
    scored = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.bool), real], 1)
    return {
        "input_ids": generated,
        "attention_mask": mask.long(),
        "labels": generated.masked_fill(~scored, IGNORED),
    }


def drawn(step: Step, part: float) -> bool:
    """Whether this batch is of a part of them, 0 … 1: one draw a batch, the same on all ranks."""
    return float(torch.rand((), generator=step.shared, device=step.shared.device)) < part


def check_answers(name: str, lmbda: float, max_new_tokens: int) -> None:
    """Raises ConfigurationError, in the name of a method, for what `OnPolicy` cannot do."""
    if not 0 <= lmbda <= 1 or max_new_tokens < 1:
        raise ConfigurationError(
            f"{name}: lmbda must lie in 0 … 1 and max_new_tokens be at least 1, got {lmbda} and {max_new_tokens}."
        )


WHOLE: Mapping[str, Any] = {"num_beams": 1, "min_length": 0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
"""Settings of `generate` with which a model's distribution is its own: some come with others, as for summaries."""


class OnPolicy(Objective):
    """An objective on the data's answers and, with probability λ, a batch at a time, on the student's own.

    Samples are of the student's whole distribution, without top-k or top-p. With λ > 0 values are averaged within each
    answer and over answers, as the lengths of a window's later batches are not known. The `Config` has the fields
    `lmbda`, 0 … 1; `max_new_tokens`, of an answer; `sampling_temperature`, above 0.
    """

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(mean_over="examples", rescored=True) if self.config.lmbda > 0 else Needs()

    def overrides(self, method: str) -> bool:
        """With λ = 0 batches stay as they are, so that a cache of the teacher's outputs holds for them."""
        return super().overrides(method) and (method != "batch" or self.config.lmbda > 0)

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        settings = self.config
        if not drawn(step, settings.lmbda):
            return inputs
        sampling = {"do_sample": True, "temperature": settings.sampling_temperature, "top_k": 0, "top_p": 1.0}
        return on_policy(inputs, step, max_new_tokens=settings.max_new_tokens, **sampling)


def ends_of(model: Any) -> list[int]:
    """The ids of a model's end-of-sequence tokens, as its generation settings name them; none, one or several."""
    found = model.generation_config.eos_token_id
    return [end for end in (found if isinstance(found, list) else [found]) if end is not None]


def on_policy(inputs: Inputs, step: Step, **sampling: Any) -> Inputs:
    """The batch with its answers replaced by the student's own: `written` by the student of a step."""
    return written(inputs, unwrap(step.student), step.generate, **sampling)


def written(inputs: Inputs, model: Any, generate: Callable[..., Tensor], **sampling: Any) -> Inputs:
    """The batch with its answers replaced by a model's.

    Args:
        inputs: a batch of a causal or an encoder-decoder model.
        model: whose end and padding tokens and inputs count.
        generate: its `generate`, or one that calls it.
        sampling: settings of `generate`, e.g. do_sample, temperature, max_new_tokens.

    Returns:
        the columns of `rebuild`, with position ids where the model takes them; for an encoder-decoder the encoder's
        inputs and labels. Other columns that run along the old tokens are left out.

    Raises:
        MismatchError: as `prompts`.
    """
    ends = ends_of(model)
    pad = next((one for one in (model.generation_config.pad_token_id, *ends) if one is not None), 0)
    sampling = {"pad_token_id": pad, **WHOLE, **sampling}
    if model.config.is_encoder_decoder:
        encoder = {k: v for k, v in inputs.items() if k != "labels" and not k.startswith("decoder_")}
        generated = generate(**encoder, **sampling)
        answer = rebuild(generated, torch.zeros_like(generated[:, :1]), ends)  # the first token starts the decoder
        return encoder | {"labels": answer["labels"][:, 1:].contiguous()}
    ids, mask = prompts(inputs, pad)
    found = rebuild(generate(input_ids=ids, attention_mask=mask, **sampling), mask, ends)
    if "position_ids" in inspect.signature(model.forward).parameters:
        found["position_ids"] = (found["attention_mask"].cumsum(1) - 1).clamp(min=0)
    along = inputs["input_ids"].shape
    kept = {k: v for k, v in inputs.items() if not (isinstance(v, Tensor) and v.shape[:2] == along)}
    return kept | found
