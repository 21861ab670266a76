"""A moving average of the student's weights, which becomes the student at the end of training.

    θ̄ ← β θ̄ + (1 - β) θ,   β = 0.5^{images of this step / min(1000 · half-life, ramp-up · images seen before)}

The ramp-up keeps early weights from lasting: at any time half of the average is at most that part of the run old.
"""

from __future__ import annotations

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from hf_compress.distiller import PREFIX
from hf_compress.errors import ResumeError


def decay(images: float, batch: float, *, half_life: float, ramp_up: float) -> float:
    """β.

    Args:
        images: seen before this step; at 0 β is 0, so that the average begins as the weights of the first step.
        batch: images of this step, over all processes and micro-batches.
        half_life: in thousands of images.
        ramp_up: part of the images seen that the half-life may not exceed.
    """
    span = min(1000 * half_life, ramp_up * images)
    return float(0.5 ** (batch / span)) if span > 0 else 0.0


class Average(nn.Module):
    """Counts images and averages weights.

    The average is in every checkpoint, which it doubles: one float32 tensor of all trained parameters, as the module's
    extra state. It is no buffer, as DDP would send it to all ranks before every forward. Checkpoints and evaluation
    while training have the student's weights of the moment.

    Args:
        half_life: in thousands of images; None: count images only.
        ramp_up: as for `decay`.
    """

    images: Tensor
    """() seen so far, over all processes."""

    def __init__(self, half_life: float | None, *, ramp_up: float = 0.05) -> None:
        super().__init__()
        self.half_life, self.ramp_up = half_life, ramp_up
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))
        self._window = 0
        self._weights = torch.empty(0)

    def get_extra_state(self) -> Tensor:
        return self._weights

    def set_extra_state(self, state: Tensor) -> None:
        self._weights = state.clone()

    def count(self, images: int, *, micro: int) -> None:
        """Notes the images of one micro-batch of this process, the first of a window being 0."""
        self._window = images + (self._window if micro else 0)

    def update(self, student: nn.Module) -> None:
        """After the optimizer's step, on all ranks.

        Raises:
            ResumeError: if the run was resumed from one that did not average these parameters.
        """
        batch = int(reduce(torch.tensor(self._window, device=self.images.device), reduction="sum"))
        if self.half_life is not None:
            beta = decay(float(self.images), batch, half_life=self.half_life, ramp_up=self.ramp_up)
            self._blend(trained(student), beta)
        self.images += batch

    def _blend(self, parameters: list[nn.Parameter], beta: float) -> None:
        if not beta:
            wide = [p.detach().flatten().to(torch.promote_types(p.dtype, torch.float32)) for p in parameters]
            self._weights = torch.cat(wide)
            return
        sizes = [p.numel() for p in parameters]
        if sum(sizes) != self._weights.numel():
            raise ResumeError(
                f"the checkpoint's average has {self._weights.numel()} weights, the student trains {sum(sizes)}. "
                "Resume a run with the same ema_half_life and the same frozen parts, or start afresh."
            )
        self._weights = self._weights.to(parameters[0].device)
        for parameter, part in zip(parameters, torch.split(self._weights, sizes), strict=True):
            part.lerp_(parameter.detach().flatten().to(part.dtype), 1 - beta)

    def fold(self, student: nn.Module) -> None:
        """Gives the student the average for its weights; does nothing if there is none."""
        if self.half_life is None or not self._weights.numel():
            return
        parameters = trained(student)
        with torch.no_grad():
            for parameter, part in zip(
                parameters, torch.split(self._weights, [p.numel() for p in parameters]), strict=True
            ):
                parameter.copy_(part.view_as(parameter))


def trained(student: nn.Module) -> list[nn.Parameter]:
    """The student's own parameters that learn, without those of the methods attached to it."""
    return [p for name, p in student.named_parameters() if p.requires_grad and not name.startswith(PREFIX)]
