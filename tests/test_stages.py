"""Trainings that follow each other."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from hf_compress import registry, testing
from hf_compress.data import Augmented
from hf_compress.errors import ConfigurationError, ForeignFileError, UnknownNameError
from hf_compress.objective import Rows, Step
from hf_compress.stages import Surroundings, freeze, run_stages, stages_of

TASK = "text-classification"
ARGUMENTS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "use_cpu": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
}


class Seen(toys.Toy):
    """Notes for each micro-batch which teacher it was given and whether there were labels."""

    notes: list[tuple[float, bool]]

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None
        self.notes.append((float(rows.teacher_logits.flatten()[0]), rows.labels is not None))
        return super().per_position(rows, step)


class Rates(TrainerCallback):
    """Notes the learning rate of each step and stops where asked."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rates: list[float] = []
        self.stop_at = stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        self.rates.append(lr_scheduler.get_last_lr()[0])
        if len(self.rates) == self.stop_at:
            raise KeyboardInterrupt


def stage(**changes: Any) -> dict[str, Any]:
    return {"name": "one", "teacher": "large", "data": "rows", "methods": (Seen(),)} | changes


def around(rates: Rates | None = None, **models: PreTrainedModel) -> Surroundings:
    rows = testing.rows(TASK, 8)
    return Surroundings(
        models={"large": testing.models(TASK)[1]} | models,
        data={"rows": rows, "others": list(reversed(rows))},
        arguments=ARGUMENTS,
        data_collator=testing.collate,
        callbacks=[rates] if rates else [],
        progress=False,
    )


def run(folder: Path, *stages: Mapping[str, Any], surroundings: Surroundings | None = None) -> PreTrainedModel:
    Seen.notes = []
    return run_stages({"stages": stages}, testing.models(TASK)[0], folder, surroundings or around())


def test_each_stage_has_its_own_teacher_labels_part_and_schedule(tmp_path: Path) -> None:
    other = testing._model(TASK, width=96, layers=3, seed=7)
    rates = Rates()
    student = run(
        tmp_path,
        stage(labels=False, trainable="body"),
        stage(name="two", teacher="tuned", data="others", task_weight=1.0, arguments={"learning_rate": 5e-3}),
        surroundings=around(rates, tuned=other),
    )
    labelled = [there for _, there in Seen.notes]
    assert labelled == [False] * 4 + [True] * 4
    assert rates.rates[4] == pytest.approx(5e-3 * 3 / 4)
    assert rates.rates[0] == pytest.approx(1e-2 * 3 / 4)
    first = type(student).from_pretrained(tmp_path / "0-one")
    start = testing.models(TASK)[0]
    assert torch.equal(first.classifier.weight, start.classifier.weight)
    assert not torch.equal(first.bert.embeddings.word_embeddings.weight, start.bert.embeddings.word_embeddings.weight)
    assert not torch.equal(student.classifier.weight, start.classifier.weight)
    assert all(parameter.requires_grad for parameter in student.parameters())
    record = student.config.compression
    assert (record["data"]["name"], [before["data"]["name"] for before in record["before"]]) == ("others", ["rows"])


def test_finished_stages_are_not_repeated_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    stages = (stage(), stage(name="two"), stage(name="three"))
    whole = run(tmp_path / "whole", *stages)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *stages, surroundings=around(Rates(stop_at=7)))
    rates = Rates()
    again = run(tmp_path / "parts", *stages, surroundings=around(rates))
    assert len(rates.rates) == 2 + 4  # from the checkpoint at step 2 of the second stage
    assert testing.weights_hash(again) == testing.weights_hash(whole)
    assert len(again.config.compression["before"]) == 2
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"0-one", "1-two", "2-three"}


def test_a_stage_can_start_from_the_first_weights_and_use_what_an_earlier_one_made(tmp_path: Path) -> None:
    student = run(tmp_path, stage(keep_as="before"), stage(name="two", teacher="before", start="first"))
    alone = run(
        tmp_path / "alone",
        stage(teacher="before"),
        surroundings=around(before=type(student).from_pretrained(tmp_path / "0-one")),
    )
    assert testing.weights_hash(student) == testing.weights_hash(alone)


def test_a_stage_without_methods_trains_on_the_labels(tmp_path: Path) -> None:
    student = run(tmp_path, stage(methods=(), teacher=None))
    assert testing.weights_hash(student) != testing.weights_hash(testing.models(TASK)[0])
    assert not Seen.notes


