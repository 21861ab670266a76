"""DistillSpec: which divergence a draft learns, on whose answers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.general.gkd import gkd
from hf_compress_plugins.language.distillspec import (
    DIVERGENCES,
    METHOD,
    RECIPE,
    DistillSpec,
    Divergence,
    answered,
    distillspec,
)
from scene import logits, rows, sizes, step
from transformers import T5Config, T5ForConditionalGeneration

from hf_compress import on_policy as loop
from hf_compress import testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.on_policy import on_policy
from hf_compress.stages import Surroundings, run_stages

CASE = testing.Case("distillspec", "text-generation")


def prompted() -> list[dict[str, Any]]:
    """The suite's rows with a prompt of two tokens."""
    found = testing.rows(CASE.task)
    return [row | {"labels": [-100, -100, *row["input_ids"][2:]]} for row in found]


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("forward_kl", 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ("reverse_kl", 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        (
            "jsd",
            0.2 * (0.75 * math.log(0.75 / 0.55) + 0.25 * math.log(0.25 / 0.45))
            + 0.8 * (0.5 * math.log(0.5 / 0.55) + 0.5 * math.log(0.5 / 0.45)),
        ),
        ("tvd", 0.25),
    ],
)
def test_by_hand(divergence: Divergence, expected: float) -> None:
    """Target (3/4, 1/4), draft (1/2, 1/2); at β = 0.2 the mixture is (0.55, 0.45)."""
    target = torch.tensor([[math.log(3.0), 0.0]])
    value = distillspec(torch.zeros(1, 2), target, divergence=divergence, beta=0.2)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        distillspec(torch.zeros(1, 2), 2 * target, divergence=divergence, beta=0.2, temperature=2.0), value
    )


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.9])
def test_a_jsd_over_beta_times_one_minus_beta_is_the_kl_of_near_distributions(beta: float) -> None:
    draft = logits(50, 7, 0)
    target = draft + 1e-3 * logits(50, 7, 1)
    near = distillspec(draft, target, divergence="jsd", beta=beta).sum() / (beta * (1 - beta))
    assert near.item() == pytest.approx(float(distillspec(draft, target, divergence="forward_kl").sum()), rel=2e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_objective_uses_its_settings(divergence: Divergence) -> None:
    draft, target = logits(4, 6, 0), logits(4, 6, 1)
    method = DistillSpec(divergence=divergence, beta=0.2, temperature=3.0)
    found = method.per_position(rows(draft, target), step())
    torch.testing.assert_close(found, distillspec(draft, target, divergence=divergence, beta=0.2, temperature=3.0))
    default = DistillSpec().per_position(rows(draft, target), step())
    torch.testing.assert_close(default, gkd(draft, target, beta=0.0))
    assert DistillSpec.task_weight == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd, tvd, got 'kl'"),
        ({"beta": 0.0}, "beta must lie between 0 and 1, got 0.0. For its ends choose forward_kl"),
        ({"beta": math.nan}, "beta must lie between"),
        ({"lmbda": 1.5}, "lmbda must lie in 0 … 1"),
        ({"max_new_tokens": 0}, "max_new_tokens be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"sampling_temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"distillspec: .*{message}"):
        DistillSpec(**settings)


def test_batches_are_its_own_business_only_where_the_draft_answers_some() -> None:
    """Else a cache of the target's outputs holds for them, and the mean is over all positions."""
    model = sizes(2, "causal")
    assert not DistillSpec().overrides("batch")
    assert DistillSpec().needs(model, model).mean_over == "positions"
    assert DistillSpec(lmbda=0.1).overrides("batch")
    assert DistillSpec(lmbda=0.1).overrides("per_position")
    needs = DistillSpec(lmbda=0.1).needs(model, model)
    assert (needs.mean_over, needs.rescored) == ("examples", True)


def test_the_draft_answers_from_its_own_distribution(tmp_path: Path) -> None:
    """λ = 1: every batch is sampled at temperature 1 without top-k and top-p, and the total variation is below 1."""
    method = DistillSpec(divergence="tvd", lmbda=1.0, max_new_tokens=4)
    with mock.patch.object(loop, "on_policy", wraps=on_policy) as called:
        trainer, _ = testing.trainer(CASE, tmp_path, objective=method, data=prompted(), max_steps=3)
        trainer.train()
    assert [call.args[1].global_step for call in called.call_args_list] == [0, 1, 2]
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4}
    assert all(call.kwargs == sampling for call in called.call_args_list)
    logged = [entry["distill_loss"] for entry in trainer.state.log_history if "distill_loss" in entry]
    assert len(logged) == 3
    assert all(0 < value < 1 for value in logged)


