"""Token Recycling's claim: about two tokens a forward, without training or a draft model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from hf_compress_plugins.decoding.token_recycling import TokenRecycling

from . import Claim
from . import _characters as characters

PROMPTS, PROMPT, NEW = 12, 64, 120


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Continues held-out prompts one by one and counts all forwards, those of the prompts included."""
    model, method = characters.teacher().eval(), TokenRecycling()
    rows = characters.rows(held_out=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:PROMPTS].tolist()
    equal, seconds = 0, 0.0
    calls, forwards, tokens = list[int](), list[int](), list[int]()
    for place in order:
        ids = torch.tensor([rows[place]["input_ids"][:PROMPT]])
        settings: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW
        }  # fmt: skip
        plain = model.generate(ids, **settings)
        if variant == "emptied before each prompt":
            method = TokenRecycling()
        if variant != "greedy":
            settings["custom_generate"] = method
        with model.register_forward_hook(lambda *_: calls.append(1)):
            started = time.perf_counter()
            found = model.generate(ids, **settings)
            seconds += time.perf_counter() - started
        equal += int(torch.equal(found, plain))
        forwards.append(len(calls))
        tokens.append(found.shape[1] - PROMPT)
        calls.clear()
    half = PROMPTS // 2
    return {
        "equal to greedy": equal / PROMPTS,
        "forwards a prompt": sum(forwards) / PROMPTS,
        "tokens a forward": sum(tokens) / sum(forwards),
        "of the first half": sum(tokens[:half]) / sum(forwards[:half]),
        "of the second half": sum(tokens[half:]) / sum(forwards[half:]),
        "milliseconds a token": 1000 * seconds / sum(tokens),
    }


CLAIM = Claim(
    published="2.09 times the speed of greedy decoding with Vicuna-7B on SpecBench; 1.95 MB for 32,000 tokens.",
    check=f"Characters of Python's help texts. A model of 3 layers of width 96 continues {PROMPTS} held-out prompts of "
    f"{PROMPT} by {NEW} characters, on one core.",
    expected="The output of greedy decoding and more than one token a forward; more where the matrix is kept from "
    "prompt to prompt than where it is emptied. Time need not fall on a CPU, where 81 tokens cost more than one.",
    variants=("greedy", "emptied before each prompt", "kept between prompts"),
    run=run,
)
