"""The output embedding of a language model called on chosen rows alone, because all its logits are the memory.

After `Head.skip` the model's own forward gets an empty tensor from its output embedding, whose input is kept. Calling
the `Head` on rows of that input then gives their logits: through the module itself (bias, adapters, int8, ties), and
through what the model does after it (soft cap, scale). What that is, is proven before it is used: known values are sent
through the untouched model and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .objective import IGNORED, Inputs, Kind, positions
from .outputs import logits_of
from .taps import unwrap

Memory = Literal["auto", "chunked", "dense"]
After = Callable[[Tensor], Tensor]
CAPS = ("final_logit_softcapping", "logits_soft_cap")
FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
SPREAD = 100.0
"""Known values reach from minus to plus this: where they are small, a soft cap looks like none."""


class UnprovenError(Exception):
    """This model's logits cannot be had in chunks; says why."""


class Logits(Protocol):
    """Logits of one batch of which rows are taken."""

    count: int
    """Rows that there are, (batch, time) flattened."""
    there: Tensor | None
    """(count,) bool, rows that are known; None: all."""

    def rows(self, index: Tensor, beside: Tensor | None) -> Tensor:
        """(position, vocab) of some rows; `beside` are the student's at the same places, for what is known in part."""


class Dense:
    """Logits that are there already."""

    there: Tensor | None = None

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.flatten(0, -2)
        self.count = len(self._logits)

    def rows(self, index: Tensor, beside: Tensor | None) -> Tensor:
        return self._logits[index]


