"""Where a config keeps its sizes, and what it can express.

A config names a size in its own way (`hidden_size`, `n_embd`, `d_model`); `attribute_map` of transformers tells most of
the names, the rest stand here. Some configs have no number for the size of a head: it is hidden ÷ heads, and the two
can only be changed together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from hf_compress.errors import ConfigurationError

Dimension = Literal["hidden", "heads", "key_value_heads", "intermediate", "vocabulary"]
REMEDY = "Build the student from a config of your own and pass it to the Trainer."
_NAMES: Mapping[Dimension, tuple[str, ...]] = {
    "hidden": ("hidden_size", "pooler_hidden_size", "word_embed_proj_dim"),
    "heads": ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"),
    "key_value_heads": ("num_key_value_heads",),
    "intermediate": (
        "intermediate_size",
        "n_inner",
        "hidden_dim",
        "ffn_dim",
        "d_ff",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
    ),
    "vocabulary": ("vocab_size",),
}
RATIO = "mlp_ratio"
"""Intermediate ÷ hidden: where a config has that instead of a size (DINOv2)."""


def names(config: Any, dimension: Dimension) -> list[str]:
    """The config's own names of a size; empty where it has none."""
    held, mapped = config.to_dict(), getattr(config, "attribute_map", None) or {}
    found = list(dict.fromkeys(mapped.get(name, name) for name in _NAMES[dimension]))
    found = [name for name in found if name in held]
    if dimension == "key_value_heads":  # Whisper's name for it is another one of its heads
        found = [name for name in found if held[name] is not None and name not in names(config, "heads")]
    if dimension == "intermediate" and not found and RATIO in held:
        return [RATIO]
    return found


def resized(config: Any, changes: Mapping[Dimension, int], head_dim: int | None = None) -> Any:
    """A copy with other sizes.

    Args:
        config: of one model, without configs inside it.
        changes: by dimension.
        head_dim: set too; None: the config decides it.
    """
    config = copy.deepcopy(config)
    for dimension, value in changes.items():
        for name in names(config, dimension):
            setattr(config, name, value)
    if RATIO in names(config, "intermediate") and "intermediate" in changes:
        setattr(config, RATIO, changes["intermediate"] // config.hidden_size)
    if head_dim is not None:
        config.head_dim = head_dim
    return config


def on_meta(cls: type, config: Any) -> nn.Module:
    """A model without memory, to read shapes from; the config is not changed."""
    with torch.device("meta"):
        model: nn.Module = cls(copy.deepcopy(config))
    return model


def check_plain(model: nn.Module) -> None:
    """Refuses a config that holds others: of an image and a text model, say.

    Raises:
        ConfigurationError: with the remedy.
    """
    config: Any = getattr(model, "config", None)
    if config is None or config.get_text_config() is not config or not names(config, "hidden"):
        raise ConfigurationError(
            f"shrink narrows models whose config has a hidden size of its own, {type(model).__name__} is made of "
            f"several or of none. {REMEDY}"
        )


def check_loadable(config: Any, sizes: str) -> None:
    """Refuses a config that could be saved but not loaded.

    Raises:
        ConfigurationError: naming the sizes and what the class said.
    """
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # each config class checks in its own way
        raise ConfigurationError(
            f"shrink cannot express {sizes} in a {type(config).__name__}: {error}. {REMEDY}"
        ) from error
