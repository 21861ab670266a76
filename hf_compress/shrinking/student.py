"""`shrink`: a student of the teacher's class with fewer layers, hidden dimensions, heads or neurons."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_compress.errors import ConfigurationError

from . import axes as a
from . import depth as d
from . import mapping, scores, width
from . import sizes as s
from .depth import Keep
from .scores import By
from .sizes import REMEDY, Dimension
from .width import Width

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAID: Mapping[Dimension, str] = {"hidden": "hidden", "heads": "heads", "intermediate": "neurons"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one size of the teacher became."""

    size: str
    """layers, encoder layers, decoder layers, hidden, heads, neurons, vocabulary."""
    before: int
    after: int
    parameters_before: int
    parameters_after: int
    """Of the whole model when this size and those above it are cut."""
    kept: float
    """Share of what was kept by the measure it was chosen by, 0 … 1."""
    of: str
    """weight norm; activation; of a vocabulary tokens of the texts."""


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """A student before training, and what it gave up."""

    student: PreTrainedModel
    changes: tuple[Change, ...]


def shrink(
    teacher: PreTrainedModel,
    *,
    layers: int | Sequence[int] | None = None,
    decoder_layers: int | Sequence[int] | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    key_value_heads: int | None = None,
    intermediate: int | None = None,
    keep: Keep = "even",
    data: Iterable[Mapping[str, Any]] | None = None,
) -> PreTrainedModel:
    """A student of the teacher's class with fewer layers, or narrower ones.

    Weights are copied, none share storage with the teacher; tied weights are tied again; label maps, special tokens and
    the generation config are kept. What was taken is written to `config.compression_start`. Without data, units are
    chosen by the norms of all weights that go with them, in each layer for itself; hidden dimensions are the same ones
    in all layers. The size of a head is the teacher's.

    Args:
        teacher: a model of transformers with one stack of blocks (BERT, Llama, ViT and their kin), or an encoder and a
            decoder (T5, BART, Whisper).
        layers: how many to keep, 1 … the teacher's number; or the indices to keep, rising from 0. Of an
            encoder-decoder: of its encoder.
        decoder_layers: the same for the decoder of an encoder-decoder.
        hidden: hidden dimensions to keep. In a config that knows no size of a head (BERT, GPT-2, Whisper) it is
            heads × that size: give both.
        heads: attention heads to keep in each layer.
        key_value_heads: where several heads share keys and values; without it whole groups are dropped if that gives
            the number of heads, else each group gets smaller.
        intermediate: neurons to keep in each MLP.
        keep: which layers, where a number is given: evenly spread (the first and the last among them), first, or last.
        data: batches (arguments of forward by name): units are chosen by their mean absolute activation on them.

    Raises:
        ConfigurationError: naming what cannot be mapped or expressed, with the remedy: two stacks, no stack, indices
            out of range, a block that works differently in another place, a size that the config has not.
    """
    asked = Width(hidden=hidden, heads=heads, key_value_heads=key_value_heads, intermediate=intermediate)
    return cut(teacher, layers=layers, decoder_layers=decoder_layers, width=asked, keep=keep, data=data).student


def cut(
    teacher: PreTrainedModel,
    *,
    layers: int | Sequence[int] | None = None,
    decoder_layers: int | Sequence[int] | None = None,
    width: Width = Width(),  # noqa: B008  # frozen
    keep: Keep = "even",
    data: Iterable[Mapping[str, Any]] | None = None,
) -> Shrunk:
    """As `shrink`, with what each size gave up."""
    if data is not None and not width:
        raise ConfigurationError(
            "data chooses hidden dimensions, heads and neurons, and none are to go. Leave it out, or give their number."
        )
    depths = _depths(teacher, layers, decoder_layers, keep)
    config, state = copy.deepcopy(teacher.config), teacher.state_dict()
    tally = _Tally(teacher)
    if width:
        config, state = _narrowed(teacher, width, data, config, state, tally)
    before = config
    bound: dict[str, list[str]] = {}
    config = copy.deepcopy(config)
    for stack, chosen in depths:
        moved = d.of_the_first(state, stack.path, chosen)
        bound[stack.path] = list(moved)
        tally.layers(stack, chosen)
        state = d.renumbered(state, stack.path, chosen) | moved
        d.set_depth(config, stack, chosen)
    _describe(config, depths, tally, "activations" if data is not None else "norms")
    s.check_loadable(config, ", ".join(f"{len(chosen)} {stack.said}" for stack, chosen in depths) or "these sizes")
    student = built(teacher, config, state)
    reference: nn.Module = s.on_meta(type(teacher), before) if width and depths else teacher
    for stack, chosen in depths:
        d.check_blocks(reference, student, stack, chosen, bound[stack.path])
    return Shrunk(student=student, changes=tally.changes(student))


def _depths(teacher: PreTrainedModel, layers: Any, decoder_layers: Any, keep: Keep) -> list[tuple[d.Stack, list[int]]]:
    found = []
    for given, decoder in ((layers, False), (decoder_layers, True)):
        if given is not None:
            stack = d.side(teacher, decoder)
            name = "decoder_layers" if decoder else "layers"
            found.append((stack, d.choose(stack.depth, given, keep, name)))
    return found


