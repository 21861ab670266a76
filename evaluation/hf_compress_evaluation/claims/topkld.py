"""TopKLD's claim: quality against bits in all, and the level that training on rounded weights gains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.general.gkd import GKD
from hf_compress_plugins.language.topkld import LowBitWeights, TopKLD
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from hf_compress import DistillCallback
from hf_compress.objective import Objective
from hf_compress_evaluation import bit_levels

from . import Claim
from . import _characters as characters

WIDTHS, LAYERS, STEPS, AGAIN, K = (16, 32, 64), 2, 600, 200, 5
BITS = (2, 3, 4, 8)
AFTER = "rounded after training"
METHODS: Mapping[str, Callable[[], Objective | None]] = {
    "labels": lambda: None,
    "forward KL": lambda: GKD(beta=0.0),
    "reverse KL": lambda: GKD(beta=1.0),
    "TopKLD": lambda: TopKLD(k=K),
    "TopKLD, plain": lambda: TopKLD(k=K, variant="plain"),
}


@cache
def whole(width: int, seed: int) -> LlamaForCausalLM:
    """A model in full precision."""
    return characters.train(characters.model(width=width, layers=LAYERS, seed=seed), steps=STEPS, seed=seed)


def likelihood(model: LlamaForCausalLM) -> float:
    """Nats per character of held-out text."""
    found, count, data = 0.0, 0, characters.rows(held_out=True)
    with torch.no_grad():
        for start in range(0, len(data), 128):
            inputs = characters.collate(data[start : start + 128])
            logits, labels = model.eval()(input_ids=inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:]
            found += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += labels.numel()
    return found / count


def trained(width: int, seed: int, bits: int, method: Objective | None) -> Any:
    """A copy that computed with rounded weights for some more steps, taught by the model that it was."""
    callbacks = [] if method is None else [DistillCallback(whole(width, seed), method)]
    return characters.train(
        copy.deepcopy(whole(width, seed)),
        steps=AGAIN,
        seed=seed,
        learning_rate=1e-3,
        callbacks=[*callbacks, LowBitWeights(bits)],
    )


@cache
def after(bits: int, seed: int) -> tuple[bit_levels.Point, ...]:
    """Without training on what is rounded."""
    return tuple(
        bit_levels.measure(whole(width, seed), likelihood, bits=bits, name=f"width {width}") for width in WIDTHS
    )


def run(variant: str, seed: int) -> Mapping[str, float]:
    """A line of the table: three sizes of model at one width of weight."""
    if variant == "32 bits":
        points = [
            bit_levels.measure(whole(width, seed), likelihood, bits=None, name=f"width {width}") for width in WIDTHS
        ]
        return figures(points)
    treatment, bits_ = variant.rsplit(": ", 1)
    bits = int(bits_.split()[0])
    if treatment == AFTER:
        return figures(after(bits, seed))
    points = [
        bit_levels.measure(
            trained(width, seed, bits, METHODS[treatment]()), likelihood, bits=bits, name=f"width {width}"
        )
        for width in WIDTHS
    ]
    wider = BITS[BITS.index(bits) + 1 : BITS.index(bits) + 2]
    if not wider:
        return figures(points)
    before, gained, next_ = (
        next(iter(bit_levels.lines(some).values())) for some in (after(bits, seed), points, after(wider[0], seed))
    )
    levels = bit_levels.levels_gained(before, gained, next_)
    return dict(figures(points)) | ({} if levels is None else {"levels gained": levels})


def figures(points: Any) -> Mapping[str, float]:
    """Bits and likelihood of each size, and the line through them."""
    (line,) = bit_levels.lines(points).values()
    found = {}
    for point in points:
        found[f"Mbit, {point.model}"] = point.total_bits / 1e6
        found[f"NLL, {point.model}"] = point.quality
    return found | {"NLL of the line at 0.15 Mbit": line.at(1.5e5), "slope": line.slope}


CLAIM = Claim(
    published="TopKLD raises the bit-level scaling law of image generators of discrete tokens by one level, for "
    "integers and floats.",
    check=f"Characters of Python's help texts. Models of {LAYERS} layers of width "
    f"{', '.join(map(str, WIDTHS))}, {STEPS} steps of 24 rows of 64 characters; then {AGAIN} more on weights rounded "
    f"by row, taught by labels or by the model itself in full precision (k = {K}). All matrices, tables too, are "
    "packed into bytes, which are counted with scales and norms; nats per character of 40,000 held-out ones are those "
    "of the unpacked weights. Levels: how far the line of a width of weight moves towards that of the next one rounded "
    "after training.",
    expected="Training on rounded weights far better than rounding after training at 2 and 3 bits, a level or more at "
    "3. No lead of TopKLD over the forward KL need show; the plain sum is behind both.",
    variants=(
        "32 bits",
        *(f"{AFTER}: {bits} bits" for bits in BITS),
        *(f"{treatment}: {bits} bits" for treatment in ("labels", "forward KL") for bits in (2, 3, 4)),
        "reverse KL: 3 bits",
        *(f"TopKLD: {bits} bits" for bits in BITS),
        "TopKLD, plain: 3 bits",
    ),
    run=run,
)
