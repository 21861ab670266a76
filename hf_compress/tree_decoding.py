"""Verifying a tree of drafted tokens in one forward of a causal LM, and what such decoding refuses.

For `generation` parts whose output is to be that of plain decoding: `check_model` and `check_call` first, then a
`CachedModel` that scores trees and keeps what was accepted.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ConfigurationError


class TreeShape(Protocol):
    """Where drafted tokens stand, the root first."""

    @property
    def depths(self) -> Tensor:
        """(node,) 0 for the root."""

    @property
    def sees(self) -> Tensor:
        """(node, node) bool: root, ancestors and itself."""


class CachedModel:
    """A causal LM with its key-value cache.

    Args:
        model: any causal LM that takes a 4-D mask, position ids and a dynamic cache of whole layers.
        prompt: (1, time) ids; all but the last are read here.
    """

    def __init__(self, model: Any, prompt: Tensor) -> None:
        from transformers import DynamicCache

        self.model, self.cache, self.length = model, DynamicCache(config=model.config), prompt.shape[1] - 1
        if self.length:
            last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
            positions = torch.arange(self.length, device=prompt.device)[None]
            model(input_ids=prompt[:, :-1], position_ids=positions, cache=self.cache, use_cache=True, **last)

    def score(self, ids: Tensor, tree: TreeShape) -> Tensor:
        """(node, vocab) logits of (node,) tokens; the cache holds the whole tree until `keep`."""
        prefix = torch.ones(len(ids), self.length, dtype=torch.bool, device=ids.device)
        output = self.model(
            input_ids=ids[None],
            attention_mask=additive(torch.cat([prefix, tree.sees], 1), self.model.dtype),
            position_ids=(self.length + tree.depths)[None],
            cache=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[0]
        return logits

    def keep(self, nodes: Tensor) -> None:
        """Moves the keys and values of those nodes behind the prefix and drops the other nodes'."""
        end = self.length + len(nodes)
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                states[:, :, self.length : end] = states[:, :, self.length + nodes.to(states.device)]
                setattr(layer, name, states[:, :, :end])
        self.length = end


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, query, key) mask to be added to attention scores, of (query, key) bool."""
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[None, None]


def positions(model: Any) -> int:
    """How many positions behave as in a shorter text: all that a model has, or those before its frequencies change."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or 2**31
    return min(limit, _frequencies_until(config))


def check_call(
    method: str,
    input_ids: Tensor,
    logits_processor: Any,
    config: Any,
    kwargs: Mapping[str, Any],
    *,
    sampling: bool = False,
) -> None:
    """Refuses a call of `generate` whose output would not be that of plain decoding.

    Args:
        method: its name, for the message.
        input_ids: (batch, time).
        logits_processor: of the call.
        config: the generation config.
        kwargs: what else the method was called with.
        sampling: whether the method also samples, and applies logits processors to the sequence of each token.

    Raises:
        ConfigurationError: with what came and the remedy.
    """
    cache, mask, places = (kwargs.get(name) for name in ("cache", "attention_mask", "position_ids"))
    known = ("cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep")
    others = [name for name, value in kwargs.items() if name not in known and value is not None]
    processors = [] if sampling else [type(processor).__name__ for processor in logits_processor or ()]
    mode = config.get_generation_mode().value
    served, remedy = (
        (("greedy_search", "sample"), "num_beams=1")
        if sampling
        else (("greedy_search",), "do_sample=False and num_beams=1")
    )
    usual = places is None or torch.equal(places.cpu(), torch.arange(input_ids.shape[1])[None])
    if mode not in served:
        problem = f"{mode}. Pass {remedy}"
    elif len(input_ids) != 1:
        problem = f"{len(input_ids)} rows. Generate them one by one; what the method keeps is kept"
    elif not input_ids.shape[1] or others:
        problem = f"inputs besides ids ({', '.join(others) or 'no ids'})"
    elif not usual or (mask is not None and not bool(mask.bool().all())):
        problem = "padding, masked tokens or position_ids of your own. Pass the row without padding"
    elif processors:
        problem = f"logits processors: {', '.join(processors)}. Unset what asks for them, such as a penalty"
    elif config.return_dict_in_generate:
        problem = "return_dict_in_generate=True. It returns ids alone"
    elif getattr(cache, "_is_user_defined", False) or (cache is not None and cache.get_seq_length()):
        problem = "a cache of your own. It starts with an empty one and does not return it"
    else:
        return
    kinds = "greedy decoding or sampling" if sampling else "greedy decoding"
    raise ConfigurationError(f"{method}: {kinds} of one row, got {problem}. Or leave custom_generate out.")


def check_model(method: str, model: Any, longest: int) -> None:
    """Refuses a model whose attention a tree does not fit.

    Args:
        method: its name, for the message.
        model: the causal LM.
        longest: tokens that the sequence may come to.

    Raises:
        ConfigurationError: with what the model has that does not fit.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    config = model.config.get_text_config(decoder=True)
    lacking = {"attention_mask", "position_ids", "cache"} - set(inspect.signature(type(model).forward).parameters)
    if model.config.is_encoder_decoder:
        problem = "has an encoder"
    elif lacking:
        problem = f"takes no {' and no '.join(sorted(lacking))}"
    elif getattr(config, "alibi", False):
        problem = "takes positions from the mask (alibi)"
    elif config._attn_implementation not in ("sdpa", "eager"):
        problem = f"runs {config._attn_implementation} attention, which takes no tree; set_attn_implementation('sdpa')"
    elif "local" in getattr(config, "attention_layers", ()) or any(
        type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers
    ):
        problem = "has layers that keep no whole cache: a sliding window, chunks or a recurrent state"
    elif longest > (limit := _frequencies_until(config)):
        problem = f"changes its rotary frequencies behind {limit} tokens, and {longest} were asked for"
    else:
        return
    raise ConfigurationError(
        f"{method}: {type(model).__name__} {problem}, so its output would not be that of plain decoding. "
        "Leave custom_generate out."
    )


def _frequencies_until(config: Any) -> int:
    """Tokens up to which the rotary frequencies do not depend on the length."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in (rope, *rope.values())
        if isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=2**31)
