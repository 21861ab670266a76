"""DM-Codec's losses and quantiser against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.speech._modeling_codec import ResidualQuantiser
from hf_compress_plugins.speech.dm_codec import (
    adversarial_loss,
    d_axis,
    discriminator_loss,
    feature_loss,
    reconstruction,
    t_axis,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("case", ["a", "b1"])
@pytest.mark.parametrize("kind", ["d_axis_sm", "d_axis_lm", "combined_avg", "t_axis_sm"])
def test_distillation(case: str, kind: str) -> None:
    data = oracle.load("dm_codec")
    feature = data[f"{case}_feature"].clone().requires_grad_()
    speech, language = data[f"{case}_sm"], data[f"{case}_lm"]

    loss = {
        "d_axis_sm": lambda: d_axis(feature, speech).mean(),
        "d_axis_lm": lambda: d_axis(feature, language).mean(),
        "combined_avg": lambda: 0.5 * (d_axis(feature, speech).mean() + d_axis(feature, language).mean()),
        "t_axis_sm": lambda: t_axis(feature, speech).mean(),
    }[kind]()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{case}_{kind}"], **CLOSE)
    torch.testing.assert_close(feature.grad, data[f"{case}_{kind}_grad"], **CLOSE)


def test_reconstruction() -> None:
    data = oracle.load("dm_codec")
    decoded = data["rec_xhat"].clone().requires_grad_()
    loss = reconstruction(data["rec_x"], decoded)
    loss.backward()
    torch.testing.assert_close(loss.detach(), data["rec_loss"], **CLOSE)
    torch.testing.assert_close(decoded.grad, data["rec_grad"], **CLOSE)


def test_the_adversarial_losses() -> None:
    data = oracle.load("dm_codec")
    real, fake = ([data[f"d{side}{place}"] for place in (0, 1)] for side in "rg")
    torch.testing.assert_close(discriminator_loss(real, fake), data["disc_loss"], **CLOSE)
    torch.testing.assert_close(adversarial_loss(fake), data["adv_loss"], **CLOSE)
    torch.testing.assert_close(feature_loss([real], [fake]), data["feat_loss"], **CLOSE)


def quantiser() -> ResidualQuantiser:
    data = oracle.load("dm_codec")
    made = ResidualQuantiser(3, 8, 6, 0.99, 2.0)
    for place, book in enumerate(made.layers):
        vectors = data[f"rvq_codebook{place}"]
        book.vectors.copy_(vectors)
        book.average.copy_(vectors * AVERAGE)
        book.counts.fill_(4.0)
        book.begun.fill_(1.0)
    return made


AVERAGE = 1.0
"""The moving sums begin as the codebooks do, whatever the counts."""


def test_the_quantiser_in_use() -> None:
    data, made = oracle.load("dm_codec"), quantiser().eval()
    found = made(data["rvq_x"])
    assert torch.equal(found.codes, data["rvq_eval_idx"])
    torch.testing.assert_close(found.layers[0], data["rvq_eval_layer0"], **CLOSE)
    torch.testing.assert_close(found.layers[2], data["rvq_eval_layer2"], **CLOSE)
    torch.testing.assert_close(found.total, data["rvq_eval_q"], **CLOSE)


def test_the_quantiser_in_training() -> None:
    data, made = oracle.load("dm_codec"), quantiser().train()
    states = data["rvq_x"].clone().requires_grad_()
    found = made(states)
    (found.total.sum() + found.layers[0].square().sum() + 10 * found.commitment.mean()).backward()

    assert torch.equal(found.codes, data["rvq_train_idx"])
    torch.testing.assert_close(found.total.detach(), data["rvq_train_q"], **CLOSE)
    torch.testing.assert_close(found.commitment.detach(), data["rvq_train_commit"][:, 0], **CLOSE)
    torch.testing.assert_close(states.grad, data["rvq_train_grad_x"], **CLOSE)
    for place, book in enumerate(made.layers):
        torch.testing.assert_close(book.counts, data[f"rvq_after_cluster{place}"], **CLOSE)
        torch.testing.assert_close(book.vectors, data[f"rvq_after_codebook{place}"], **CLOSE)
