"""DistillSpec against TRL's generalised JSD, the TAID authors' total variation, and acceptance in closed form."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from hf_compress_evaluation.speculative import Decoding, acceptance
from hf_compress_plugins.language.distillspec import DistillSpec, Divergence, distillspec
from stub import GradientKeeper, StubForTokenClassification, stub_trainer

from hf_compress import DistillCallback

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SINGLE = {"rtol": 1e-4, "atol": 1e-6}
CASES: list[tuple[Divergence, str]] = [
    ("forward_kl", "0"),
    ("reverse_kl", "1"),
    ("jsd", "0.1"),
    ("jsd", "0.5"),
    ("jsd", "0.9"),
]


@pytest.mark.parametrize(("divergence", "beta"), CASES)
@pytest.mark.parametrize("temperature", ["1.0", "0.9", "2.0"])
def test_value_and_gradient(divergence: Divergence, beta: str, temperature: str) -> None:
    data = oracle.load("gkd_jsd")
    draft, chosen = data["student_logits"].requires_grad_(), data["labels"] != -100
    settings = {"beta": float(beta)} if divergence == "jsd" else {}

    rows = draft[chosen], data["teacher_logits"][chosen]
    loss = distillspec(*rows, divergence=divergence, temperature=float(temperature), **settings).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"beta{beta}_temp{temperature}/loss"], **EXACT)
    torch.testing.assert_close(draft.grad, data[f"beta{beta}_temp{temperature}/grad"], **EXACT)


@pytest.mark.parametrize("name", ["tvd", "inf/tvd"])
def test_total_variation(name: str) -> None:
    data = oracle.load("taid_repo_divergences")
    part = "inf/" if name.startswith("inf") else ""
    draft, chosen = data[f"{part}student_logits"].requires_grad_(), data["mask"].bool()

    loss = distillspec(draft[chosen], data[f"{part}teacher_logits"][chosen], divergence="tvd").mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{name}/loss"], **SINGLE)
    assert draft.grad is not None
    if f"{name}/grad" in data:
        torch.testing.assert_close(draft.grad, data[f"{name}/grad"], **SINGLE)
    assert draft.grad.isfinite().all()


def test_acceptance_of_each_position_is_what_the_total_variation_leaves() -> None:
    data = oracle.load("gkd_jsd")
    target, draft = (data[f"{who}_logits"].flatten(0, 1) for who in ("teacher", "student"))

    found = acceptance(*(Decoding().probabilities(logits) for logits in (target, draft)))

    torch.testing.assert_close(found.view(3, 6), data["hand/acceptance_per_position"], **EXACT)
    torch.testing.assert_close(found, 1 - distillspec(draft, target, divergence="tvd"), **EXACT)


@pytest.mark.parametrize(("divergence", "beta"), [("reverse_kl", "1"), ("jsd", "0.1")])
def test_through_the_callback(divergence: Divergence, beta: str, tmp_path: Path) -> None:
    data = oracle.load("gkd_jsd")
    settings = {"beta": float(beta)} if divergence == "jsd" else {}
    method = DistillSpec(divergence=divergence, temperature=0.9, **settings)
    kept, target = GradientKeeper(), StubForTokenClassification(data["teacher_logits"])
    trainer = stub_trainer(tmp_path, data["student_logits"], data["labels"], [DistillCallback(target, method), kept])
    trainer.train()

    expected = data[f"beta{beta}_temp0.9/loss"].item()
    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(kept.gradients[0]["rows"], data[f"beta{beta}_temp0.9/grad"], **EXACT)
