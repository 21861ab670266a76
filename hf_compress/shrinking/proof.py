"""That a map of axes is right, shown on a small model: the order of units means nothing.

Hidden dimensions, heads and neurons may be renamed in all weights at once without any change of the outputs. So a map
is tried by permuting everything that it claims: where an axis is missing, too many, or laid out otherwise, the outputs
differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import ConfigurationError

from .axes import Axis, gathered
from .sizes import REMEDY, Dimension

TOKENS = 7
TOLERANCE = 1e-4
"""Times the largest output: RMSNorm and some softmaxes are float32 in a float64 model too."""


class Probe:
    """A small model with random weights, in float64, with its outputs on a sample."""

    def __init__(self, cls: type, config: Any) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = config._experts_implementation = "eager"
        draw = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            self.model: Any = cls(config).double().eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.copy_(_drawn(weight.shape, draw))
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.called: list[str] = []
        """Names of the modules in the order of their first call."""
        self.sample = sample(self.model)
        handles = [
            module.register_forward_hook(lambda *_, name=name: self.called.append(name))
            for name, module in self.model.named_modules()
        ]
        self.outputs = self._run()
        for handle in handles:
            handle.remove()
        self.called = list(dict.fromkeys(self.called))

    def holds(self, found: Iterable[Axis], orders: Mapping[tuple[Dimension, str], Tensor]) -> bool:
        """Whether the outputs stay when the units of the axes are put into other orders, by dimension and group."""
        self.model.load_state_dict(gathered(self.state, found, orders))
        outputs = self._run()
        hidden = orders.get(("hidden", ""))
        return all(
            _close(outputs[name], value)
            or (hidden is not None and value.shape[-1] == len(hidden) and _close(outputs[name], value[..., hidden]))
            for name, value in self.outputs.items()
        )

    def _run(self) -> dict[str, Tensor]:
        with torch.no_grad():
            found = self.model(**self.sample, return_dict=True)
        return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=TOLERANCE * (1 + other.abs().max().item()))


def _drawn(shape: torch.Size, draw: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=draw, dtype=torch.float64)
    if len(shape) < 2:  # biases and norms
        return 0.5 + 0.3 * values
    return values / math.sqrt(math.prod(shape[1:]))


def sample(model: nn.Module) -> dict[str, Tensor]:
    """Invented inputs of one row, of the model's dtype.

    Raises:
        ConfigurationError: if it takes something for which none are known.
    """
    config: Any = model.config
    draw = torch.Generator().manual_seed(1)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    name = str(getattr(model, "main_input_name", "input_ids"))

    def ids(count: int) -> Tensor:
        special = [value for key, value in config.to_dict().items() if key.endswith("token_id")]
        plain = torch.tensor([token for token in range(min(config.vocab_size, 1000)) if token not in special])
        found = plain[torch.randint(len(plain), (1, count), generator=draw)]
        last = getattr(config, "eos_token_id", None)
        if isinstance(last, int) and last < config.vocab_size:
            found[0, -1] = last  # BART's classifier reads there
        return found

    shape = _shape(config, name)
    if shape is None:
        raise ConfigurationError(f"shrink has no inputs to try {type(model).__name__} on: it takes {name}. {REMEDY}")
    found = {
        name: ids(TOKENS) if name == "input_ids" else torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    }
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_decoder"):
        found["decoder_input_ids"] = ids(TOKENS)  # as many: classifiers look for the end in input_ids and read it there
    return found


def _shape(config: Any, name: str) -> tuple[int, ...] | None:
    """Of an input with a row; None where it is not known."""
    if name == "input_ids":
        return (1, TOKENS)
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        return (1, config.num_channels, *((size, size) if isinstance(size, int) else size))
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return (1, config.num_mel_bins, 2 * config.max_source_positions)
    if name == "input_values" and hasattr(config, "conv_stride"):
        return (1, 16 * math.prod(config.conv_stride) + sum(config.conv_kernel))
    return None
