"""What a method implements and what it is given: `Objective` and the types around it.

The mathematics of a method are pure functions in its own file; an `Objective` wires them: which signals it needs, what
state it keeps, which value it gives at each position. Weights, denominators, processes and the task's own loss are the
framework's (`distiller.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .errors import ConfigurationError, MismatchError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedConfig
    from transformers.modeling_outputs import ModelOutput

Inputs: TypeAlias = dict[str, Tensor]
"""A batch by column."""
Shapes: TypeAlias = Mapping[str, torch.Size]
"""By tap, from one forward of two rows."""
Values: TypeAlias = Tensor | Mapping[str, Tensor]
"""One term, or several by name; a method's own term weights (fields of its Config) are included."""
Kind = Literal["rows", "labels", "tokens", "causal", "spans", "pixels", "none"]
"""Where a model's distributions stand: one a row (batch, class); one of two outcomes for each label of a row (batch,
label), read as (batch, label, 2) with logits 0 and z; one a token, unshifted (batch, time, class); causal,
the same shifted by one; two over time a row (start, end); one a pixel; none (regression, embeddings)."""
MeanOver = Literal["positions", "tokens", "examples", "batch"]

IGNORED = -100
"""The label that the field's losses skip."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One model, from its config."""

    kind: Kind
    layers: int
    width: int
    heads: int
    vocab: int
    """Size of the class axis of the logits; 0 where there is none."""
    config: PreTrainedConfig | None
    causal: bool = False
    """Whether its tokens attend to themselves and what comes before alone: a decoder, whatever its head."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective asks of student, teacher and batch.

    Taps: `logits`; `hidden:-1`, the first output of the body, after the final norm; `hidden:3`, entry 3 of
    `hidden_states` (0 is the embeddings), of an encoder-decoder those of its encoder, whose tokens the mask tells;
    `q:-1`, `k:2`, `v:0`, (batch, heads, time, head dim) after rotation; `input:NAME` and `output:NAME`, of the module
    of that name; `output.FIELD`.
    """

    student: frozenset[str] = frozenset({"logits"})
    teacher: frozenset[str] | None = frozenset({"logits"})
    """Empty: the teacher is called by the method alone. None: no teacher."""
    columns: frozenset[str] = frozenset()
    """Batch columns that the student never sees, in evaluation either."""
    frozen: tuple[str, ...] = ()
    """Further frozen models by role, e.g. "reference"; the user gives them as `frozen={"reference": model}`."""
    teacher_until: str | None = None
    """Stop the teacher's forward after this tap, which is among `teacher`; what comes later is not computed."""
    rescored: bool = False
    """`batch` may change which positions are scored: all objectives of the run are then averaged over examples, as the
    positions of later micro-batches are not known when a window is counted."""
    relates_positions: bool = False
    """A value depends on the other positions of its micro-batch: accumulation changes its meaning."""
    other_tokens: frozenset[str] = frozenset()
    """Roles of frozen models that read other ids than the student, as `frozen_batch` gives them."""
    same_tokens: bool = True
    """False: the teacher reads other ids of one example; vocabulary and tokenizer checks are off."""
    mean_over: MeanOver = "positions"


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What is scored, in the order of the logits flattened to (row, class)."""

    index: Tensor
    """(position,) rows of the flattened logits."""
    example: Tensor
    """(position,) the example, 0 … batch - 1, that each position belongs to."""
    labels: Tensor | None
    """(position,) class ids, -100 where an example has none; None for data without labels."""
    rows: int
    """How many rows the flattened logits must have; with another number `index` would pick the wrong ones."""
    each: int = 1
    """So many positions, the labels of a row, count as one: their values are averaged."""

    def of_labels(self, count: int) -> Positions:
        """Of rows with so many labels: a position for each, 1 where the row has it."""
        index = torch.arange(self.rows * count, device=self.index.device)
        return Positions(index=index, example=index // count, labels=self.labels, rows=self.rows * count, each=count)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A chunk of the scored positions."""

    student_logits: Tensor
    """(position, vocab)"""
    teacher_logits: Tensor | None
    """(position, vocab), without gradient; None if the objective taps no teacher logits."""
    labels: Tensor | None
    """(position,)"""
    example: Tensor
    """(position,)"""
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    """(position, vocab) by role, without gradient."""


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What both models gave for one micro-batch."""

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    inputs: Inputs
    """As `batch` left them, columns of `Needs.columns` included."""
    positions: Positions
    tokens: Tensor
    """(batch, time) bool, the student's real tokens; all True without a mask; (batch, 1) where there is no time."""
    examples: int
    frozen: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """The teacher's taps (logits where it has none) of each further frozen model, by role."""


