"""SiD's losses and sampler against the authors' code, with their analytic networks."""

from __future__ import annotations

from functools import partial

import oracle
import pytest
import torch
from hf_compress_plugins.generative._adversarial import adversarial_loss, discriminator_loss, features_to_logits
from hf_compress_plugins.generative._diffusion import (
    EDM,
    Latent,
    clean,
    dropped,
    few_steps,
    guided,
    mix,
    scaled_linear,
    target,
)
from hf_compress_plugins.generative.sid import (
    SiDConfig,
    fake_level,
    fake_loss,
    fake_weight,
    generator_loss,
    level,
    scale,
    whole,
)
from torch import Tensor

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
LATENT_CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DATA = 0.5
BATCH_MEAN = (0, 1, 2, 3)


def encode(weight: Tensor, bias: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """c_in W x + b, W over channels."""
    mixed = torch.einsum("dc,bchw->bdhw", weight, noisy)
    return mixed / (sigma**2 + DATA**2).sqrt() + bias.view(1, -1, 1, 1)


def denoise(weight: Tensor, bias: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """D(x, σ) = c_skip x + c_out tanh(c_in W x + b + ¼ ln σ)."""
    total = (sigma**2 + DATA**2).sqrt()
    inner = torch.tanh(encode(weight, bias, noisy, sigma) + 0.25 * sigma.log())
    return noisy * (DATA / total) ** 2 + inner * sigma * DATA / total


def generated(data: dict[str, Tensor], case: str, t_max: float) -> tuple[Tensor, ...]:
    """x, f_φ, f_ψ, x_t and σ of a case of the generator's."""
    image = data[f"{case}_images"].clone().requires_grad_()
    sigma = level(data[f"{case}_u"], sigma_min=0.002, sigma_max=80.0, t_max=t_max)
    noisy = mix(EDM(), image, data[f"{case}_eps"], sigma.flatten())
    real, fake = (denoise(data[f"{side}_W"], data[f"{side}_b"], noisy, sigma) for side in ("true", "fake"))
    return image, real, fake, noisy, sigma


@pytest.mark.parametrize("case", ["g_a1", "g_a12", "g_b1"])
def test_the_generator_s_loss_and_its_gradient_through_both_networks(case: str) -> None:
    data = oracle.load("sid_edm")
    image, real, fake, _, _ = generated(data, case, float(data[f"{case}_tmax"]))

    found = generator_loss(image, real, fake, alpha=float(data[f"{case}_alpha"]), weight=1 / scale(image, real))
    found.sum().backward()

    torch.testing.assert_close(found.detach(), data[f"{case}_loss_map"], **CLOSE)
    torch.testing.assert_close(found.detach().sum(), data[f"{case}_loss_sum"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image.grad, data[f"{case}_grad_images"], rtol=1e-5, atol=1e-5)


def test_the_generator_s_loss_with_its_adversarial_term() -> None:
    data = oracle.load("sid_edm")
    image, real, fake, noisy, sigma = generated(data, "ga", SiDConfig().t_max)
    weight = 1 / scale(image, real)
    features = torch.tanh(encode(data["fake_W"], data["fake_b"], noisy, sigma))

    found = generator_loss(image, real, fake, alpha=1.0, weight=weight)
    judged = adversarial_loss(features_to_logits(features), weight=weight, over=BATCH_MEAN)
    total = 0.5 * found.sum() + 0.5 * judged.sum() * image[0].numel()
    total.backward()

    torch.testing.assert_close(found.detach(), data["ga_loss_map"], **CLOSE)
    torch.testing.assert_close(judged.detach().float(), data["ga_gan"], **CLOSE)
    torch.testing.assert_close(total.detach(), data["ga_total_half_half"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image.grad, data["ga_grad_images"], rtol=1e-5, atol=1e-5)


def test_the_fake_score_s_loss() -> None:
    data = oracle.load("sid_edm")
    weight, bias = data["fake_W"].clone().requires_grad_(), data["fake_b"].clone().requires_grad_()
    sigma, image = fake_level(data["f_normal"]), data["f_images"].clone().requires_grad_()

    levels = sigma.flatten()
    denoised = denoise(weight, bias, mix(EDM(), image.detach(), data["f_eps"], levels), sigma)
    wanted = target(EDM(), image, data["f_eps"], levels)
    found = fake_loss(denoised, wanted, weight=fake_weight(EDM(), levels, sigma_data=DATA))
    found.sum().backward()

    torch.testing.assert_close(found.detach(), data["f_loss_map"], **CLOSE)
    torch.testing.assert_close(found.detach().sum(), data["f_loss_sum"], **CLOSE)
    torch.testing.assert_close(weight.grad, data["f_grad_W"], **CLOSE)
    torch.testing.assert_close(bias.grad, data["f_grad_b"], **CLOSE)
    assert image.grad is None


def test_the_fake_score_s_loss_with_the_discriminator_s() -> None:
    data = oracle.load("sid_edm")
    kernel, bias = data["fake_W"].clone().requires_grad_(), data["fake_b"].clone().requires_grad_()
    sigma = fake_level(data["da_normal"])
    weight = fake_weight(EDM(), sigma.flatten(), sigma_data=DATA)
    noisy, real = (mix(EDM(), data[name], data["da_eps"], sigma.flatten()) for name in ("da_images", "da_real"))

    values = fake_loss(denoise(kernel, bias, noisy, sigma), data["da_images"], weight=weight)
    logits = [features_to_logits(torch.tanh(encode(kernel, bias, read, sigma))) for read in (real, noisy)]
    judged = discriminator_loss(*logits, weight=weight, over=BATCH_MEAN)
    (values.sum() + judged.sum()).backward()

    torch.testing.assert_close(values.detach(), data["da_loss_map"], **CLOSE)
    torch.testing.assert_close(judged.detach(), data["da_lossD"], **CLOSE)
    torch.testing.assert_close(kernel.grad, data["da_grad_W"], **CLOSE)
    torch.testing.assert_close(bias.grad, data["da_grad_b"], **CLOSE)


def latent_network(weight: Tensor, mixing: Tensor, noisy: Tensor, step: Tensor, prompts: Tensor) -> Tensor:
    """ε(x, t, c) = tanh(W x + c V) + x t / 1000, W over channels."""
    mixed = torch.einsum("dc,bchw->bdhw", weight, noisy) + (prompts @ mixing).view(-1, 4, 1, 1)
    return torch.tanh(mixed) + noisy * step.view(-1, 1, 1, 1) / 1000


def prompts(data: dict[str, Tensor], *places: int) -> dict[str, Tensor]:
    """Embeddings of prompts by place; 0 is the empty one."""
    return {"c": data["emb"][list(places), 0]}


def predict(
    data: dict[str, Tensor], side: str, noisy: Tensor, step: Tensor, given: dict[str, Tensor], kappa: float
) -> Tensor:
    """Guided prediction of a network of the file."""
    network = partial(latent_network, data[f"{side}_W"], data[f"{side}_V"], noisy, step)
    return guided(lambda asked: network(asked["c"]), given, prompts(data, *[0] * len(noisy)), kappa)


def test_the_schedule() -> None:
    torch.testing.assert_close(scaled_linear(), oracle.load("sid_lsg")["alphas_cumprod"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_with_its_gradient_through_all_steps(steps: int) -> None:
    data = oracle.load("sid_lsg")
    data["G_W"].requires_grad_()
    process, given = Latent(alphas_cumprod=data["alphas_cumprod"]), prompts(data, 1, 2)
    drawn = iter([data[f"samp{steps}_z"], *(data[f"samp{steps}_fresh_noise"] if steps > 1 else [])])
    read: list[int] = []

    def call(noisy: Tensor, at: Tensor) -> Tensor:
        read.append(int(at[0]))
        return clean(process, predict(data, "G", noisy, at, given, 1.0), noisy, at)

    last = few_steps(process, call, lambda: next(drawn), start=SiDConfig().t_init, steps=steps, of=steps)
    image = call(*last)
    (image * data[f"samp{steps}_upstream"]).sum().backward()

    assert read == data[f"samp{steps}_timesteps"].tolist()
    torch.testing.assert_close(image.detach(), data[f"samp{steps}_x"], **LATENT_CLOSE)
    torch.testing.assert_close(data["G_W"].grad, data[f"samp{steps}_grad_G_W"], **LATENT_CLOSE)


@pytest.mark.parametrize(
    ("case", "kappa2", "kappa4"), [("a1_k2", 2, 2), ("a12_k1", 1, 1), ("a1_k45_nan", 4.5, 4.5), ("a1_zero", 0, 1)]
)
def test_the_generator_s_loss_under_guidance(case: str, kappa2: float, kappa4: float) -> None:
    """In the NaN case the second image has one; it is left out and the divisor stays 3."""
    data = oracle.load("sid_lsg")
    own = {name.removeprefix(f"gen_{case}_"): tensor for name, tensor in data.items() if f"gen_{case}_" in name}
    if "nan" in case:
        own["images"][1, 0, 0, 0] = torch.nan
    process, given = Latent(alphas_cumprod=data["alphas_cumprod"]), prompts(data, 1, 2, 3)
    image, step = own["images"].requires_grad_(), own["timesteps"]

    noisy = mix(process, image, own["noise"], step)
    real, fake = (
        clean(process, predict(data, side, noisy, step, given, kappa), noisy, step)
        for side, kappa in (("real", kappa4), ("fake", kappa2))
    )
    kept = whole(image, real, fake)
    w = scale(image[kept], real[kept])
    values = generator_loss(image[kept], real[kept], fake[kept], alpha=float(own["alpha"]), weight=1 / w)
    loss = values.sum() / len(image)
    loss.backward()

    assert image.grad is not None
    stored_real, stored_fake = own["y_real"], own["y_fake"]
    torch.testing.assert_close(real.detach()[kept], stored_real[kept], **LATENT_CLOSE)
    torch.testing.assert_close(fake.detach()[kept], stored_fake[kept], **LATENT_CLOSE)
    torch.testing.assert_close(w, own["weight"], **LATENT_CLOSE)
    torch.testing.assert_close(loss.detach(), own["loss"], **LATENT_CLOSE)
    torch.testing.assert_close(image.grad.nan_to_num(0.0), own["grad_images"], **LATENT_CLOSE)


def test_the_fake_score_s_loss_under_guidance() -> None:
    """The second image's prompt has been dropped."""
    data = oracle.load("sid_lsg")
    data["fake_W"].requires_grad_()
    process, image, noise = Latent(alphas_cumprod=data["alphas_cumprod"]), data["fs_images"], data["fs_noise"]
    step = data["fs_timesteps"]
    given = dropped(prompts(data, 1, 2), prompts(data, 0, 0), torch.tensor([False, True]))

    found = predict(data, "fake", mix(process, image, noise, step), step, given, 2.0)
    weight = fake_weight(process, step, sigma_data=DATA)
    loss = fake_loss(found, target(process, image, noise, step), weight=weight).sum() / len(image)
    loss.backward()

    torch.testing.assert_close(found.detach(), data["fs_noise_pred"], **LATENT_CLOSE)
    torch.testing.assert_close(loss.detach(), data["fs_loss"], **LATENT_CLOSE)
    torch.testing.assert_close(data["fake_W"].grad, data["fs_grad_W"], **LATENT_CLOSE)
