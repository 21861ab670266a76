"""Exits: weights, where gradients go, and cuts that give what the exits gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_compress_plugins.encoders.multi_exit import MultiExit, ending_in, exit_layers, exit_loss, exit_weight
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