class Forward(Protocol):
    """Runs a model inside the hook without entering the hook again."""

    def __call__(self, *, grad: bool = False, **inputs: Any) -> ModelOutput: ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where the run is, and what a method may call."""

    global_step: int
    max_steps: int
    epoch: float
    micro: int
    """Place in the accumulation window, 0 … micros - 1."""
    micros: int
    generator: torch.Generator
    """Seeded by (seed, global_step, micro, rank): equal after a resume."""
    shared: torch.Generator
    """The same on all ranks."""
    student: nn.Module
    run_student: Forward
    run_teacher: Forward
    generate: Callable[..., Tensor]
    """The student's own `generate` in eval mode without gradient, modes restored; draws are equal after a resume."""
    evaluate: Callable[[Any, Literal["student", "teacher"]], Tensor]
    """(row,) mean cross-entropy in nats of each row of a labelled data set, over all ranks."""
    dataset: Any
    """The training set."""
    networks: Mapping[str, nn.Module]
    """The method's own networks."""


class Objective(nn.Module):
    """One published objective. Its parameters are learned with the student, its buffers are its state.

    Both are in every checkpoint. Overrides `per_position`, `forward`, or both; their terms add up.

    Args:
        config: the method's frozen `Config`; alternatively its fields as keywords.
        weight: factor of all its terms in the run's total.
    """

    Config: ClassVar[type]
    task_weight: ClassVar[float | None] = None
    """The published weight of the task's own loss; None: no opinion."""
    logged: ClassVar[frozenset[str]] = frozenset()
    """Names of terms that are told in the logs and are no part of the loss, whatever the weight."""

    def __init__(self, config: Any = None, *, weight: float = 1.0, **settings: Any) -> None:
        super().__init__()
        if config is not None and settings:
            raise ConfigurationError(f"{self.name}: give a config or its fields {sorted(settings)}, not both.")
        if not (isinstance(weight, int | float) and 0 <= weight < float("inf")):
            raise ConfigurationError(f"{self.name}: weight must be finite and at least 0, got {weight}.")
        known = {field.name for field in dataclasses.fields(self.Config)}
        if unknown := sorted(set(settings) - known):
            raise ConfigurationError(f"{self.name} has no setting {unknown}; it has {sorted(known)}.")
        if config is not None and not isinstance(config, self.Config):
            raise ConfigurationError(
                f"{self.name}: config must be a {self.Config.__name__}, got {type(config).__name__}."
            )
        self.config: Any = self.Config(**settings) if config is None else config
        self.weight = float(weight)

    @property
    def name(self) -> str:
        """The method's name: its module's."""
        return type(self).__module__.rpartition(".")[2]

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        """What to tap; may depend on the config and on the depth of the models."""
        return Needs()

    def build(self, student: Shapes, teacher: Shapes) -> None:
        """Makes learned parts and buffers that depend on shapes, from one dry forward of two rows.

        `teacher` holds those of further frozen models too, as ROLE/TAP: "reference/hidden:-1".
        """

    def networks(self, teacher: nn.Module | None) -> Mapping[str, tuple[nn.Module, Optimizer]]:
        """Networks of its own with their optimizers, made once; never assigned to `self`, as the student's optimizer
        and checkpoint would take them. They are saved beside each checkpoint."""
        return {}

    def network_losses(self, inputs: Inputs, step: Step) -> Mapping[str, Tensor]:
        """() losses of its networks for one micro-batch, before `batch`; the framework does backward, all-reduce and,
        on the window's last micro-batch, the optimizers' step, so that the student sees the changed networks."""
        return {}

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        """What the student sees instead of the batch: noise, masks. Entries that its forward does not name stay with
        the method, in `Signals.inputs`."""
        return inputs

    def teacher_batch(self, inputs: Inputs, step: Step) -> Inputs:
        """What the teacher sees; whatever its forward does not name is left out afterwards."""
        return inputs

    def frozen_batch(self, role: str, inputs: Inputs, step: Step) -> Inputs:
        """What the further frozen model of that role sees, as `teacher_batch`: other ids of the same examples."""
        return inputs

    def count(self, inputs: Inputs) -> int | None:
        """A denominator of all its terms, read from the batch before any forward; None: by `Needs.mean_over`."""
        return None

    def per_position(self, rows: Rows, step: Step) -> Values:
        """(position,) values; each depends on its own row and on parameters alone, so it may run in chunks."""
        raise NotImplementedError

    def forward(self, signals: Signals, step: Step) -> Values:
        """Everything else: one value per position, real token or example, or (), as `mean_over` says."""
        raise NotImplementedError

    def after_step(self, step: Step, means: Mapping[str, Tensor]) -> None:
        """After the optimizer's step and before any save; `means`: own terms over the window and all ranks."""

    def finish(self, step: Step) -> None:
        """At the end of training, before the distiller leaves the student."""

    def overrides(self, method: str) -> bool:
        """Whether this class defines that method itself; one whose settings leave it unused may say no."""
        return getattr(type(self), method) is not getattr(Objective, method)


