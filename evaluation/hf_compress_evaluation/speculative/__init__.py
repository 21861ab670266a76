"""How many of a draft model's tokens its target accepts: `python -m hf_compress_evaluation.speculative TARGET DRAFT`.

Leviathan, Kalman, Matias: Fast Inference from Transformers via Speculative Decoding, ICML 2023, arXiv:2211.17192; Zhou
et al.: DistillSpec, ICLR 2024, arXiv:2310.08461, with the lenience functions.

    α_i = Σ_v min( p_i[v], q_i[v] ) = 1 - TV( p_i, q_i )        probability that the token drafted at i is accepted
    τ   = (1 - α^(γ+1)) / (1 - α) = 1 + α + … + α^γ             tokens a target call, if all positions had one α
    speed-up = τ / (c γ + 1)                                    c: time of a draft's forward over a target's

p is the target's distribution, q the draft's, as they are at decode time: with that temperature, top-k and top-p.
Greedy decoding puts all of each distribution on its likeliest token, so that α is 1 where both choose the same, else 0.
The contexts that count are those of texts that the target writes. Acceptance comes in bursts: τ from the mean α is
above what a decode gives, so `running.counted` counts one.

    lossy: accept x with probability min(1, f(p[x]) / q[x]),  f_lin = p/ε,  f_sq = p²/ε,  f_exp = p^ε,  0 < ε ≤ 1

These three forms are recalled of DistillSpec, not compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_compress.divergences import REMEDY
from hf_compress.errors import ConfigurationError
from hf_compress.objective import require_one_shape

Lenience = Callable[[Tensor], Tensor]
"""From the target's probabilities to what takes their place in the acceptance ratio."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen."""

    temperature: float = 1.0
    """0: the likeliest token."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    """1: all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigurationError(
                "speculative: temperature and top_k must be at least 0 and top_p lie in (0, 1], got "
                f"{self.temperature}, {self.top_k} and {self.top_p}."
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def whole(self) -> bool:
        """Whether tokens are drawn from a model's own distribution."""
        return self.temperature == 1 and not self.top_k and self.top_p == 1

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from.

        Args:
            logits: (position, vocab), any float type; widened to float32.

        Returns:
            (position, vocab), each row sums to 1.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.greedy:
            return torch.nn.functional.one_hot(wide.argmax(-1), wide.shape[-1]).to(wide.dtype)
        return self._warped(wide).softmax(-1)

    def drafted(self, logits: Tensor) -> Tensor:
        """What transformers 5.24 draws a draft's tokens from; arguments and result as `probabilities`.

        `generate(assistant_model=…)` hands the draft the target's temperature, top-k and top-p, and the draft applies
        those of the settings after them, so that each counts twice: a temperature as its square. The decode keeps the
        target's distribution all the same, as it accepts by what was drawn from; how much it accepts is another.
        """
        if self.greedy or self.whole:
            return self.probabilities(logits)
        return self.probabilities(self._warped(logits.to(torch.promote_types(logits.dtype, torch.float32))))

    def _warped(self, wide: Tensor) -> Tensor:
        found: Tensor = TemperatureLogitsWarper(float(self.temperature))(None, wide)
        if self.top_k:
            found = TopKLogitsWarper(self.top_k)(None, found)
        if self.top_p < 1:
            found = TopPLogitsWarper(self.top_p)(None, found)
        return found

    def settings(self) -> dict[str, Any]:
        """Of `generate`."""
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": float(self.temperature), "top_k": self.top_k, "top_p": self.top_p}

    def __str__(self) -> str:
        if self.greedy:
            return "greedy"
        cuts = [f"top-k {self.top_k}"] * (self.top_k > 0) + [f"top-p {self.top_p:g}"] * (self.top_p < 1)
        return ", ".join([f"temperature {self.temperature:g}", *cuts])


def acceptance(target: Tensor, draft: Tensor, lenience: Lenience | None = None) -> Tensor:
    """Probability that a token which the draft draws is accepted.

    Args:
        target: (position, vocab) p, probabilities as `Decoding.probabilities` gives them.
        draft: (position, vocab) q.
        lenience: f, e.g. `partial(f_lin, eps=0.5)`; None: f(p) = p, which keeps the target's distribution.

    Returns:
        (position,) in 0 … 1.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("acceptance", draft, target, REMEDY)
    allowed = target if lenience is None else lenience(target)
    return torch.minimum(allowed, draft).sum(-1).clamp(max=1.0)


def f_lin(probabilities: Tensor, eps: float) -> Tensor:
    """p / ε."""
    return probabilities / _checked(eps)


def f_sq(probabilities: Tensor, eps: float) -> Tensor:
    """p² / ε: below p, so stricter, where p < ε."""
    return probabilities.square() / _checked(eps)


def f_exp(probabilities: Tensor, eps: float) -> Tensor:
    """p^ε."""
    return probabilities.pow(_checked(eps))


def _checked(eps: float) -> float:
    if not 0 < eps <= 1:
        raise ConfigurationError(f"speculative: the lenience ε must lie in (0, 1], got {eps}.")
    return eps


def block_efficiency(alpha: float, gamma: int) -> float:
    """τ: tokens a target call when γ are drafted and each is accepted with probability α, independently.

    Args:
        alpha: 0 … 1.
        gamma: at least 1.

    Returns:
        1 … γ + 1.
    """
    if not 0 <= alpha <= 1 or gamma < 1:
        raise ConfigurationError(f"speculative: alpha must lie in 0 … 1 and gamma be at least 1, got {alpha}, {gamma}.")
    return float(sum(alpha**place for place in range(gamma + 1)))


def speed_up(tau: float, *, gamma: int, cost: float) -> float:
    """Tokens in the time of one target call, against decoding without a draft, where a token costs one.

    Args:
        tau: tokens a target call.
        gamma: drafted tokens a call.
        cost: c, time of a draft's forward over a target's; above 0.
    """
    if cost <= 0:
        raise ConfigurationError(f"speculative: the draft's cost must be above 0, got {cost}.")
    return tau / (cost * gamma + 1)
