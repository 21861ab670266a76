"""DistillSpec's claims: which divergence, on whose answers, makes a draft whose tokens the target accepts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hf_compress_plugins.language.distillspec import DistillSpec, answered

from hf_compress import DistillCallback
from hf_compress_evaluation.speculative import Decoding, block_efficiency
from hf_compress_evaluation.speculative.lossless import chi_square, first_tokens, next_token
from hf_compress_evaluation.speculative.running import Counted, Text, continuations, counted, expected

from . import Claim
from . import _characters as characters

STEPS, FURTHER = 600, 300
PROMPT, ANSWER = 24, 40
GAMMA, DECODED, DRAWS = 4, 16, 20_000
DIVERGENCES = {"forward KL": "forward_kl", "reverse KL": "reverse_kl", "JSD(0.5)": "jsd", "TVD": "tvd"}
SAMPLED, GREEDY = Decoding(), Decoding(temperature=0.0)
THEN, LAW = "forward KL, then ", "first token of 20,000 decodes"


def trained(divergence: str, seed: int) -> Any:
    """A draft from its start, on the text."""
    callback = DistillCallback(characters.teacher(), DistillSpec(divergence=DIVERGENCES[divergence]))
    return characters.train(
        characters.model(width=24, layers=1, seed=seed), steps=STEPS, seed=seed, callbacks=[callback]
    )


@cache
def drafted(seed: int) -> Any:
    """The draft that all second stages start from."""
    return trained("forward KL", seed)


def prompted(*, held_out: bool = False) -> list[dict[str, list[int]]]:
    """Rows whose first characters are the prompt."""
    found = characters.rows(held_out=held_out)
    return [row | {"labels": [-100] * PROMPT + row["labels"][PROMPT:]} for row in found]


@cache
def of_the_target() -> Sequence[Any]:
    """The same prompts with answers that the target wrote."""
    ended = answered(prompted(), teacher=characters.teacher(), max_new_tokens=ANSWER, batch=256)
    return [row for row in ended if len(row["input_ids"]) == PROMPT + ANSWER]  # rows of one length


@cache
def contexts() -> list[Text]:
    """What the target writes behind held-out prompts."""
    prompts = [row["input_ids"][:PROMPT] for row in prompted(held_out=True)]
    return continuations(characters.teacher(), prompts, SAMPLED, new_tokens=ANSWER)


def further(variant: str, seed: int) -> Any:
    """The draft after a second stage of as many updates for all."""
    divergence, _, whose = variant.removeprefix(THEN).partition(" on the ")
    settings: dict[str, Any] = {"divergence": DIVERGENCES[divergence]}
    if whose == "draft's answers":
        settings |= {"lmbda": 1.0, "max_new_tokens": ANSWER}
    data = of_the_target() if whose == "target's answers" else prompted()
    callback = DistillCallback(characters.teacher(), DistillSpec(**settings))
    draft = copy.deepcopy(drafted(seed))
    return characters.train(draft, steps=FURTHER, seed=seed, callbacks=[callback], learning_rate=1e-3, data=data)


def made(variant: str, seed: int) -> Any:
    """The draft of a variant."""
    if variant == "cross-entropy":
        return characters.train(characters.model(width=24, layers=1, seed=seed), steps=STEPS, seed=seed)
    if variant.startswith(THEN):
        return further(variant, seed)
    return drafted(seed) if variant == "forward KL" else trained(variant, seed)


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One draft, its acceptance on held-out text and on the target's own, and what a decode gives."""
    target = characters.teacher()
    if variant == LAW:
        return law(seed)
    draft = made(variant, seed)
    held_out = characters.compare(draft, target, characters.rows(held_out=True))
    on_own = expected(target, draft, contexts(), SAMPLED)
    places = sum(one.tokens for one in on_own)
    alpha = sum(one.accepted for one in on_own) / places
    decodes = {name: decoded(draft, how, seed) for name, how in (("sampled", SAMPLED), ("greedy", GREEDY))}
    return {
        "acceptance, held-out text": held_out["acceptance"],
        "KL(p‖q) there, nats": held_out["KL(p‖q), nats"],
        "NLL there, nats per character": held_out["NLL, nats per character"],
        "acceptance, the target's texts": alpha,
        "greedy agreement there": sum(one.greedy for one in on_own) / places,
        "acceptance, counted": decodes["sampled"].acceptance,
        "characters a target call, from that acceptance": block_efficiency(alpha, GAMMA),
        "characters a target call, sampled": decodes["sampled"].block_efficiency,
        "characters a target call, greedy": decodes["greedy"].block_efficiency,
    }


def decoded(draft: Any, decoding: Decoding, seed: int) -> Counted:
    """Continues some held-out prompts with the draft's help."""
    prompts = [text.ids[:PROMPT] for text in contexts()[seed * DECODED : (seed + 1) * DECODED]]
    given: dict[str, Any] = {"gamma": GAMMA, "new_tokens": ANSWER, "seed": seed}
    return sum(counted(characters.teacher(), draft, prompts, decoding, **given), Counted())


def law(seed: int) -> Mapping[str, float]:
    """The first character of decodes with a draft against the target's distribution."""
    target, prompt = characters.teacher(), contexts()[seed].ids[:PROMPT]
    counts = first_tokens(target, drafted(seed), prompt, SAMPLED, count=DRAWS, seed=seed)
    theirs, own = next_token(target, prompt, SAMPLED), next_token(drafted(seed), prompt, SAMPLED)
    return {
        "p of chi-square against the target": chi_square(counts, theirs),
        "p of chi-square against the draft": chi_square(counts, own),
    }


CLAIM = Claim(
    published="Drafts distilled with DistillSpec decode 10 to 45 % faster than undistilled ones; the draft's own "
    "answers are better data than fixed ones and about as good as the target's; which divergence is best depends on "
    "the task.",
    check="Characters of Python's help texts. Target: 3 layers of width 96, 900 steps. Draft: 1 layer of width 24, "
    f"{STEPS} steps of 24 rows of 64 characters; then, from the forward KL's draft, {FURTHER} steps at a third of the "
    f"learning rate on answers of {ANSWER} characters to prompts of {PROMPT}. Acceptance in closed form at temperature "
    f"1; decodes by generate(assistant_model=…) of {DECODED} held-out prompts with {GAMMA} characters drafted a call.",
    expected="Acceptance of every divergence above the cross-entropy's, and with it the characters a target call. TVD "
    "and JSD from the forward KL's draft above the forward KL, which has the lowest KL. On the target's texts the "
    "draft's own answers at least as good as the text's. The first character follows the target's distribution.",
    variants=(
        "cross-entropy",
        *DIVERGENCES,
        *(THEN + divergence for divergence in ("forward KL", "JSD(0.5)", "TVD")),
        THEN + "TVD on the draft's answers",
        THEN + "TVD on the target's answers",
        LAW,
    ),
    run=run,
)
