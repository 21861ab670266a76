"""A teacher that is read from disk: the same targets, whoever filled the folder and whenever."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from stub import GradientKeeper
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.divergences import kl
from hf_compress.errors import ConfigurationError, ForeignFileError, MismatchError
from hf_compress.teachers import cache as module
from hf_compress.teachers.cache import CacheTeacher
from hf_compress.teachers.sparse import completed

LANGUAGE = "text-generation"


def trainer(
    folder: Path,
    teacher: Any,
    task: str = LANGUAGE,
    method: Any = "kd",
    *callbacks: TrainerCallback,
    data: Any = None,
    held: Any = None,
    memory: str = "auto",
    **settings: Any,
) -> tuple[Trainer, GradientKeeper]:
    keeper = GradientKeeper()
    defaults: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.0,
    }  # fmt: skip
    ours = DistillCallback(teacher, method, memory=memory)
    made = Trainer(
        model=testing.models(task)[0],
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=data or testing.rows(task, 4),  # type: ignore[arg-type]  # map-style
        eval_dataset=held,
        data_collator=testing.collate,
        callbacks=[ours, keeper, *callbacks],
    )
    return made, keeper


def losses(made: Trainer, name: str = "distill_loss") -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


class Counted:
    """How many rows a model is given."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self.rows += len(next(value for value in kwargs.values() if isinstance(value, Tensor)))


# ---------------------------------------------------------------------- the likeliest tokens


def draws(shape: tuple[int, ...], seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([0.1, 3.0, 30.0]))
def test_the_divergence_is_that_over_the_known_tokens_and_one_bucket(seed: int, k: int, scale: float) -> None:
    teacher, student = draws((3, 9), seed, scale).log_softmax(-1), draws((3, 9), seed + 1, scale)
    known, ids = teacher.topk(k)
    whole = completed(ids, known, student)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    found = kl(whole, student.log_softmax(-1))
    assert (found >= -1e-9).all()
    q = student.log_softmax(-1).exp()
    rest = 1 - known.exp().sum(-1), q.scatter(1, ids, 0.0).sum(-1)
    bucket = torch.where(rest[0] > 1e-12, rest[0] * (rest[0].clamp(min=1e-300) / rest[1].clamp(min=1e-300)).log(), 0.0)
    expected = (known.exp() * (known - q.gather(1, ids).log())).sum(-1) + bucket
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_all_tokens_known_give_the_teacher_itself_and_missing_ones_are_passed_over() -> None:
    teacher, student = draws((2, 5), 0).log_softmax(-1), draws((2, 5), 1)
    known, ids = teacher.topk(5)
    torch.testing.assert_close(completed(ids, known, student), teacher)
    fewer = ids.clone()
    fewer[:, 3:] = -1
    torch.testing.assert_close(completed(fewer, known, student), completed(ids[:, :3], known[:, :3], student))


def test_no_gradient_reaches_the_student_through_its_tail() -> None:
    student = draws((2, 5), 1).requires_grad_()
    known, ids = draws((2, 5), 0).log_softmax(-1).topk(2)
    assert not completed(ids, known, student).requires_grad


# ---------------------------------------------------------------------- in a Trainer


@pytest.mark.parametrize(
    ("task", "method", "memory"),
    [(LANGUAGE, "kd", "dense"), (LANGUAGE, "kd", "chunked"), (LANGUAGE, ["kd", "features"], "dense"),
     (LANGUAGE, ["kd", "features"], "chunked"), ("fill-mask", "kd", "dense"), ("fill-mask", "kd", "chunked"),
     ("text-classification", ["kd", "features"], "dense"), ("token-classification", "kd", "dense"),
     ("image-classification", "kd", "dense")],
)  # fmt: skip
def test_it_teaches_what_the_model_teaches(task: str, method: Any, memory: str, tmp_path: Path) -> None:
    plain, expected = trainer(tmp_path / "a", testing.models(task)[1], task, method)
    plain.train()
    cached, found = trainer(
        tmp_path / "b",
        CacheTeacher(tmp_path / "c", testing.models(task)[1], dtype="float32"),
        task,
        method,
        memory=memory,
    )
    cached.train()
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=1e-5, msg=name)


