"""SiD's two losses against the authors' code, with their analytic network."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.generative.sid import fake_level, fake_loss, generator_loss, level
from torch import Tensor

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
DATA = 0.5


def denoise(weight: Tensor, bias: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """D(x, σ) = c_skip x + c_out tanh(c_in W x + b + ¼ ln σ), W over channels."""
    total = (sigma**2 + DATA**2).sqrt()
    mixed = torch.einsum("dc,bchw->bdhw", weight, noisy)
    inner = torch.tanh(mixed / total + bias.view(1, -1, 1, 1) + 0.25 * sigma.log())
    return noisy * (DATA / total) ** 2 + inner * sigma * DATA / total


@pytest.mark.parametrize("case", ["g_a1", "g_a12", "g_b1"])
def test_the_generator_s_loss_and_its_gradient_through_both_networks(case: str) -> None:
    data = oracle.load("sid_edm")
    image = data[f"{case}_images"].clone().requires_grad_()
    sigma = level(data[f"{case}_u"], sigma_min=0.002, sigma_max=80.0, t_max=float(data[f"{case}_tmax"]))
    noisy = image + sigma * data[f"{case}_eps"]
    real, fake = (denoise(data[f"{side}_W"], data[f"{side}_b"], noisy, sigma) for side in ("true", "fake"))

    found = generator_loss(image, real, fake, alpha=float(data[f"{case}_alpha"]))
    found.sum().backward()

    torch.testing.assert_close(found.detach(), data[f"{case}_loss_map"], **CLOSE)
    torch.testing.assert_close(found.detach().sum(), data[f"{case}_loss_sum"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image.grad, data[f"{case}_grad_images"], rtol=1e-5, atol=1e-5)


def test_the_fake_score_s_loss() -> None:
    data = oracle.load("sid_edm")
    weight, bias = data["fake_W"].clone().requires_grad_(), data["fake_b"].clone().requires_grad_()
    sigma, image = fake_level(data["f_normal"]), data["f_images"].clone().requires_grad_()

    denoised = denoise(weight, bias, image.detach() + sigma * data["f_eps"], sigma)
    found = fake_loss(image, denoised, sigma, sigma_data=DATA)
    found.sum().backward()

    torch.testing.assert_close(found.detach(), data["f_loss_map"], **CLOSE)
    torch.testing.assert_close(found.detach().sum(), data["f_loss_sum"], **CLOSE)
    torch.testing.assert_close(weight.grad, data["f_grad_W"], **CLOSE)
    torch.testing.assert_close(bias.grad, data["f_grad_b"], **CLOSE)
    assert image.grad is None
