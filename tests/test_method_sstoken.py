"""ssToken: scores and choice by hand, attention as the model's, and what a Trainer's step is."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.language import sstoken as module
from hf_compress_plugins.language.sstoken import SsToken, attention, keep, kept_of, scores, to_prompt
from scene import logits
from stub import GradientKeeper
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compress import DistillConfig, testing
from hf_compress.errors import ConfigurationError, MismatchError, NumericalError
from hf_compress.taps import Taps, watching

CASE = testing.Case("sstoken", "text-generation")
PROMPT = 2


def test_scores_by_hand() -> None:
    """REL of 1, 3, 2 in one answer is 0, 1, 1/2 of its range; the other answer has a range of its own."""
    excess = torch.tensor([1.0, 3.0, 2.0, 10.0, -10.0], dtype=torch.float64)
    attending = torch.tensor([0.2, 0.0, 0.6, 0.5, 1.0], dtype=torch.float64)
    example = torch.tensor([0, 0, 0, 2, 2])
    found = scores(excess, attending, example, gamma=0.25)
    assert found.tolist() == pytest.approx([0.15, 0.25, 0.575, 0.625, 0.75])
    assert torch.equal(scores(excess, attending, example, gamma=0.0), attending)
    assert scores(torch.ones(3), torch.zeros(3), torch.zeros(3, dtype=torch.long), gamma=1.0).tolist() == [0, 0, 0]
    assert not len(scores(excess[:0], attending[:0], example[:0], gamma=0.5))


def test_the_best_of_each_answer_are_kept() -> None:
    """⌈0.4 · 3⌉ = 2 of the first and ⌈0.4 · 2⌉ = 1 of the second; of equal scores the earlier."""
    values, example = torch.tensor([0.1, 0.9, 0.1, 0.3, 0.7]), torch.tensor([0, 0, 0, 1, 1])
    assert keep(values, example, rho=0.4).tolist() == [True, True, False, False, True]
    assert keep(values, example, rho=1.0).all()
    assert keep(values, example, rho=0.01).tolist() == [False, True, False, False, True]
    assert [kept_of(n, 0.6) for n in (1, 2, 5, 10)] == [1, 2, 3, 6]


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_is_the_models_own(key_heads: int, side: str) -> None:
    """From queries and keys, also where two queries share a key and with padding on either side."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": key_heads}
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=2, **heads)
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    ids, mask = torch.randint(1, 20, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_attentions=True).attentions[-1].mean(1)
        taps = Taps(model, {"q:-1", "k:-1"}, 2)
        with watching(taps):
            output = model(ids, attention_mask=mask)
        found = taps.read(output)
        taps.remove()
    for row in range(2):
        real = mask[row].bool()
        own = attention(found["q:-1"][row], found["k:-1"][row], real)
        torch.testing.assert_close(own[real], expected[row][real])
        torch.testing.assert_close(own[real].sum(-1), torch.ones(int(real.sum())))
        assert not own[~real].any()


def test_attention_to_the_prompt_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.2, 0.3]])
    assert to_prompt(weights, torch.tensor([True, False, False])).tolist() == [1.0, 0.25, 0.5]
    assert to_prompt(weights, torch.tensor([False, False, False])).tolist() == [0.0, 0.0, 0.0]


def answers() -> list[dict[str, Any]]:
    """The suite's rows with a prompt."""
    return [row | {"labels": [-100] * PROMPT + row["labels"][PROMPT:]} for row in testing.rows(CASE.task)]