class Lazy:
    """Logits that are computed when they are asked for.

    Args:
        states: (batch, time, dim) input of the output embedding.
        head: the output embedding.
        context: of its calls, e.g. the student's autocast.
    """

    there: Tensor | None = None

    def __init__(
        self, states: Tensor, head: Head, context: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.states, self.head, self._context = states.flatten(0, -2), head, context
        self.count = len(self.states)

    def of(self, states: Tensor) -> Tensor:
        """(position, vocab) of (position, dim) inputs of the output embedding."""
        with self._context():
            return self.head(states)

    def rows(self, index: Tensor, beside: Tensor | None) -> Tensor:
        return self.of(self.states[index])


class Head:
    """The output embedding of a model, and what the model does after it.

    Args:
        model: with `get_output_embeddings`.

    Raises:
        UnprovenError: if it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap(model)
        found = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if not isinstance(found, nn.Module):
            raise UnprovenError(f"{type(inner).__name__} has no output embedding")
        self.module: nn.Module = found
        self.after: After = _same
        self.input: Tensor | None = None
        self._given: Callable[[Tensor], Tensor] | None = None
        self._own = vars(found).get("forward")
        self.original: Callable[[Tensor], Tensor] = found.forward
        vars(found)["forward"] = self._called

    def _called(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._given is None:
            return self.original(states, *args, **kwargs)
        self.input = states
        return self._given(states)

    def __call__(self, states: Tensor) -> Tensor:
        """(…, vocab) logits of (…, dim) inputs of the output embedding."""
        given, self._given = self._given, None
        try:
            return self.after(self.module(states))
        finally:
            self._given = given

    @contextmanager
    def instead(self, give: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The model's forwards inside get this of the output embedding's input."""
        self.input, self._given = None, give
        try:
            yield
        finally:
            self._given = None

    def skip(self) -> None:
        """The model's next forward keeps the input and computes no logits."""
        self.input, self._given = None, _empty

    def stop(self) -> None:
        """The model computes logits again; idempotent."""
        self._given = None

    def take(self) -> Tensor:
        """What the output embedding was given in the last forward; it is not kept here any longer."""
        found, self.input = self.input, None
        assert found is not None  # it was proven that the forward calls it
        return found

    def remove(self) -> None:
        """Gives the module its own forward back."""
        self.stop()
        if vars(self.module).get("forward") == self._called:
            del self.module.forward
            if self._own is not None:
                self.module.forward = self._own
            return
        above = getattr(vars(self.module).get("forward"), "__self__", None)
        while isinstance(above, Head):  # another lies on top: it is to call what was below this one
            below = getattr(above._own, "__self__", None)
            if below is self:
                above._own, above.original = self._own, self.original
                return
            above = below

    def prove(self, run: Callable[[], Any], config: Any) -> None:
        """Finds what the model does after its output embedding, and that its forward can do without.

        Args:
            run: a forward of two rows in eval mode without gradient.
            config: the model's.

        Raises:
            UnprovenError: if what comes out is not what a known function of the config gives, or if logits are used for
                something else.
        """
        size = logits_of(run()).shape[-1]
        known = torch.linspace(-SPREAD, SPREAD, size)

        def give(states: Tensor) -> Tensor:
            return known.to(states).expand(*states.shape[:-1], size)

        name = type(self.module).__name__
        with self.instead(give):
            found = logits_of(run())
        if self.input is None:
            raise UnprovenError(f"the output embedding, a {name}, is not called in the forward")
        expected = give(self.input)
        if found.shape != expected.shape:
            raise UnprovenError(f"logits of shape {tuple(found.shape)} come of {tuple(expected.shape)}")
        tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 2e-2
        for after in _candidates(config):
            if torch.allclose(after(expected).float(), found.float(), rtol=tolerance, atol=tolerance):
                self.after = after
                break
        else:
            raise UnprovenError("the model changes its logits in a way that its config does not tell")
        try:
            with self.instead(_empty):
                empty = logits_of(run())
        except Exception as error:  # whatever a forward raises that meets an empty last axis
            raise UnprovenError(f"the model needs its logits: {type(error).__name__}: {error}") from error
        if empty.shape[-1]:
            raise UnprovenError("the model makes logits of more than its output embedding")


def _same(logits: Tensor) -> Tensor:
    return logits


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _scaled(logits: Tensor, factor: float) -> Tensor:
    return logits * factor


def _empty(states: Tensor) -> Tensor:
    return states.new_empty(*states.shape[:-1], 0)


def _candidates(config: Any) -> Iterator[After]:
    """What a model of that config may do after its output embedding."""
    yield _same
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in CAPS:
        if cap := getattr(text, name, None):
            yield partial(_capped, cap=cap)
    for name in FACTORS:
        if factor := getattr(text, name, None):
            yield from (partial(_scaled, factor=factor), partial(_scaled, factor=1 / factor))


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found of a model before its logits are taken in chunks."""

    head: Head
    task: bool
    """Whether the model computes a loss of its own from labels."""
    auxiliary: float
    """Factor on `output.aux_loss` in it."""


def prove(
    model: nn.Module,
    kind: Kind,
    inputs: Inputs,
    *,
    task: bool,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Proof:
    """Shows that a model's logits, and its own loss, are what `Head` and a cross-entropy over positions give.

    Args:
        model: in eval mode; its head is taken until `Proof.head.remove()`.
        kind: where its distributions stand.
        inputs: two rows of ids.
        task: prove its own loss too.
        context: of calls of its head, e.g. the autocast that its forward runs in.

    Raises:
        UnprovenError: with the reason.
    """
    head = Head(model)
    config = getattr(unwrap(model), "config", None)
    forward: Callable[..., Any] = model.forward  # not __call__: hooks on the model are not for this
    try:
        with torch.no_grad():
            head.prove(lambda: forward(**inputs), config)
            if not task:
                return Proof(head=head, task=False, auxiliary=0.0)
            coefficient = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)
            own, auxiliary = _own_loss(forward, head, context, kind, inputs, coefficient)
    except UnprovenError:
        head.remove()
        raise
    except Exception as error:  # a stranger's forward may raise anything on two rows that it did not expect
        head.remove()
        raise UnprovenError(f"a forward of two rows failed: {type(error).__name__}: {error}") from error
    return Proof(head=head, task=own, auxiliary=auxiliary)


def _own_loss(
    forward: Callable[..., Any],
    head: Head,
    context: Callable[[], AbstractContextManager[Any]],
    kind: Kind,
    inputs: Inputs,
    coefficient: float,
) -> tuple[bool, float]:
    """Whether the model has a loss of its own, and the factor on `output.aux_loss` in it."""
    ids = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"]
    labels = torch.arange(ids.numel(), device=ids.device).view_as(ids) % 7
    labels[0, 0] = IGNORED
    given = inputs | {"labels": labels}
    with head.instead(head.original):
        output = forward(**given)
    own, where = output.get("loss"), positions(kind, given)
    if own is None:
        return False, 0.0
    assert where.labels is not None  # just given
    lazy = Lazy(head.take(), head, context)
    expected = F.cross_entropy(lazy.of(lazy.states[where.index]).float(), where.labels)
    extra = output.get("aux_loss")
    totals = {0.0: expected} if extra is None else {0.0: expected, coefficient: expected + coefficient * extra}
    errors = {auxiliary: float((total - own).abs() / own.abs()) for auxiliary, total in totals.items()}
    nearest = min(errors, key=lambda auxiliary: errors[auxiliary])
    if errors[nearest] > (1e-4 if own.dtype in (torch.float32, torch.float64) else 2e-2):
        raise UnprovenError(f"the model's own loss, {own:.4g}, is not the cross-entropy of its logits, {expected:.4g}")
    return True, nearest
