"""dParallel's claim: after training for certainty far fewer decoding steps are needed, for the same answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.decoding._modeling_masked_diffusion import MaskedDiffusionConfig, MaskedDiffusionForMaskedLM
from hf_compress_plugins.decoding.dparallel import DParallel, ParallelDecoding
from torch import Tensor, nn

from hf_compress import DistillCallback

from . import Claim
from . import _characters as characters

PROMPT, ANSWER, BLOCK, PROMPTS, STEPS = 16, 32, 16, 200, 300
LENGTH = PROMPT + ANSWER


def mask_id() -> int:
    """The letter behind the alphabet."""
    return len(characters.alphabet()) + 1


class Filling(nn.Module):
    """A masked diffusion model's training loss: a random share of each row is hidden."""

    def __init__(self, model: MaskedDiffusionForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the hidden letters, each by the inverse of its row's share."""
        share = torch.rand(len(input_ids), 1).clamp(min=0.05)
        hidden = torch.rand(input_ids.shape) < share
        logits = self.model(input_ids=input_ids.masked_fill(hidden, mask_id())).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none")
        return {"loss": (losses * hidden / share).mean(), "logits": logits}


def rows(*, held_out: bool = False) -> list[dict[str, list[int]]]:
    """Texts of one length."""
    return [{k: v[:LENGTH] for k, v in row.items()} for row in characters.rows(held_out=held_out)]


@cache
def base() -> MaskedDiffusionForMaskedLM:
    """Three layers of width 96 that fill in letters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MaskedDiffusionForMaskedLM(
            MaskedDiffusionConfig(
                vocab_size=mask_id() + 1,
                hidden_size=96,
                num_hidden_layers=3,
                intermediate_size=192,
                max_position_embeddings=LENGTH,
                mask_token_id=mask_id(),
            )
        )
    characters.train(Filling(model), steps=1500, seed=0, batch=48, learning_rate=2e-3, data=rows())
    model.eval()
    return model


def answers(model: Any, prompts: Tensor, threshold: float) -> tuple[Tensor, float]:
    """Answers to prompts one by one, and the mean number of steps."""
    decode, found, steps = ParallelDecoding(threshold=threshold, block=BLOCK), [], 0
    for prompt in prompts:
        found.append(decode(model, prompt[None], max_new_tokens=ANSWER))
        steps += decode.steps_taken
    return torch.cat(found), steps / len(prompts)


@cache
def own() -> Tensor:
    """The base model's slow answers to prompts of the training text."""
    prompts = torch.tensor([row["input_ids"][:PROMPT] for row in rows()[:PROMPTS]])
    return answers(base(), prompts, -1.0)[0]


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Steps and agreement with the base model's slow answers, on held-out prompts."""
    model: Any = copy.deepcopy(base())
    if variant != "base":
        data = [{"input_ids": row, "prompt_length": PROMPT} for row in own().tolist()]
        method = DParallel(beta=0.0 if variant == "cross-entropy alone" else 2.0, block=BLOCK)
        callback = DistillCallback(method=method)
        characters.train(model, steps=STEPS, seed=seed, batch=16, learning_rate=3e-4, data=data, callbacks=[callback])
    prompts = torch.tensor([row["input_ids"][:PROMPT] for row in rows(held_out=True)[:40]])
    slow, _ = answers(base(), prompts, -1.0)
    fast, steps = answers(model.eval(), prompts, 0.5)
    return {
        "steps for 32 characters": steps,
        "agreement with the slow answer": float((slow == fast)[:, PROMPT:].float().mean()),
    }


CLAIM = Claim(
    published="LLaDA-8B on GSM8K: 256 to 30 steps, on MBPP 256 to 24, accuracy kept.",
    check=f"Characters of Python's help texts. Model of 3 layers of width 96; {PROMPTS} of its own answers of {ANSWER} "
    f"characters to prompts of {PROMPT}, {STEPS} steps of 16. Decoding in blocks of {BLOCK}, entropy at most 0.5.",
    expected="Fewer steps with the certainty loss than without it and than before, at nearly the same agreement.",
    variants=("base", "cross-entropy alone", "dParallel"),
    run=run,
)