def shouted(dataset: Any, *, tokenizer: str, seed: int, times: int = 1) -> Augmented:
    """Rows that say what they were made with; drawn anew in each epoch."""
    Shouted.given.append((tokenizer, seed, times))
    return Augmented(dataset, Shouted(), seed)


class Shouted:
    """Notes each draw, and leaves the row."""

    given: list[tuple[str, int, int]]
    draws: list[int]

    def __call__(self, row: Any, draw: torch.Generator) -> Any:
        self.draws.append(int(torch.randint(2**40, (), generator=draw)))
        return row


def pairs(dataset: Any) -> Any:
    """A collator that notes how many rows it was given."""

    def collate(rows: Any) -> dict[str, Tensor]:
        Shouted.draws.append(len(rows))
        return testing.collate(rows)

    return collate


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of these names, found as any other."""
    Shouted.given, Shouted.draws = [], []
    methods = {"shouted": shouted, "pairs": pairs, "nothing": None}
    found = registry.get

    def get(name: str) -> Any:
        made = SimpleNamespace(preparation=methods.get(name))
        return SimpleNamespace(load=lambda: made) if name in methods else found(name)

    monkeypatch.setattr(registry, "get", get)


@pytest.mark.usefixtures("prepared")
def test_a_stage_s_data_is_what_a_method_prepares(tmp_path: Path) -> None:
    around_ = replace(around(), processing_class=None, preparing={"tokenizer": "of the student"}, seed=5)
    stages = (
        stage(preparation={"name": "shouted", "times": 3}, arguments={"max_steps": 8}),
        stage(name="two", methods=(), teacher=None, preparation="pairs"),
    )
    run(tmp_path, *stages, surroundings=around_)
    assert Shouted.given == [("of the student", 5, 3)]
    assert len(set(Shouted.draws[:16])) == 16  # another draw in the second epoch
    assert Shouted.draws[-4:] == [2] * 4


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(
    ("preparation", "error", "told"),
    [
        ("nothing", ConfigurationError, "method 'nothing' prepares no data"),
        ("shuted", UnknownNameError, "no method 'shuted'"),
        ({"name": "shouted", "time": 2}, UnknownNameError, "setting of shouted's preparation 'time'.*'times'"),
    ],
)
def test_a_preparation_that_is_not_there_is_refused_before_training(
    preparation: Any, error: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=told):
        run(tmp_path, stage(name="zero"), stage(preparation=preparation))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"teacher": "lrge"}, UnknownNameError, "model of stage one"),
        ({"frozen": {"reference": "none"}}, UnknownNameError, "model of stage one"),
        ({"data": "row"}, UnknownNameError, "data of stage one"),
        ({"techer": "large"}, UnknownNameError, "techer"),
        ({"start": "last"}, ForeignFileError, "start"),
        ({"name": "a/b"}, ForeignFileError, "name"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    changes: dict[str, Any], error: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=told):
        run(tmp_path, stage(name="zero"), stage(**changes))
    assert not list(tmp_path.iterdir())


def test_stages_have_names_of_their_own() -> None:
    with pytest.raises(ConfigurationError, match="different names"):
        stages_of({"stages": (stage(), stage())})
    with pytest.raises(ConfigurationError, match="needs stages"):
        stages_of({})


def test_nothing_to_train_is_refused() -> None:
    model = testing.models(TASK)[0]
    freeze(model, r"^classifier")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    freeze(model, "all")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigurationError, match="leaves no parameter"):
        freeze(model, "nothing of that name")


class Learning(Seen):
    """Has a part that is learned with the student."""

    starts: list[Tensor]

    def build(self, student: Any, teacher: Any) -> None:
        self.scale = torch.nn.Parameter(torch.ones(()))

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        if step.global_step == 0 and step.micro == 0:
            self.starts.append(self.scale.detach().clone())
        return super().per_position(rows, step) * self.scale


def test_what_is_learned_beside_the_student_goes_on_in_the_next_stage(tmp_path: Path) -> None:
    Learning.starts = []
    stages = (stage(methods=(Learning(),)), stage(name="two", methods=(Learning(),)))
    run(tmp_path, *stages)
    assert Learning.starts[0] == 1
    assert Learning.starts[1] < 1
    shutil.rmtree(tmp_path / "1-two")
    carried, Learning.starts = Learning.starts[1], []
    run(tmp_path, *stages)
    assert torch.equal(Learning.starts[0], carried)
