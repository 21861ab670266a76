"""Data sets whose rows depend on index, seed and saved state alone: mixtures and augmented rows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import toys
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.data import Augmented, Mixture, check_in_order
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Step

DOMAINS = {"a": [f"a{i}" for i in range(7)], "b": [f"b{i}" for i in range(5)], "c": [f"c{i}" for i in range(3)]}
WORKERS = [
    pytest.param({}, id="0"),
    pytest.param({"dataloader_num_workers": 2}, id="2"),
    pytest.param({"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, id="2 persistent"),
]


def mixture(**settings: Any) -> Mixture:
    return Mixture(DOMAINS, **({"size": 40, "interval": 10, "lag": 4} | settings))


def decided(seed: int = 0, **settings: Any) -> Mixture:
    made = mixture(seed=seed, weights=[0.5, 0.25, 0.25], **settings)
    made.decide(1, [0.0, 0.5, 0.5])
    made.decide(2, [0.2, 0.8, 0.0])
    made.decide(3, [1 / 3, 1 / 3, 1 / 3])
    return made


# ---------------------------------------------------------------------- a mixture


def test_one_domain_alone_is_read_in_its_order_and_again_from_the_beginning() -> None:
    made = mixture(size=9, weights=[0.0, 1.0, 0.0])
    assert list(made) == ["b0", "b1", "b2", "b3", "b4", "b0", "b1", "b2", "b3"]


def test_weights_take_force_lag_rows_after_their_interval_begins() -> None:
    made = mixture(weights=[1.0, 0.0, 0.0])
    for interval, weights in enumerate([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], 1):
        made.decide(interval, weights)
    assert "".join(row[0] for row in made) == "a" * 14 + "b" * 10 + "c" * 10 + "a" * 6
    assert [made.interval_of(index) for index in (0, 13, 14, 23, 24, 39)] == [0, 0, 1, 1, 2, 3]
    assert made[34] == "a0"  # 14 rows of seven are two rounds


def test_each_domain_s_rows_follow_each_other_over_all_intervals() -> None:
    read = list(decided())
    for name, rows in DOMAINS.items():
        own = [row for row in read if row[0] == name]
        assert own == [rows[place % len(rows)] for place in range(len(own))]
    assert not any(row[0] == "a" for row in read[14:24])
    assert not any(row[0] == "c" for row in read[24:34])


def test_the_draws_are_these() -> None:
    """A saved run must read the same rows with a later version: the draws are a contract."""
    assert "".join(row[0] for row in decided()) == "baacaaaccbcaaabbbcbbcbcbbbbbbbbbbbbcbcbc"
    assert "".join(row[0] for row in decided(seed=1)) != "".join(row[0] for row in decided())


def test_a_domain_of_weight_0_is_not_even_drawn_by_a_zero() -> None:
    with mock.patch("torch.rand", lambda length, **settings: torch.zeros(length, dtype=torch.float64)):
        assert mixture(weights=[0.0, 1.0, 0.0])[0] == "b0"


def test_the_shares_are_the_weights() -> None:
    made = mixture(size=20_000, interval=20_000, lag=0, weights=[0.6, 0.3, 0.1])
    shares = Counter(row[0] for row in made)
    for name, weight in zip("abc", [0.6, 0.3, 0.1], strict=True):
        assert shares[name] / 20_000 == pytest.approx(weight, abs=4 * math.sqrt(weight * (1 - weight) / 20_000))


def test_a_row_depends_on_the_history_alone_in_whatever_order_it_is_read() -> None:
    whole = list(decided())
    backwards = decided()
    assert [backwards[index] for index in reversed(range(40))] == whole[::-1]
    fresh = mixture(weights=[0.0, 0.0, 1.0])
    assert fresh[0] == "c0"
    fresh.restore(decided().history)
    assert list(fresh) == whole


def test_the_last_row_of_a_long_run_is_read_at_once() -> None:
    """Thousands of intervals lie before it, and none of them was read by this process."""
    made = mixture(size=20_000, interval=4, lag=0)
    made.restore(made.history[:1].expand_as(made.history))
    last = made[19_999]
    assert list(made)[-1] == last


def test_workers_see_decisions_and_restored_weights() -> None:
    """The same persistent workers read before a decision, after it, and after other weights were restored."""
    made = mixture(size=24, weights=[1.0, 0.0, 0.0])
    loader = DataLoader(made, batch_size=2, num_workers=2, persistent_workers=True, prefetch_factor=1)
    read: list[str] = []
    for batch in loader:
        read += batch
        if len(read) == 10:  # the workers are two batches ahead, which is the lag
            made.decide(1, [0.0, 1.0, 0.0])
    assert "".join(row[0] for row in read) == "a" * 14 + "b" * 10

    other = made.history.clone()
    other[0] = torch.tensor([0.0, 1.0, 0.0])
    made.restore(other)
    again = list(itertools.chain.from_iterable(loader))
    assert again == list(made) == [f"b{place % 5}" for place in range(24)]


class Mover(toys.Toy):
    """Moves the weights after every step, by the step's loss."""

    def after_step(self, step: Step, means: Mapping[str, Tensor]) -> None:
        assert isinstance(step.dataset, Mixture)
        (loss,) = means.values()
        share = float(loss.double().sigmoid())
        step.dataset.decide(step.global_step + 1, [share, 1 - share])