def gradient(folder: Path, objective: SsToken, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    keeper = GradientKeeper()
    trainer, _ = testing.trainer(
        CASE, folder, objective=objective, dtype=torch.float64, callbacks=(keeper,), **({"data": answers()} | settings)
    )
    trainer.train()
    return keeper.gradients[0], trainer.state.log_history[0]


def test_a_step_is_that_of_the_kept_tokens_of_each_answer(tmp_path: Path) -> None:
    """Against the choice made by hand from the models' own outputs, token by token."""
    settings = SsToken(rho=0.5, gamma=0.3).config
    student, _ = testing.models(CASE.task, torch.float64)
    history = testing.frozen(CASE, SsToken(), torch.float64)["history"]
    student.set_attn_implementation("eager")
    inputs = testing.collate(answers())
    losses, total, count = [], torch.zeros((), dtype=torch.float64), 0
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = student(**given, output_attentions=True)
    for model in (history, student):
        log_p = (model(**given) if model is history else output).logits.log_softmax(-1)
        losses.append(-log_p[:, :-1].gather(-1, given["input_ids"][:, 1:, None]).squeeze(-1))
    for row, labels in enumerate(inputs["labels"]):
        places = [t for t in range(len(labels)) if labels[t] != -100]
        excess = [(losses[0] - losses[1])[row, t - 1].item() for t in places]
        low, high = min(excess), max(excess)
        found = {}
        for t, value in zip(places, excess, strict=True):
            looked = output.attentions[-1][row, :, t, :PROMPT].sum(-1).mean().item()
            found[t] = 0.3 * (value - low) / (high - low + 1e-8) + 0.7 * looked
        best = sorted(places, key=lambda t: -found[t])[: math.ceil(0.5 * len(places))]
        total, count = total + sum(losses[1][row, t - 1] for t in best), count + len(best)
    (total / count).backward()

    gradients, log = gradient(tmp_path, SsToken(settings))
    assert log["distill_loss"] == pytest.approx((total / count).item(), rel=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_with_all_kept_it_is_the_task_s_own_loss(tmp_path: Path) -> None:
    gradients, _ = gradient(tmp_path, SsToken(rho=1.0))
    student, _ = testing.models(CASE.task, torch.float64)
    student(**testing.collate(answers())).loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_the_teacher_s_distribution_may_be_what_is_learnt(tmp_path: Path) -> None:
    _, teacher = gradient(tmp_path, SsToken(target="teacher"))
    _, labels = gradient(tmp_path, SsToken())
    assert abs(teacher["distill_loss"] - labels["distill_loss"]) > 0.1
    trainer, model = testing.trainer(CASE, tmp_path, objective=SsToken(target="teacher"))
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(NumericalError, match="sstoken"):
        trainer.train()


def test_the_first_steps_are_attention_s_alone(tmp_path: Path) -> None:
    waiting, attending, both = (
        gradient(tmp_path, SsToken(**one))[1]["distill_loss"]
        for one in ({"warmup_steps": 1}, {"gamma": 0.0}, {"gamma": 0.9})
    )
    assert waiting == attending != both
    after = gradient(tmp_path, SsToken(warmup_steps=0, gamma=0.9))[1]["distill_loss"]
    assert after == both


def test_sinks_are_no_prompt(tmp_path: Path) -> None:
    """With the whole prompt left out, attention is 0 and REL decides as with γ = 1."""
    left_out = gradient(tmp_path, SsToken(sinks=PROMPT))[1]["distill_loss"]
    assert left_out == gradient(tmp_path, SsToken(gamma=1.0))[1]["distill_loss"]
    assert left_out != gradient(tmp_path, SsToken())[1]["distill_loss"]


def test_the_prompt_is_every_real_token_that_is_not_learnt(tmp_path: Path) -> None:
    """Of a chat of two turns: both questions, no answer, no padding; a sink is left out."""
    data = [{"input_ids": [5, 6, 7, 8, 9, 10, 11], "labels": [-100, -100, 7, 8, -100, 10, 11]}]
    data.append({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]})
    with mock.patch.object(module, "to_prompt", wraps=to_prompt) as called:
        gradient(tmp_path, SsToken(), data=data, per_device_train_batch_size=2)
        gradient(tmp_path, SsToken(sinks=1), data=data, per_device_train_batch_size=2)
    masks = [call.args[1].int().tolist() for call in called.call_args_list]
    assert masks[:2] == [[1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert masks[2:] == [[0, 1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]]


def test_a_broken_history_stops_the_run(tmp_path: Path) -> None:
    frozen = testing.frozen(CASE, SsToken())
    for parameter in frozen["history"].parameters():
        parameter.data.fill_(math.nan)
    trainer, _ = testing.trainer(CASE, tmp_path, config=DistillConfig(frozen=frozen))
    with pytest.raises(NumericalError, match="sstoken"):
        trainer.train()


def test_the_student_s_own_start_is_a_history(tmp_path: Path) -> None:
    """At the first step REL is 0 everywhere: attention alone decides."""
    student, _ = testing.pair(CASE, torch.float64)
    config = DistillConfig(frozen={"history": copy.deepcopy(student)})
    own = gradient(tmp_path, SsToken(gamma=0.5), config=config)[1]["distill_loss"]
    assert own == gradient(tmp_path, SsToken(gamma=0.0))[1]["distill_loss"]


def test_rows_without_labels_and_other_models_are_refused(tmp_path: Path) -> None:
    data = [{"input_ids": row["input_ids"]} for row in testing.rows(CASE.task)]
    with pytest.raises(MismatchError, match="sstoken: needs labels"):
        testing.trainer(CASE, tmp_path, data=data)[0].train()
    with pytest.raises(MismatchError, match="causal"):
        testing.trainer(testing.Case("sstoken", "fill-mask"), tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"rho": 0.0}, {"rho": 1.1}, {"gamma": -0.1}, {"gamma": math.nan}, {"warmup_steps": -1}, {"sinks": -1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="sstoken: "):
        SsToken(**wrong)
    with pytest.raises(ConfigurationError, match="target"):
        SsToken(target="mask")  # type: ignore[arg-type]


def test_scores_carry_no_gradient() -> None:
    query = logits(6, 4, 0).view(1, 6, 4).requires_grad_()
    assert not attention(query, query, torch.ones(6, dtype=torch.bool)).requires_grad