def test_an_encoder_decoder_is_cached_by_its_labels_too(tmp_path: Path) -> None:
    def model(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=testing.VOCAB,
                                       dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)

    data = testing.rows(LANGUAGE, 4)
    for row in data:
        row["labels"] = row["labels"][:2] if len(row["labels"]) > 4 else row["labels"] * 2
    data[1]["input_ids"] = data[0]["input_ids"]  # told apart by the labels alone
    found = []
    for teacher in (model(1), CacheTeacher(tmp_path / "c", model(1), dtype="float32")):
        made = Trainer(
            model=model(0),
            args=TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[],
                                   use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True),
            train_dataset=data,  # type: ignore[arg-type]  # map-style
            data_collator=_uneven,
            callbacks=[DistillCallback(teacher, "kd")],
        )  # fmt: skip
        made.train()
        found.append(losses(made))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def _uneven(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = testing.collate([{"input_ids": row["input_ids"]} for row in batch])
    labels = testing.collate([{"input_ids": row["labels"], "labels": row["labels"]} for row in batch])["labels"]
    return ids | {"labels": labels}


def test_the_model_runs_once_for_each_example_and_never_again(tmp_path: Path) -> None:
    teacher = testing.models(LANGUAGE)[1]
    counted = Counted(teacher)
    made, _ = trainer(tmp_path / "a", CacheTeacher(tmp_path / "c", teacher, top_k=8), max_steps=6)
    made.train()
    assert counted.rows == 4
    again, _ = trainer(tmp_path / "b", CacheTeacher(tmp_path / "c"), max_steps=6)
    again.train()
    assert losses(again) == losses(made)
    assert counted.rows == 4


def test_top_k_is_near_the_whole_and_bytes_are_few(tmp_path: Path) -> None:
    whole, _ = trainer(tmp_path / "a", testing.models(LANGUAGE)[1])
    whole.train()
    for k, tolerance in ((testing.VOCAB, 2e-3), (20, 0.2)):
        folder = tmp_path / f"c{k}"
        made, _ = trainer(tmp_path / "b", CacheTeacher(folder, testing.models(LANGUAGE)[1], top_k=k))
        made.train()
        assert losses(made)[0] == pytest.approx(losses(whole)[0], rel=tolerance)
        assert losses(made)[0] <= losses(whole)[0] * 1.002  # joined outcomes never diverge more
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        positions = sum(testing.LENGTHS)
        assert positions * k * 6 <= size <= positions * k * 6 + 600


@pytest.mark.parametrize("top_k", [None, 3])
def test_one_real_value_a_row_is_read_back(top_k: int | None, tmp_path: Path) -> None:
    """A head without classes has no likeliest ones either: its value is kept whole."""
    teacher = testing.models("text-ranking")[1]
    batch = testing.collate(testing.rows("text-ranking", 3))
    made = CacheTeacher(tmp_path, teacher, top_k=top_k, dtype="float32")
    assert made.fill([batch]) == 3
    read = CacheTeacher(tmp_path)
    read.prepare(frozenset({"logits"}), torch.device("cpu"))
    _, logits = read.apart(batch)
    assert logits is not None
    expected = teacher(**batch).logits.detach()
    assert expected.shape == read(batch)["logits"].shape == (3, 1)
    torch.testing.assert_close(logits.rows(torch.arange(3), expected), expected)


def test_padding_and_order_do_not_change_an_example(tmp_path: Path) -> None:
    teacher = testing.models(LANGUAGE)[1]
    cache = CacheTeacher(tmp_path, teacher, dtype="float32")
    rows = testing.rows(LANGUAGE, 4)
    assert cache.fill([testing.collate(rows[:1], 20), testing.collate(rows[1:])]) == 4
    read = CacheTeacher(tmp_path)
    read.prepare(frozenset({"logits"}), torch.device("cpu"))
    for side in ("right", "left"):
        inputs = testing.collate([rows[2], rows[0]], 15)
        if side == "left":
            inputs = {name: values.flip(1) for name, values in inputs.items()}
            rows_ = [[*reversed(row["input_ids"])] for row in rows]
            inputs["input_ids"] = torch.tensor(
                [[0] * (15 - len(ids)) + [*reversed(ids)] for ids in (rows_[2], rows_[0])]
            )
        _, logits = read.apart(inputs)
        assert logits is not None
        real = inputs["attention_mask"].bool().flatten().nonzero().squeeze(1)
        expected = torch.cat([teacher(torch.tensor([rows[i]["input_ids"]])).logits[0] for i in (2, 0)]).detach()
        torch.testing.assert_close(logits.rows(real, expected), expected, rtol=1e-4, atol=1e-4)


def test_a_key_column_names_the_example(tmp_path: Path) -> None:
    data = [row | {"id": place} for place, row in enumerate(testing.rows(LANGUAGE, 4))]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return testing.collate(batch) | {"id": torch.tensor([row["id"] for row in batch])}

    made, _ = trainer(tmp_path / "a", CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1], key="id"), data=data)
    made.data_collator = collate
    made.train()
    names = [json.loads(path.read_text()) for path in (tmp_path / "c").glob("*.json") if path.name != "cache.json"]
    assert {key for manifest in names for key in manifest["examples"]} == {"0", "1", "2", "3"}
    lacking, _ = trainer(tmp_path / "b", CacheTeacher(tmp_path / "c"))
    with pytest.raises(MismatchError, match="id"):
        lacking.train()


