"""How well a language model predicts texts, from the nats that it needed for them.

The online `perplexity` loads a model from the hub; these take what the user's model has given: for each text the sum
of its tokens' cross-entropies in nats, e.g. `loss * scored_tokens`.

    perplexity     = exp( Σ nats / Σ tokens )
    bits per byte  = Σ nats / ( ln 2 · Σ bytes )       also between models of different vocabularies

And how well a draft predicts what its target would say, from what `hf_compress_evaluation.speculative` gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import numpy as np

from hf_compress.errors import MismatchError, NumericalError
from hf_compress_evaluation.speculative import block_efficiency

from ._base import Offline


class Perplexity(Offline):
    """Perplexity of texts, at least 1: the number of equally likely tokens that would be as hard to predict.

    Of `nats` and `tokens` (those that were predicted, so mostly one fewer than the text has) of each text:
    `perplexity` of the whole, `perplexities` of each text, and their mean `mean_perplexity`; the last two are what the
    online metric returns. inf where exp overflows. Between models of different tokenizers compare `bits_per_byte`.

    >>> found = Perplexity(keep_in_memory=True).compute(nats=[4 * math.log(2), 0.0], tokens=[2, 2])
    >>> round(found["perplexity"], 6), [round(each, 6) for each in found["perplexities"]]
    (2.0, [4.0, 1.0])
    """

    INPUTS = "nats: summed cross-entropy of each text; tokens: how many were predicted in it"
    FEATURES = datasets.Features({"nats": datasets.Value("float64"), "tokens": datasets.Value("int64")})

    def score(self, *, nats: Sequence[float], tokens: Sequence[int]) -> dict[str, float | list[float]]:
        _check("perplexity", nats, tokens, "tokens")
        each = [_exp(cost / count) for cost, count in zip(nats, tokens, strict=True)]
        return {
            "perplexity": _exp(sum(nats) / sum(tokens)),
            "perplexities": each,
            "mean_perplexity": float(np.mean(each)),
        }


class BitsPerByte(Offline):
    """Bits needed for a byte of the texts, at least 0, from `nats` and `bytes` (of UTF-8) of each text.

    Ours; it compares models of different vocabularies.

    >>> BitsPerByte(keep_in_memory=True).compute(nats=[math.log(2), math.log(8)], bytes=[1, 3])
    {'bits_per_byte': 1.0}
    """

    INPUTS = "nats: summed cross-entropy of each text; bytes: its length in UTF-8"
    FEATURES = datasets.Features({"nats": datasets.Value("float64"), "bytes": datasets.Value("int64")})

    def score(self, *, nats: Sequence[float], bytes: Sequence[int]) -> dict[str, float]:
        _check("bits_per_byte", nats, bytes, "bytes")
        return {"bits_per_byte": sum(nats) / sum(bytes) / math.log(2)}


class AcceptanceRate(Offline):
    """Part of a draft's tokens that its target accepts in speculative decoding, 0 to 1 (arXiv:2211.17192).

    Of `accepted` tokens, counted in a decode or the sum of their probabilities, and `tokens`, those that the target
    decided on, of each text: `acceptance_rate` of the whole, `acceptance_rates` of each text, and `block_efficiency`,
    tokens a call of the target when `gamma` are drafted and each is accepted with the probability of the whole. Ours.

    >>> found = AcceptanceRate(keep_in_memory=True).compute(accepted=[3.0, 1.0], tokens=[4, 4], gamma=2)
    >>> found["acceptance_rate"], found["acceptance_rates"], found["block_efficiency"]
    (0.5, [0.75, 0.25], 1.75)
    """

    INPUTS = "accepted: tokens of the draft's that were accepted in each text; tokens: how many were decided on"
    FEATURES = datasets.Features({"accepted": datasets.Value("float64"), "tokens": datasets.Value("int64")})

    def score(
        self, *, accepted: Sequence[float], tokens: Sequence[int], gamma: int = 5
    ) -> dict[str, float | list[float]]:
        for row, (part, whole) in enumerate(zip(accepted, tokens, strict=True)):
            if not 0 <= part <= whole or whole < 1:
                raise MismatchError(
                    f"acceptance_rate: row {row} has {part} accepted tokens of {whole}. Drop texts in which none is "
                    "decided on."
                )
        rate = sum(accepted) / sum(tokens)
        return {
            "acceptance_rate": rate,
            "acceptance_rates": [part / whole for part, whole in zip(accepted, tokens, strict=True)],
            "block_efficiency": block_efficiency(rate, gamma),
        }


def _check(metric: str, nats: Sequence[float], counts: Sequence[int], unit: str) -> None:
    for row, (cost, count) in enumerate(zip(nats, counts, strict=True)):
        if not 0 <= cost < math.inf:
            raise NumericalError(f"{metric}: row {row} cost {cost} nats, expected a finite number of at least 0.")
        if count < 1:
            raise MismatchError(f"{metric}: row {row} has {count} {unit}. Drop texts in which nothing is predicted.")


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
