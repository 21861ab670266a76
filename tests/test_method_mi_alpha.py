"""MI-α by hand, its critics, its other settings in a Trainer, and AutoDistiller."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.encoders import _auto_distiller as runs_module
from hf_compress_plugins.encoders import mi_alpha as module
from hf_compress_plugins.encoders._auto_distiller import features, ranks, read_runs, recommender
from hf_compress_plugins.encoders.mi_alpha import (
    Critic,
    Loss,
    MIAlpha,
    MIAlphaConfig,
    auto_distiller,
    first_tokens,
    hidden_loss,
    layer_pairs,
    leave_one_out,
    logits_loss,
    mi_alpha,
    transport,
)
from runs import published
from scene import logits, signals, sizes, step
from scipy.stats import spearmanr
from stub import arguments
from tiny import tiny_bert_config
from transformers import BertForQuestionAnswering, BertForSequenceClassification, Trainer

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, ForeignFileError, MismatchError
from hf_compress.parts import Budget

TASK = "text-classification"
TOKENS = torch.tensor([[True, True, True], [False, True, True]])
LARGE = Budget(parameters=10**9)


# ---------------------------------------------------------------------- the bound


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_scores_that_tell_nothing_give_nothing(alpha: float) -> None:
    assert mi_alpha(torch.zeros(4, 4), torch.zeros(4), alpha=alpha).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, math.log(4)), (0.5, math.log(8))])
def test_scores_that_tell_every_example_give_what_five_can(alpha: float, expected: float) -> None:
    """A diagonal of c: a is c - log 4 off the diagonal and 0 on it, so that I = 1 + log(4 / α) - 1."""
    assert -mi_alpha(30.0 * torch.eye(5), torch.zeros(5), alpha=alpha).item() == pytest.approx(expected, rel=1e-4)


def test_of_two_examples_the_batch_s_own_baseline_leaves_nothing() -> None:
    """K = 2, α = 1: a[i, j] is the row's other score, S[i, i] or S[i, j]: I = 1 + 0 - 1."""
    assert mi_alpha(logits(2, 2, 0), logits(2, 1, 1)[:, 0], alpha=1.0).item() == pytest.approx(0.0, abs=1e-12)


def test_the_others_of_a_row_are_averaged() -> None:
    scores = logits(4, 4, 0)
    expected = [
        [math.log(sum(math.exp(scores[i, k]) for k in range(4) if k != j) / 3) for j in range(4)] for i in range(4)
    ]
    torch.testing.assert_close(leave_one_out(scores), torch.tensor(expected, dtype=torch.float64))


def test_a_large_score_does_not_hide_the_small_ones() -> None:
    """log( ½ (e^0 + e^1) ) beside a score of 200, where a difference of sums would be lost."""
    found = leave_one_out(torch.tensor([[200.0, 0.0, 1.0]]).expand(3, 3))
    assert found[0, 0].item() == pytest.approx(math.log((1 + math.e) / 2))


