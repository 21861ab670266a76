"""MEND's losses and their gradients to the virtual tokens, through a frozen stand-in, against the authors' code."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from hf_compress_plugins.encoders.mend import check_tokens, distillation, selected
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CASES: dict[str, tuple[float | None, float, slice]] = {
    "pretrain_only_kl_T1": (None, 1.0, slice(2)),
    "pretrain_only_kl_T2": (None, 2.0, slice(2)),
    "finetune_lambda1_T1": (1.0, 1.0, slice(2)),
    "finetune_lambda0.5_T2": (0.5, 2.0, slice(2)),
    "finetune_batch1": (1.0, 1.0, slice(1, 2)),
}
"""λ (None: without the task's loss), T, rows."""


def stand_in(data: dict[str, Tensor], embeddings: Tensor, mask: Tensor) -> Tensor:
    """tanh(running masked mean + own embedding) through a head, as the file's metadata says."""
    weight = mask.to(embeddings)[..., None]
    mean = (embeddings * weight).cumsum(1) / weight.cumsum(1).clamp(min=1)
    return torch.tanh(mean + embeddings) @ data["llm.head"]


def losses(data: dict[str, Tensor], virtual: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
    """L_task and L_kd."""
    one = {name: data[name][rows] for name in data if name.startswith(("query_", "teacher_"))}
    ids, real = one["query_ids"], one["query_mask"].bool()
    count = virtual.shape[1]
    embeddings = torch.cat([virtual, data["llm.embedding"][ids]], 1)
    mask = torch.cat([real.new_ones(len(ids), count), real], 1)
    logits = stand_in(data, embeddings, mask)[:, count:]
    teacher = stand_in(data, data["llm.embedding"][one["teacher_ids"]], one["teacher_mask"])
    theirs = one["teacher_mask"].bool() & ~one["teacher_demo_mask"].bool()
    check_tokens(ids[real], one["teacher_ids"][theirs])
    value = distillation(selected(logits, real), selected(teacher, theirs), temperature=temperature)
    labels = ids.masked_fill(~(real & one["query_target_mask"].bool()), -100)
    task: Any = ForCausalLMLoss
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
    torch.testing.assert_close(task(logits, labels, vocab_size=logits.shape[-1]).double(), entropy, rtol=1e-6, atol=0)
    return entropy, value.mean()  # transformers' own is the same in float32


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_to_the_virtual_tokens(case: str) -> None:
    data = oracle.load("mend")
    factor, temperature, rows = CASES[case]
    virtual = data["virtual_demo"][rows].clone().requires_grad_()
    task, divergence = losses(data, virtual, rows, temperature)
    loss = divergence if factor is None else task + factor * divergence
    loss.backward()
    torch.testing.assert_close(loss, data[f"{case}.loss"], **CLOSE)
    torch.testing.assert_close(virtual.grad, data[f"{case}.grad_virtual_demo"], **CLOSE)


def test_the_divergence_alone() -> None:
    data = oracle.load("mend")
    student = data["kl.student_logits"].requires_grad_()
    own, theirs = data["query_mask"].bool(), data["teacher_mask"].bool() & ~data["teacher_demo_mask"].bool()
    value = distillation(selected(student, own), selected(data["kl.teacher_logits"], theirs), temperature=2.0).mean()
    value.backward()
    torch.testing.assert_close(value, data["kl.loss_T2"], **CLOSE)
    torch.testing.assert_close(student.grad, data["kl.grad_student_T2"], **CLOSE)
