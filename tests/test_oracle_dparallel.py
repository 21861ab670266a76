"""dParallel's loss, masking and decoding step against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.decoding.dparallel import (
    certainty_losses,
    corrupt,
    tokens_each_step,
    unmask,
    unmask_some,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
MASK, BLOCK = 126336, 32


@pytest.mark.parametrize("case", ["b1", "b1_last_block", "b2_bug"])
def test_the_loss_of_both_views(case: str) -> None:
    data = oracle.load("dparallel")
    logits = [data[f"{case}.logits{view}"].clone().requires_grad_() for view in ("", "_rev")]
    total = torch.zeros(())
    for view, own in zip(("", "_rev"), logits, strict=True):
        plain, entropy = certainty_losses(own, data[f"{case}.input_ids"], data[f"{case}.masked{view}"].bool())
        total = total + plain + 2 * entropy
    total.backward()

    torch.testing.assert_close(total.detach(), data[f"{case}.loss"][0], **CLOSE)
    for view, own in zip(("", "_rev"), logits, strict=True):
        torch.testing.assert_close(own.grad, data[f"{case}.grad_logits{view}"], **CLOSE)


@pytest.mark.parametrize("case", ["b1", "b1_last_block"])
@pytest.mark.parametrize("view", ["", "_rev"])
def test_what_a_view_hides(case: str, view: str) -> None:
    data = oracle.load("dparallel")
    chosen = data[f"{case}.masked{view}"][0].bool()
    both = chosen | data[f"{case}.masked{'_rev' if not view else ''}"][0].bool()
    end = int(both.nonzero().max()) + 1
    noisy, _ = corrupt(data[f"{case}.input_ids"][0], chosen, end, mask=MASK)
    assert torch.equal(noisy, data[f"{case}.noisy{view}"][0])


@pytest.mark.parametrize("threshold", ["0.5", "1.0"])
def test_a_decoding_step(threshold: str) -> None:
    data = oracle.load("dparallel")
    best, taken = unmask(data["dec.logits"], data["dec.x"], data["dec.mask_index"].bool(), threshold=float(threshold))
    assert torch.equal(best, data[f"dec.entropy{threshold}.x0"])
    assert torch.equal(taken.int(), data[f"dec.entropy{threshold}.transfer"].int())


def test_a_decoding_step_by_probability() -> None:
    data = oracle.load("dparallel")
    masked = data["dec.mask_index"].bool()
    best, taken = unmask(data["dec.logits"], data["dec.x"], masked, threshold=0.9, by="confidence")
    assert torch.equal(best, data["dec.conf0.9.x0"])
    assert torch.equal(taken.int(), data["dec.conf0.9.transfer"].int())


def test_a_decoding_step_of_a_given_number_of_tokens() -> None:
    data = oracle.load("dparallel")
    masked = data["dec.mask_index"].bool()
    _, taken = unmask_some(data["dec.logits"], data["dec.x"], masked, counts=torch.tensor([2, 1]))
    assert torch.equal(taken.int(), data["dec.fixed2_1.transfer"].int())
    assert torch.equal(tokens_each_step(masked.sum(1), 4), data["dec.num_transfer_tokens_steps4"])