# ---------------------------------------------------------------------- what is refused


def test_an_example_that_comes_late_is_an_error_that_says_so(tmp_path: Path) -> None:
    class More(TrainerCallback):
        def on_epoch_end(
            self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
        ) -> None:
            train_dataloader.dataset[0]["input_ids"][0] = 7
            train_dataloader.dataset[0]["labels"][0] = 7

    for teacher, why in (
        (testing.models(LANGUAGE)[1], "only the first epoch fills it"),
        (None, "there is no model to run"),
    ):
        if teacher is None:
            CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1]).fill([testing.collate(testing.rows(LANGUAGE, 4))])
        made, _ = trainer(tmp_path / "a", CacheTeacher(tmp_path / "c", teacher), LANGUAGE, "kd", More())
        with pytest.raises(MismatchError, match=rf"lacks 1 of the 2 examples of this batch, and {why}"):
            made.train()


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"top_k": 3}, "top_k=8, asked for is 3"), ({"top_k": 8, "dtype": "float32"}, "dtype='float16'"),
     ({"top_k": 8, "key": "id"}, "key=None")],
)  # fmt: skip
def test_other_settings_are_other_targets(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    batch = testing.collate(testing.rows(LANGUAGE, 2))
    CacheTeacher(tmp_path, testing.models(LANGUAGE)[1], top_k=8).fill([batch])
    with pytest.raises(ConfigurationError, match=told):
        CacheTeacher(tmp_path, testing.models(LANGUAGE)[1], **settings).fill([batch])
    with pytest.raises(ConfigurationError, match=told):
        CacheTeacher(tmp_path, **settings)
    assert CacheTeacher(tmp_path).fill is not None


def test_another_teacher_or_other_taps_are_refused(tmp_path: Path) -> None:
    batch = testing.collate(testing.rows(LANGUAGE, 2))
    CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1]).fill([batch])
    other = testing.models(LANGUAGE)[1]
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(ConfigurationError, match="filled with teacher="):
        CacheTeacher(tmp_path / "c", other).fill([batch])
    with pytest.raises(ConfigurationError, match=r"holds \['logits'\], the methods ask for \['hidden"):
        trainer(tmp_path / "a", CacheTeacher(tmp_path / "c"), LANGUAGE, "features")
    with pytest.raises(ConfigurationError, match="changes the batch"):
        trainer(tmp_path / "a", CacheTeacher(tmp_path / "c"), LANGUAGE, _rewriting())
    with pytest.raises(ForeignFileError, match=r"holds no cache.json"):
        CacheTeacher(tmp_path / "nothing")


def _rewriting() -> Any:
    import toys

    class Rewriting(toys.Toy):
        def batch(self, inputs: Any, step: Any) -> Any:
            return inputs

    return Rewriting()


# ---------------------------------------------------------------------- nothing lost


