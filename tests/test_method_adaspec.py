"""AdaSPEC: which tokens a draft learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hf_compress_plugins.general.gkd import GKD
from hf_compress_plugins.language.adaspec import AdaSPEC, adaspec, learnable
from scene import logits

from hf_compress import DistillConfig, testing
from hf_compress.errors import ConfigurationError, MismatchError, NumericalError

CASE = testing.Case("adaspec", "text-generation")


def test_the_largest_differences_are_kept() -> None:
    """Δ = 4, 3, 2, 1, 0: the upper 40 % at k = 0.4 (quantile 0.6 of five is 2.4), all at k = 1."""
    reference = torch.ones(5)
    draft = reference + torch.tensor([1.0, 4.0, 0.0, 3.0, 2.0])
    assert learnable(draft, reference, k=0.4).tolist() == [False, True, False, True, False]
    assert learnable(draft, reference, k=1.0).all()
    assert learnable(draft[:1], reference[:1], k=0.01).all()
    assert learnable(reference, reference, k=0.4).all()
    assert not len(learnable(draft[:0], draft[:0], k=0.4))


def test_by_hand() -> None:
    """Target (1/2, 1/2); the first draft row is that, the second is (3/4, 1/4); a reference that is right keeps it."""
    draft = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    values = adaspec(draft, torch.zeros(2, 2), torch.zeros(2, 2), k=0.5)
    assert values.tolist() == pytest.approx([0.0, 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)])


def test_the_choice_carries_no_gradient() -> None:
    draft, target, reference = (logits(6, 5, seed) for seed in range(3))
    kept = adaspec(draft, target, reference, k=0.5) > 0
    ours, plain = draft.clone().requires_grad_(), draft.clone().requires_grad_()
    adaspec(ours, target, reference, k=0.5).sum().backward()
    adaspec(plain, target, reference, k=1.0)[kept].sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    assert 0 < kept.sum() < 6


def test_a_token_that_is_no_number_is_not_hidden() -> None:
    target = torch.zeros(3, 2)
    target[1] = math.nan
    assert adaspec(torch.zeros(3, 2), target, torch.zeros(3, 2), k=0.4).isnan().any()
    with pytest.raises(MismatchError, match="one shape"):
        adaspec(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 3), k=0.4)


def test_a_broken_reference_stops_the_run(tmp_path: Path) -> None:
    frozen = testing.frozen(CASE, AdaSPEC())
    for parameter in frozen["reference"].parameters():
        parameter.data.fill_(math.nan)
    trainer, _ = testing.trainer(CASE, tmp_path, config=DistillConfig(frozen=frozen))
    with pytest.raises(NumericalError, match="adaspec"):
        trainer.train()


def test_its_step_is_a_plain_kl_s_on_part_of_the_tokens(tmp_path: Path) -> None:
    """With k = 1 the loss is the plain forward KL; with k = 0.4 it is smaller: what is left out counts as 0."""
    found = {}
    for k in (1.0, 0.4):
        trainer, _ = testing.trainer(CASE, tmp_path, objective=AdaSPEC(k=k))
        trainer.train()
        found[k] = trainer.state.log_history[0]["distill_loss"]
    plain, _ = testing.trainer(testing.Case("gkd", CASE.task), tmp_path, objective=GKD(beta=0.0))
    plain.train()
    assert found[1.0] == pytest.approx(plain.state.log_history[0]["distill_loss"], rel=1e-5)
    assert found[0.4] < 0.9 * found[1.0]


@pytest.mark.parametrize("k", [0.0, 1.1, math.nan])
def test_k_out_of_range_is_refused(k: float) -> None:
    with pytest.raises(ConfigurationError, match="k must lie"):
        AdaSPEC(k=k)
