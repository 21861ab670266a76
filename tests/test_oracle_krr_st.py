"""KRR-ST's outer loss against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.dataset_distillation.krr_st import ConvNet, krr_loss

EXACT = {"rtol": 1e-8, "atol": 1e-12}


def network() -> ConvNet:
    data = oracle.load("krr_st")
    net = ConvNet(3, (8, 8), (4, 6), 5).double()
    net.load_state_dict({name.removeprefix("net."): data[name] for name in data if name.startswith("net.")})
    return net.eval()


@pytest.mark.parametrize("part", ["syn", "real"])
def test_features(part: str) -> None:
    data = oracle.load("krr_st")
    torch.testing.assert_close(network().features(data[f"x_{part}"]).detach(), data[f"features_{part}"], **EXACT)


@pytest.mark.parametrize(("prefix", "rows", "suffix"), [("", 6, "_syn"), ("one_", 1, "")])
def test_loss_and_gradients(prefix: str, rows: int, suffix: str) -> None:
    data, net = oracle.load("krr_st"), network()
    images, targets = data["x_syn"][:rows].requires_grad_(), data["y_syn"][:rows].requires_grad_()

    loss = krr_loss(net.features(images), targets, net.features(data["x_real"]), data["y_real"])
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{prefix}outer_loss"], **EXACT)
    torch.testing.assert_close(images.grad, data[f"{prefix}grad_x{suffix}"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(targets.grad, data[f"{prefix}grad_y{suffix}"], **EXACT)