def test_a_shard_that_was_cut_is_not_taken_and_one_without_a_manifest_is_made_anew(tmp_path: Path) -> None:
    teacher, batch = testing.models(LANGUAGE)[1], testing.collate(testing.rows(LANGUAGE, 4))
    assert CacheTeacher(tmp_path, teacher).fill([batch]) == 4
    (manifest,) = (path for path in tmp_path.glob("*.json") if path.name != "cache.json")
    kept = manifest.read_text()
    manifest.unlink()  # killed between the two files
    counted = Counted(teacher)
    assert CacheTeacher(tmp_path, teacher).fill([batch]) == 4
    assert counted.rows == 4
    manifest.write_text(kept)
    with manifest.with_suffix(".safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ForeignFileError, match="is not what its manifest says"):
        CacheTeacher(tmp_path, teacher).fill([batch])


def test_two_fill_one_folder_and_read_each_other(tmp_path: Path) -> None:
    rows = testing.rows(LANGUAGE, 4)
    halves = [[testing.collate(rows[:2])], [testing.collate(rows[2:])]]
    teachers = [testing.models(LANGUAGE)[1] for _ in range(2)]
    counts = [Counted(teacher) for teacher in teachers]
    one, other = (CacheTeacher(tmp_path, teacher) for teacher in teachers)
    one.prepare(frozenset({"logits"}), torch.device("cpu"))  # before the other has written anything
    other.fill(halves[1])
    one.fill(halves[0])
    one.epoch_began(1)
    assert one.holds(testing.collate(rows))
    assert one.fill([*halves[0], *halves[1]]) == 4
    assert [count.rows for count in counts] == [2, 2]


def test_evaluation_is_measured_on_rows_that_are_known_and_leaves_others(tmp_path: Path) -> None:
    data = testing.rows(LANGUAGE, 4)
    for rows, there in ((data, True), (testing.rows(LANGUAGE, 4, seed=9), False)):
        cache = CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1])
        made, _ = trainer(tmp_path / "a", cache, held=rows, eval_strategy="epoch")
        made.train()
        logged = [entry for entry in made.state.log_history if "eval_loss" in entry]
        assert logged
        assert all(("eval_distill_loss" in entry) == there for entry in logged)


def test_a_run_resumed_in_mid_epoch_reads_what_was_there(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole, _ = trainer(tmp_path / "a", CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1]), **settings)
    whole.train()
    first, _ = trainer(
        tmp_path / "b", CacheTeacher(tmp_path / "d", testing.models(LANGUAGE)[1]), LANGUAGE, "kd", Stop(), **settings
    )
    first.train()
    second, _ = trainer(tmp_path / "b", CacheTeacher(tmp_path / "d"), **settings)
    second.train(resume_from_checkpoint=True)
    assert testing.weights_hash(second.model) == testing.weights_hash(whole.model)


