"""FSPAD's drafter and loss, and EAGLE's loss, against the authors' code."""

from __future__ import annotations

import oracle
import torch
from hf_compress_plugins.language._modeling_fspad import FSPADDrafter, FSPADDrafterConfig
from hf_compress_plugins.language.fspad import FSPADConfig, feature_loss, token_loss
from torch import Tensor
from torch.nn import functional as F

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the scored positions, as theirs."""
    return (values * mask).sum() / (mask.sum() + 1e-5)


def losses(regress: Tensor, predict: Tensor, features: Tensor, head: Tensor, mask: Tensor) -> list[Tensor]:
    """v, c and their weighed sum."""
    settings = FSPADConfig()
    v = mean(feature_loss(regress, features), mask)
    c = mean(token_loss(F.linear(predict, head), F.linear(features, head)), mask)
    return [v, c, settings.feature_weight * v + settings.token_weight * c]


def test_the_drafter_and_its_gradients() -> None:
    data = oracle.load("fspad")
    config = oracle.metadata("fspad")["config"]
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    drafter = FSPADDrafter(FSPADDrafterConfig(**config, rope_parameters=rope))
    weights = {name.removeprefix("w/"): value for name, value in data.items() if name.startswith("w/")}
    drafter.load_state_dict(weights | {"lm_head.weight": data["in/head_weight"]})
    features, sampled = data["in/hidden_states"].requires_grad_(), list[Tensor]()
    drafter.fc.register_forward_hook(lambda *called: sampled.append(called[-1]))

    output = drafter(data["in/input_ids"], features, data["in/attention_mask"])
    found = losses(
        output.regress, output.predict, data["in/target_features"], data["in/head_weight"], data["in/loss_mask"]
    )
    found[-1].backward()

    torch.testing.assert_close(sampled[0], data["out/fc_output"], **CLOSE)
    torch.testing.assert_close(output.predict, data["out/predict"], **CLOSE)
    torch.testing.assert_close(output.regress, data["out/regress"], **CLOSE)
    for name, value in zip(("vloss", "ploss", "loss"), found, strict=True):
        torch.testing.assert_close(value, data[f"out/{name}"], **CLOSE)
    torch.testing.assert_close(features.grad, data["grad/hidden_states"], **CLOSE)
    gradients = {name: p.grad for name, p in drafter.named_parameters() if p.requires_grad}
    assert {f"grad/{name}" for name in gradients} == {name for name in data if name.startswith("grad/")} - {
        "grad/hidden_states"
    }
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, data[f"grad/{name}"], **CLOSE, msg=name)


def test_the_loss_of_eagle() -> None:
    """One output for both."""
    data = oracle.load("eagle_objective")
    drafted = data["predict_features"].requires_grad_()
    found = losses(drafted, drafted, data["target_features"], data["head_weight"], data["loss_mask"])
    for name, value in zip(("vloss", "ploss", "loss"), found, strict=True):
        torch.testing.assert_close(value, data[name], **CLOSE)
    torch.testing.assert_close(
        torch.autograd.grad(found[0], drafted, retain_graph=True)[0], data["grad_vloss"], **CLOSE
    )
    torch.testing.assert_close(torch.autograd.grad(found[2], drafted)[0], data["grad"], **CLOSE)
