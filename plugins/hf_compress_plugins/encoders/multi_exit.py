"""One training that gives a family of sizes: the same head learns after several layers, without a teacher.

Gurioli, Pennino, Monteiro, Gabbrielli: One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early
Layer Embeddings, 2025, arXiv:2503.03008.

    L = Σ_{i in exits} (i / depth) · L_i        L_i: the model's own task after layer i, through its last norm and head

Nothing is detached: the deeper exits teach the shared lower layers by their gradients. The last layer's exit, of
weight 1, is the model's own loss. Afterwards the model is cut after any exit with `cut(model, i, objective)`, which
keeps norm and head, and the cut gives what the exit gave.

    conditional_size c > 0:  head( [h, e_i] ) = W_h h + (W_e e_i + b)     e_i a learned vector of c numbers of exit i

The part in brackets is constant for an exit, so that a cut carries it in the bias of the head's first layer and stays a
stock class. The last exit's part is in the bias already: e_i counts from it, which loses nothing.

    loss="contrastive", a model without a head:  L_i = ½ ( CE( s · Q Dᵀ, j ) + CE( s · D Qᵀ, j ) )     over a batch

Q and D: the pooled vectors of queries and of their documents (columns pair_input_ids, pair_attention_mask) after layer
i, through a projection of exit i, of length 1; s = 10. The projections are the objective's, `objective.projections`: no
stock class has room for them. Here the last layer's exit is a term as the others are.

`in_context` makes the data of the published pre-training's second task: texts joined until the window is full, of one
group or, with probability ½, of several, and a label that says which.

Weights are not normalised, as published: with more exits the total grows. Difference from the published model: a
classifier's own pooling is used, where the published model has its class token last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_compress import shrink
from hf_compress.data import Augmented, Rows
from hf_compress.distiller import select_logits
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Inputs, Needs, Objective, Shapes, Signals, Sizes, Step, tokens
from hf_compress.outputs import first, hidden_state, logits_of
from hf_compress.registry import Method
from hf_compress.taps import blocks, unwrap

PAIR = "pair_"
"""Before the names of the columns that hold each query's document."""
Pooling = Literal["first", "last", "mean"]


@dataclass(frozen=True, kw_only=True)
class MultiExitConfig:
    """Hyper-parameters of the exits."""

    exits: tuple[int, ...] | None = None
    """Layers, from 1, after which the head learns too; the last layer's is there in any case. None: an eighth, a
    quarter, a half and three quarters of the depth, as 4, 9, 18 and 27 of the published 36."""
    conditional_size: int = 0
    """Size of the learned vector of each exit, 4 in the published model; 0: exits share the head as it is."""
    head: str | None = None
    """With a conditional_size: the name of the linear layer, with bias, that an exit's vector enters first, e.g.
    "bert.pooler.dense"."""
    loss: Literal["task", "contrastive"] = "task"
    """What the exits learn: the labels, or pairs."""
    scale: float = 10.0
    """Of 2, s > 0: factor of the cosines."""
    pooling: Pooling = "last"
    """Of 2: the published model takes the last real token, its class token."""

    def __post_init__(self) -> None:
        if self.loss not in ("task", "contrastive") or self.pooling not in ("first", "last", "mean"):
            raise ConfigurationError(
                "multi_exit: loss must be task or contrastive, pooling first, last or mean, got "
                f"{self.loss!r} and {self.pooling!r}."
            )
        if self.scale <= 0 or self.conditional_size < 0 or bool(self.conditional_size) != bool(self.head):
            raise ConfigurationError(
                "multi_exit: scale must be above 0, conditional_size at least 0 and with it the name of the head's "
                f"first layer, head=…, got {self.scale}, {self.conditional_size} and {self.head!r}."
            )
        if self.conditional_size and self.loss == "contrastive":
            raise ConfigurationError("multi_exit: pairs have a projection for each exit, leave out conditional_size.")
        if self.exits is not None and (
            not self.exits or list(self.exits) != sorted({*self.exits}) or self.exits[0] < 1
        ):
            raise ConfigurationError(f"multi_exit: exits must be layers from 1, in rising order, got {self.exits}.")


