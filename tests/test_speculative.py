"""What a target accepts of a draft: in closed form, and counted in decodes by transformers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hf_compress_evaluation.speculative import (
    Decoding,
    acceptance,
    block_efficiency,
    f_exp,
    f_lin,
    f_sq,
    speed_up,
)
from hf_compress_evaluation.speculative.__main__ import main
from hf_compress_evaluation.speculative.lossless import chi_square, first_tokens, next_token
from hf_compress_evaluation.speculative.measuring import Asked, measure
from hf_compress_evaluation.speculative.running import Counted, Text, assisted, continuations, counted, expected
from tiny import VOCAB, tiny_plain_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import utils
from typer.testing import CliRunner

from hf_compress import facts
from hf_compress.divergences import tvd
from hf_compress.errors import ConfigurationError, MismatchError

SAMPLED, GREEDY = Decoding(), Decoding(temperature=0.0)
PROMPTS = [[5, 9, 7], [11, 6, 8, 5], [7, 7, 9]]
GAMMA = 3


def model(seed: int, vocab: int = 24, **settings: Any) -> LlamaForCausalLM:
    """A small model whose distributions are neither flat nor sharp, which never ends a text."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "initializer_range": 0.4, "max_position_embeddings": 64, "pad_token_id": 0}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, eos_token_id=None, bos_token_id=None, **(sizes | settings))
    ).eval()


TARGET, DRAFT = model(0), model(1)


def probs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ closed form


def test_acceptance_by_hand() -> None:
    target, draft = probs([0.5, 0.5, 0.0], [0.2, 0.3, 0.5]), probs([0.75, 0.0, 0.25], [0.2, 0.3, 0.5])
    assert acceptance(target, draft).tolist() == pytest.approx([0.5, 1.0])
    torch.testing.assert_close(acceptance(target, draft), 1 - tvd(target.log(), draft.log()))
    with pytest.raises(MismatchError, match="acceptance: student"):
        acceptance(target, draft[:, :2])


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (Decoding(), [0.5, 0.25, 0.125, 0.125]),
        (Decoding(temperature=0.5), [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        (Decoding(top_k=2), [2 / 3, 1 / 3, 0.0, 0.0]),
        (Decoding(top_p=0.6), [2 / 3, 1 / 3, 0.0, 0.0]),
        (Decoding(temperature=0.5, top_p=0.6), [1.0, 0.0, 0.0, 0.0]),
        (GREEDY, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_what_tokens_are_drawn_from(decoding: Decoding, expected: list[float]) -> None:
    """Of the distribution (1/2, 1/4, 1/8, 1/8): first the temperature, then top-k, then top-p."""
    logits = probs([0.5, 0.25, 0.125, 0.125]).log()
    assert decoding.probabilities(logits)[0].tolist() == pytest.approx(expected)
    twice = Decoding(temperature=decoding.temperature**2, top_k=decoding.top_k)
    if decoding.top_p == 1:
        torch.testing.assert_close(decoding.drafted(logits), twice.probabilities(logits))


def test_greedy_acceptance_is_agreement() -> None:
    target, draft = torch.tensor([[1.0, 3.0, 2.0], [0.0, 1.0, 5.0]]), torch.tensor([[0.0, 2.0, 1.0], [4.0, 0.0, 1.0]])
    assert acceptance(*map(GREEDY.probabilities, (target, draft))).tolist() == [1.0, 0.0]


def test_lenience_by_hand() -> None:
    """Target (1/2, 1/2), draft (3/4, 1/4): Σ min(f(p), q)."""
    target, draft = probs([0.5, 0.5]), probs([0.75, 0.25])
    found = {f: float(acceptance(target, draft, partial(f, eps=0.8))) for f in (f_lin, f_sq, f_exp)}
    assert found[f_lin] == pytest.approx(0.5 / 0.8 + 0.25)
    assert found[f_sq] == pytest.approx(0.25 / 0.8 + 0.25)
    assert found[f_exp] == pytest.approx(0.5**0.8 + 0.25)
    for f in (f_lin, f_exp):
        assert float(acceptance(target, draft, partial(f, eps=1.0))) == float(acceptance(target, draft)) == 0.75
        assert float(acceptance(target, draft, partial(f, eps=0.01))) == pytest.approx(1.0)
    with pytest.raises(ConfigurationError, match=r"ε must lie in \(0, 1\], got 0"):
        f_lin(target, 0.0)


@pytest.mark.parametrize("gamma", [1, 4, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.999])
def test_block_efficiency_is_the_closed_form_and_its_limit(alpha: float, gamma: int) -> None:
    assert block_efficiency(alpha, gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))
    assert block_efficiency(1.0, gamma) == gamma + 1


def test_speed_up_by_hand() -> None:
    assert speed_up(3.0, gamma=5, cost=0.1) == pytest.approx(2.0)
    for wrong in (lambda: speed_up(3.0, gamma=5, cost=0.0), lambda: block_efficiency(1.1, 4)):
        with pytest.raises(ConfigurationError):
            wrong()
    for settings in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"temperature": math.inf}):
        with pytest.raises(ConfigurationError, match="speculative: temperature and top_k"):
            Decoding(**settings)


