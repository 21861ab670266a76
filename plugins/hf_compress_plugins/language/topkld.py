"""TopKLD: a low-bit copy of a generator learns from the model in full precision.

Ding, Cao, Cao, Chen: Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models, 2025, arXiv:2501.06218.

    S = the teacher's k most likely classes                          k: that of the sampler
    D_i = Σ_{v in S}     ( p log(p / q) - p + q )                    at each scored position i
        + Σ_{v not in S} ( q log(q / p) - q + p )                    p the teacher's distribution, q the student's

[reconstruction] No code is public and the loss is not confirmed. Known is that it splits what the sampler can draw from
the rest, is compared with the forward and the reverse KL, and ties k to the sampler's; forward on the head and reverse
on the tail is our reading, `swapped=True` the other one. Without the terms ∓p ±q, the `plain` variant, the sum is no
divergence: of p = (0.5, 0.5), q = (0.9, 0.1) and k = 1 it is -0.45, so that its least value is not where q = p. With
them every summand is at least 0 and all are 0 only there. k of all classes is the forward KL and k = 0 the reverse one,
in both variants. The task's own loss has no part. S comes from the teacher and is constant for the gradient.

`LowBitWeights` is the other half, quantisation-aware training, as a callback beside the distillation's:

    s_r = max |w_r| / (2^(bits - 1) - 1) of each row r,   ŵ = s_r · round( w / s_r )

The student computes with ŵ and its gradient moves w (straight through the rounding, s without gradient); at the end ŵ
stays in it. What that is worth at a number of bits in all is measured by `hf_compress_evaluation.bit_levels`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_compress.distiller import PREFIX
from hf_compress.divergences import log_probabilities
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Objective, Rows, Step
from hf_compress.registry import Method

logger = logging.getLogger(__name__)

Variant = Literal["generalised", "plain"]
BITS = (2, 8)
"""Fewest and most bits of a weight."""


@dataclass(frozen=True, kw_only=True)
class TopKLDConfig:
    """Hyper-parameters of TopKLD."""

    k: int = 50
    """k ≥ 0. Set it to the top_k that the model will be sampled with; 50 is that of `generate`."""
    variant: Variant = "generalised"
    """ "plain" leaves out the terms that make the sum a divergence."""
    swapped: bool = False
    """True: reverse KL on the head, forward on the tail."""

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigurationError(f"topkld: k must be at least 0, got {self.k}.")
        if self.variant not in ("generalised", "plain"):
            raise ConfigurationError(f"topkld: variant must be generalised or plain, got {self.variant!r}.")
        if self.variant == "plain":
            logger.warning("topkld: the plain sum falls below 0; its least value is not at the teacher's distribution.")


def head(teacher_logits: Tensor, k: int) -> Tensor:
    """(position, class) bool: the teacher's k most likely classes at each position; all where there are no more."""
    chosen = teacher_logits.detach().topk(min(k, teacher_logits.shape[-1]), -1).indices
    return torch.zeros_like(teacher_logits, dtype=torch.bool).scatter(-1, chosen, True)


