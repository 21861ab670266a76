"""FF-G2M: rows joined by edges, teacher logits by id, a perceptron that loads anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from alone import output_of
from hf_compress_plugins.graphs import ff_g2m as module
from hf_compress_plugins.graphs._modeling_node_mlp import NodeMLPConfig, NodeMLPForSequenceClassification
from hf_compress_plugins.graphs.ff_g2m import FFG2M, graph_batches, high_frequency, low_frequency
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_compress import DistillCallback
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.teachers.table import TableTeacher

NODES, CLASSES = 6, 3
EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 2, 2], [1, 0, 2, 1, 4, 3, 2, 0]])


def rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(NODES, 5, generator=draw)
    return [
        {"features": features[node], "node": node, "labels": node % CLASSES if node < 2 else None}
        for node in range(NODES)
    ]


def teacher() -> Tensor:
    return torch.randn(NODES, CLASSES, generator=torch.Generator().manual_seed(1))


def student() -> NodeMLPForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return NodeMLPForSequenceClassification(
            NodeMLPConfig(features=5, hidden_size=8, num_hidden_layers=1, dropout=0.0, num_labels=CLASSES)
        )


def run(folder: Path, method: Any = "ff_g2m", **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": NODES, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }  # fmt: skip
    made = Trainer(
        model=student(),
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=rows(),
        data_collator=graph_batches(rows(), edges=EDGES),
        callbacks=[DistillCallback(TableTeacher({"logits": teacher()}, column="node"), method)],
    )
    made.train()
    return made


def test_low_by_hand() -> None:
    """The student at u against the teacher at v: uniform against (3/4, 1/4)."""
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    value = low_frequency(torch.zeros(2, 2), logits, torch.tensor([[1], [0]]))
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_high_sees_differences_alone_and_no_sign() -> None:
    one, other = torch.randn(4, 3), torch.randn(4, 3)
    edges = torch.tensor([[0, 2], [1, 3]])
    value = high_frequency(one, other, edges, tau=1.5)
    torch.testing.assert_close(high_frequency(one + torch.tensor([5.0, -1.0, 0.0]), other, edges, tau=1.5), value)
    torch.testing.assert_close(high_frequency(one, other, edges.flip(0), tau=1.5), value)
    assert not high_frequency(one, -one, edges, tau=1.5).any()


def test_a_batch_has_the_edges_among_its_nodes() -> None:
    collate = graph_batches(rows(), edges=EDGES)
    batch = collate([rows()[node] for node in (2, 1, 5)])
    assert batch["node"].tolist() == [2, 1, 5]
    assert sorted(map(tuple, batch["edges"].T.tolist())) == [(0, 1), (1, 0)]
    assert batch["labels"].tolist() == [-100, 1, -100]
    assert collate([rows()[5]])["edges"].shape == (2, 0)
    with pytest.raises(MismatchError, match="node 9"):
        graph_batches(rows(), edges=torch.tensor([[0], [9]]))


def test_the_whole_graph_as_one_batch_gives_the_published_loss(tmp_path: Path) -> None:
    (log,) = [entry for entry in run(tmp_path).state.log_history if "loss" in entry]
    logits, known = student()(torch.stack([row["features"] for row in rows()])).logits, EDGES[:, EDGES[0] != EDGES[1]]
    loops = torch.cat([known, torch.arange(NODES).expand(2, -1)], 1)
    low = low_frequency(logits, teacher(), loops).mean().item()
    high = high_frequency(logits, teacher(), known, tau=1.5).mean().item()
    nll = torch.nn.functional.cross_entropy(logits[:2], torch.tensor([0, 1])).item()
    assert log["distill/ff_g2m.low"] == pytest.approx(0.6 * low, rel=1e-5)
    assert log["distill/ff_g2m.high"] == pytest.approx(0.6 * high, rel=1e-5)
    assert log["loss"] == pytest.approx(0.4 * nll + 0.6 * (low + high), rel=1e-5)


def test_a_batch_without_edges_teaches_by_its_nodes(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=NODES, per_device_train_batch_size=1)
    assert all(entry["distill/ff_g2m.high"] == 0 for entry in made.state.log_history if "loss" in entry)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path, **settings)
    again = Trainer(
        model=student(), args=whole.args, train_dataset=rows(), data_collator=graph_batches(rows(), edges=EDGES),
        callbacks=[DistillCallback(TableTeacher({"logits": teacher()}, column="node"), "ff_g2m")],
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_it_loads_where_this_package_cannot_be_imported(tmp_path: Path) -> None:
    run(tmp_path).save_model(str(tmp_path / "student"))
    call = "model(torch.ones(1, 5)).logits"
    assert output_of(tmp_path / "student", "AutoModelForSequenceClassification", call).shape == (1, CLASSES)


@pytest.mark.parametrize("settings", [{"tau": 0.0}, {"lamb": 1.5}, {"low": False, "high": False}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="ff_g2m"):
        FFG2M(**settings)


@pytest.mark.parametrize("name", ["low_frequency", "high_frequency", "with_loops"])
def test_each_function_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run(tmp_path)