# ---------------------------------------------------------------------------------------------------- counted


@pytest.mark.parametrize("decoding", [SAMPLED, GREEDY], ids=str)
def test_a_draft_that_is_the_target_fills_every_block(decoding: Decoding) -> None:
    """γ + 1 tokens a call, all drafted tokens accepted, one forward of the draft for each."""
    twin = copy.deepcopy(TARGET)
    found = counted(TARGET, twin, PROMPTS[:1], decoding, gamma=GAMMA, new_tokens=3 * (GAMMA + 1))[0]
    assert (found.tokens, found.target_calls, found.draft_calls) == (12, 3, 9)
    assert (found.tried, found.accepted, found.acceptance) == (9, 9, 1.0)
    assert found.block_efficiency == GAMMA + 1


def test_every_call_gives_one_token_beside_the_accepted_ones() -> None:
    """And a greedy decode with a draft is the greedy decode without one."""
    before = DRAFT.generation_config
    for decoding in (SAMPLED, GREEDY):
        each = counted(TARGET, DRAFT, PROMPTS[:2], decoding, gamma=GAMMA, new_tokens=12)
        total = sum(each, Counted())
        assert total.tokens == 24 == total.target_calls + total.accepted
        assert total.accepted <= total.tried <= total.draft_calls <= GAMMA * total.target_calls
        assert 0 < total.tried - total.accepted <= total.target_calls  # a block has at most one rejection
    with assisted(TARGET, DRAFT, GAMMA) as generate:
        found = generate(PROMPTS[0], max_new_tokens=12, do_sample=False)
    assert torch.equal(found, TARGET.generate(torch.tensor(PROMPTS[:1]), do_sample=False, max_new_tokens=12))
    assert DRAFT.generation_config is before
    assert before.num_assistant_tokens is None
    assert not TARGET._forward_pre_hooks
    assert not DRAFT._forward_hooks


def test_an_end_that_was_drafted_is_accepted_and_leaves_the_rest_undecided() -> None:
    twin = copy.deepcopy(TARGET)
    second = int(TARGET.generate(torch.tensor(PROMPTS[:1]), do_sample=False, max_new_tokens=2)[0, -1])
    ending = copy.deepcopy(TARGET)
    ending.generation_config.eos_token_id = second
    found = counted(ending, twin, PROMPTS[:1], GREEDY, gamma=5, new_tokens=12)[0]
    assert (found.tokens, found.target_calls, found.tried, found.accepted) == (2, 1, 2, 2)


