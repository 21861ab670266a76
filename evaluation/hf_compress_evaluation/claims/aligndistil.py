"""AlignDistil's claim: a model aligned token by token obeys a preference better than one aligned by DPO alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.language.aligndistil import AlignDistil
from torch import Tensor
from torch.nn import functional as F

from hf_compress import DistillCallback
from hf_compress.divergences import kl

from . import Claim
from . import _characters as characters

PROMPT, ANSWER, BETA, DPO_STEPS, STEPS, BATCH = 24, 12, 0.1, 80, 80, 32
UNLIKED = "e"
"""An answer with this letter is the rejected one."""


@cache
def base() -> Any:
    """Two layers of width 64, 600 steps on the text."""
    return characters.train(characters.model(width=64, layers=2, seed=0), steps=600, seed=0)


def prompts(count: int, *, held_out: bool = False) -> Tensor:
    """(count, prompt) beginnings of rows."""
    rows = characters.rows(held_out=held_out)
    return torch.tensor([row["input_ids"][:PROMPT] for row in (rows * (1 + count // len(rows)))[:count]])


def answers(model: Any, asked: Tensor, seed: int) -> Tensor:
    """(prompt, time) sampled by the model, prompts first."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": ANSWER, "min_new_tokens": ANSWER}
        ids: Tensor = model.eval().generate(asked, attention_mask=torch.ones_like(asked), **settings)
    return ids


def obeys(ids: Tensor) -> Tensor:
    """(row,) bool."""
    return (ids[:, PROMPT:] != characters.alphabet()[UNLIKED]).all(1)


@cache
def pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Chosen and rejected answers of the base to prompts to which it gave both."""
    asked = prompts(1500)
    found = torch.stack([answers(base(), asked, 10 * seed + place) for place in range(4)], 1)
    good = torch.stack([obeys(ids) for ids in found.unbind(1)], 1)
    both = good.any(1) & ~good.all(1)
    rows = torch.arange(int(both.sum()))
    return tuple(found[both][rows, (good[both] == side).int().argmax(1)] for side in (True, False))  # type: ignore[return-value]


def log_likelihood(model: Any, ids: Tensor) -> Tensor:
    """(row,) of the answers, in nats."""
    log_q = model(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return -F.nll_loss(log_q.mT, ids[:, PROMPT:], reduction="none").sum(1)


@cache
def dpo(seed: int, *, reverse: bool = False, times: int = 1) -> Any:
    """The base after direct preference optimisation, with chosen and rejected exchanged where it is reverse."""
    chosen, rejected = reversed(pairs(seed)) if reverse else pairs(seed)
    model, draw = copy.deepcopy(base()).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    for _ in range(times * DPO_STEPS):
        rows = torch.randint(len(chosen), (BATCH,), generator=draw)
        both = torch.cat([chosen[rows], rejected[rows]])
        with torch.no_grad():
            before = log_likelihood(base(), both)
        gain, loss = (log_likelihood(model, both) - before).chunk(2)
        optimizer.zero_grad()
        (-F.logsigmoid(BETA * (gain - loss)).mean()).backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
    return model


METHODS: dict[str, dict[str, Any]] = {
    "DPO reward, constant": {"reward": "dpo", "adaptive": False},
    "contrastive, constant": {"adaptive": False},
    "aligndistil, off-policy": {},
    "aligndistil, on-policy": {"on_policy": True, "c": 15.0, "max_new_tokens": ANSWER},
}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """From the base, the same number of steps on the same chosen answers."""
    if variant == "base":
        student = base()
    elif variant.startswith("DPO ×"):
        student = dpo(seed, times=int(variant.rpartition("×")[2]))
    else:
        method = AlignDistil(beta=BETA, **METHODS[variant])
        role = "reference" if method.config.reward == "dpo" else "reverse"
        other = base() if role == "reference" else dpo(seed, reverse=True)
        callback = DistillCallback(dpo(seed), method, frozen={role: other})
        data = [{"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]} for ids in pairs(seed)[0].tolist()]
        student = copy.deepcopy(base())
        characters.train(
            student, steps=STEPS, seed=seed, data=data, batch=BATCH, callbacks=[callback], learning_rate=1e-3
        )
    ids = answers(student, prompts(1000, held_out=True), 99)
    with torch.no_grad():
        log_q, log_p = (m.eval()(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1) for m in (student, base()))
    return {
        "answers that obey": float(obeys(ids).float().mean()),
        "KL from the base, nats per character": float(kl(log_q.flatten(0, 1), log_p.flatten(0, 1)).mean()),
    }


CLAIM = Claim(
    published="Above DPO and its kin on AlpacaEval 2, MT-Bench and Arena-Hard with Qwen2 and Qwen2.5-1.5B-Instruct, "
    "with more than twice as fast convergence.",
    check=f"Characters of Python's help texts. Base: 2 layers of width 64, 600 steps. Of its answers of {ANSWER} "
    f"characters to one prompt one without “{UNLIKED}” is chosen and one with it rejected; DPO and its reverse, "
    f"{DPO_STEPS} steps of {BATCH} pairs, β = {BETA}. Then from the base {STEPS} steps on the chosen answers or on "
    "its own. 1,000 samples to held-out prompts.",
    expected="More answers that obey than those of the DPO model that teaches, and at the distance from the base that "
    "longer DPO comes to at least as many as it has.",
    variants=("base", "DPO ×1", "DPO ×4", *METHODS),
    run=run,
)
