"""A 7B student and a 70B teacher on many GPUs, on paper: where the time goes, what is sharded, what is cached.

Nothing here was measured. Times are lower bounds of one resource each, none hidden behind another; what overlaps in
practice is the largest of them.

    compute    6 P_s n for the student, 2 P_t n for the teacher's forward; 2 d V n for a head, twice that in backward,
               and once more where logits are computed again by chunks
    gathering  full sharding over g GPUs brings the weights to each of them: bytes (g - 1) / g at the slowest link's
               rate, and g - 1 hops for each layer; the student's twice and its gradients once, the teacher's once
    memory     student 16 bytes a parameter (weights, gradients, AdamW's float32 copies), teacher 2, both divided by g;
               activations 34 bytes a token, layer and channel (Korthikanti et al., arXiv:2205.05198, without the
               attention matrices); logits at the chunk's positions alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Size:
    """A decoder."""

    parameters: float
    width: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the GPUs are and how they are joined."""

    flops: float = 989e12
    """Of a GPU in bfloat16, a second (H100 SXM's data sheet, dense)."""
    used: float = 0.4
    """Part of it that training reaches."""
    memory: float = 80 * GIGA
    """Bytes of a GPU."""
    node: int = 8
    """GPUs that are joined by NVLink."""
    within: float = 450 * GIGA
    """Bytes a second that a GPU receives inside its node."""
    between: float = 400 * GIGA
    """Bytes a second that a node receives, of eight links of 400 Gbit."""
    hop: float = 10e-6
    """Seconds of latency from one GPU to the next in a ring."""


STUDENT, TEACHER = Size(parameters=7e9, width=4096, layers=32), Size(parameters=70e9, width=8192, layers=80)
VOCABULARY, TOKENS, CHUNK, TOP = 128_256, 8192, 128, 64
"""Tokens of a step on one GPU, positions of a chunk, likeliest tokens that a cache or a server tells."""
WHOLE, TOPK, STATES = "whole logits", f"the likeliest {TOP}", "last hidden states, the head kept here"
A_TOKEN: Mapping[str, float] = {WHOLE: 2.0 * VOCABULARY, TOPK: 8.0 * TOP, STATES: 2.0 * TEACHER.width}
"""Bytes of the teacher's answer; of the likeliest the id and a logit of 4 bytes each."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Seconds and bytes of a step on each of the GPUs that train."""

    name: str
    student: float
    """Seconds of the student's forward and backward."""
    teacher: float
    heads: float
    """Of both heads, with the student's logits computed twice."""
    gathering: float
    """Of weights and gradients."""
    memory: float
    """Bytes."""
    tokens: float
    """A second, of all GPUs, the teacher's own ones included, if nothing but compute counts: it is as much work
    wherever it is done."""


def compute(operations: float, cluster: Cluster) -> float:
    """Seconds of so many operations on one GPU."""
    return operations / (cluster.flops * cluster.used)


def gather(size: Size, shards: int, times: float, cluster: Cluster) -> float:
    """Seconds in which the weights of a sharded model, 2 bytes each, reach each GPU so often."""
    if shards == 1:
        return 0.0
    rate = cluster.within if shards <= cluster.node else min(cluster.within, cluster.between)
    moved = 2 * size.parameters * (shards - 1) / shards / rate
    return times * (moved + size.layers * (shards - 1) * cluster.hop)


def training_traffic(gpus: int, shards: int, cluster: Cluster) -> float:
    """Seconds of the student's weights and gradients; gradients of copies are summed between the groups."""
    found = gather(STUDENT, shards, 3, cluster)
    if shards < gpus:
        found += 2 * 2 * STUDENT.parameters / shards * cluster.node / cluster.between
    return found


def heads(*, teacher: bool, cluster: Cluster) -> float:
    """Seconds of the products with the vocabulary: the student's logits twice and their gradients, the teacher's."""
    width = 4 * STUDENT.width + (TEACHER.width if teacher else 0)
    return compute(2 * width * VOCABULARY * TOKENS, cluster)


def memory(student_shards: int, teacher_shards: int | None) -> float:
    """Bytes on a GPU; None: the teacher is elsewhere."""
    own = 16 * STUDENT.parameters / student_shards + 34 * TOKENS * STUDENT.width * STUDENT.layers
    theirs = 0.0 if teacher_shards is None else 2 * TEACHER.parameters / teacher_shards
    logits = 2 * 4 * CHUNK * VOCABULARY
    return own + theirs + logits


def plan(name: str, gpus: int, shards: int, *, runs: bool, here: bool, cluster: Cluster) -> Plan:
    """A step on GPUs in groups that share the weights.

    Args:
        name: for the table.
        gpus: all of them, those that serve the teacher included.
        shards: of a group.
        runs: the teacher runs; otherwise its answers are read.
        here: the teacher is on the GPUs that train, sharded like the student.
        cluster: the GPUs.
    """
    student = compute(6 * STUDENT.parameters * TOKENS, cluster)
    teacher = compute(2 * TEACHER.parameters * TOKENS, cluster) if runs else 0.0
    of_heads = heads(teacher=runs, cluster=cluster)
    moving = training_traffic(gpus, shards, cluster) + (gather(TEACHER, shards, 1, cluster) if here else 0.0)
    return Plan(
        name=name,
        student=student,
        teacher=teacher,
        heads=of_heads,
        gathering=moving,
        memory=memory(shards, shards if here else None),
        tokens=gpus * TOKENS / (student + teacher + of_heads),
    )


def plans(cluster: Cluster | None = None) -> list[Plan]:
    """Of 8 and of 1,024 GPUs. A served teacher has as many of them as keep pace, and sends its last hidden states."""
    cluster = cluster or Cluster()
    node = cluster.node
    return [
        plan("8 GPUs, both sharded over all", 8, 8, runs=True, here=True, cluster=cluster),
        plan("8 GPUs, cached teacher", 8, 8, runs=False, here=False, cluster=cluster),
        plan("1,024 GPUs, both sharded over all", 1024, 1024, runs=True, here=True, cluster=cluster),
        plan("1,024 GPUs, both sharded within a node", 1024, node, runs=True, here=True, cluster=cluster),
        plan("1,024 GPUs, teacher served by some of them", 1024, node, runs=True, here=False, cluster=cluster),
        plan("1,024 GPUs, cached teacher", 1024, node, runs=False, here=False, cluster=cluster),
    ]


def markdown(cluster: Cluster | None = None) -> str:
    """The plans, and what a token of the teacher weighs."""
    cells = ("student, s", "teacher, s", "heads, s", "gathering, s", "GB a GPU", "million tokens a minute")
    lines = [f"| | {' | '.join(cells)} |", "|---|" + "--:|" * len(cells)]
    for plan in plans(cluster):
        seconds = (f"{value:.2f}" for value in (plan.student, plan.teacher, plan.heads, plan.gathering))
        lines.append(
            f"| {plan.name} | {' | '.join(seconds)} | {plan.memory / GIGA:.0f} | {60 * plan.tokens / 1e6:.1f} |"
        )
    lines += ["", "| the teacher's answer | bytes a token, GB a billion tokens |", "|---|--:|"]
    lines += [f"| {name} | {size:,.0f} |" for name, size in A_TOKEN.items()]
    return "\n".join([*lines, ""])