@pytest.mark.parametrize("alpha", [0.1, 0.9, 1.0])
def test_no_value_is_above_the_bound(alpha: float) -> None:
    for seed in range(20):
        found = -mi_alpha(40 * logits(6, 6, seed), 40 * logits(6, 1, 100 + seed)[:, 0], alpha=alpha)
        assert found.isfinite()
        assert found <= 1 + math.log(6 / alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_the_value(alpha: float) -> None:
    scores, baseline = logits(4, 4, 0).requires_grad_(), logits(4, 1, 1)[:, 0].requires_grad_()
    assert torch.autograd.gradcheck(lambda s, b: mi_alpha(s, b, alpha=alpha) + 0 * b.sum(), (scores, baseline))


def test_one_example_gives_nothing_and_a_way_for_gradients() -> None:
    scores, baseline = torch.ones(1, 1, requires_grad=True), torch.ones(1, requires_grad=True)

    found = mi_alpha(scores, baseline, alpha=0.9)
    found.backward()

    assert (found.item(), scores.grad, baseline.grad) == (0.0, torch.zeros(1, 1), torch.zeros(1))


@pytest.mark.parametrize(("scores", "baseline"), [((2, 3), (2,)), ((3, 3), (2,)), ((3, 3), (3, 1))])
def test_other_shapes_are_refused(scores: tuple[int, ...], baseline: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match="must be square"):
        mi_alpha(torch.zeros(scores), torch.zeros(baseline), alpha=0.5)


# ---------------------------------------------------------------------- layers and critics


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("skip", 3, 6, ((0, 0), (1, 2), (2, 4), (3, 6))),
        ("skip", 2, 3, ((0, 0), (1, 1), (2, 3))),
        ("skip", 4, 2, ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2))),
        ("last", 2, 6, ((0, 4), (1, 5), (2, 6))),
        ("emd", 1, 2, ((0, 0), (1, 1), (1, 2))),
    ],
)
def test_layer_maps(layers: Any, student: int, teacher: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert layer_pairs(layers, student, teacher) == expected


def test_the_last_layers_of_a_shallower_teacher_are_refused() -> None:
    with pytest.raises(MismatchError, match="at least 4 layers, got 2"):
        layer_pairs("last", 4, 2)


def test_the_first_real_token_on_whichever_side_the_padding_is() -> None:
    hidden = torch.arange(6.0).view(2, 3, 1)
    assert first_tokens(hidden, TOKENS).flatten().tolist() == [0.0, 4.0]
    with pytest.raises(MismatchError, match=r"\(2, 3, 1\) do not fit tokens of shape \(2, 2\)"):
        first_tokens(hidden, TOKENS[:, :2])


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_critic_relates_examples_and_does_not_see_padding(kind: Any) -> None:
    """Scores (2, 2) of three tokens, b of the teacher's alone, NaN in padding and a longer row change nothing."""
    torch.manual_seed(0)
    critic = Critic(4, 6, MIAlphaConfig(critic=kind, hidden=8, out=3))
    student, teacher = logits(6, 4, 0).view(2, 3, 4).requires_grad_(), logits(6, 6, 1).view(2, 3, 6).requires_grad_()

    scores, baseline = critic(student, teacher, TOKENS)
    (scores.sum() + baseline.sum()).backward()

    assert (scores.shape, baseline.shape, teacher.grad) == ((2, 2), (2,), None)
    assert scores[0, 0] != scores[0, 1]
    longer = [torch.cat([x.detach(), torch.full_like(x[:, :1], math.nan)], 1) for x in (student, teacher)]
    again, _ = critic(*longer, torch.cat([TOKENS, torch.zeros(2, 1, dtype=torch.bool)], 1))
    torch.testing.assert_close(again, scores)
    other, same = critic(student + 1, teacher, TOKENS)
    assert torch.equal(same, baseline)
    assert not torch.equal(other, scores)


def test_with_the_batch_s_baseline_alone_none_is_learned() -> None:
    assert Critic(4, 6, MIAlphaConfig(alpha=1.0)).baseline is None


def test_layers_of_unlike_width_are_refused() -> None:
    objective = MIAlpha()
    objective.needs(sizes(1), sizes(1))
    shapes = {"hidden:0": torch.Size([2, 3, 4]), "hidden:1": torch.Size([2, 3, 8])}
    with pytest.raises(MismatchError, match="embeddings=False"):
        objective.build(shapes, shapes)


# ---------------------------------------------------------------------- the study's other choices


@pytest.mark.parametrize(
    ("loss", "expected"), [("mse", (4 + 16) / 4), ("cos", 2 / 2), ("pkd", 4 / 2), ("ce", math.log(2))]
)
def test_other_losses_by_hand(loss: Loss, expected: float) -> None:
    """Two rows of one token: (1, 0) against (-1, 0), (0, 2) against (0, 6); for ce two even distributions of two."""
    student = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    teacher = torch.tensor([[[-1.0, 0.0]], [[0.0, 6.0]]])
    if loss == "ce":
        student, teacher = torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
    found = hidden_loss(student, teacher, torch.ones(2, 1, dtype=torch.bool), loss=loss)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["ce", "mse", "cos", "pkd"])
