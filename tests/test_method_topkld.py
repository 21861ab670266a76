"""TopKLD: forward KL on the head, reverse on the tail; training on rounded weights."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hf_compress_plugins.language.topkld import (
    LowBitWeights,
    TopKLD,
    TopKLDConfig,
    dequantize,
    head,
    matrices,
    quantize,
    topkld,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import logits
from stub import GradientKeeper
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_compress import testing
from hf_compress.divergences import kl, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError

CASE = testing.Case("topkld", "text-generation")
VARIANTS = ("generalised", "plain")


def two_classes(student: float, teacher: float, **settings_: Any) -> float:
    own, theirs = (torch.tensor([[part, 1 - part]], dtype=torch.float64).log() for part in (student, teacher))
    return topkld(own, theirs, **settings_).item()


def test_two_classes_by_hand() -> None:
    """p = (0.6, 0.4), q = (0.9, 0.1), head {0}: 0.6 ln(2/3) + 0.1 ln(1/4), and on top -0.6 + 0.9 - 0.1 + 0.4."""
    plain = 0.6 * math.log(2 / 3) + 0.1 * math.log(1 / 4)
    assert two_classes(0.9, 0.6, k=1, variant="plain") == pytest.approx(plain)
    assert two_classes(0.9, 0.6, k=1) == pytest.approx(plain + 0.6)
    swapped = 0.9 * math.log(3 / 2) + 0.4 * math.log(4)
    assert two_classes(0.9, 0.6, k=1, variant="plain", swapped=True) == pytest.approx(swapped)
    assert two_classes(0.9, 0.6, k=1, swapped=True) == pytest.approx(swapped - 0.6)


def test_the_plain_sum_is_no_divergence() -> None:
    """p near (1/2, 1/2), q = (0.9, 0.1): -0.4548 plain, 0.3452 with the terms that mend it."""
    assert two_classes(0.9, 0.5 + 1e-9, k=1, variant="plain") == pytest.approx(-0.4548, abs=1e-4)
    assert two_classes(0.9, 0.5 + 1e-9, k=1) == pytest.approx(0.3452, abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("k", "case"), [(10**6, "beta0_temp1.0"), (0, "beta1_temp1.0")])
def test_all_classes_or_none_are_the_two_kls_of_an_oracle(variant: Any, k: int, case: str) -> None:
    data = oracle.load("gkd_jsd")
    student, scored = data["student_logits"].requires_grad_(), data["labels"] != -100
    found = topkld(student[scored], data["teacher_logits"][scored], k=k, variant=variant)
    loss = found.sum() / scored.sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), data[f"{case}/loss"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(student.grad, data[f"{case}/grad"], rtol=1e-9, atol=1e-11)


@given(st.integers(0, 6), st.booleans(), st.floats(0.1, 5.0), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_it_is_at_least_zero_and_zero_only_between_equals(k: int, swapped: bool, scale: float, seed: int) -> None:
    student, teacher = scale * logits(4, 6, seed), scale * logits(4, 6, seed + 1)
    values = topkld(student, teacher, k=k, swapped=swapped)
    assert values.min() > 1e-6
    torch.testing.assert_close(topkld(teacher + 1.0, teacher, k=k, swapped=swapped), torch.zeros_like(values))
    torch.testing.assert_close(topkld(student - 2.0, teacher + 3.0, k=k, swapped=swapped), values)


def test_swapping_exchanges_head_and_tail() -> None:
    student, teacher = logits(4, 6, 0), logits(4, 6, 1)
    for variant in VARIANTS:
        both = [topkld(student, teacher, k=2, variant=variant, swapped=swapped) for swapped in (False, True)]
        log_p, log_q = log_probabilities("test", student, teacher)
        torch.testing.assert_close(both[0] + both[1], kl(log_p, log_q) + kl(log_q, log_p))
        assert not torch.allclose(both[0], both[1])


def test_at_the_teacher_only_the_plain_sum_has_a_gradient() -> None:
    teacher, found = logits(3, 5, 1), {}
    for variant in VARIANTS:
        student = teacher.clone().requires_grad_()
        topkld(student, teacher, k=2, variant=variant).sum().backward()
        found[variant] = student.grad.abs().max().item()
    assert found["generalised"] < 1e-12
    assert found["plain"] > 0.05


def test_the_head_is_the_teachers_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(3, 5, 0).requires_grad_(), logits(3, 5, 1).requires_grad_()
    chosen = head(teacher, 2)
    assert chosen.sum(-1).tolist() == [2, 2, 2]
    assert torch.where(chosen, teacher, math.inf).min() > torch.where(chosen, -math.inf, teacher).min()
    topkld(student, teacher, k=2).sum().backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda own: topkld(own, teacher, k=2), student)


@pytest.mark.parametrize("k", [0, 2, 9])
def test_excluded_classes_leave_value_and_gradient_finite(k: int) -> None:
    student, teacher = logits(3, 6, 0), logits(3, 6, 1)
    student[:, :2] = teacher[:, :2] = -math.inf
    student.requires_grad_()
    found = topkld(student, teacher, k=k)
    found.sum().backward()
    torch.testing.assert_close(found, topkld(student[:, 2:], teacher[:, 2:], k=k))
    assert student.grad.isfinite().all()
    assert topkld(logits(3, 6, 0), teacher, k=1).isinf().all()  # the tail's reverse KL
    assert topkld(student, logits(3, 6, 1), k=6).isinf().all()  # the head's forward KL
    with pytest.raises(MismatchError, match="one shape"):
        topkld(student, teacher[:, :5], k=k)


def test_settings_are_checked_and_the_plain_variant_warns(caplog: pytest.LogCaptureFixture) -> None:
    for wrong in ({"k": -1}, {"variant": "other"}):
        with pytest.raises(ConfigurationError, match="topkld"):
            TopKLDConfig(**wrong)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        TopKLDConfig()
        assert not caplog.records
        TopKLDConfig(variant="plain")
        assert "below 0" in caplog.text


def test_its_loss_in_a_run(tmp_path: Path) -> None:
    trainer, _ = testing.trainer(CASE, tmp_path, objective=TopKLD(k=5, swapped=True))
    trainer.train()
    given_ = testing.signals(CASE)
    own, theirs = (side["logits"].flatten(0, 1)[given_.positions.index] for side in (given_.student, given_.teacher))
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(topkld(own, theirs, k=5, swapped=True).mean().item(), rel=1e-4)


def test_codes_by_hand() -> None:
    """Rows of largest magnitude 3 and 0.5; 3 bits have the points -3 … 3, 2 bits -1, 0, 1; zeros stay zeros."""
    weight = torch.tensor([[3.0, -1.4, 0.4], [0.5, -0.5, 0.2], [0.0, 0.0, 0.0]])
    whole, scales = quantize(weight, 3)
    assert whole.tolist() == [[3, -1, 0], [3, -3, 1], [0, 0, 0]]
    assert scales.flatten().tolist() == pytest.approx([1.0, 0.5 / 3, 0.0], rel=1e-3)
    assert dequantize(whole, scales, weight)[0].tolist() == [3.0, -1.0, 0.0]
    assert quantize(weight, 2)[0].tolist() == [[1, 0, 0], [1, -1, 0], [0, 0, 0]]


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_rounded_weights_are_within_half_a_step_and_stay(bits: int, seed: int) -> None:
    weight = logits(5, 7, seed).float()
    whole, scales = quantize(weight, bits)
    found = dequantize(whole, scales, weight)
    assert whole.abs().amax(1).eq(2 ** (bits - 1) - 1).all()
    assert ((found - weight).abs() <= 0.501 * scales.float() + 1e-3 * weight.abs()).all()
    again, same = quantize(found, bits)
    assert torch.equal(again, whole)
    torch.testing.assert_close(same, scales, rtol=1e-3, atol=0)


def test_matrices_are_named_once_and_not_the_distillers() -> None:
    model = nn.Module()
    model.table, model.head, model.norm = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False), nn.LayerNorm(2)
    model.head.weight = model.table.weight
    model.distiller = nn.Linear(2, 2)
    assert [name for name, _ in matrices(model)] == ["table.weight"]


class Watcher(TrainerCallback):
    """Weights that each forward saw, and those at rest."""

    def __init__(self, name: str = "lm_head") -> None:
        self.name, self.seen, self.rest = name, list[tuple[bool, Tensor]](), list[Tensor]()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        def note(module: nn.Module, *_: Any) -> None:
            self.seen.append((torch.is_grad_enabled(), module.weight.detach().clone()))

        model.get_submodule(self.name).register_forward_hook(note)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.rest.append(model.get_submodule(self.name).weight.detach().clone())

    def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.rest.append(model.get_submodule(self.name).weight.detach().clone())


def points(weight: Tensor) -> int:
    return max(len(row.unique()) for row in weight)


def test_the_model_computes_with_rounded_weights_and_the_optimizer_moves_the_others(tmp_path: Path) -> None:
    """One step of plain descent: w - 0.1 times the gradient at ŵ, then rounded where training ends."""
    watcher, kept = Watcher(), GradientKeeper()
    start = testing.models(CASE.task)[0].lm_head.weight.detach().clone()
    trainer, _ = testing.trainer(
        CASE, tmp_path, callbacks=(LowBitWeights(3), kept, watcher), optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", max_steps=1,
    )  # fmt: skip
    trainer.train()

    rounded = dequantize(*quantize(start, 3), start)
    assert torch.equal(watcher.seen[-1][1], rounded)
    plain = copy.deepcopy(testing.models(CASE.task)[0])
    for _, parameter in matrices(plain):
        parameter.data.copy_(dequantize(*quantize(parameter, 3), parameter))
    by_hand, other = GradientKeeper(), testing.trainer(CASE, tmp_path, callbacks=(), max_steps=1)[0]
    other.model.load_state_dict(plain.state_dict())
    other.add_callback(by_hand)
    other.train()
    torch.testing.assert_close(kept.gradients[0]["lm_head.weight"], by_hand.gradients[0]["lm_head.weight"])
    moved = start - 0.1 * kept.gradients[0]["lm_head.weight"]
    torch.testing.assert_close(watcher.rest[0], moved)
    assert torch.equal(trainer.model.lm_head.weight, dequantize(*quantize(watcher.rest[0], 3), start))
    assert not trainer.model._forward_pre_hooks


def test_evaluation_reads_rounded_weights_and_leaves_the_others(tmp_path: Path) -> None:
    watcher = Watcher()
    trainer, _ = testing.trainer(
        CASE, tmp_path, callbacks=(LowBitWeights(2), watcher), max_steps=2, eval_strategy="steps", eval_steps=1,
        give=lambda _: {"eval_dataset": testing.rows(CASE.task)}, gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    assert {grad for grad, _ in watcher.seen} == {True, False}
    assert max(points(weight) for _, weight in watcher.seen) <= 3
    assert min(map(points, watcher.rest)) > 10
    assert len(watcher.rest) == 4  # after each step and after each evaluation, where a checkpoint is written


def test_a_resumed_run_goes_on_from_the_weights_that_were_moved(tmp_path: Path) -> None:
    def run(folder: str, **more: Any) -> Any:
        trainer, _ = testing.trainer(
            CASE, tmp_path / folder, callbacks=(LowBitWeights(3),), max_steps=6, save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.train(**more)
        return trainer

    whole = run("whole")
    again = run("whole", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert testing.weights_hash(again.model) == testing.weights_hash(whole.model)
    assert points(whole.model.lm_head.weight) <= 7


class Breaker(TrainerCallback):
    """Ends the run where the weights are still the rounded ones."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_after_a_run_that_broke_off_the_next_begins_with_the_weights_that_were_moved(tmp_path: Path) -> None:
    low, start = LowBitWeights(3), testing.models(CASE.task)[0]
    trainer, _ = testing.trainer(CASE, tmp_path, callbacks=(Breaker(), low))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert points(trainer.model.lm_head.weight) <= 7
    broken = len(trainer.model._forward_pre_hooks)
    low.on_train_begin(None, None, None, model=trainer.model)
    assert torch.equal(trainer.model.lm_head.weight, start.lm_head.weight)
    assert len(trainer.model._forward_pre_hooks) == broken  # its own is replaced; the distiller's is still there
    low.on_train_end(None, None, None)
    assert points(trainer.model.lm_head.weight) <= 7
    assert len(trainer.model._forward_pre_hooks) == broken - 1


def test_low_bit_weights_refuse_what_they_cannot_do() -> None:
    for bits in (1, 9):
        with pytest.raises(ConfigurationError, match="2 to 8 bits"):
            LowBitWeights(bits)
        with pytest.raises(ConfigurationError, match="bits must be 2 to 8"):
            quantize(torch.zeros(2, 2), bits)
    with pytest.raises(ConfigurationError, match="nothing to put into few bits"):
        LowBitWeights(4).on_train_begin(None, None, None, model=nn.LayerNorm(3))
