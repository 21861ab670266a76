"""ALM's alignment and losses against the authors' code."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from hf_compress_plugins.tokenizers._alignment import FAMILIES, align
from hf_compress_plugins.tokenizers.alm import (
    _last,
    chunk_likelihoods,
    distance,
    end_likelihoods,
    groups,
    join,
    join_ends,
    latents,
)
from torch import Tensor

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
CASES = sorted({name.rpartition(".")[0] for name in oracle.outputs("alm") if not name.startswith("latents")})


@pytest.mark.parametrize("case", oracle.metadata("alm")["alignments"], ids=lambda case: case["tokens_student"][0])
def test_alignment(case: dict[str, Any]) -> None:
    kinds = (case["kind_teacher"], case["kind_student"])
    found = align(case["tokens_teacher"], case["tokens_student"], *(FAMILIES[kind.lower()] for kind in kinds))
    assert [list(chunk) for chunk in found] == case["alignment_indices"]


def members(data: dict[str, Tensor], side: str) -> Tensor:
    return data[f"chunk_matrix_{side}"].float() * data[f"loss_mask_{side}"].float()[..., None]


def value(data: dict[str, Tensor], mode: str, kind: Any, temperature: float) -> Tensor:
    """The published reduction: the mean over valid chunks of the batch, in the default mode by the code's own count."""
    sides = ("teacher", "student")
    member = [members(data, side) for side in sides]
    valid = member[0][:, 1:].sum(1) > 0
    likely = [
        chunk_likelihoods(data[f"{s}_logits"], data[f"input_ids_{s}"], m) for s, m in zip(sides, member, strict=True)
    ]
    ends = [
        end_likelihoods(data[f"{s}_logits"], m, data[f"space_mask_{s}"]) for s, m in zip(sides, member, strict=True)
    ]
    counted, divisor = valid, valid.sum()
    if mode == "default":
        group = groups(ends[0], 0.1)
        counted = join(valid.float(), group) > 0
        present = [{int(number) for number in row[ok]} for row, ok in zip(group, valid, strict=True)]
        twice = [len({int(row[number]) for number in own}) for row, own in zip(group, present, strict=True)]
        divisor = torch.tensor(sum(twice))
        likely = [join(one * valid, group) for one in likely]
        ends = [join_ends(one, group, valid) for one in ends]
    both = [one if mode == "naive" else one + end for one, end in zip(likely, ends, strict=True)]
    found = distance(*(one.masked_fill(~counted, -1.0) for one in both), kind=kind, temperature=temperature)
    return (found * counted).sum() / divisor


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case: str) -> None:
    data = oracle.load("alm")
    expected = {name: data[f"{case}.{name}"] for name in ("loss", "grad_student_logits")}
    if case.startswith("batch1"):
        data = {name: tensor[1:2] if tensor.shape[:1] == (3,) else tensor for name, tensor in data.items()}
    mode, kind, temperature = case.removeprefix("batch1.").split(".")
    student = data["student_logits"].clone().requires_grad_()

    loss = value(data | {"student_logits": student}, mode, kind, float(temperature.removeprefix("T")))
    loss.backward()

    torch.testing.assert_close(loss.detach(), expected["loss"][0], **CLOSE)
    torch.testing.assert_close(student.grad, expected["grad_student_logits"], **CLOSE)


@pytest.mark.parametrize("kind", ["l2", "l2_channelwise"])
def test_states_at_the_ends_of_chunks(kind: str) -> None:
    data = oracle.load("alm")
    student = data["student_hidden"].clone().requires_grad_()
    member = [data[f"chunk_matrix_{side}"].float() for side in ("teacher", "student")]
    valid = member[0].any(1)
    states = [
        hidden.gather(1, _last(m)[..., None].expand(-1, -1, hidden.shape[-1]))
        for hidden, m in zip((data["teacher_hidden"], student), member, strict=True)
    ]

    found = latents(states[1], states[0], valid, channelwise=kind == "l2_channelwise")
    loss = found.mean() / valid.float().mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"latents.{kind}.loss"][0], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"latents.{kind}.grad_student_hidden"], **CLOSE)
