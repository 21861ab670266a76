"""Networks of a method with optimizers of their own: outside the student, saved beside its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from . import files, foreign
from .errors import ConfigurationError, NumericalError, ResumeError

WEIGHTS, OPTIMIZERS = "networks.safetensors", "networks-optimizers.pt"
"""Beside a checkpoint's own files."""


class Networks:
    """The networks of a run by name, each stepped once a window.

    Args:
        made: (network, its optimizer) by name.

    Raises:
        ConfigurationError: if an optimizer holds parameters that are not its network's.
    """

    def __init__(self, made: Mapping[str, tuple[nn.Module, Optimizer]]) -> None:
        self.modules = {name: network for name, (network, _) in made.items()}
        self._optimizers = {name: optimizer for name, (_, optimizer) in made.items()}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        """Of the window. Kept apart from `.grad`: a student's loss that runs through a network leaves its own there."""
        for name, (network, optimizer) in made.items():
            own = {id(parameter) for parameter in network.parameters()}
            if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
                raise ConfigurationError(f"the optimizer of network {name!r} holds parameters of another module.")

    def __bool__(self) -> bool:
        return bool(self.modules)

    def backward(self, losses: Mapping[str, Tensor], *, micros: int, step: int) -> None:
        """Adds the gradients of one micro-batch's losses to the networks, and to nothing else.

        Raises:
            NumericalError: for a loss that is not finite; no network has changed.
        """
        for name, loss in losses.items():
            if not torch.isfinite(loss):
                raise NumericalError(f"step {step}: network loss {name!r} is {loss.item()}; no weight was changed.")
        inputs = [p for network in self.modules.values() for p in network.parameters() if p.requires_grad]
        total = torch.stack(list(losses.values())).sum() / micros
        for parameter, gradient in zip(inputs, torch.autograd.grad(total, inputs, allow_unused=True), strict=True):
            if gradient is not None:
                before = self._gradients.get(parameter)
                self._gradients[parameter] = gradient if before is None else before + gradient

    def step(self, accelerator: Accelerator) -> None:
        """Averages the gradients over all ranks and steps every optimizer."""
        for name, optimizer in self._optimizers.items():
            for parameter in self.modules[name].parameters():
                gradient = self._gradients.get(parameter)
                if gradient is not None and accelerator.num_processes > 1:
                    gradient = accelerator.reduce(gradient, reduction="mean")
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._gradients = {}

    def save(self, folder: Path) -> None:
        """Writes weights and optimizers, each file whole or not at all."""
        states = {
            f"{name}/{key}": tensor.detach().clone().contiguous()
            for name, network in self.modules.items()
            for key, tensor in network.state_dict().items()
        }
        with files.atomic_file(folder / WEIGHTS) as weights:  # last: without them a resume is refused
            save_file(states, weights)
            with files.atomic_file(folder / OPTIMIZERS) as optimizers:
                torch.save({name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}, optimizers)

    def load(self, folder: Path) -> None:
        """Takes the state of a checkpoint.

        Raises:
            ResumeError: if the checkpoint has none, or that of other networks.
        """
        remedy = "Resume from a checkpoint of a run with this method, or start afresh."
        if not (folder / WEIGHTS).exists() or not (folder / OPTIMIZERS).exists():
            raise ResumeError(f"checkpoint {folder.name} holds no {WEIGHTS}; the networks would start anew. {remedy}")
        with files.safetensors(folder / WEIGHTS) as weights:
            states = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118 (no mapping)
        with foreign.refusing(folder / OPTIMIZERS, "to resume from", remedy):
            optimizers: dict[str, Any] = torch.load(folder / OPTIMIZERS, weights_only=True)
        for name, network in self.modules.items():
            own = {k.partition("/")[2]: v for k, v in states.items() if k.partition("/")[0] == name}
            if own.keys() != network.state_dict().keys() or name not in optimizers:
                raise ResumeError(f"checkpoint {folder.name} holds other networks than {name!r}. {remedy}")
            with foreign.refusing(folder, "to resume from", remedy):  # shapes of another network
                network.load_state_dict(own)
                self._optimizers[name].load_state_dict(optimizers[name])
