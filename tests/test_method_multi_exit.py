"""Exits: weights, where gradients go, and cuts that give what the exits gave."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.encoders import multi_exit as module
from hf_compress_plugins.encoders.multi_exit import (
    MultiExit,
    contrast,
    cut,
    ending_in,
    exit_layers,
    exit_loss,
    exit_weight,
    in_context,
    joined,
    pooled,
)
from stub import GradientKeeper
from transformers import AutoModelForSequenceClassification, Trainer

from hf_compress import DistillCallback, export_onnx, shrink, testing
from hf_compress.errors import ConfigurationError, MismatchError

TASK = "text-classification"


def test_weights_by_hand() -> None:
    """Four layers, exits after 2 and 4, losses 0.8 and 0.5: 0.9."""
    assert exit_weight(2, 4) * 0.8 + exit_weight(4, 4) * 0.5 == pytest.approx(0.9)


def test_the_exits_of_the_published_depth() -> None:
    assert exit_layers(None, 36) == (4, 9, 18, 27)
    assert exit_layers((1, 2, 3, 6), 6) == (1, 2, 3)
    assert exit_layers(None, 2) == (1,)


@pytest.mark.parametrize(("exits", "depth"), [((3,), 2), ((2,), 2), (None, 1)])
def test_exits_that_are_none_are_refused(exits: tuple[int, ...] | None, depth: int) -> None:
    with pytest.raises(MismatchError, match="multi_exit"):
        exit_layers(exits, depth)


@pytest.mark.parametrize("exits", [(), (2, 1), (1, 1), (0, 1)])
def test_exits_out_of_order_are_refused(exits: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="rising order"):
        MultiExit(exits=exits)


def test_an_unlabelled_position_counts_nothing() -> None:
    values = exit_loss(torch.zeros(2, 4), torch.tensor([1, -100]))
    assert values.tolist() == pytest.approx([torch.tensor(4.0).log().item(), 0.0])


def run(folder: Path, method: MultiExit, task: str = TASK, **settings: Any) -> Trainer:
    plain, _ = testing.trainer(testing.Case("multi_exit", task), folder)
    keeper = GradientKeeper()
    made = Trainer(
        model=testing.models(task)[1],
        args=plain.args,
        train_dataset=plain.train_dataset,
        data_collator=testing.collate,
        callbacks=[DistillCallback(method=method, **settings), keeper],
    )
    made.train()
    made.kept = keeper.gradients[0]
    return made


def test_layers_above_the_deepest_exit_get_no_gradient(tmp_path: Path) -> None:
    made = run(tmp_path, MultiExit(exits=(1, 2)), task_weight=0.0)
    layers = [name for name in made.kept if ".layer.2." in name]
    assert not layers or not any(made.kept[name].any() for name in layers)
    for layer in (0, 1):
        assert made.kept[f"bert.encoder.layer.{layer}.intermediate.dense.weight"].any()
    assert made.kept["classifier.weight"].any()


def test_lower_layers_learn_from_every_exit(tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    one, two, both = (
        run(tmp_path, MultiExit(exits=exits), task_weight=0.0).kept[name] for exits in ((1,), (2,), (1, 2))
    )
    torch.testing.assert_close(one + two, both, rtol=1e-4, atol=1e-6)


def test_the_total_is_the_task_s_loss_and_the_weighed_exits(tmp_path: Path) -> None:
    (log,) = [entry for entry in run(tmp_path, MultiExit(exits=(1, 2))).state.log_history if "loss" in entry]
    exits = log["distill/multi_exit.exit_1"] + log["distill/multi_exit.exit_2"]
    assert log["loss"] == pytest.approx(log["task_loss"] + exits, rel=1e-5)


@pytest.mark.parametrize("task", ["text-classification", "fill-mask", "text-generation"])
def test_a_cut_gives_what_its_exit_gave(task: str) -> None:
    model = testing.models(task)[1].eval()
    batch: dict[str, Any] = testing.collate(testing.rows(task))
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        states = model(**given, output_hidden_states=True).hidden_states
        for layer in (1, 2):
            with ending_in(model, 3, states[layer]):
                exit_logits = model(**given).logits
            cut = shrink(model, layers=list(range(layer))).eval()
            torch.testing.assert_close(cut(**given).logits, exit_logits, rtol=1e-5, atol=1e-6)
        assert len([name for name in model.state_dict() if ".2." in name])


def test_a_cut_is_saved_and_exported_alone(tmp_path: Path) -> None:
    made = run(tmp_path, MultiExit(exits=(1, 2)))
    cut = shrink(made.model, layers=[0])
    cut.save_pretrained(tmp_path / "cut")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not report["missing_keys"]
    assert loaded.config.num_hidden_layers == 1
    export_onnx(tmp_path / "cut")
    assert (tmp_path / "cut/onnx/model.onnx").exists()


def test_the_callback_is_complete_without_a_teacher_and_says_what_lacks_labels(tmp_path: Path) -> None:
    plain, _ = testing.trainer(testing.Case("multi_exit", TASK), tmp_path)
    rows = [{"input_ids": row["input_ids"]} for row in testing.rows(TASK)]
    made = Trainer(
        model=testing.models(TASK)[0],
        args=plain.args,
        train_dataset=rows,
        data_collator=testing.collate,
        callbacks=[DistillCallback(method="multi_exit")],
    )
    with pytest.raises(ConfigurationError, match="the batch has none"):
        made.train()


HEAD = "bert.pooler.dense"


def trained(folder: Path, method: MultiExit, **settings: Any) -> tuple[Trainer, MultiExit]:
    """A run of three steps on the model of three layers, and its objective."""
    plain, _ = testing.trainer(testing.Case("multi_exit", TASK), folder, max_steps=3)
    callback, keeper = DistillCallback(method=method, **settings), GradientKeeper()
    made = Trainer(
        model=testing.models(TASK)[1],
        args=plain.args,
        train_dataset=plain.train_dataset,
        data_collator=testing.collate,
        callbacks=[callback, keeper],
    )
    made.train()
    made.kept = keeper.gradients[0]
    (objective,) = callback.run.distiller.objectives
    assert isinstance(objective, MultiExit)
    return made, objective


def test_an_exit_s_vector_is_concatenated_to_the_head_s_input(tmp_path: Path) -> None:
    """A linear layer over [h, e] is what the head gives with W e added; the cut carries it and is a stock model."""
    made, objective = trained(tmp_path, MultiExit(exits=(1, 2), conditional_size=4, head=HEAD))
    assert objective.embedding.weight.shape == (2, 4)
    model, batch = made.model.eval(), testing.collate(testing.rows(TASK))
    given = {name: value for name, value in batch.items() if name != "labels"}
    for place, layer in enumerate((1, 2)):
        assert made.kept["distiller.0_multi_exit.embedding.weight"][place].any()
        with torch.no_grad():
            states = model(**given, output_hidden_states=True).hidden_states[layer][:, 0]
            dense, vector = model.bert.pooler.dense, objective.embedding.weight[place]
            weight = torch.cat([dense.weight, objective.conditional.weight], 1)
            first = torch.cat([states, vector.expand(len(states), -1)], 1) @ weight.T + dense.bias
            expected = model.classifier(first.tanh())
            small = cut(model, layer, objective).eval()
            torch.testing.assert_close(small(**given).logits, expected, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(cut(model, layer).eval()(**given).logits, expected, rtol=1e-3)
            assert type(small) is type(model)


def test_what_trains_is_the_exit_with_its_vector(tmp_path: Path) -> None:
    """The logged term of the first step is the loss of the cut that would be made before it."""
    method = MultiExit(exits=(1,), conditional_size=4, head=HEAD)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, _ = testing.trainer(testing.Case("multi_exit", TASK), tmp_path, learning_rate=0.0)
        callback = DistillCallback(method=method)
        made = Trainer(
            model=testing.models(TASK)[1], args=plain.args, train_dataset=plain.train_dataset,
            data_collator=testing.collate, callbacks=[callback],
        )  # fmt: skip
    made.train()
    (objective,) = callback.run.distiller.objectives
    assert isinstance(objective, MultiExit)
    small = cut(made.model, 1, objective).eval()
    with torch.no_grad():
        loss = small(**testing.collate(testing.rows(TASK))).loss.item()
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    assert log["distill/multi_exit.exit_1"] == pytest.approx(loss / 3, rel=1e-5)


def test_a_head_that_cannot_carry_an_exit_s_vector_is_refused(tmp_path: Path) -> None:
    task = "text-generation"
    with pytest.raises(MismatchError, match="linear layer with a bias"):
        run(tmp_path, MultiExit(exits=(1,), conditional_size=4, head="lm_head"), task)
    _, objective = trained(tmp_path, MultiExit(exits=(1,), conditional_size=4, head=HEAD))
    with pytest.raises(MismatchError, match="asked for 2"):
        cut(testing.models(TASK)[1], 2, objective)


def test_pairs_by_hand() -> None:
    """Queries and documents the three unit vectors, s = 10: -ln(e^10 / (e^10 + 2)) each way."""
    value = contrast(torch.eye(3).double(), 2 * torch.eye(3).double(), scale=10.0)
    assert value.tolist() == pytest.approx([9.0796e-5] * 3, rel=1e-4)
    query, document = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = contrast(query, document, scale=1.0)
    ways = [(math.log(2), math.log(1 + math.exp(-1))), (math.log(2), math.log(1 + math.e))]
    assert found.tolist() == pytest.approx([sum(pair) / 2 for pair in ways])


def test_one_vector_of_the_real_tokens() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    real = torch.tensor([[True, True, False], [False, True, True]])
    assert pooled(states, real, pooling="first").tolist() == [[0, 1], [8, 9]]
    assert pooled(states, real, pooling="last").tolist() == [[2, 3], [10, 11]]
    assert pooled(states, real, pooling="mean").tolist() == [[1, 2], [9, 10]]


def pairs(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Each row's document is the row from its second token on."""
    documents = testing.collate([{"input_ids": row["input_ids"][1:]} for row in batch])
    own = testing.collate([{"input_ids": row["input_ids"]} for row in batch])
    return own | {f"pair_{name}": value for name, value in documents.items()}


