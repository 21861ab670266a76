"""DMAE's alignment against the authors' code, and what it takes for granted of the models' own masking and loss."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import oracle
import pytest
import torch
from hf_compress_plugins.vision.dmae import dmae
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def projection(data: dict[str, Tensor]) -> nn.Linear:
    layer = nn.Linear(12, 20, dtype=torch.float64)
    layer.load_state_dict({"weight": data["proj_weight"], "bias": data["proj_bias"]})
    return layer


@pytest.mark.parametrize("distance", ["L1", "L2"])
def test_alignment_with_a_projector(distance: str) -> None:
    data = oracle.load("dmae")
    student, layer = data["feat_student"].requires_grad_(), projection(data)

    loss = dmae(layer(student), data["feat_teacher"], distance=distance, normalise=True).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"align_loss_{distance}"], **EXACT)
    torch.testing.assert_close(student.grad, data[f"align_grad_{distance}"], **EXACT)
    torch.testing.assert_close(layer.weight.grad, data[f"align_gradW_{distance}"], **EXACT)
    torch.testing.assert_close(layer.bias.grad, data[f"align_gradb_{distance}"], **EXACT)


@pytest.mark.parametrize("distance", ["L1", "L2"])
def test_alignment_without_one(distance: str) -> None:
    data = oracle.load("dmae")
    student = data["feat_student"].requires_grad_()

    loss = dmae(student, data["feat_teacher"][..., :12], distance=distance, normalise=False).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"noproj_loss_{distance}"], **EXACT)
    torch.testing.assert_close(student.grad, data[f"noproj_grad_{distance}"], **EXACT)


def model(**settings: object) -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        image_size=16, patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=8,
        mask_ratio=0.75, **settings,
    )  # fmt: skip
    return ViTMAEForPreTraining(config).double()


def test_the_models_mask_by_noise_as_the_authors_do() -> None:
    data, student = oracle.load("dmae"), model()
    masking = student.vit.embeddings.random_masking

    visible, mask, restore = masking(data["tokens"], noise=data["noise"])

    torch.testing.assert_close(visible, data["tokens_visible"], **EXACT)
    torch.testing.assert_close(mask.double(), data["mask"])
    assert torch.equal(restore, data["ids_restore"])
    assert torch.equal(data["noise"].argsort(1)[:, :4], data["ids_keep"])


@pytest.mark.parametrize(("name", "normed"), [("plain", False), ("normpix", True)])
def test_the_models_reconstruct_as_the_authors_do(name: str, normed: bool) -> None:
    data, student = oracle.load("dmae"), model(norm_pix_loss=normed)
    predicted = data["pred"].requires_grad_()

    torch.testing.assert_close(student.patchify(data["imgs"]), data["patches"], **EXACT)
    with mock.patch.object(student.decoder, "forward", return_value=SimpleNamespace(logits=predicted)):
        loss = student(data["imgs"], noise=data["noise"]).loss
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"recon_loss_{name}"], **EXACT)
    torch.testing.assert_close(predicted.grad, data[f"recon_grad_{name}"], **EXACT)