def _narrowed(
    teacher: PreTrainedModel,
    asked: Width,
    data: Iterable[Mapping[str, Any]] | None,
    config: Any,
    state: dict[str, Tensor],
    tally: _Tally,
) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights at other sizes, all layers still there."""
    found, sizes = check_sizes(teacher, asked)
    values = scores.norms(teacher, found) if data is None else scores.activations(teacher, found, data)
    kept = width.select(values, found, sizes)
    tally.widths(found, values, kept, sizes, squares=data is None)
    return width.config_of(sizes, found, config), a.gathered(state, found.axes, kept)


def check_sizes(teacher: nn.Module, asked: Width) -> tuple[mapping.Map, dict[Dimension, int]]:
    """The teacher's axes, and every size that the student's config gets; of weights only shapes are read.

    Args:
        teacher: its tensors may be without memory.
        asked: sizes of the student.

    Raises:
        ConfigurationError: as `shrink`, for sizes that cannot be had.
    """
    config, known = teacher.config, a.shapes(teacher)
    dimensions = asked.dimensions()
    if s.names(config, "intermediate") == [s.RATIO]:
        dimensions.add("intermediate")
    found = mapping.find(teacher, dimensions)
    neurons = [axis.units(known[axis.weight][axis.axis]) for axis in found.of("intermediate")]
    sizes = width.resolved(asked, found, config, min(neurons, default=None))
    width.check_expressible(sizes, found, config)
    return found, sizes


def built(teacher: PreTrainedModel, config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of the teacher's class from a config and weights of that size, which are copied.

    Raises:
        ConfigurationError: if a weight has no counterpart, or another shape.
    """
    with torch.random.fork_rng():  # the random initial weights are all replaced
        student = type(teacher)(config)
    student.to(teacher.dtype)
    where = f"of {type(teacher).__name__} to a model of these sizes"
    try:
        report = student.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes that differ from layer to layer
        raise ConfigurationError(f"shrink cannot map the weights {where}: {error}. {REMEDY}") from error
    tied = set(getattr(student, "all_tied_weights_keys", None) or ())
    left = [name for name in (*report.missing_keys, *report.unexpected_keys) if name not in tied]
    if left:
        raise ConfigurationError(f"shrink cannot map {left[:3]} {where}. {REMEDY}")
    student.tie_weights()
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    device: Any = teacher.device
    return student.to(device).train(teacher.training)


def cleared(config: Any) -> Any:
    """The config without the record and the place of the model that it came from."""
    for name in ("compression", "_name_or_path"):
        vars(config).pop(name, None)
    return config


def _describe(config: Any, depths: Sequence[tuple[d.Stack, list[int]]], tally: _Tally, by: By) -> None:
    cleared(config)
    said = [f"{stack.said} {', '.join(map(str, chosen))} of {stack.depth}" for stack, chosen in depths]
    said += [f"{name} {after} of {before}" for name, before, after in tally.sizes]
    chosen = f", chosen by {by}" if tally.sizes else ""
    config.compression_start = f"{', '.join(said)} of the teacher{chosen}" if said else "all of the teacher"


class _Tally:
    """Counts parameters and shares while sizes are cut, on tensors without memory."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.weights = {name: weight.detach() for name, weight in teacher.named_parameters()}  # tied ones once
        self.small = {name: weight.to("meta") for name, weight in self.weights.items()}
        self.found: list[Change] = []
        self.sizes: list[tuple[str, int, int]] = []

    def _count(self) -> int:
        return sum(weight.numel() for weight in self.small.values())

    def _add(self, size: str, before: int, after: int, count: int, kept: float, of: str) -> None:
        self.found.append(
            Change(
                size=size,
                before=before,
                after=after,
                parameters_before=count,
                parameters_after=self._count(),
                kept=kept,
                of=of,
            )
        )

    def widths(
        self,
        found: mapping.Map,
        values: scores.Scores,
        kept: width.Kept,
        sizes: Mapping[Dimension, int],
        *,
        squares: bool,
    ) -> None:
        for dimension, name in SAID.items():
            if dimension not in sizes:
                continue
            count, own = self._count(), {dimension} | ({"key_value_heads"} if dimension == "heads" else set())
            axes = [axis for axis in found.axes if axis.dimension in own and axis.weight in self.small]
            self.small = a.gathered(self.small, axes, kept)
            whole = sum(float(v.sum()) for key, v in values.items() if key[0] in own)
            part = sum(
                float(v[kept[key]].sum() if key in kept else v.sum()) for key, v in values.items() if key[0] in own
            )
            share = part / whole if whole else 1.0
            before = max(len(v) for key, v in values.items() if key[0] == dimension)
            of = "weight norm" if squares else "activation"
            if before != sizes[dimension]:
                self._add(name, before, sizes[dimension], count, share**0.5 if squares else share, of)
                self.sizes.append((name, before, sizes[dimension]))

    def layers(self, stack: d.Stack, chosen: Sequence[int]) -> None:
        def squares(names: Iterable[str]) -> float:
            norms = (torch.linalg.vector_norm(self.weights[name], dtype=torch.float64) for name in names)
            return sum(float(norm) ** 2 for norm in norms)

        count = self._count()
        own = [name for name in self.weights if name.startswith(f"{stack.path}.")]
        kept = [name for name in own if int(name.removeprefix(f"{stack.path}.").partition(".")[0]) in chosen]
        bound = d.of_the_first(self.small, stack.path, chosen)
        self.small = d.renumbered(self.small, stack.path, chosen) | bound
        whole = squares(own)
        share = (squares(kept) / whole) ** 0.5 if whole else 1.0
        self._add(stack.said, stack.depth, len(chosen), count, share, "weight norm")

    def changes(self, student: nn.Module) -> tuple[Change, ...]:
        """All of them.

        Raises:
            RuntimeError: if the student's parameters are not as many as were counted: an error of ours.
        """
        count = sum(parameter.numel() for parameter in student.parameters())
        if count != self._count():
            raise RuntimeError(f"shrink counted {self._count()} parameters and the student has {count}.")
        return tuple(self.found)