@pytest.mark.parametrize("workers", WORKERS)
def test_a_resumed_run_reads_the_rows_of_an_uninterrupted_one(workers: dict[str, Any], tmp_path: Path) -> None:
    """Two rows a step, weights that move at each; the second half is made by another Trainer with another Mixture."""

    def run(folder: Path, *callbacks: TrainerCallback) -> tuple[Trainer, list[Tensor]]:
        parts = {name: testing.rows("text-generation", 9, seed) for seed, name in enumerate("ab")}
        ahead = 2 * (1 + 2 * workers.get("dataloader_num_workers", 0))
        _, teacher = testing.models("text-generation")
        return plain_trainer(
            folder,
            Mixture(parts, size=28, interval=2, lag=ahead),
            DistillCallback(teacher, Mover()),
            *callbacks,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            save_strategy="steps",
            save_steps=7,
            **workers,
        )

    whole, read = run(tmp_path / "whole")
    whole.train()
    run(tmp_path / "parts", _Stop(7))[0].train()
    second, rest = run(tmp_path / "parts")
    second.train(resume_from_checkpoint=True)

    history = whole.train_dataset.history
    assert len(history.unique(dim=0)) == len(history) >= 9
    torch.testing.assert_close(second.train_dataset.history, history, rtol=0, atol=0)
    assert same(
        read, [testing.collate([whole.train_dataset[i + k] for k in (0, 1)])["input_ids"] for i in range(0, 28, 2)]
    )
    assert same(rest, read[7:])
    assert testing.weights_hash(second.model) == testing.weights_hash(whole.model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size ≥ 1"),
        ({"interval": 0}, "interval ≥ 1"),
        ({"lag": -1}, "lag ≥ 0"),
        ({"weights": [0.5, 0.5]}, "sum to 1, got"),
        ({"weights": [1.5, -0.5, 0.0]}, "≥ 0"),
        ({"weights": [0.5, 0.5, 0.5]}, "sum to 1"),
        ({"weights": [math.nan, 0.5, 0.5]}, "nan"),
    ],
)
def test_a_mixture_that_is_none_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        mixture(**settings)


def test_empty_domains_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\['b'\] have no rows"):
        Mixture({"a": [1], "b": []}, size=1, interval=1, lag=0)
    with pytest.raises(ConfigurationError, match="needs domains"):
        Mixture({}, size=1, interval=1, lag=0)


