"""Named signals of a model, recorded while its forward runs.

`hidden:-1` comes from a hook on the body, other hidden states from `output_hidden_states`; queries, keys and values
come from an attention function that records its arguments and calls the real one, so the user's backend stays.
Nothing is recorded outside the one forward that is being watched: gradient checkpointing runs inner modules again
during backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigurationError, MismatchError
from .outputs import field, first, hidden_state, logits_of

_WATCHED: list[Taps] = []
"""The forwards being recorded, innermost last."""
_SUFFIX = "_tap"
ATTENTION = ("q", "k", "v")
"""Kinds of taps that are (batch, heads, time, head dim)."""


def joined_heads(vectors: Tensor) -> Tensor:
    """Queries, keys or values (batch, heads, time, head dim) as (batch, time, width)."""
    return vectors.transpose(1, 2).flatten(2)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model; the model itself otherwise."""
    outer: Any = model
    return outer.get_base_model() if hasattr(outer, "peft_config") and hasattr(outer, "get_base_model") else outer


def body(model: nn.Module) -> nn.Module | None:
    """What the head receives its input from: the decoder of an encoder-decoder, else the base model.

    None if the model is its own body: then the first field of its output is what the body gives.
    """
    inner = unwrap(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False) and hasattr(inner, "get_decoder"):
        decoder: nn.Module = inner.get_decoder()
        return decoder
    base: nn.Module = getattr(inner, "base_model", inner)
    return None if base is inner else base


class Reached(Exception):  # noqa: N818 (no error: it ends a forward whose last tap has been recorded)
    """The forward has come to the tap after which nothing is wanted."""


