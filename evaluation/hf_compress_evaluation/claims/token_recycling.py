"""Token Recycling's claim: about two tokens a forward, without training or a draft model."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from hf_compress_plugins.decoding.token_recycling import TokenRecycling

from . import Claim
from . import _characters as characters

PROMPTS, PROMPT, NEW = 12, 64, 120


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Continues held-out prompts one by one; the matrix is kept from one to the next."""
    model, method = characters.teacher().eval(), TokenRecycling()
    rows = characters.rows(held_out=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:PROMPTS].tolist()
    forwards, equal, per, seconds = 0, 0, list[float](), 0.0
    for place in order:
        ids = torch.tensor([rows[place]["input_ids"][:PROMPT]])
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW}
        plain = model.generate(ids, **settings)
        started = time.perf_counter()
        if variant == "greedy":
            found = model.generate(ids, **settings)
            count = found.shape[1] - PROMPT
        else:
            found = model.generate(ids, custom_generate=method, **settings)
            count = method.forwards
        seconds += time.perf_counter() - started
        equal += int(torch.equal(found, plain))
        forwards += count
        per.append((found.shape[1] - PROMPT) / count)
    return {
        "equal to greedy": equal / PROMPTS,
        "tokens a forward": sum(per) / PROMPTS,
        "first three prompts": sum(per[:3]) / 3,
        "last three prompts": sum(per[-3:]) / 3,
        "seconds a token, one core": seconds / (PROMPTS * NEW),
    }


CLAIM = Claim(
    published="2.09 times the speed of greedy decoding with Vicuna-7B on SpecBench; 1.95 MB for 32,000 tokens.",
    check=f"Characters of Python's help texts. A model of 3 layers of width 96 continues {PROMPTS} held-out prompts of "
    f"{PROMPT} by {NEW} characters.",
    expected="The output of greedy decoding, more than one token a forward, and more for later prompts than for the "
    "first. Seconds need not fall on a CPU, where 81 tokens cost more than one.",
    variants=("greedy", "token recycling"),
    run=run,
)
