"""AlignDistil's loss against the authors' code, whose labels mask logits of the same place."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.language.aligndistil import Reward, aligndistil, extrapolated, strength
from torch import Tensor

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def given(rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, DPO model, the other model, and which places are valid."""
    data = oracle.load("aligndistil")
    logits = [data[f"{name}_logits"][rows] for name in ("student", "dpo", "reverse_dpo")]
    return logits[0].clone().requires_grad_(), logits[1], logits[2], data["labels"][rows] != -100


def reduced(values: Tensor, valid: Tensor, *, by_length: bool) -> Tensor:
    """Mean over sequences of each one's sum, or of its mean over valid places."""
    found = torch.zeros(valid.shape).masked_scatter(valid, values).sum(1)
    return (found / valid.sum(1) if by_length else found).mean()


def compare(case: str, student: Tensor, loss: Tensor) -> None:
    data = oracle.load("aligndistil")
    loss.backward()
    torch.testing.assert_close(loss.detach(), data[f"{case}/loss"], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"{case}/grad"], **CLOSE)


@pytest.mark.parametrize(
    ("case", "c", "temperature"),
    [
        ("aligndistil_b0.1_b210.0_len0_T1.0", 10.0, 1.0),
        ("aligndistil_b0.1_b210.0_len1_T1.0", 10.0, 1.0),
        ("aligndistil_b0.1_b210.0_len1_T2.0", 10.0, 2.0),
        ("aligndistil_b0.1_b215.0_len1_T1.0", 15.0, 1.0),
        ("b1", 10.0, 1.0),
        ("theorem1_adaptive_b0.1_b210.0_len1_T1.0", 10.0, 1.0),
    ],
)
def test_the_adaptive_loss(case: str, c: float, temperature: float) -> None:
    student, dpo, other, valid = given(slice(0, 1) if case == "b1" else slice(None))
    reward: Reward = "dpo" if case.startswith("theorem1") else "contrastive"
    w = strength(dpo[valid], other[valid], c=c)
    target = extrapolated(dpo[valid], other[valid], w, reward=reward, temperature=temperature)
    values = aligndistil(student[valid], target, 0.1 / w)
    compare(case, student, reduced(values, valid, by_length="len0" not in case))


@pytest.mark.parametrize(("case", "reward"), [("theorem1", "dpo"), ("theorem1_contrast", "contrastive")])
def test_the_loss_with_one_strength_everywhere(case: str, reward: Reward) -> None:
    student, dpo, other, valid = given()
    weight = torch.full((int(valid.sum()),), 0.05)
    target = extrapolated(dpo[valid], other[valid], 0.1 / weight, reward=reward, temperature=1.0)
    loss = reduced(aligndistil(student[valid], target, weight), valid, by_length=True)
    compare(f"{case}_b0.1_b20.05_len1_T1.0", student, loss)


def test_its_parts() -> None:
    data = oracle.load("aligndistil")
    _, dpo, other, _ = given()
    w = strength(dpo.flatten(0, 1), other.flatten(0, 1), c=10.0)
    target = extrapolated(dpo.flatten(0, 1), other.flatten(0, 1), w, reward="contrastive", temperature=1.0)
    valid = data["labels"] != -100
    for name, found in (
        ("l1_distance", (w - 1e-3) / 10),
        ("per_token_lossweight", 0.1 / w),
        ("teacher_logprobs", target),
    ):
        shaped = found.view(*valid.shape, *found.shape[1:])
        torch.testing.assert_close(shaped, data[f"aligndistil/{name}"], **CLOSE)