def require_one_shape(method: str, student: Tensor, teacher: Tensor, remedy: str) -> None:
    """Raises `MismatchError` unless both tensors have one shape: broadcasting would return nonsense."""
    if student.shape != teacher.shape:
        raise MismatchError(
            f"{method}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape. {remedy}"
        )


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Number of examples in a batch."""
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim())


def tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """(batch, time) bool: the real tokens. All True without a mask, one a row where the input has no time axis."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return mask.bool()
    ids = inputs.get("input_ids")
    if ids is not None:
        return torch.ones_like(ids, dtype=torch.bool)
    embeds = inputs.get("inputs_embeds")
    shape = (batch_size(inputs), 1) if embeds is None else tuple(embeds.shape[:2])
    return torch.ones(shape, dtype=torch.bool, device=next(iter(inputs.values())).device)


def check_unpacked(method: str, inputs: Mapping[str, Tensor]) -> None:
    """Refuses rows of several documents, told by positions that begin again, for a method that takes each for one.

    Raises:
        MismatchError: naming the method.
    """
    places = inputs.get("position_ids")
    if places is None or places.dim() != 2 or "attention_mask" in inputs:
        return
    if bool((places[:, 1:] < places[:, :-1]).any()):
        raise MismatchError(
            f"{method} takes a row of the batch for one document, and here the positions begin again within one. Pad "
            "the rows instead: packing=False and padding_free=False in TRL, no DataCollatorWithFlattening."
        )


