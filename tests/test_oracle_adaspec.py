"""AdaSPEC against the authors' code."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from hf_compress_plugins.language.adaspec import AdaSPEC, adaspec, learnable
from stub import GradientKeeper, StubForTokenClassification, stub_trainer
from torch import Tensor

from hf_compress import DistillCallback
from hf_compress.divergences import kl, log_probabilities

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def aligned(tensor: Tensor) -> Tensor:
    """Logits of the positions that predict the next label."""
    return tensor[:, :-1]


def scored(labels: Tensor) -> Tensor:
    return labels[:, 1:] != -100


def given(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = oracle.load("adaspec")
    rows = slice(0, 1) if case.startswith("b1") else slice(None)
    reference = data["draft_logits" if case.startswith("ties") else "ref_logits"]
    return data["draft_logits"][rows], data["target_logits"][rows], reference[rows], data["labels"][rows]


@pytest.mark.parametrize("case", ["k0.2", "k0.4", "k0.7", "k1.0", "b1_k0.4", "ties_k0.4"])
def test_which_positions_are_kept(case: str) -> None:
    draft, target, reference, labels = given(case)
    chosen, k = scored(labels), float(case.rpartition("k")[2])

    log_p, log_q = log_probabilities("adaspec", aligned(draft)[chosen], aligned(target)[chosen])
    _, log_r = log_probabilities("adaspec", aligned(reference)[chosen], aligned(target)[chosen])
    kept = learnable(kl(log_p, log_q), kl(log_p, log_r), k=k)

    found = torch.zeros(labels.shape, dtype=torch.bool)
    found[:, :-1][chosen] = kept
    assert torch.equal(found.int(), oracle.load("adaspec")[f"{case}/selected"].int())


@pytest.mark.parametrize("case", ["k0.2", "k0.4", "k0.7", "k1.0", "b1_k0.4", "ties_k0.4"])
def test_the_mean_over_what_is_kept(case: str) -> None:
    """The authors' loss without a count of items: the mean over the kept positions."""
    data = oracle.load("adaspec")
    draft, target, reference, labels = given(case)
    draft.requires_grad_()
    chosen, k = scored(labels), float(case.rpartition("k")[2])

    values = adaspec(aligned(draft)[chosen], aligned(target)[chosen], aligned(reference)[chosen], k=k)
    loss = values.sum() / data[f"{case}/selected"].sum()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{case}/loss"], **CLOSE)
    if f"{case}/grad" in data:
        torch.testing.assert_close(draft.grad, data[f"{case}/grad"], **CLOSE)


def test_the_sum_over_a_number_of_items() -> None:
    data = oracle.load("adaspec")
    draft, target, reference, labels = given("k0.4")
    draft.requires_grad_()
    chosen = scored(labels)

    loss = adaspec(aligned(draft)[chosen], aligned(target)[chosen], aligned(reference)[chosen], k=0.4).sum() / 20
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["k0.4_num_items20/loss"], **CLOSE)
    torch.testing.assert_close(draft.grad, data["k0.4_num_items20/grad"], **CLOSE)


@pytest.mark.parametrize("k", ["0.2", "0.4", "0.7", "1.0"])
def test_through_the_callback(k: str, tmp_path: Path) -> None:
    """In a Trainer's step the sum is divided by all scored positions, as with the authors' count of items."""
    data = oracle.load("adaspec")
    draft, target, reference, labels = given(f"k{k}")
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    kept = GradientKeeper()
    callback = DistillCallback(
        StubForTokenClassification(target),
        AdaSPEC(k=float(k)),
        frozen={"reference": StubForTokenClassification(reference)},
    )
    trainer = stub_trainer(tmp_path, draft, shifted, [callback, kept])
    trainer.train()

    part = data[f"k{k}/selected"].sum() / (shifted != -100).sum()
    torch.testing.assert_close(kept.gradients[0]["rows"], data[f"k{k}/grad"] * part, **CLOSE)
    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx((data[f"k{k}/loss"] * part).item(), rel=1e-4)