def test_other_losses_do_not_see_padding_and_leave_the_teacher(loss: Loss) -> None:
    student, teacher = (logits(6, 4, seed).view(2, 3, 4) for seed in (0, 1))
    spoilt = student.masked_fill(~TOKENS[..., None], math.nan).requires_grad_()
    teacher.requires_grad_()
    found = hidden_loss(spoilt, teacher, TOKENS, loss=loss)
    found.backward()
    torch.testing.assert_close(found, hidden_loss(student, teacher, TOKENS, loss=loss))
    assert teacher.grad is None
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()


def test_logits_by_hand() -> None:
    """(2, 0) against (0, 0) by T = 2: mean of 1² and 0²; -½ (log σ(1) + log σ(-1))."""
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    assert logits_loss(student, teacher, loss="mse", temperature=2.0).tolist() == [0.5]
    expected = -0.5 * sum(math.log(1 / (1 + math.exp(-x))) for x in (1.0, -1.0))
    assert logits_loss(student, teacher, loss="ce", temperature=2.0).item() == pytest.approx(expected)


def test_the_cheapest_flow() -> None:
    assert transport(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).tolist() == [[0.0, 0.5], [0.5, 0.0]]
    assert transport(torch.tensor([[3.0, 1.0, 2.0]])).flatten().tolist() == pytest.approx([1 / 3] * 3)
    flow = transport(logits(2, 3, 0))
    torch.testing.assert_close(flow.sum(1), torch.full((2,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(flow.sum(0), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert transport(torch.tensor([[math.nan, 1.0]])).tolist() == [[0.5, 0.5]]


def states(*rows: float) -> torch.Tensor:
    """(2, 3, 2) hidden states that are the same at each token."""
    return torch.tensor(rows).view(2, 1, 2).expand(2, 3, 2)


def valued(student: list[torch.Tensor], teacher: list[torch.Tensor], **settings: Any) -> tuple[MIAlpha, torch.Tensor]:
    """The objective and its term, of the `hidden_states` of both models."""
    objective = MIAlpha(hidden=8, **settings)
    taps = [{f"hidden:{place}": tensor for place, tensor in enumerate(one)} for one in (student, teacher)]
    needs = objective.needs(sizes(len(student) - 1), sizes(len(teacher) - 1))
    given = [
        {name: one[name] for name in names} for one, names in zip(taps, (needs.student, needs.teacher), strict=True)
    ]
    torch.manual_seed(0)
    objective.build(*({name: tensor.shape for name, tensor in one.items()} for one in given))
    return objective, objective.forward(signals(given[0], given[1], TOKENS), step())[objective.config.loss]


def test_the_flow_between_layers_takes_the_cheapest_way_and_the_embeddings_are_a_pair_beside() -> None:
    """Student layers (a, b), teacher layers (b, a): nothing is left to pay but the embeddings, (1 + 1) / 2 = 1."""
    a, b, zero = states(1.0, 2.0, 3.0, 4.0), states(5.0, 6.0, 7.0, 8.0), states(0.0, 0.0, 0.0, 0.0)
    layers = ([zero, a, b], [zero + 1, b, a])
    assert valued(*layers, loss="mse", layers="emd")[1].item() == pytest.approx(1.0)
    assert valued(*layers, loss="mse", layers="emd", embeddings=False)[1].item() == pytest.approx(0.0)


def test_the_embeddings_are_left_out_where_asked() -> None:
    """Layers 1 apart at each value, embeddings 10: 1 + 100 with them."""
    zero = states(0.0, 0.0, 0.0, 0.0)
    assert valued([zero, zero], [zero + 10, zero + 1], loss="mse")[1].item() == pytest.approx(101.0)
    assert valued([zero, zero], [zero + 10, zero + 1], loss="mse", embeddings=False)[1].item() == pytest.approx(1.0)


def test_scores_are_cut_to_the_limit() -> None:
    """Scores of ±ε are all but equal, and tell nothing."""
    taps = [100 * logits(6, 2, seed).float().view(2, 3, 2) for seed in range(2)]
    _, plain = valued([taps[0]] * 2, [taps[1]] * 2, alpha=0.5)
    objective, cut = valued([taps[0]] * 2, [taps[1]] * 2, alpha=0.5, score_limit=1e-4)
    baseline = objective.critics["shared"](taps[0], taps[1], TOKENS)[1]
    assert cut.item() == pytest.approx(2 * mi_alpha(torch.zeros(2, 2), baseline, alpha=0.5).item(), abs=1e-3)
    assert abs(plain.item() - cut.item()) > 0.01


def test_what_stands_in_padding_does_not_reach_a_projection() -> None:
    student = logits(6, 2, 0).float().view(2, 3, 2).masked_fill(~TOKENS[..., None], math.nan)
    objective, value = valued([student] * 2, [logits(6, 4, 1).float().view(2, 3, 4)] * 2, loss="mse")
    value.backward()
    gradients = [parameter.grad for parameter in objective.parameters()]
    assert len(gradients) == 4
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


SETTINGS: dict[str, dict[str, Any]] = {
    "emd": {"layers": "emd", "hidden": 8},
    "last": {"layers": "last", "embeddings": False, "alpha": 1.0},
    "transformer": {"critic": "transformer", "hidden": 8, "score_limit": 5.0, "alpha": 0.0},
    "mse": {"loss": "mse", "logits": "mse"},
    "pkd": {"loss": "pkd", "logits": "ce", "layers": "emd"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_trainer_with_other_settings(name: str, tmp_path: Path) -> None:
    """Three steps give finite terms under their names, and every learned part a gradient."""
    case = testing.Case("mi_alpha", TASK, settings=SETTINGS[name])
    keeper = testing._Keeper()
    made, _ = testing.trainer(case, tmp_path, callbacks=(keeper,), max_steps=3)
    made.train()
    config = case.objective().config
    logged = made.state.log_history[-2]
    terms = {f"distill/mi_alpha.{config.loss}"} | (set() if config.logits is None else {"distill/mi_alpha.logits"})
    assert terms == {key for key in logged if key.startswith("distill/mi_alpha")}
    learned = {key: gradient for key, gradient in keeper.gradients[0].items() if key.startswith("distiller.")}
    assert learned
    assert all(gradient.isfinite().all() for gradient in learned.values())
    if config.layers != "emd":  # whose plan leaves pairs out
        assert all(gradient.abs().max() > 0 for gradient in learned.values())


@pytest.mark.parametrize(
    ("function", "name"), [("hidden_loss", "mse"), ("logits_loss", "pkd"), ("transport", "emd"), ("mi_alpha", "last")]
)
def test_a_step_reaches_what_the_settings_name(function: str, name: str, tmp_path: Path) -> None:
    case = testing.Case("mi_alpha", TASK, settings=SETTINGS[name])
    with mock.patch.object(module, function, side_effect=KeyError(function)), pytest.raises(KeyError, match=function):
        testing.trainer(case, tmp_path)[0].train()


def test_the_bound_rises_with_training(tmp_path: Path) -> None:
    made, _ = testing.trainer(
        testing.Case("mi_alpha", TASK), tmp_path, data=testing.rows(TASK, 16), max_steps=20,
        per_device_train_batch_size=16, learning_rate=2e-3,
    )  # fmt: skip
    made.train()
    found = [entry["distill/mi_alpha.mi"] for entry in made.state.log_history if "distill/mi_alpha.mi" in entry]
    assert found[-1] < found[0] - 1


@pytest.mark.parametrize("kind", [BertForQuestionAnswering, BertForSequenceClassification])
def test_answers_and_real_values_are_learned_too(kind: Any, tmp_path: Path) -> None:
    outputs = 2 if kind is BertForQuestionAnswering else 1
    student, teacher = (kind(tiny_bert_config(seed=seed, num_labels=outputs)) for seed in (0, 1))
    rows = [{"input_ids": [2, 5 + place, 6, 3], "attention_mask": [1] * 4} for place in range(4)]
    made = Trainer(
        model=student,
        args=arguments(tmp_path),
        train_dataset=Dataset.from_list(rows),
        callbacks=[DistillCallback(teacher, MIAlpha(logits="mse", hidden=8))],
    )
    made.train()
    found = made.state.log_history[0]
    assert found["distill/mi_alpha.mi"] != 0
    assert found["distill/mi_alpha.logits"] > 0


def test_one_row_a_batch_leaves_the_task_alone(tmp_path: Path) -> None:
    made, _ = testing.trainer(testing.Case("mi_alpha", TASK), tmp_path, per_device_train_batch_size=1, max_steps=2)
    made.train()
    assert [entry["distill/mi_alpha.mi"] for entry in made.state.log_history if "distill/mi_alpha.mi" in entry] == [
        0.0,
        0.0,
    ]
    assert made.state.log_history[0]["task_loss"] > 0


def test_the_published_total_has_no_labels() -> None:
    assert MIAlpha().task_weight is None
    assert MIAlpha(logits="mse").task_weight == 0.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alpha": 1.5}, "alpha must lie in 0 … 1, got 1.5"),
        ({"layers": "first"}, "layers must be one of"),
        ({"loss": "kl"}, "loss must be one of"),
        ({"logits": "kl"}, "logits must be one of"),
        ({"critic": "cnn"}, "critic must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"hidden": 6, "critic": "transformer"}, "multiple of 4"),
        ({"out": 0}, "at least 1"),
        ({"score_limit": 0.0}, "score_limit must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        MIAlphaConfig(**settings)


def test_models_that_cannot_be_are_refused() -> None:
    with pytest.raises(MismatchError, match="num_hidden_layers"):
        MIAlpha().needs(sizes(0), sizes(2))
    with pytest.raises(MismatchError, match="Take logits='mse'"):
        MIAlpha(logits="ce").needs(replace(sizes(2), kind="none"), sizes(2))


# ---------------------------------------------------------------------- AutoDistiller


def run(loss: str = "mi", alpha: Any = 0.9, layers: str = "skip", kd: str = "mse", **more: Any) -> dict[str, Any]:
    settings = {"intermediate_loss_type": loss, "alpha": alpha, "intermediate_strategy": layers, "kd_loss_type": kd}
    return settings | more


def some_runs() -> list[dict[str, Any]]:
    """Two tasks on which mi with 0.5 and the mean square of logits do best, at ratios of different size."""
    found = []
    for task, size, level in (("a", 1000, 0.5), ("b", 100_000, 2.0)):
        for loss in ("mi", "mse", "pkd"):
            for alpha in (0.1, 0.5):
                for kd in ("ce", "mse"):
                    ratio = level * (1 + 0.3 * (loss == "mi") * (1 + (alpha == 0.5)) + 0.1 * (kd == "mse"))
                    found.append(run(loss, alpha, kd=kd, task=task, ratio=ratio, **{"#example": size}))
    return found


def test_ranks_by_hand() -> None:
    found = ranks([1.0, 3.0, 20.0, 2.0, 20.0], ["a", "a", "b", "a", "b"])
    assert found.tolist() == pytest.approx([1 / 6, 5 / 6, 1 / 2, 1 / 2, 1 / 2])


def test_what_is_read_of_a_run() -> None:
    found = features(run(alpha="0.90", mixup=False, **{"#example": "1000", "score": 0.3, "task": "a"}))
    assert found == {
        "intermediate_loss_type": "mi", "alpha": "0.9", "intermediate_strategy": "skip", "kd_loss_type": "mse",
        "mixup": "false", "size": 3.0,
    }  # fmt: skip
    assert "alpha" not in features(run("cos"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_runs_are_read_from_a_table(tmp_path: Path) -> None:
    rows = some_runs()
    found = read_runs(write(tmp_path / "runs.csv", rows))
    assert [features(row) for row in found] == [features(row) for row in rows]
    with pytest.raises(ForeignFileError, match=r"no columns \['task'\]"):
        read_runs(write(tmp_path / "untold.csv", [{k: v for k, v in row.items() if k != "task"} for row in rows]))
    with pytest.raises(ForeignFileError, match="line 3: the ratio 'nan' is no number"):
        read_runs(write(tmp_path / "lost.csv", [rows[0], rows[1] | {"ratio": "nan"}]))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ForeignFileError, match="has no rows"):
        read_runs(tmp_path / "empty.csv")


def test_a_recommender_learns_from_something() -> None:
    with pytest.raises(ConfigurationError, match="got 1"):
        recommender([run(task="a", ratio=1.0)])


def test_published_runs_tell_what_does_well_on_a_task_that_they_are_not_of() -> None:
    runs = published()
    own, others = ([row for row in runs if (row["task"] == "qnli") == wanted] for wanted in (True, False))

    expected, truth = recommender(others)(own), ranks([row["ratio"] for row in own], ["qnli"] * len(own))

    best = np.unique(expected)[-5:]
    assert np.mean([truth[expected == value].mean() for value in best]) > 0.7
    assert spearmanr(expected, truth).statistic > 0.4


def test_a_search_ranks_settings_and_builds_the_student(tmp_path: Path) -> None:
    teacher = testing.models(TASK)[1]
    batches = [testing.collate(testing.rows(TASK))]
    space = {"loss": ("mi", "mse"), "alpha": (0.1, 0.5), "layers": ("skip",), "logits": ("ce", "mse")}

    found = auto_distiller(teacher, data=batches, budget=LARGE, runs=some_runs(), space=space)

    assert found.configs[0] == {"loss": "mi", "alpha": 0.5, "layers": "skip", "logits": "mse"}
    assert len(found.configs) == 6  # α varies under mi alone
    assert found.configs[-1]["loss"] == "mse"
    student = found.build(0)
    assert student.config.num_hidden_layers == teacher.config.num_hidden_layers - 1
    again = auto_distiller(
        teacher, data=batches, budget=LARGE, runs=write(tmp_path / "runs.csv", some_runs()), space=space
    )
    assert (again.configs, again.scores) == (found.configs, found.scores)
    DistillCallback(teacher, MIAlpha(**found.configs[0]))


def test_what_holds_for_all_candidates_is_read_like_a_column_of_the_runs() -> None:
    """Model A does best with the mean square, B with mi."""
    runs = [
        run(loss, task="a", ratio=0.5 + 0.4 * ((loss == "mi") == (model == "B")), Model=model, **{"#example": 100})
        for loss in ("mi", "mse")
        for model in ("A", "B")
        for _ in range(4)
    ]
    space = {"loss": ("mi", "mse"), "alpha": (0.9,), "layers": ("skip",), "logits": ("mse",)}
    settings: dict[str, Any] = {"data": [testing.collate(testing.rows(TASK))], "budget": LARGE, "space": space}
    teacher = testing.models(TASK)[1]
    for model, best in (("A", "mse"), ("B", "mi")):
        found = auto_distiller(teacher, runs=runs, like={"Model": model}, **settings)
        assert found.configs[0]["loss"] == best


def test_a_budget_bounds_student_and_ranking() -> None:
    teacher = testing.models(TASK)[1]
    total, block = (sum(p.numel() for p in m.parameters()) for m in (teacher, teacher.bert.encoder.layer[0]))  # type: ignore[union-attr, index]
    settings: dict[str, Any] = {"data": [testing.collate(testing.rows(TASK))], "runs": some_runs()}
    found = auto_distiller(teacher, budget=Budget(parameters=total - 2 * block, evaluations=3), **settings)
    assert found.build(0).config.num_hidden_layers == 1
    assert len(found.configs) == 3
    with pytest.raises(ConfigurationError, match="no student of less than 3 layers"):
        auto_distiller(teacher, budget=Budget(parameters=10), **settings)
    with pytest.raises(ConfigurationError, match="a space gives values for each of"):
        auto_distiller(teacher, budget=LARGE, space={"alpha": (0.1,)}, **settings)


def test_what_is_read_of_runs_is_what_is_learned_from() -> None:
    with (
        mock.patch.object(runs_module, "features", side_effect=KeyError("read")),
        pytest.raises(KeyError, match="read"),
    ):
        recommender(some_runs())
    with pytest.raises(KeyError, match="ranked"):
        recommender(some_runs(), target=mock.Mock(side_effect=KeyError("ranked")))