def exit_layers(exits: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The exits before the last layer.

    Raises:
        MismatchError: if an exit lies behind the last layer, or there is no layer to leave out.
    """
    chosen = exits or tuple(sorted({max(round(depth * part), 1) for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4)}))
    if exits is not None and exits[-1] > depth:
        raise MismatchError(f"multi_exit: the model has {depth} layers, asked for an exit after {exits[-1]}.")
    inner = tuple(layer for layer in chosen if layer < depth)
    if not inner:
        raise MismatchError(f"multi_exit: a model of {depth} layers has no exit before its last among {chosen}.")
    return inner


def exit_weight(layer: int, depth: int) -> float:
    """α of the exit after that layer."""
    return layer / depth


def exit_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(position,) cross-entropy in nats, 0 where the label is -100; logits (position, class) are widened to float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), labels, reduction="none", ignore_index=IGNORED)


def contrast(queries: Tensor, documents: Tensor, *, scale: float) -> Tensor:
    """(pair,) mean cross-entropy in nats of finding the document by the query, and the query by the document.

    Args:
        queries: (pair, dim), any length above 0; widened to float32.
        documents: (pair, dim), in the same order; the others of the batch are each pair's negatives.
        scale: factor of the cosines.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    left, right = (F.normalize(vectors.to(dtype), dim=-1) for vectors in (queries, documents))
    cosines = scale * left @ right.T
    places = torch.arange(len(cosines), device=cosines.device)
    ways = [F.cross_entropy(scores, places, reduction="none") for scores in (cosines, cosines.T)]
    return (ways[0] + ways[1]) / 2


def pooled(states: Tensor, real: Tensor, *, pooling: Pooling) -> Tensor:
    """(example, dim) one vector of each example's (example, time, dim) states, `real` (example, time) its tokens."""
    if pooling == "mean":
        return states.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1, keepdim=True).to(states.dtype)
    places = torch.arange(real.shape[1], device=real.device).expand_as(real)
    at = places.masked_fill(~real, -1).amax(1) if pooling == "last" else places.masked_fill(~real, 2**31).amin(1)
    return states[torch.arange(len(states), device=states.device), at]


def joined(texts: list[list[int]], *, length: int, separator: int, start: int | None) -> list[int]:
    """At most `length` token ids: the start token, and each text with a separator behind it."""
    ids = [] if start is None else [start]
    for text in texts:
        ids += [*text, separator]
    return ids[:length]


class _Given(nn.Module):
    """Stands for all blocks: returns states that are there already."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.states


@contextmanager
def ending_in(student: nn.Module, depth: int, states: Tensor) -> Iterator[None]:
    """The student's forward goes from its embeddings straight to its last norm and head, with these states."""
    stack = blocks(student, depth)
    kept = stack._modules
    stack._modules = {"0": _Given(states.to(next(student.parameters()).dtype))}
    try:
        yield
    finally:
        stack._modules = kept