def task_labels(kind: Kind, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The labels that the task's own loss scores, causal ones shifted; None for data without labels.

    (batch,) for rows, (batch, time) for tokens and causal, (batch, 2) for spans, any shape otherwise.
    """
    if kind == "spans":
        ends = [inputs.get(name) for name in ("start_positions", "end_positions")]
        return (
            None if any(end is None for end in ends) else torch.stack([e.flatten() for e in ends if e is not None], 1)
        )
    if kind == "causal":
        if (shifted := inputs.get("shift_labels")) is not None:
            return shifted
        labels = inputs.get("labels")
        return None if labels is None else nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return inputs.get("labels")


def positions(kind: Kind, inputs: Mapping[str, Tensor]) -> Positions:
    """The scored positions of a batch, from its inputs alone: the same before the forward, to count, and after it.

    causal: where the shifted label is not -100, else where this token and the next are real; tokens: where the label is
    not -100, else the real tokens; rows, labels and none: every example, labelled or not (`Positions.of_labels` once
    the logits tell how many labels there are); spans: start and end of each example.
    """
    labels = task_labels(kind, inputs)
    if kind in ("rows", "labels", "none", "pixels"):
        index = torch.arange(batch_size(inputs), device=next(iter(inputs.values())).device)
        if kind == "labels":
            flat = None if labels is None else labels.flatten().long()
            return Positions(index=index, example=index, labels=flat, rows=len(index))
        flat = labels.flatten() if labels is not None and kind == "rows" and labels.numel() == len(index) else None
        return Positions(index=index, example=index, labels=flat, rows=len(index))
    if kind == "spans":
        count = batch_size(inputs)
        index = torch.arange(2 * count, device=next(iter(inputs.values())).device)
        flat = None if labels is None else labels.flatten()
        return Positions(index=index, example=index // 2, labels=flat, rows=2 * count)
    if labels is not None:
        scored = labels != IGNORED
    else:
        scored = _decoded(inputs)
        if kind == "causal":
            following = nn.functional.pad(scored, (0, 1), value=False)[..., 1:]
            scored = scored & following
    index = scored.flatten().nonzero().squeeze(-1)
    flat = None if labels is None else labels.flatten()[index]
    return Positions(index=index, example=index // scored.shape[-1], labels=flat, rows=scored.numel())


def row_count(kind: Kind, inputs: Mapping[str, Tensor]) -> int:
    """`Positions.rows` of a batch of tokens, without looking into it."""
    labels = task_labels(kind, inputs)
    return _decoded(inputs).numel() if labels is None else labels.numel()


def _decoded(inputs: Mapping[str, Tensor]) -> Tensor:
    """(batch, time) bool: the real tokens that have logits: the decoder's, where its inputs are given."""
    ids, mask = inputs.get("decoder_input_ids"), inputs.get("decoder_attention_mask")
    if ids is None:
        return tokens(inputs)
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


_SUFFIXES: tuple[tuple[str, Kind], ...] = (
    (r"For(Sequence|Image|Audio|Video)Classification(WithTeacher)?$", "rows"),
    (r"For(Token|AudioFrame)Classification$|ForMaskedLM$|ForConditionalGeneration$|ForSpeechSeq2Seq$", "tokens"),
    (r"ForCausalLM$|LMHeadModel$", "causal"),
    (r"ForQuestionAnswering$", "spans"),
    (r"ForSemanticSegmentation$", "pixels"),
)


def kind_of(model: nn.Module) -> Kind:
    """Where a model's distributions stand, from the name of its class, which is the field's convention."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration") and not getattr(config, "is_encoder_decoder", False):
        return "causal"  # a language model that also reads images or sound
    kind: Kind = next((kind for suffix, kind in _SUFFIXES if re.search(suffix, name)), "none")
    if kind == "rows" and getattr(config, "problem_type", None) == "multi_label_classification":
        return "labels"
    return "none" if kind == "rows" and is_regression(config) else kind


def is_regression(config: Any) -> bool:
    """Whether a classification head of that config gives real values instead of scores of classes."""
    return getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", 2) == 1


def sizes(model: nn.Module, kind: Kind | None = None) -> Sizes:
    """Depth, width, heads and class count of a model; zeros where its config does not tell."""
    config: Any = getattr(model, "config", None)
    kind = kind or kind_of(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    classes = {
        "rows": "num_labels",
        "labels": "num_labels",
        "pixels": "num_labels",
        "causal": "vocab_size",
        "tokens": "vocab_size",
    }.get(kind)
    if kind == "tokens" and type(model).__name__.endswith("Classification"):
        classes = "num_labels"
    return Sizes(
        kind=kind,
        layers=getattr(text, "num_hidden_layers", 0) or 0,
        width=getattr(text, "hidden_size", 0) or 0,
        heads=getattr(text, "num_attention_heads", 0) or 0,
        vocab=(getattr(text, classes, 0) or 0) if classes else 0,
        config=config,
        causal=kind == "causal" or any(getattr(module, "is_causal", False) is True for module in model.modules()),
    )
