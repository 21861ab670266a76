"""From a graph network to a perceptron that reads a node's own features: neighbours' labels and edges' differences.

Wu, Lin, Huang, Fan, Li: Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into
MLPs: An Effective GNN-to-MLP Distillation Framework, AAAI 2023, arXiv:2305.10758.

    L_low  = mean over edges (u, v) and self-loops of KL( softmax(z_t,v) ‖ softmax(z_s,u) )
    L_high = mean over edges (u, v) of KL( q_t,uv ‖ q_s,uv ),  q_uv = softmax( |z_u - z_v| / τ )
    L = λ · NLL(labelled nodes) + (1 - λ) · (L_low + L_high)

The teacher's logits of all nodes are computed beforehand and looked up by the node's id; they carry no gradient. λ
weighs the labels, the other way round than elsewhere. The form is the authors' code's: one temperature, in the high
term alone.

A batch is a set of nodes with the edges among them; with all nodes in one batch the losses are the published ones.
Means run over the edges of a batch, so that accumulation changes their meaning. Isolated nodes stand in L_low by their
self-loop and not in L_high; adding a constant to a class of all logits leaves L_high alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_compress.divergences import check_temperature, kl
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Inputs, Needs, Objective, Signals, Sizes, Step
from hf_compress.registry import Method
from hf_compress_plugins.graphs._modeling_node_mlp import NodeMLPConfig, NodeMLPForSequenceClassification

NODE, EDGES = "node", "edges"
"""Columns of a batch: (node,) ids, and (2, edge) places in the batch, self-loops left out."""


@dataclass(frozen=True, kw_only=True)
class FFG2MConfig:
    """Hyper-parameters of FF-G2M; the authors' best for GCN on Cora."""

    tau: float = 1.5
    """τ > 0, in the high-frequency term."""
    lamb: float = 0.4
    """λ, 0 … 1, weight of the labels."""
    low: bool = True
    """The low-frequency term."""
    high: bool = True
    """The high-frequency term."""

    def __post_init__(self) -> None:
        check_temperature("ff_g2m", self.tau)
        if not 0 <= self.lamb <= 1 or not (self.low or self.high):
            raise ConfigurationError(f"ff_g2m: lamb must lie in 0 … 1 and a term be on, got {self}.")


def low_frequency(student_logits: Tensor, teacher_logits: Tensor, edges: Tensor) -> Tensor:
    """Each node learns what the teacher says of its neighbours and of itself.

    Args:
        student_logits: (node, class), any float type; widened to float32.
        teacher_logits: (node, class), detached here.
        edges: (2, edge) source and destination, self-loops included.

    Returns:
        (edge,) nats, at least 0.
    """
    log_q, log_p = (_wide(logits).log_softmax(-1) for logits in (student_logits, teacher_logits.detach()))
    return kl(log_p[edges[1]], log_q[edges[0]])


def high_frequency(student_logits: Tensor, teacher_logits: Tensor, edges: Tensor, *, tau: float) -> Tensor:
    """Each edge's difference in the student is distributed over classes as in the teacher.

    Args:
        student_logits: (node, class), any float type; widened to float32.
        teacher_logits: (node, class), detached here.
        edges: (2, edge) without self-loops.
        tau: τ.

    Returns:
        (edge,) nats, at least 0.
    """
    log_q, log_p = (
        ((_wide(logits)[edges[0]] - _wide(logits)[edges[1]]).abs() / tau).log_softmax(-1)
        for logits in (student_logits, teacher_logits.detach())
    )
    return kl(log_p, log_q)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def with_loops(edges: Tensor, nodes: int) -> Tensor:
    """(2, edge + node) the edges and one self-loop a node."""
    loops = torch.arange(nodes, device=edges.device)
    return torch.cat([edges, loops.expand(2, -1)], 1)


def graph_batches(
    dataset: Sequence[Mapping[str, Any]], *, edges: Tensor
) -> Callable[[Sequence[Mapping[str, Any]]], Inputs]:
    """A collator that joins the rows of a batch by the edges among them.

    Args:
        dataset: rows with `features`, `node` (their id) and, where known, `labels`.
        edges: (2, edge) ids of the whole graph; each direction of an undirected edge once.

    Returns:
        a function from rows to `features`, `labels` (-100 where unknown), `node` and `edges`.

    Raises:
        MismatchError: if an edge names a node that no row has.
    """
    known = {int(row[NODE]) for row in dataset}
    if edges.numel() and (missing := set(edges.flatten().tolist()) - known):
        raise MismatchError(f"ff_g2m: the edges name node {min(missing)}, which no row has.")
    edges = edges[:, edges[0] != edges[1]]
    size = max(known) + 1

    def collate(batch: Sequence[Mapping[str, Any]]) -> Inputs:
        nodes = torch.tensor([int(row[NODE]) for row in batch])
        place = torch.full((size,), -1)
        place[nodes] = torch.arange(len(nodes))
        inner = place[edges]
        labels = [int(row["labels"]) if row.get("labels") is not None else IGNORED for row in batch]
        return {
            "features": torch.stack([torch.as_tensor(row["features"], dtype=torch.float32) for row in batch]),
            "labels": torch.tensor(labels),
            NODE: nodes,
            EDGES: inner[:, (inner >= 0).all(0)],
        }

    return collate


class FFG2M(Objective):
    """The two terms over the edges of a batch."""

    Config = FFG2MConfig
    config: FFG2MConfig

    def __init__(self, config: Any = None, *, weight: float = 1.0, **settings: Any) -> None:
        super().__init__(config, weight=weight, **settings)
        self.task_weight = self.config.lamb  # type: ignore[misc]  # λ is a setting here

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(columns=frozenset({NODE, EDGES}), mean_over="batch")

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        student, teacher = signals.student["logits"], signals.teacher["logits"]
        edges, settings = signals.inputs[EDGES], self.config
        found = {}
        if settings.low:
            found["low"] = low_frequency(student, teacher, with_loops(edges, len(student))).mean()
        if settings.high:
            values = high_frequency(student, teacher, edges, tau=settings.tau)
            found["high"] = values.sum() / max(len(values), 1)
        return {name: (1 - settings.lamb) * value for name, value in found.items()}


AutoConfig.register("node_mlp", NodeMLPConfig, exist_ok=True)
AutoModelForSequenceClassification.register(NodeMLPConfig, NodeMLPForSequenceClassification, exist_ok=True)

METHOD = Method(
    title="Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs: An "
    "Effective GNN-to-MLP Distillation Framework",
    paper="arXiv:2305.10758",
    authors="Lirong Wu, Haitao Lin, Yufei Huang, Tianyu Fan, Stan Z. Li",
    year=2023,
    summary="A perceptron without neighbours learns what a graph network says of nodes, neighbours and edges.",
    bibtex="""@inproceedings{wu2023extracting,
  title = {Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into {MLPs}: An
           Effective {GNN}-to-{MLP} Distillation Framework},
  author = {Wu, Lirong and Lin, Haitao and Huang, Yufei and Fan, Tianyu and Li, Stan Z.},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2023}, eprint = {2305.10758}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence", "similarity"),
    knowledge=("feature",),
    tasks=("graph-ml",),
    objective=FFG2M,
    preparation=graph_batches,
)
