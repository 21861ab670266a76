"""Whether a decode with a draft draws from the target's own distribution, as it must whatever the draft is.

The token behind one prompt is decoded many times and its counts are compared with the target's probabilities. A wrong
distribution after a rejection (p in place of max(p - q, 0)) or a wrong acceptance ratio shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

from hf_compress.errors import MismatchError
from hf_compress.taps import evaluating

from . import Decoding
from .running import assisted, drawing

POOLED = 5.0
"""Counts that a cell of a chi-square test must expect, the usual rule; tokens that expect fewer share one."""


def first_tokens(
    target: Any,
    draft: Any,
    prompt: Sequence[int],
    decoding: Decoding,
    *,
    count: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> NDArray[np.int64]:
    """The token behind a prompt, decoded so many times with the draft's help.

    Two tokens are decoded each time, as the last one of a text is not drafted.

    Args:
        target, draft: causal language models of one vocabulary; neither may end a text with its first token.
        prompt: token ids.
        decoding: how tokens are chosen.
        count: decodes.
        seed: of the draws.
        tick: called after each.

    Returns:
        (vocab,) how often each token came first.
    """
    found = np.zeros(target.config.get_text_config().vocab_size, np.int64)
    with assisted(target, draft, 1) as generate, drawing(seed):
        for _ in range(count):
            found[int(generate(prompt, max_new_tokens=2, **decoding.settings())[0, len(prompt)])] += 1
            tick()
    return found


def next_token(model: Any, prompt: Sequence[int], decoding: Decoding) -> NDArray[np.float64]:
    """(vocab,) probabilities of the token behind a prompt."""
    with evaluating(model), torch.no_grad():
        logits = model(input_ids=torch.tensor([list(prompt)], device=model.device)).logits[0, -1:]
    return np.asarray(decoding.probabilities(logits.double())[0].cpu())


def chi_square(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """p-value of Pearson's chi-square test that counts were drawn from a distribution.

    Args:
        counts: (token,) whole numbers.
        probabilities: (token,) sums to 1. Tokens that expect fewer than `POOLED` are one cell.

    Returns:
        in 0 … 1; 0 if a token came that has no probability.

    Raises:
        MismatchError: if there are too few counts for two cells.
    """
    if counts[probabilities == 0].any():
        return 0.0
    wanted = probabilities / probabilities.sum() * counts.sum()
    order = np.argsort(wanted)
    rare = int(np.searchsorted(wanted[order], POOLED))
    while 0 < rare < len(order) and wanted[order[:rare]].sum() < POOLED:
        rare += 1
    own, theirs = counts[order[rare:]].astype(float), wanted[order[rare:]]
    if rare:
        own, theirs = np.append(own, counts[order[:rare]].sum()), np.append(theirs, wanted[order[:rare]].sum())
    if len(theirs) < 2:
        raise MismatchError(f"speculative: {counts.sum()} draws are too few for a chi-square test. Draw more.")
    return float(chisquare(own, theirs).pvalue)