def test_decisions_are_final_and_those_after_the_end_are_ignored() -> None:
    made = mixture()
    made.decide(1, [1.0, 0.0, 0.0])
    made.decide(1, torch.tensor([1.0, 0.0, 0.0]))
    made.decide(4, [1.0, 0.0, 0.0])
    with pytest.raises(ConfigurationError, match="interval 1 has weights already"):
        made.decide(1, [0.0, 1.0, 0.0])
    with pytest.raises(ConfigurationError, match="count from 0, got -1"):
        made.decide(-1, [1.0, 0.0, 0.0])
    with pytest.raises(ConfigurationError, match=r"\(4, 3\) does not fit one of \(3, 3\)"):
        mixture(size=34).restore(made.history)


def test_a_row_that_is_read_too_early_says_what_to_do() -> None:
    made = mixture()
    assert made[13]
    with pytest.raises(ConfigurationError, match=r"interval 1 is read before its weights are decided.*lag of at least"):
        made[14]
    with pytest.raises(IndexError):
        made[40]
    with pytest.raises(IndexError):
        made[-1]


def test_a_mixture_is_read_in_order_only() -> None:
    for settings, resumed, says in (
        ({"train_sampling_strategy": "random"}, False, 'train_sampling_strategy="sequential"'),
        ({"train_sampling_strategy": "sequential", "ignore_data_skip": True}, True, "ignore_data_skip would read"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            check_in_order("a Mixture", TrainingArguments("x", **settings), resumed=resumed)
    skipping = TrainingArguments("x", train_sampling_strategy="sequential", ignore_data_skip=True)
    check_in_order("a Mixture", skipping, resumed=False)  # nothing is skipped yet


# ---------------------------------------------------------------------- augmented rows


def noisy(row: dict[str, Any], draw: torch.Generator) -> dict[str, Any]:
    """A row that has grown by some drawn tokens, and starts with its old length."""
    extra = torch.randint(1, testing.VOCAB, (int(torch.randint(4, (), generator=draw)),), generator=draw).tolist()
    ids = row["input_ids"] + extra
    return row | {"input_ids": ids, "labels": ids}


def augmented(count: int = 8, seed: int = 0) -> Augmented:
    return Augmented(testing.rows("text-generation", count), noisy, seed)


def test_a_row_is_a_function_of_seed_epoch_and_index() -> None:
    data = Augmented([0] * 3, lambda row, draw: int(torch.randint(2**40, (), generator=draw)), seed=5)
    other = Augmented([0] * 3, data.function, seed=6)
    drawn = {(seed, epoch, index): one.row(index, epoch=epoch) for seed, one in ((5, data), (6, other))
             for epoch in range(3) for index in range(3)}  # fmt: skip
    assert len(set(drawn.values())) == len(drawn) == 18
    for epoch in (2, 0, 1):
        data.epoch = epoch
        torch.manual_seed(epoch)
        assert [data[index] for index in (2, 0, 1)] == [drawn[5, epoch, index] for index in (2, 0, 1)]
        assert list(data) == [drawn[5, epoch, index] for index in range(3)]
    assert drawn[5, 0, 0] == 600907117146


def test_an_epoch_that_nobody_sets_is_an_error() -> None:
    data = augmented()
    with pytest.raises(ConfigurationError, match=r"callbacks=\[data.callback\(\)\]"):
        data[0]
    data.callback()
    assert data[0] == data.row(0, epoch=0)
    with pytest.raises(ConfigurationError, match="count from 0, got -1"):
        data.epoch = -1
    with pytest.raises(ConfigurationError, match="domains of a Mixture"):
        Augmented(mixture(), noisy)


def test_a_spawned_worker_reads_the_epoch_that_is_set_later() -> None:
    data = augmented(2)
    loader = DataLoader(
        data, batch_size=2, num_workers=1, persistent_workers=True, multiprocessing_context="spawn", collate_fn=list
    )
    for epoch in range(2):
        data.epoch = epoch
        assert list(loader) == [[data.row(0, epoch=epoch), data.row(1, epoch=epoch)]]


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


class _Evaluate(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = True


def seen(model: nn.Module) -> list[Tensor]:
    """The ids that the model is trained on, filled while it runs."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            found.append(kwargs["input_ids"].clone())

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return found


def plain_trainer(
    folder: Path, data: Any, *callbacks: TrainerCallback, **settings: Any
) -> tuple[Trainer, list[Tensor]]:
    """A Trainer without anything of ours but its data; two rows a step."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    model, _ = testing.models("text-generation")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=data,
        data_collator=testing.collate,
        callbacks=list(callbacks),
    )
    return trainer, seen(model)


def batches(data: Augmented, epochs: int) -> list[Tensor]:
    """What a sequential Trainer must read."""
    pairs = itertools.product(range(epochs), range(0, len(data), 2))
    return [testing.collate([data.row(i + k, epoch=epoch) for k in (0, 1)])["input_ids"] for epoch, i in pairs]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_trainer_reads_each_epoch_s_own_rows(workers: dict[str, Any], tmp_path: Path) -> None:
    data = augmented()
    trainer, read = plain_trainer(
        tmp_path, data, data.callback(), train_sampling_strategy="sequential", gradient_accumulation_steps=2, **workers
    )
    trainer.train()
    assert same(read, batches(data, 3))
    assert not same(read[:4], read[4:8])


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("sampling", ["random", "sequential"])
def test_a_run_resumed_in_mid_epoch_reads_the_same_rows(sampling: str, workers: dict[str, Any], tmp_path: Path) -> None:
    """Four steps an epoch; step 6 is the middle of the second epoch, where another process would go on."""
    settings = {"train_sampling_strategy": sampling, "save_strategy": "steps", "save_steps": 6}

    def run(folder: Path, *callbacks: TrainerCallback, **more: Any) -> tuple[Trainer, list[Tensor]]:
        data = augmented()
        return plain_trainer(folder, data, data.callback(), *callbacks, **(settings | more))

    whole, read = run(tmp_path / "whole")
    whole.train()
    run(tmp_path / "parts", _Stop(6), **workers)[0].train()
    resumed, rest = run(tmp_path / "parts", **workers)
    resumed.train(resume_from_checkpoint=True)

    assert same(rest, read[6:])
    assert testing.weights_hash(resumed.model) == testing.weights_hash(whole.model)


def test_evaluating_the_same_rows_in_mid_epoch_changes_none(tmp_path: Path) -> None:
    data = augmented()
    trainer, read = plain_trainer(tmp_path, data, data.callback(), _Evaluate(), train_sampling_strategy="sequential")
    trainer.eval_dataset = data
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 12
    assert same(read, batches(data, 3))


def test_without_the_callback_nothing_is_read(tmp_path: Path) -> None:
    trainer, read = plain_trainer(tmp_path, augmented())
    with pytest.raises(ConfigurationError, match="the epoch is not known"):
        trainer.train()
    assert not read


class Built(toys.Toy):
    """Asks for a dry forward."""

    def build(self, student: Any, teacher: Any) -> None:
        self.shapes = student


def test_a_distill_callback_tells_the_epoch_too(tmp_path: Path) -> None:
    """Resumed in mid-epoch as well; its dry forward reads a row before any epoch begins."""
    settings: dict[str, Any] = {"train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 6}

    def run(folder: Path, *callbacks: TrainerCallback) -> tuple[Trainer, list[Tensor], Augmented]:
        data = augmented()
        ours = DistillCallback(testing.models("text-generation")[1], Built())
        return *plain_trainer(folder, data, ours, *callbacks, **settings), data

    whole, read, data = run(tmp_path / "whole")
    whole.train()
    assert same([ids for ids in read if ids.shape[0] == 2], batches(data, 3))
    run(tmp_path / "parts", _Stop(6))[0].train()
    resumed, rest, _ = run(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert same(rest, read[6:])
    assert testing.weights_hash(resumed.model) == testing.weights_hash(whole.model)