class Killed(TrainerCallback):
    """Ends the process as SIGKILL would."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os._exit(9)


def test_killed_after_a_checkpoint_of_the_first_epoch_it_goes_on(tmp_path: Path) -> None:
    """The resumed run passes over the batches before the checkpoint: they must be on disk with it."""

    def made(*callbacks: TrainerCallback) -> Trainer:
        cache = CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1])
        return trainer(tmp_path / "a", cache, LANGUAGE, "kd", *callbacks, save_strategy="steps", save_steps=1)[0]

    child = os.fork()
    if child == 0:
        made(Killed()).train()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    made().train(resume_from_checkpoint=True)


def test_rows_that_an_epoch_drops_may_come_later(tmp_path: Path) -> None:
    data = [*testing.rows(LANGUAGE, 4), *testing.rows(LANGUAGE, 1, seed=7)]
    cache = CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1])
    made, _ = trainer(tmp_path / "a", cache, data=data, dataloader_drop_last=True, max_steps=12)
    made.train()


def named(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    found = testing.collate(batch)
    return found | ({"id": torch.tensor([row["id"] for row in batch])} if "id" in batch[0] else {})


@pytest.mark.parametrize("column", [True, False])
def test_ids_of_another_data_set_name_other_examples(column: bool, tmp_path: Path) -> None:
    data, held = ([row | {"id": at} for at, row in enumerate(testing.rows(LANGUAGE, 4, seed=s))] for s in (0, 9))
    held = held if column else [{k: v for k, v in row.items() if k != "id"} for row in held]
    cache = CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1], key="id")
    made, _ = trainer(tmp_path / "a", cache, data=data, held=held, eval_strategy="epoch")
    made.data_collator = named
    made.train()
    logged = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert logged
    assert not any("eval_distill_loss" in entry for entry in logged)


def test_a_cache_or_a_server_is_no_further_frozen_model(tmp_path: Path) -> None:
    cache = CacheTeacher(tmp_path, testing.models(LANGUAGE)[1])
    with pytest.raises(ConfigurationError, match="not the frozen 'reference'"):
        DistillCallback(testing.models(LANGUAGE)[1], "adaspec", frozen={"reference": cache}).attach(
            trainer(tmp_path / "a", testing.models(LANGUAGE)[1])[0]
        )


def test_the_student_is_not_its_own_cached_teacher(tmp_path: Path) -> None:
    student = testing.models(LANGUAGE)[0]
    with pytest.raises(ConfigurationError, match="one object"):
        Trainer(
            model=student,
            args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
            callbacks=[DistillCallback(CacheTeacher(tmp_path / "c", student), "kd")],
        )


def test_whatever_the_teacher_reads_tells_examples_apart(tmp_path: Path) -> None:
    teacher = testing.models(LANGUAGE)[1]
    mask = torch.ones(2, 4, dtype=torch.long)
    embedded = {"inputs_embeds": torch.randn(2, 4, 96), "attention_mask": mask}
    assert CacheTeacher(tmp_path / "a", teacher).fill([embedded]) == 2
    placed = {
        "input_ids": torch.full((2, 4), 5),
        "attention_mask": mask,
        "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]),
    }
    assert CacheTeacher(tmp_path / "b", teacher).fill([placed]) == 2
    with pytest.raises(MismatchError, match="tells examples apart"):
        CacheTeacher(tmp_path / "c", teacher).fill([{"attention_mask": mask}])
    classifier = testing.models("text-classification")[1]
    ids = {"input_ids": torch.full((1, 4), 5), "attention_mask": mask[:1]}
    zeros, ones = ({"token_type_ids": torch.full((1, 4), value)} for value in (0, 1))
    assert CacheTeacher(tmp_path / "d", classifier).fill([ids, ids | zeros, ids | ones]) == 2


def test_two_that_begin_a_folder_at_once_agree_or_one_is_refused(tmp_path: Path) -> None:
    one, other = (testing.models(LANGUAGE)[1] for _ in range(2))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    caches = CacheTeacher(tmp_path, one), CacheTeacher(tmp_path, other)  # both see an empty folder
    caches[0].fill([testing.collate(testing.rows(LANGUAGE, 2))])
    with pytest.raises(ConfigurationError, match="filled with teacher="):
        caches[1].fill([testing.collate(testing.rows(LANGUAGE, 2))])
    assert not list(tmp_path.glob(".*"))


def test_a_file_system_without_links_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=PermissionError("no links here")))
    CacheTeacher(tmp_path, testing.models(LANGUAGE)[1]).fill([testing.collate(testing.rows(LANGUAGE, 2))])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]


def test_single_numbers_in_weights_and_columns_are_hashed_too(tmp_path: Path) -> None:
    teacher = testing.models(LANGUAGE)[1]
    teacher.register_buffer("steps", torch.tensor(3))
    teacher.model.register_buffer("ratio", torch.tensor(0.5))
    batch = testing.collate(testing.rows(LANGUAGE, 2)) | {"position_ids": torch.tensor([1, 2])}
    assert CacheTeacher(tmp_path, teacher).fill([{k: v for k, v in batch.items() if k != "position_ids"}]) == 2
    assert len(set(CacheTeacher(tmp_path, teacher)._keys(batch))) == 2


def shard_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_changed_bytes_are_no_targets(tmp_path: Path) -> None:
    batch = testing.collate(testing.rows(LANGUAGE, 2))
    CacheTeacher(tmp_path, testing.models(LANGUAGE)[1]).fill([batch])
    with shard_of(tmp_path).open("r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(100))
    read = CacheTeacher(tmp_path)
    read.prepare(frozenset({"logits"}), torch.device("cpu"))
    with pytest.raises(ForeignFileError, match="is not what its manifest says"):
        read.apart(batch)


@pytest.mark.parametrize("name", ["manifest", "header"])
@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.clear(),
        lambda found: found.update(single=3, taps=3),
        lambda found: found.update(examples=["a"], version=2),
        lambda found: found.update(examples={"a": [0, 5, 1]}, kind="none of these"),
        lambda found: found.update(examples={"a": ["0", 0, 1]}, vocab="60"),
        lambda found: found.update(sha256="../../x", about=3),
        lambda found: found.update(more=1),
    ],
)
def test_foreign_json_is_one_error_that_names_the_file(name: str, change: Any, tmp_path: Path) -> None:
    CacheTeacher(tmp_path, testing.models(LANGUAGE)[1]).fill([testing.collate(testing.rows(LANGUAGE, 2))])
    path = tmp_path / "cache.json" if name == "header" else shard_of(tmp_path).with_suffix(".json")
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ForeignFileError, match=path.name):
        CacheTeacher(tmp_path).prepare(frozenset({"logits"}), torch.device("cpu"))


def test_many_small_outputs_are_cut_into_shards_whose_manifests_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXAMPLES", 50)
    ids = torch.arange(300 * 3).view(300, 3) % 50 + 5
    ids[:, 0], ids[:, 1] = torch.arange(300) % 50 + 5, torch.arange(300) // 50 + 5
    cache = CacheTeacher(tmp_path, testing.models("text-classification")[1])
    assert cache.fill([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]) == 300
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    CacheTeacher(tmp_path).prepare(frozenset({"logits"}), torch.device("cpu"))


def test_what_is_not_written_yet_is_read_without_joining_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, batch = CacheTeacher(tmp_path, testing.models(LANGUAGE)[1]), testing.collate(testing.rows(LANGUAGE, 4))
    cache.fill([batch], flush=False)
    joined = mock.Mock(wraps=torch.cat)
    monkeypatch.setattr(module.torch, "cat", joined)
    cache.apart(batch)
    assert joined.call_count <= 2
    assert max(len(call.args[0]) for call in joined.call_args_list) == 4


def test_a_full_disk_gives_the_teacher_back_and_leaves_no_torn_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = testing.models(LANGUAGE)[1].train()
    cache = CacheTeacher(tmp_path, teacher)
    cache.fill([testing.collate(testing.rows(LANGUAGE, 2))], flush=False)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        cache.close()
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]
    monkeypatch.undo()
    cache.close()  # what was in memory is not lost
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    teacher = testing.models(LANGUAGE)[1]
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1e6)
    batch = testing.collate(testing.rows(LANGUAGE, 2))
    with pytest.raises(ConfigurationError, match=r"more than float16 holds.*bfloat16"):
        CacheTeacher(tmp_path / "a", teacher).fill([batch])
    assert CacheTeacher(tmp_path / "b", teacher, dtype="bfloat16").fill([batch]) == 2


def test_the_order_of_the_labels_travels_with_the_cache(tmp_path: Path) -> None:
    teacher, student = testing.models("text-classification")[1], testing.models("text-classification")[0]
    teacher.config.id2label = dict(enumerate("abcde"))
    CacheTeacher(tmp_path / "c", teacher).fill([testing.collate(testing.rows("text-classification", 2))])
    student.config.id2label = dict(enumerate("edcba"))
    with pytest.raises(MismatchError, match="label orders differ"):
        Trainer(
            model=student,
            args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
            callbacks=[DistillCallback(CacheTeacher(tmp_path / "c"), "kd")],
        )


def test_one_object_is_filled_and_then_trains(tmp_path: Path) -> None:
    cache = CacheTeacher(tmp_path / "c", testing.models(LANGUAGE)[1])
    cache.fill([testing.collate(testing.rows(LANGUAGE, 4))])
    with pytest.raises(ConfigurationError, match=r"holds \['logits'\], the methods ask for"):
        trainer(tmp_path / "a", cache, LANGUAGE, "features")
    trainer(tmp_path / "a", cache)[0].train()


@pytest.mark.parametrize("headless", [False, True])
def test_what_methods_ask_of_a_teacher_s_sizes_is_in_the_folder(headless: bool, tmp_path: Path) -> None:
    model = testing.models(LANGUAGE)[1]
    cache = CacheTeacher(tmp_path, model.base_model if headless else model)
    cache.prepare(frozenset({"q:-1"}), torch.device("cpu"))
    cache.fill([testing.collate(testing.rows(LANGUAGE, 2))])
    cache.close()
    own, kept = cache.sizes, CacheTeacher(tmp_path).sizes
    assert own.causal
    names = ("kind", "layers", "heads", "vocab", "causal")
    assert [getattr(kept, name) for name in names] == [getattr(own, name) for name in names]


def test_two_distributions_a_row_are_not_cached(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ConfigurationError, match="'spans' cannot be cached"):
        CacheTeacher(tmp_path, transformers.BertForQuestionAnswering(config))


def test_few_batches_are_read_ahead(tmp_path: Path) -> None:
    batches = [testing.collate(testing.rows(LANGUAGE, 2, seed=seed)) for seed in range(6)]
    CacheTeacher(tmp_path, testing.models(LANGUAGE)[1]).fill(batches)
    cache = CacheTeacher(tmp_path)
    cache.prepare(frozenset({"logits"}), torch.device("cpu"))
    cache.prefetch(batches)
    for batch in batches:
        assert len(cache._ahead) <= module.AHEAD
        assert tuple(cache._keys(batch)) in cache._ahead
        cache.apart(batch)
    assert not cache._ahead
    cache.close()