def contrasted(folder: Path, rows: Any = pairs, **settings: Any) -> tuple[Trainer, MultiExit]:
    """A run of a body without a head."""
    plain, _ = testing.trainer(testing.Case("multi_exit", TASK), folder)
    method = MultiExit(exits=(1, 2), loss="contrastive", **settings)
    callback, keeper = DistillCallback(method=method), GradientKeeper()
    made = Trainer(
        model=testing.models("feature-extraction")[1],
        args=plain.args,
        train_dataset=testing.rows("feature-extraction"),
        data_collator=rows,
        callbacks=[callback, keeper],
    )
    made.args.remove_unused_columns = False
    made.train()
    made.kept = keeper.gradients[0]
    (objective,) = callback.run.distiller.objectives
    assert isinstance(objective, MultiExit)
    return made, objective


def test_every_exit_learns_pairs_through_its_own_projection(tmp_path: Path) -> None:
    made, objective = contrasted(tmp_path)
    assert sorted(objective.projections) == ["1", "2", "3"]
    for layer in "123":
        assert made.kept[f"distiller.0_multi_exit.projections.{layer}.weight"].any()
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    terms = [log[f"distill/multi_exit.exit_{layer}"] for layer in (1, 2, 3)]
    assert log["loss"] == pytest.approx(sum(terms), rel=1e-5)
    with pytest.raises(MismatchError, match="pair_input_ids"):
        contrasted(tmp_path, testing.collate)


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_the_terms_are_those_of_the_cut_bodies(pooling: Any, tmp_path: Path) -> None:
    plain, _ = testing.trainer(testing.Case("multi_exit", TASK), tmp_path, learning_rate=0.0)
    with mock.patch.object(testing, "trainer", return_value=(plain, None)):
        made, objective = contrasted(tmp_path, pooling=pooling, scale=5.0)
    batch = pairs(testing.rows("feature-extraction"))
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    for layer in (1, 2, 3):
        body, sides = cut(made.model, layer).eval(), []
        for prefix in ("", "pair_"):
            ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
            with torch.no_grad():
                states = body(input_ids=ids, attention_mask=mask).last_hidden_state
                sides.append(objective.projections[str(layer)](pooled(states, mask.bool(), pooling=pooling)))
        expected = layer / 3 * contrast(sides[0], sides[1], scale=5.0).mean().item()
        assert log[f"distill/multi_exit.exit_{layer}"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["contrast", "pooled"])