class MultiExit(Objective):
    """The task's loss, or that of pairs, after inner layers."""

    Config = MultiExitConfig
    config: MultiExitConfig
    task_weight: ClassVar[float | None] = 1.0
    embedding: nn.Embedding
    conditional: nn.Linear
    projections: nn.ModuleDict
    """Of pairs: by layer."""

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        self.depth, self.kind = student.layers, student.kind
        self.exits = exit_layers(self.config.exits, student.layers)
        taps = frozenset(f"hidden:{layer}" for layer in self.exits)
        if self.config.loss == "task":
            head = {f"output:{self.config.head}"} if self.config.head else set()
            return Needs(student=taps | head, teacher=None)
        columns = frozenset(f"{PAIR}{name}" for name in ("input_ids", "attention_mask"))
        return Needs(student=taps | {"hidden:-1"}, teacher=None, columns=columns, mean_over="batch")

    def build(self, student: Shapes, teacher: Shapes) -> None:
        size = self.config.conditional_size
        if size:
            self.embedding = nn.Embedding(len(self.exits), size)
            self.conditional = nn.Linear(size, student[f"output:{self.config.head}"][-1], bias=False)
        if self.config.loss == "contrastive":
            width = student["hidden:-1"][-1]
            layers = (*self.exits, self.depth)
            self.projections = nn.ModuleDict({str(layer): nn.Linear(width, width) for layer in layers})

    def offset(self, layer: int) -> Tensor:
        """(width of the head's first layer,) W_e e_i, what an exit adds there."""
        found: Tensor = self.conditional(self.embedding.weight[self.exits.index(layer)])
        return found

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        if self.config.loss == "contrastive":
            return self._pairs(signals, step)
        where = signals.positions
        if where.labels is None:
            raise ConfigurationError("multi_exit: every exit learns the labels, and the batch has none.")
        given = {name: value for name, value in signals.inputs.items() if name != "labels"}
        found = {}
        for layer in self.exits:
            states = signals.student[f"hidden:{layer}"].masked_fill(~signals.tokens[..., None], 0.0)
            with ExitStack() as stack:
                stack.enter_context(ending_in(step.student, self.depth, states))
                if self.config.head:
                    stack.enter_context(_adding(_first_layer(step.student, self.config.head), self.offset(layer)))
                output = step.run_student(grad=torch.is_grad_enabled(), **given)
            rows = select_logits(logits_of(output), where)
            found[f"exit_{layer}"] = exit_weight(layer, self.depth) * exit_loss(rows, where.labels)
        return found

    def _pairs(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        """() for each exit, the last one included."""
        queries = {name: value for name, value in signals.inputs.items() if not name.startswith(PAIR)}
        documents = {n.removeprefix(PAIR): value for n, value in signals.inputs.items() if n.startswith(PAIR)}
        grad = torch.is_grad_enabled()
        output = step.run_student(grad=grad, output_hidden_states=True, **documents)
        states = {layer: hidden_state(output, "documents", layer) for layer in self.exits} | {self.depth: first(output)}
        own = {layer: signals.student[f"hidden:{layer}"] for layer in self.exits}
        own[self.depth] = signals.student["hidden:-1"]
        found = {}
        for layer in (*self.exits, self.depth):
            sides = [self._vectors(step, layer, *side) for side in ((queries, own), (documents, states))]
            value = contrast(*sides, scale=self.config.scale).mean()
            found[f"exit_{layer}"] = exit_weight(layer, self.depth) * value
        return found

    def _vectors(self, step: Step, layer: int, inputs: Inputs, states: Mapping[int, Tensor]) -> Tensor:
        """(example, dim) after that layer, the model's last norm and the exit's projection."""
        real = tokens(inputs)
        last = states[layer].masked_fill(~real[..., None], 0.0)
        if layer < self.depth:
            with ending_in(step.student, self.depth, last):
                last = first(step.run_student(grad=torch.is_grad_enabled(), **inputs))
        projection = self.projections[str(layer)]
        vectors = pooled(last, real, pooling=self.config.pooling)
        found: Tensor = projection(vectors.to(next(projection.parameters()).dtype))
        return found


def _first_layer(model: nn.Module, name: str) -> nn.Linear:
    """The head's first layer.

    Raises:
        MismatchError: if it is not linear or has no bias: a cut could not carry the exit's part.
    """
    layer = unwrap(model).get_submodule(name)
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise MismatchError(
            f"multi_exit: head must name a linear layer with a bias, {name} is {layer}. Without one a cut cannot carry "
            "its exit's vector: leave out conditional_size."
        )
    return layer


@contextmanager
def _adding(layer: nn.Module, offset: Tensor) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda *found: found[2] + offset)
    try:
        yield
    finally:
        handle.remove()