class Taps:
    """Records the named taps of one model.

    Args:
        model: student or teacher; hooks are placed on its inner modules until `remove`.
        names: tap names as in `Needs`.
        layers: its number of layers, to resolve negative indices.
        until: `hidden:i` or `output:NAME`: a watched forward raises `Reached` once it is recorded. Hidden states are
            then read from the blocks, as the model never gets to return them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], layers: int, until: str | None = None) -> None:
        self.model, self.names, self.layers, self.until = model, frozenset(names), layers, until
        self.record: dict[str, Tensor] = {}
        self._calls = 0
        self._on = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._implementation: str | None = None
        attention = {name for name in self.names if name.partition(":")[0] in ATTENTION}
        self._attention = {self._resolve(name) for name in attention}
        try:
            self._place()
        except BaseException:
            self.remove()
            raise

    @property
    def hidden_states(self) -> bool:
        """Whether the forward has to be asked for `output_hidden_states`."""
        early = self.until is not None
        return not early and any(name.startswith("hidden:") and name != "hidden:-1" for name in self.names)

    def _resolve(self, name: str) -> tuple[str, int]:
        letter, _, index = name.partition(":")
        layer = int(index)
        if not -self.layers <= layer < self.layers:
            raise MismatchError(f"tap {name!r}: the model has {self.layers} layers.")
        return letter, layer % self.layers

    def _place(self) -> None:
        if "hidden:-1" in self.names and (inner := body(self.model)) is not None:
            self._handles.append(inner.register_forward_hook(self._keep_first("hidden:-1")))
        modules = dict(unwrap(self.model).named_modules())
        for name in self.names:
            side, _, path = name.partition(":")
            if side not in ("input", "output"):
                continue
            if path not in modules:
                raise MismatchError(f"tap {name!r}: {type(self.model).__name__} has no module {path!r}.")
            if side == "input":
                self._handles.append(modules[path].register_forward_pre_hook(self._keep_input(name), with_kwargs=True))
            else:
                self._handles.append(modules[path].register_forward_hook(self._keep_first(name)))
        if self._attention:
            self._tap_attention()
        if self.until is not None:
            self._place_early(self.until)

    def _place_early(self, until: str) -> None:
        """Hidden states from the blocks themselves, and the end of the forward after the last wanted one."""
        if until not in self.names or until.partition(":")[0] not in ("hidden", "output"):
            raise ConfigurationError(f"teacher_until must be a tapped hidden:i or output:NAME, got {until!r}.")
        states = any(name.startswith("hidden:") for name in self.names)
        if states and getattr(getattr(unwrap(self.model), "config", None), "is_encoder_decoder", False):
            raise ConfigurationError(
                "teacher_until reads hidden states from the decoder's blocks, and those of an encoder-decoder are its "
                "encoder's. Leave teacher_until out."
            )
        for name in sorted(self.names, key=lambda name: name == until):  # its hook is the last on its module
            if not name.startswith("hidden:"):
                continue
            index = int(name.partition(":")[2])
            if not 0 <= index < self.layers:
                raise MismatchError(f"tap {name!r} with teacher_until: give hidden:0 … hidden:{self.layers - 1}.")
            stack = blocks(self.model, self.layers)
            if index == 0:
                self._handles.append(stack[0].register_forward_pre_hook(self._keep_input(name), with_kwargs=True))
            else:
                self._handles.append(stack[index - 1].register_forward_hook(self._keep_first(name)))
        module = self._source(until)
        hook = module.register_forward_pre_hook if until == "hidden:0" else module.register_forward_hook
        self._handles.append(hook(self._stop_here))

    def _source(self, name: str) -> nn.Module:
        kind, _, path = name.partition(":")
        if kind == "output":
            module: nn.Module = unwrap(self.model).get_submodule(path)
            return module
        return blocks(self.model, self.layers)[max(int(path) - 1, 0)]

    def _stop_here(self, *_: Any) -> None:
        if self._on:
            raise Reached

    def _keep_first(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._on:
                self.record[name] = output if isinstance(output, Tensor) else first(output)

        return hook

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._on:
                self.record[name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def _tap_attention(self) -> None:
        config = getattr(self.model, "config", None)
        real = str(getattr(config, "_attn_implementation", None)).removesuffix(_SUFFIX)  # tapped by another run already
        if real not in ("eager", "sdpa"):
            raise ConfigurationError(
                f"queries, keys and values are tapped under eager and sdpa attention, this model uses {real!r}. "
                'Load it with attn_implementation="sdpa".'
            )
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigurationError(
                "queries, keys and values of an encoder-decoder are not tapped: its attentions interleave. "
                "Tap hidden states, or distil its encoder alone."
            )
        _register(real)
        self._implementation = real
        self._use_tap(real)

    def _use_tap(self, real: str) -> None:
        model: Any = self.model  # a PreTrainedModel, as its config told
        if model.config._attn_implementation != real + _SUFFIX:
            model.set_attn_implementation(real + _SUFFIX)

    def keep_attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """One attention call of the forward; the n-th call is layer n."""
        layer, self._calls = self._calls, self._calls + 1
        for letter, tensor in zip(ATTENTION, (query, key, value), strict=True):
            if (letter, layer) in self._attention:
                self.record[f"{letter}:{layer}"] = tensor

    def start(self) -> None:
        """Begins to record; the next forward of the model is the one that is watched."""
        if self._implementation is not None:
            self._use_tap(self._implementation)  # another run on this model may have given it back
        self.record, self._calls, self._on = {}, 0, True
        _WATCHED.append(self)

    def stop(self) -> None:
        """Ends recording; idempotent."""
        self._on = False
        if self in _WATCHED:
            _WATCHED.remove(self)

    def read(self, output: Any) -> dict[str, Tensor]:
        """The taps of the forward that gave `output`, by the names that were asked for.

        Raises:
            MismatchError: if the output has no such field, or a module was not called.
        """
        return {name: self._read(name, output) for name in self.names}

    def _read(self, name: str, output: Any) -> Tensor:
        kind, _, index = name.partition(":")
        if kind == "logits":
            return logits_of(output)
        if kind == "hidden" and index != "-1" and self.until is None:
            return hidden_state(output, name, int(index))
        if kind in ATTENTION:
            letter, layer = self._resolve(name)
            name_there = f"{letter}:{layer}"
        else:
            name_there = name
        if name_there in self.record:
            return self.record[name_there]
        if name == "hidden:-1":
            return first(output)
        if kind.startswith("output."):
            return field(output, kind.removeprefix("output."))
        raise MismatchError(f"tap {name!r} was not reached in the forward of {type(self.model).__name__}.")

    def remove(self) -> None:
        """Takes every hook off and gives the model its attention implementation back."""
        self.stop()
        while self._handles:
            self._handles.pop().remove()
        if self._implementation is not None:
            self.model.set_attn_implementation(self._implementation)  # type: ignore[operator]  # as in _tap_attention
            self._implementation = None


def stacks(model: nn.Module, depth: int) -> list[str]:
    """Names of the lists of modules that are as long as a model is deep, lists inside such a list left out."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth and depth]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def blocks(model: nn.Module, depth: int) -> nn.ModuleList:
    """The stack of a model's blocks.

    Raises:
        MismatchError: if there is no list of modules that is as long as the model is deep, or more than one.
    """
    inner = body(model) or unwrap(model)  # a decoder beside it may be as deep
    names = stacks(inner, depth)
    if len(names) != 1:
        raise MismatchError(
            f"{type(model).__name__}: one stack of {depth} blocks was expected, found {names or 'none'}."
        )
    stack = inner.get_submodule(names[0])
    assert isinstance(stack, nn.ModuleList)  # as `stacks` chose it
    return stack


@contextmanager
def watching(taps: Taps) -> Iterator[Taps]:
    """Records the forward that runs inside."""
    taps.start()
    try:
        yield taps
    finally:
        taps.stop()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module's own mode afterwards."""
    modes = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in modes:
            module.training = True


def returns_tuple(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a transformers model will return a tuple, by argument or config: taps are read from fields."""
    asked = inputs.get("return_dict")
    config = getattr(unwrap(model), "config", None)
    return not (getattr(config, "return_dict", True) if asked is None else asked)


def _register(real: str) -> None:
    """Registers a recording attention function beside the real one, once."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    name = real + _SUFFIX
    if name in AttentionInterface():
        return

    def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _WATCHED:
            _WATCHED[-1].keep_attention(query, key, value)
        function = AttentionInterface().get(real)
        if function is None:  # eager is a function of each modeling module, not an entry of the interface
            function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return function(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, recording)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[real])
