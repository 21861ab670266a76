"""Divergences between two distributions given as log probabilities, one value a position, in nats.

p is the teacher's distribution, q the student's. All stay in log space, where a temperature of 0.05 or a float16 logit
does not underflow, and give 0 for entries that both models exclude (0 · log 0 = 0). Rows come in already selected.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigurationError
from .objective import require_one_shape

REMEDY = "For different vocabularies or label sets choose a method that aligns them."


def log_probabilities(
    method: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p and log q, each (position, vocab), in float32 or wider; the teacher's without gradient.

    Raises:
        MismatchError: if the shapes differ: broadcasting would return nonsense.
    """
    require_one_shape(method, student_logits, teacher_logits, REMEDY)
    log_p = _softened(teacher_logits.detach(), temperature).log_softmax(-1)
    log_q = _softened(student_logits, temperature).log_softmax(-1)
    return log_p, log_q


def _softened(logits: Tensor, temperature: float) -> Tensor:
    """z / T in float32 or wider; one pass less where T = 1."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature


def check_temperature(method: str, temperature: float) -> None:
    """Raises `ConfigurationError` unless 0 < temperature < ∞."""
    if not 0 < temperature < math.inf:
        raise ConfigurationError(f"{method}: temperature must be positive and finite, got {temperature}.")


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(position,) KL(p ‖ q) = Σ p (log p - log q), at least 0, ∞ where q excludes what p allows. `kl(log_q, log_p)` is
    the reverse KL."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


class _SoftenedKL(torch.autograd.Function):
    """`softened_kl` with its gradient T (q - p) in closed form: 10 ms where the chain of its operations takes 20 (64 x
    32,000 logits, one CPU thread), and beside the logits it keeps p alone."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_q = _softened(student, temperature).log_softmax(-1)
        theirs = _softened(teacher, temperature)
        log_p, p = theirs.log_softmax(-1), theirs.softmax(-1)
        ctx.temperature = temperature
        ctx.save_for_backward(student, p)
        difference = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)  # 0 · log 0 = 0
        return temperature**2 * difference.mul_(p).sum(-1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        student, p = ctx.saved_tensors
        q = _softened(student, ctx.temperature).softmax(-1)
        if torch.is_grad_enabled():  # of a gradient that is differentiated again
            found = (q - p) * (ctx.temperature * upstream)[..., None]
        else:
            found = q.sub_(p).mul_((ctx.temperature * upstream)[..., None])
        return found.to(student.dtype), None, None


def softened_kl(method: str, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T² · KL( softmax(z_t / T) ‖ softmax(z_s / T) ).

    Args:
        method: for the message.
        student_logits: (…, class), any float type; the softmax is taken in float32 or wider.
        teacher_logits: the same shape, detached here.
        temperature: T.

    Returns:
        (…) nats, at least 0.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape(method, student_logits, teacher_logits, REMEDY)
    found: Tensor = _SoftenedKL.apply(student_logits, teacher_logits.detach(), temperature)  # type: ignore[no-untyped-call]
    return found


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(position,) -Σ p log q: KL(p ‖ q) plus the entropy of p. Entries that q excludes add 0."""
    return -(log_p.exp() * torch.where(log_q > -math.inf, log_q, 0.0)).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight · p + (1 - weight) · q), 0 < weight < 1; -inf with a zero gradient where both are -inf."""
    neither = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp(-inf, -inf) has a NaN gradient
    left = torch.where(neither, 0.0, log_p) + math.log(weight)
    right = torch.where(neither, 0.0, log_q) + math.log1p(-weight)
    return torch.where(neither, -math.inf, torch.logaddexp(left, right))


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """(position,) generalised Jensen-Shannon: β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q.

    β = 0 is KL(p ‖ q) and β = 1 is KL(q ‖ p) by definition (arXiv:2306.13649), not by the limit, which is 0.
    """
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(position,) total variation ½ Σ |p - q|, 0 … 1: one minus the acceptance rate of speculative sampling."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def skew_kl(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """(position,) KL(p ‖ weight · p + (1 - weight) · q), finite where q excludes what p allows (arXiv:2402.03898)."""
    return kl(log_p, log_mixture(log_p, log_q, weight))
