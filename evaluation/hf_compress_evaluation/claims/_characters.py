"""A language of characters for claims about language models: the text of Python's own help, a teacher and a student."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compress.divergences import kl, log_probabilities
from hf_compress_evaluation.speculative import acceptance

from . import _training

LENGTH = 64
"""Characters of a row."""
HELD_OUT = 40_000
"""Characters at the end of the text that nothing is trained on."""


@cache
def text() -> str:
    """All topics of Python's help, in order of name."""
    topics: Mapping[str, str] = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


@cache
def alphabet() -> dict[str, int]:
    """Character to id; 0 is kept for the end of a text."""
    return {letter: place for place, letter in enumerate(sorted(set(text())), 1)}


def rows(*, held_out: bool = False) -> list[dict[str, list[int]]]:
    """Rows of `LENGTH` ids with themselves as labels."""
    part = text()[-HELD_OUT:] if held_out else text()[:-HELD_OUT]
    ids = [alphabet()[letter] for letter in part]
    cut = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return [{"input_ids": row, "labels": row} for row in cut]


def model(*, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """An untrained model of characters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(alphabet()) + 1,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                max_position_embeddings=256,
                pad_token_id=0,
                eos_token_id=0,
                bos_token_id=0,
            )
        )


def collate(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows of one length as tensors."""
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


def train(
    student: Any, *, steps: int, seed: int, data: Any = None, batch: int = 24, sampling: str = "random", **settings: Any
) -> Any:
    """A plain Trainer on the text, or on other rows of one length."""
    rows_ = rows() if data is None else data
    return _training.train(
        student,
        data=rows_,
        data_collator=collate,
        steps=steps,
        seed=seed,
        batch=batch,
        train_sampling_strategy=sampling,
        **settings,
    )


@cache
def teacher(seed: int = 0) -> LlamaForCausalLM:
    """Three layers of width 96, 900 steps on the text."""
    return train(model(width=96, layers=3, seed=seed), steps=900, seed=seed)


def compare(student: LlamaForCausalLM, target: LlamaForCausalLM, data: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Acceptance of the student's tokens by the target, agreement, divergence and likelihood on held-out rows."""
    log_p, log_q, labels = [], [], []
    with torch.no_grad():
        for start in range(0, len(data), 64):
            inputs = collate(data[start : start + 64])
            logits = [
                one.eval()(input_ids=inputs["input_ids"]).logits[:, :-1].flatten(0, 1) for one in (student, target)
            ]
            theirs, own = log_probabilities("compare", *logits)
            log_p.append(theirs)
            log_q.append(own)
            labels.append(inputs["labels"][:, 1:].flatten())
    p, q, wanted = torch.cat(log_p), torch.cat(log_q), torch.cat(labels)
    scored = wanted != -100
    p, q, wanted = p[scored], q[scored], wanted[scored]
    return {
        "acceptance": float(acceptance(p.exp(), q.exp()).mean()),
        "greedy agreement": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        "KL(p‖q), nats": float(kl(p, q).mean()),
        "NLL, nats per character": float(-q.gather(1, wanted[:, None]).mean()),
    }