@pytest.mark.parametrize(
    "decoding", [SAMPLED, Decoding(temperature=0.6, top_k=5), Decoding(temperature=1.5, top_p=0.8)], ids=str
)
def test_transformers_accepts_by_the_distributions_of_the_closed_form(
    decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two that its rejection step sees are `Decoding.probabilities` of the target, `Decoding.drafted` of the draft:
    temperature, top-k and top-p reach the draft twice."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step: Callable[..., Any] = utils._speculative_sampling

    def watched(ids: Tensor, draft: Tensor, length: int, target: Tensor, **settings: Any) -> Any:
        seen.append((ids, draft, target))
        return step(ids, draft, length, target, **settings)

    monkeypatch.setattr(utils, "_speculative_sampling", watched)
    counted(TARGET, DRAFT, PROMPTS[:1], decoding, gamma=2, new_tokens=4)
    assert seen
    for ids, draft, target in seen:
        count = draft.shape[1]
        for one, theirs, of in ((DRAFT, draft, decoding.drafted), (TARGET, target, decoding.probabilities)):
            logits = one(ids).logits[0, -count - 1 :].detach()[: theirs.shape[1]]
            torch.testing.assert_close(theirs[0].softmax(-1), of(logits), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- contexts


def test_what_the_target_writes_and_what_is_expected_there() -> None:
    texts = continuations(TARGET, PROMPTS, GREEDY, new_tokens=4)
    assert [text.ids[: text.prompt] for text in texts] == [tuple(prompt) for prompt in PROMPTS]
    for text, prompt in zip(texts, PROMPTS, strict=True):
        alone = TARGET.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=4)
        assert list(text.ids) == alone[0].tolist()
    drawn = [continuations(TARGET, PROMPTS, SAMPLED, new_tokens=4, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]

    found = expected(TARGET, DRAFT, texts, SAMPLED)
    for text, one in zip(texts, found, strict=True):
        ids = torch.tensor([text.ids])
        rates = acceptance(*(each(ids).logits[0, text.prompt - 1 : -1].softmax(-1) for each in (TARGET, DRAFT)))
        assert one.tokens == len(rates) == 4
        assert one.accepted == one.drafted == pytest.approx(float(rates.detach().sum()), rel=1e-4)
    assert expected(TARGET, TARGET, texts, SAMPLED)[0].accepted == pytest.approx(4.0)
    assert expected(TARGET, TARGET, texts, SAMPLED)[0].greedy == 4
    with pytest.raises(MismatchError, match="a text of 2 tokens has no prompt of 2"):
        Text(ids=(1, 2), prompt=2)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MismatchError, match="the target knows 24 tokens, the draft 8"):
        expected(TARGET, model(0, vocab=8), [Text(ids=(1, 2), prompt=1)], SAMPLED)
    with pytest.raises(ConfigurationError, match="gamma must be at least 1, got 0"):
        counted(TARGET, DRAFT, PROMPTS, SAMPLED, gamma=0, new_tokens=2)
    with pytest.raises(ConfigurationError, match="the target has 64 positions, prompt and continuation take 67"):
        measure(TARGET, DRAFT, PROMPTS, Asked(decoding=SAMPLED, prompt=3))
    with pytest.raises(MismatchError, match="none of the 3 texts has 9 tokens"):
        measure(TARGET, DRAFT, PROMPTS, Asked(decoding=SAMPLED, prompt=9, new_tokens=4))


# ---------------------------------------------------------------------------------------------------- lossless


def test_chi_square_by_hand() -> None:
    """Counts (60, 40) of a fair coin: χ² = 4, p = 0.0455; a token that cannot come settles it."""
    assert chi_square(np.array([60, 40]), np.array([0.5, 0.5])) == pytest.approx(0.0455, abs=1e-4)
    assert chi_square(np.array([50, 50]), np.array([0.5, 0.5])) == 1.0
    assert chi_square(np.array([50, 49, 1]), np.array([0.5, 0.5, 0.0])) == 0.0
    rare = np.array([0.5, 0.44, 0.02, 0.02, 0.02])  # of 100 two each: one cell of six
    assert chi_square(np.array([50, 44, 6, 0, 0]), rare) == 1.0
    with pytest.raises(MismatchError, match="3 draws are too few"):
        chi_square(np.array([2, 1]), np.array([0.5, 0.5]))


def leaning(strength: float) -> LlamaForCausalLM:
    """A model of four tokens that gives the first one's logit behind the prompt (1, 2)."""
    made = model(3, vocab=4)
    hidden: list[Tensor] = []
    handle = made.model.norm.register_forward_hook(lambda module, args, output: hidden.append(output[0, -1]))
    with torch.no_grad():
        made(torch.tensor([[1, 2]]))
        made.lm_head.weight.zero_()
        made.lm_head.weight[0] = strength * hidden[0] / hidden[0].square().sum()
    handle.remove()
    return made


def from_the_target(ids: Tensor, draft: Tensor, length: int, target: Tensor, **_: Any) -> tuple[Tensor, int]:
    """A rejection step with the usual mistake: after a rejection it draws from p, not from what p has above q."""
    token = ids[0, -length]
    p, q = target[0, 0].softmax(-1), draft[0, 0].softmax(-1)
    taken = bool(torch.rand(()) <= p[token] / q[token])
    kept = token if taken else torch.multinomial(p, 1)[0]
    return kept.view(1, 1), 0


def test_the_first_token_of_decodes_with_a_draft_is_the_target_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft gives token 0 nearly always, the target half the time. With the mistake it comes three times in four,
    which as many decodes show."""
    target, draft = leaning(math.log(3.0)), leaning(6.0)
    wanted = next_token(target, [1, 2], SAMPLED)
    assert wanted.tolist() == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])
    right = first_tokens(target, draft, [1, 2], SAMPLED, count=120)
    assert right.sum() == 120
    assert chi_square(right, wanted) > 0.01
    monkeypatch.setattr(utils, "_speculative_sampling", from_the_target)
    assert chi_square(first_tokens(target, draft, [1, 2], SAMPLED, count=120), wanted) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [SAMPLED, Decoding(temperature=0.7, top_k=10)], ids=str)
def test_the_first_token_of_20_000_decodes_is_the_target_s(decoding: Decoding) -> None:
    counts = first_tokens(TARGET, DRAFT, PROMPTS[0], decoding, count=20_000)
    assert chi_square(counts, next_token(TARGET, PROMPTS[0], decoding)) > 1e-3
    assert chi_square(counts, next_token(DRAFT, PROMPTS[0], decoding)) < 1e-9


# ---------------------------------------------------------------------------------------------------- command


def test_the_command_prints_and_records_what_it_measured(tmp_path: Path) -> None:
    tokenizer = tiny_plain_tokenizer()
    for name, seed in (("target", 0), ("draft", 1)):
        model(seed, vocab=len(VOCAB)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = ["the film was very good and the music was fine", "love", "a dull story with a bad end but quick actor"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    app = typer.Typer()
    app.command()(main)
    given = [str(tmp_path / "target"), str(tmp_path / "draft"), "--data", str(tmp_path / "texts.jsonl")]
    small = ["--prompt", "6", "--new-tokens", "5", "--gamma", "2"]

    done = CliRunner().invoke(app, [*given, *small, "--json", "--output", str(tmp_path / "figures.json")])

    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    assert found["texts"] == 2
    assert found["counts"]["tokens"] == 10
    assert found["block_efficiency"]["value"] == pytest.approx(10 / found["counts"]["target_calls"])
    tau, cost = found["block_efficiency"]["value"], found["cost"]
    assert found["estimated_speed_up"] == pytest.approx(tau / (2 * cost + 1))
    record = facts.load(tmp_path / "draft")
    kept = {one.metric: one for one in record.measurements}
    assert kept["acceptance_rate"].value == found["acceptance"]["value"]
    assert kept["expected_acceptance_rate"].value == found["on_continuations"]["value"]
    assert kept["block_efficiency"].how["gamma"] == 2
    assert kept["block_efficiency"].data is not None
    assert kept["block_efficiency"].data.rows == 2

    shown = CliRunner().invoke(app, [*given, *small, "--temperature", "0"])
    assert shown.exit_code == 0, shown.output
    assert "tokens a target call, counted" in shown.stdout
    assert "greedy, 2 tokens drafted a call; 2 prompts of 6 tokens" in " ".join(shown.stdout.split())
    refused = CliRunner().invoke(app, [*given, "--prompt", "40"])
    assert refused.exit_code == 1
    assert "error: speculative: none of the 3 texts has 40 tokens" in refused.output