def cut(model: PreTrainedModel, layer: int, objective: MultiExit | None = None) -> PreTrainedModel:
    """A model of the same class that gives what the exit after a layer gave.

    Args:
        model: the trained student.
        layer: from 1.
        objective: where exits have vectors: the trained one, `callback.run.distiller.objectives[0]`.

    Raises:
        MismatchError: if the objective trained no such exit.
    """
    small: PreTrainedModel = shrink(model, layers=list(range(layer)))
    if objective is not None and objective.config.head:
        if layer not in objective.exits:
            raise MismatchError(f"multi_exit: exits were trained after {objective.exits}, asked for {layer}.")
        with torch.no_grad():
            _first_layer(small, objective.config.head).bias.add_(objective.offset(layer))
    return small


def in_context(
    dataset: Rows, *, tokenizer: Any, length: int, text: str = "input_ids", group: str = "group", seed: int = 0
) -> Augmented:
    """Rows for in-context classification: a text with others behind it until the window is full, anew in each epoch.

    With probability ½ all are of the row's group (label 1), else each further one is of another group (label 0). A
    group whose texts do not fill the window is begun again, so that the length does not tell the label.

    Args:
        dataset: rows of token ids without special tokens, and what group (repository, author) each is of.
        tokenizer: its separator stands behind each text, its class token, where it has one, before the first.
        length: tokens of the window.
        text: column of the ids.
        group: column of the group.
        seed: of the draws, with epoch and row.

    Raises:
        ConfigurationError: without a separator, for fewer than two groups, or a group of a single text.
    """
    if tokenizer.sep_token_id is None:
        raise ConfigurationError("multi_exit: the tokenizer has no separator token to put between texts.")
    groups = [dataset[place][group] for place in range(len(dataset))]
    members: dict[Any, list[int]] = {}
    for place, name in enumerate(groups):
        members.setdefault(name, []).append(place)
    if len(members) < 2 or min(map(len, members.values())) < 2:
        raise ConfigurationError(
            "multi_exit: in-context classification needs two groups of two texts at least, got "
            f"{ {name: len(places) for name, places in members.items()} }."
        )
    join = partial(joined, length=length, separator=tokenizer.sep_token_id, start=tokenizer.cls_token_id)

    def filled(place: int, draw: torch.Generator) -> dict[str, Any]:
        same = bool(torch.rand((), generator=draw) < 0.5)
        others = [other for other in members[groups[place]] if other != place]
        texts, order = [list(dataset[place][text])], list[int]()
        while sum(len(part) + 1 for part in texts) < length:
            order = order or [others[at] for at in torch.randperm(len(others), generator=draw).tolist()]
            chosen = order.pop() if same else _of_another(groups, groups[place], draw)
            texts.append(list(dataset[chosen][text]))
        ids = join(texts)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(same)}

    return Augmented(range(len(dataset)), filled, seed)


def _of_another(groups: list[Any], own: Any, draw: torch.Generator) -> int:
    """A row of any other group."""
    while True:
        place = int(torch.randint(len(groups), (), generator=draw))
        if groups[place] != own:
            return place


METHOD = Method(
    title="One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings",
    paper="arXiv:2503.03008",
    authors="Andrea Gurioli, Federico Pennino, João Monteiro, Maurizio Gabbrielli",
    year=2025,
    summary="One training without a teacher gives a model that can be cut after several of its layers.",
    bibtex="""@misc{gurioli2025one,
  title = {One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings},
  author = {Gurioli, Andrea and Pennino, Federico and Monteiro, Jo{\\~a}o and Gabbrielli, Maurizio},
  year = {2025}, eprint = {2503.03008}, archivePrefix = {arXiv}
}""",
    algorithm=("supervised",),
    knowledge=("self",),
    tasks=("text-classification", "token-classification", "fill-mask", "text-generation", "image-classification"),
    objective=MultiExit,
    preparation=in_context,
)