def test_answers_are_the_target_s_and_the_prompts_the_data_s() -> None:
    """Prompts of one and two tokens; the first answer ends with its second token, the others go on."""
    target, data = testing.models(CASE.task)[1].train(), list[dict[str, Any]]()
    for place, row in enumerate(testing.rows(CASE.task)):
        prompt = 1 + place % 2
        data.append(row | {"labels": [-100] * prompt + row["input_ids"][prompt:], "domain": "a"})

    def alone(row: dict[str, Any], prompt: int) -> list[int]:
        ids = torch.tensor([row["input_ids"][:prompt]])
        return target.eval().generate(ids, do_sample=False, max_new_tokens=5)[0].tolist()

    target.generation_config.eos_token_id = alone(data[0], 1)[2]
    found = answered(data, teacher=target.train(), max_new_tokens=5, temperature=0.0, batch=3)
    assert target.training
    for place, (row, before) in enumerate(zip(found, data, strict=True)):
        prompt = 1 + place % 2
        assert row["input_ids"] == alone(before, prompt)
        assert row["labels"] == [-100] * prompt + row["input_ids"][prompt:]
        assert row["domain"] == "a"
    assert len(found[0]["input_ids"]) == 3 < max(map(len, found["input_ids"]))
    drawn = [answered(data, teacher=target, max_new_tokens=5, seed=seed)["input_ids"][:] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert METHOD.preparation is answered


def test_an_encoder_decoder_keeps_its_inputs() -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    data = [{"input_ids": [5, 6, 7], "labels": [8, 1]}, {"input_ids": [9, 4], "labels": [3, 3, 1]}]
    found = answered(data, teacher=T5ForConditionalGeneration(config), max_new_tokens=4)
    assert found["input_ids"][:] == [[5, 6, 7], [9, 4]]
    assert all(1 <= len(labels) <= 4 and -100 not in labels for labels in found["labels"])


def test_rows_that_cannot_be_answered_are_refused() -> None:
    target = testing.models(CASE.task)[1]
    with pytest.raises(MismatchError, match=r"the rows have no \['labels'\], they have \['input_ids'\]"):
        answered([{"input_ids": [1, 2]}], teacher=target)
    with pytest.raises(MismatchError, match="row 0 of the batch has none"):
        answered([{"input_ids": [1, 2], "labels": [1, 2]}], teacher=target)
    with pytest.raises(ConfigurationError, match="got 0 rows"):
        answered([], teacher=target)
    with pytest.raises(ConfigurationError, match=r"a temperature of at least 0 .* -1"):
        answered(prompted(), teacher=target, temperature=-1)


def test_the_recipe_ends_with_the_total_variation_on_the_draft_s_answers(tmp_path: Path) -> None:
    """Two stages of one step; the second starts from the first's weights."""
    draft, target = testing.models(CASE.task)
    stages = copy.deepcopy(RECIPE)
    for stage in stages["stages"]:
        stage["methods"] = tuple(method | {"max_new_tokens": 3} for method in stage["methods"])
    arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "save_strategy": "no"}
    around = Surroundings(
        models={"target": target},
        data={"answers": prompted()},
        arguments=arguments,
        data_collator=testing.collate,
        progress=False,
    )
    with mock.patch.object(loop, "on_policy", wraps=on_policy) as called:
        made = run_stages(stages, draft, tmp_path, around)
    record = made.config.compression
    named = [run["methods"][0]["settings"]["divergence"] for run in (*record["before"], record)]
    assert named == ["forward_kl", "tvd"]
    assert called.call_count == 1
    assert {path.name for path in tmp_path.iterdir()} == {"0-forward-kl", "1-tvd-on-policy"}