def topkld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    variant: Variant = "generalised",
    swapped: bool = False,
) -> Tensor:
    """Forward KL on the head and reverse KL on the tail of the teacher's distribution.

    Args:
        student_logits: (position, class), any float type; widened to float32.
        teacher_logits: (position, class), detached here.
        k: classes in the head.
        variant: whether the summands are those of an unnormalised divergence.
        swapped: exchange the two.

    Returns:
        (position,) nats, at least 0 in the generalised variant; ∞ where one excludes what the other allows in its part.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    log_p, log_q = log_probabilities("topkld", student_logits, teacher_logits)
    forward = head(teacher_logits, k) != swapped
    p, q = log_p.exp(), log_q.exp()
    ahead = p * torch.where(forward & (p > 0), log_p - log_q, 0.0)
    behind = q * torch.where(~forward & (q > 0), log_q - log_p, 0.0)
    found = ahead + behind
    if variant == "generalised":
        found = found + torch.where(forward, q - p, p - q)
    return found.sum(-1)


class TopKLD(Objective):
    """Forward KL where the sampler draws, reverse KL where it does not."""

    Config = TopKLDConfig
    config: TopKLDConfig
    task_weight: ClassVar[float | None] = 0.0

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        settings = self.config
        return topkld(
            rows.student_logits,
            rows.teacher_logits,
            k=settings.k,
            variant=settings.variant,
            swapped=settings.swapped,
        )


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is put into few bits: every parameter of two axes or more, tables too, each once where it is tied."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.is_floating_point() and not name.startswith(PREFIX):
            yield name, parameter


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest points of each row's grid, symmetric around 0.

    Args:
        weight: (row, ...) finite.
        bits: 2 … 8; 2 leaves -1, 0 and 1.

    Returns:
        codes (row, column) int8 in ±(2^(bits - 1) - 1), and scales (row, 1) float16, 0 of a row of zeros.
    """
    if not BITS[0] <= bits <= BITS[1]:
        raise ConfigurationError(f"topkld: bits must be {BITS[0]} to {BITS[1]}, got {bits}.")
    top = 2 ** (bits - 1) - 1
    rows = weight.detach().float().flatten(1)
    scales = (rows.abs().amax(1, keepdim=True) / top).half()
    steps = rows / torch.where(scales > 0, scales, 1.0).float()
    return steps.round().clamp(-top, top).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """The weights that codes and scales stand for, in shape and type of `like`."""
    return (codes.float() * scales.float()).view_as(like).to(like.dtype)


class LowBitWeights(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Quantisation-aware training: the model computes with rounded weights, in training and evaluation.

    At rest its parameters are those that the optimizer moves, so that checkpoints resume exactly; when training ends
    they are the rounded ones. Activations stay as they are. One process a device, and no sharded parameters (FSDP,
    DeepSpeed's third stage).

        Trainer(model=copy.deepcopy(teacher), callbacks=[DistillCallback(teacher, TopKLD(k=50)), LowBitWeights(3)], …)

    Args:
        bits: of each weight of a matrix, 2 to 8.
    """

    def __init__(self, bits: int) -> None:
        if not BITS[0] <= bits <= BITS[1]:
            raise ConfigurationError(f"topkld: LowBitWeights takes {BITS[0]} to {BITS[1]} bits, got {bits}.")
        self.bits = bits
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._chosen = [parameter for _, parameter in matrices(model)]
        if not self._chosen:
            raise ConfigurationError("topkld: the model has no parameter of two axes: nothing to put into few bits.")
        self._remove()
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._round()),
            model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self._restore()),
        ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()
        self._round()
        self._kept = []

    def _round(self) -> None:
        if self._kept:
            return
        for parameter in self._chosen:
            self._kept.append((parameter, parameter.detach().clone()))
            # past autograd, which would otherwise refuse the backward of what it has seen
            parameter.data.copy_(dequantize(*quantize(parameter, self.bits), parameter))

    def _restore(self) -> None:
        for parameter, moved in self._kept:
            parameter.data.copy_(moved)
        self._kept = []

    def _remove(self) -> None:
        self._restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


METHOD = Method(
    title="Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models",
    paper="arXiv:2501.06218",
    authors="Xin Ding, Shijie Cao, Ting Cao, Zhibo Chen",
    year=2025,
    summary="A low-bit copy learns its full-precision model's likely classes by the forward KL, the others by the "
    "reverse; the loss is a reconstruction.",
    bibtex="""@misc{ding2025dissecting,
  title = {Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models},
  author = {Ding, Xin and Cao, Shijie and Cao, Ting and Chen, Zhibo},
  year = {2025}, eprint = {2501.06218}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("text-generation",),
    objective=TopKLD,
)
