"""How much a language model has memorised of a secret: the exposure of a canary.

Carlini, Liu, Erlingsson, Kos, Song: The Secret Sharer: Evaluating and Testing Unintended Memorization in Neural
Networks, USENIX Security 2019, arXiv:1802.08232, section 4.

    exposure = log2 |R| - log2 rank      rank: 1 + how many of the space R of secrets the model thinks more likely

In bits: 0 … log2 |R|. A model that knows nothing of the secret has 1 / ln 2 = 1.44 on average. The canary is a fixed
prefix with a secret after it. A secret that a model knew before it was trained is exposed too: measure the start as
well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from hf_compress.errors import MismatchError, NumericalError


def exposure(log_likelihoods: ArrayLike, secret: int) -> float:
    """Bits by which the secret stands out among all candidates.

    Args:
        log_likelihoods: (candidate,) of the whole space; among equal ones the secret counts as the best.
        secret: place of the true one.

    Raises:
        MismatchError: if there is no candidate of that place.
        NumericalError: if a likelihood is NaN.
    """
    values = np.asarray(log_likelihoods, np.float64)
    if values.ndim != 1 or not 0 <= secret < len(values):
        raise MismatchError(f"exposure: likelihoods {values.shape} have no candidate {secret}.")
    if np.isnan(values).any():
        raise NumericalError("exposure: a likelihood is NaN. Look for NaN weights.")
    return math.log2(len(values)) - math.log2(1 + int((values > values[secret]).sum()))


def candidate_log_likelihoods(
    model: Any, prefix: Sequence[int], candidates: Sequence[Sequence[int]], *, batch: int = 1000
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What a causal model makes of each secret after a prefix.

    Args:
        model: a causal language model of transformers; scored in eval mode, which it is left in.
        prefix: ids of the fixed part, one at least.
        candidates: ids of each secret, of one length or several.
        batch: candidates a forward.

    Returns:
        (candidate,) natural logarithms of P(secret | prefix).

    Raises:
        MismatchError: if the prefix or a candidate is empty.
    """
    if not prefix or not candidates or not all(candidates):
        raise MismatchError(
            f"exposure: needs a prefix and secrets of one token at least, got {len(prefix)} tokens and "
            f"{len(candidates)} secrets, the shortest of {min(map(len, candidates), default=0)}."
        )
    device = next(model.parameters()).device
    found = []
    model.eval()
    for start in range(0, len(candidates), batch):
        part = candidates[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([[*prefix, *one, *[0] * (width - len(one))] for one in part], device=device)
        real = torch.tensor([[i < len(one) for i in range(width)] for one in part], device=device)
        with torch.no_grad():
            log_q = model(input_ids=ids).logits[:, len(prefix) - 1 : -1].double().log_softmax(-1)
        chosen = log_q.gather(-1, ids[:, len(prefix) :, None]).squeeze(-1)
        found.append(torch.where(real, chosen, 0.0).sum(1))
    return torch.cat(found).cpu().numpy()