def test_each_function_of_pairs_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        contrasted(tmp_path)


TOKENIZER = SimpleNamespace(sep_token_id=99, cls_token_id=98)
TEXTS = [{"input_ids": [10 * group + place] * (2 + place), "group": group} for group in (1, 2, 3) for place in range(4)]


def test_texts_are_joined_to_the_window() -> None:
    assert joined([[1, 2], [3]], length=9, separator=0, start=7) == [7, 1, 2, 0, 3, 0]
    assert joined([[1, 2], [3]], length=4, separator=0, start=None) == [1, 2, 0, 3]


def test_half_of_the_windows_are_of_one_group() -> None:
    data, labels = in_context(TEXTS, tokenizer=TOKENIZER, length=16, seed=3), []
    for epoch in range(20):
        for place, text in enumerate(TEXTS):
            row = data.row(place, epoch=epoch)
            ids = row["input_ids"]
            assert len(ids) == len(row["attention_mask"]) == 16
            assert ids[: 2 + len(text["input_ids"])] == [98, *text["input_ids"], 99]
            groups = {token // 10 for token in ids[2 + len(text["input_ids"]) :] if token < 90}
            assert (groups == {text["group"]}) if row["labels"] else text["group"] not in groups
            labels.append(row["labels"])
    assert 0.4 < sum(labels) / len(labels) < 0.6


def test_windows_are_drawn_anew_in_each_epoch_and_by_seed() -> None:
    data, again = (in_context(TEXTS, tokenizer=TOKENIZER, length=16, seed=3) for _ in range(2))
    other = in_context(TEXTS, tokenizer=TOKENIZER, length=16, seed=4)
    rows = [[made.row(place, epoch=epoch) for place in range(12)] for made, epoch in ((data, 0), (again, 0))]
    assert rows[0] == rows[1]
    assert rows[0] != [data.row(place, epoch=1) for place in range(12)]
    assert rows[0] != [other.row(place, epoch=0) for place in range(12)]


def test_a_window_does_not_begin_with_its_text_twice() -> None:
    data = in_context(TEXTS, tokenizer=TOKENIZER, length=40)
    for epoch in range(10):
        ids = data.row(3, epoch=epoch)["input_ids"]
        assert ids[1] == 13
        assert ids[7] != 13


def test_windows_train_exits(tmp_path: Path) -> None:
    texts = [{"input_ids": [2 + place] * 3, "group": place % 2} for place in range(8)]
    data = in_context(texts, tokenizer=SimpleNamespace(sep_token_id=1, cls_token_id=None), length=12)
    plain, _ = testing.trainer(testing.Case("multi_exit", TASK), tmp_path)
    made = Trainer(
        model=testing.models(TASK)[1],
        args=plain.args,
        train_dataset=data,
        data_collator=testing.collate,
        callbacks=[data.callback(), DistillCallback(method="multi_exit")],
    )
    made.train()
    assert made.state.log_history[0]["distill/multi_exit.exit_1"] > 0
    with mock.patch.object(module, "joined", side_effect=KeyError), pytest.raises(KeyError):
        in_context(texts, tokenizer=TOKENIZER, length=12).row(0, epoch=0)


@pytest.mark.parametrize(("texts", "match"), [(TEXTS[:4], "two groups"), (TEXTS[:5], "of two texts")])
def test_groups_that_cannot_be_told_apart_are_refused(texts: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        in_context(texts, tokenizer=TOKENIZER, length=12)


def test_a_tokenizer_without_a_separator_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no separator"):
        in_context(TEXTS, tokenizer=SimpleNamespace(sep_token_id=None, cls_token_id=1), length=12)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "margin"},
        {"pooling": "all"},
        {"scale": 0.0},
        {"conditional_size": 4},
        {"head": "classifier"},
        {"conditional_size": 4, "head": "classifier", "loss": "contrastive"},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="multi_exit"):
        MultiExit(**settings)
