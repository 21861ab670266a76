"""A Trainer's run that ends with an exported folder and a push: what is there then, and what is refused before.

Run as a script it is one process of the two-process test.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from hf_compress_evaluation.bench import _together
from hub.server import KINDS, Fault, Hub, running_hub
from huggingface_hub import HfApi, constants
from recipes import write_rows, write_teacher
from safetensors.torch import load_file
from stub import arguments
from tiny import tiny_bert_classifier, tiny_tokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback

from hf_compress import DistillCallback, ExportCallback, PublishCallback, cli, facts, publishing, shrink
from hf_compress.errors import (
    ConfigurationError,
    ForeignFileError,
    GateError,
    HfCompressError,
    HubError,
    MismatchError,
    UnknownNameError,
)
from hf_compress.onnx import Gate
from hf_compress.outgoing import ALLOWED

TEXTS = ["the film was very bad", "a book was good", "the story was bad", "an actor was very good"]
LABELS = [0, 1, 0, 1]
LENIENT = Gate(features=TEXTS, labels=LABELS, max_drop=1.0, min_agreement=0.0)


class StoppedError(Exception):
    """What a test lets training fail with."""


class Stopping(TrainerCallback):
    """Lets training fail after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise StoppedError


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A loopback hub, the owner's token in the environment; each test has a repository of its own."""
    with pytest.MonkeyPatch.context() as patch, running_hub() as hub:
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr("hf_compress.hub.WAITS", (0.0, 0.0))
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("HF_TOKEN", Hub.token)
        yield hub


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder, rows to measure on and their task file."""
    folder = tmp_path_factory.mktemp("inputs")
    write_teacher(folder / "big")
    write_rows(folder / "test.csv", 12)
    (folder / "task.yaml").write_text("task: text-classification\ndata: test.csv\n")
    return folder


Build = Callable[..., Trainer]


def build(folder: Path, *callbacks: Any, student: Any = None, **settings: Any) -> Trainer:
    """A Trainer of two steps over four sentences, with a student of the inputs' classes."""
    tokenizer = tiny_tokenizer()
    own = {"eval_dataset", "compute_metrics", "model_init"}
    return Trainer(
        model=None if "model_init" in settings else student or new_student(),
        processing_class=tokenizer,
        args=arguments(folder / "out", **{"max_steps": 2} | {k: v for k, v in settings.items() if k not in own}),
        train_dataset=rows(),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=list(callbacks),
        **{k: v for k, v in settings.items() if k in own},
    )


def rows() -> Dataset:
    return Dataset.from_dict({**tiny_tokenizer()(TEXTS), "labels": LABELS})


def new_student(**settings: Any) -> Any:
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    return tiny_bert_classifier(num_labels=2, **{**names, **settings})


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that would have been exported."""
    folders: list[Path] = []
    monkeypatch.setattr(publishing.onnx, "export_onnx", lambda folder, **settings: folders.append(folder))
    return folders


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training anything fails the test."""
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: pytest.fail("trained first"))


Finished = tuple[Path, Trainer, PublishCallback]


@pytest.fixture(scope="module")
def finished(inputs: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The whole of it once: trained, exported, measured, described, pushed. The order of the callbacks is reversed."""
    work = tmp_path_factory.mktemp("finished")
    teacher = write_teacher(work / "big")
    publish = PublishCallback(f"{hub.url}/me/whole", licence="mit", task=inputs / "task.yaml", teacher=inputs / "big")
    export = ExportCallback(work / "student", precisions=("int8",), gate=LENIENT)
    trainer = build(work, publish, export, DistillCallback(teacher), student=shrink(teacher, layers=2))
    trainer.train()
    return work / "student", trainer, publish


# ---------------------------------------------------------------------- what is made


def test_one_script_ends_with_one_commit_of_all_of_it(finished: Finished, hub: Hub) -> None:
    folder, _, publish = finished
    made, start = hub.history("me/whole")
    held = hub.files("me/whole")

    assert start.parent is None
    assert publish.pushed is not None
    assert (publish.pushed.oid, publish.pushed.new) == (made.oid, True)
    assert held == {
        name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ALLOWED.fullmatch(name := path.relative_to(folder).as_posix())
    }
    assert {
        "README.md", "compression.json", "config.json", "model.safetensors", "onnx_int8/model.onnx", "onnx/model.onnx",
        "tokenizer.json",
    } <= held.keys()  # fmt: skip
    assert b'model="me/whole"' in held["README.md"]


def test_the_folder_is_the_trained_student_and_its_record(finished: Finished) -> None:
    folder, trainer, _ = finished
    record = facts.load(folder)

    saved = load_file(folder / "model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)
    assert record.training is not None
    assert (record.training.steps, record.training.teacher is not None) == (2, True)
    assert record.find("parity_max_abs_diff", variant="onnx") is not None
    assert record.find("agreement_with_fp32", variant="onnx_int8") is not None
    for variant in ("torch", "onnx", "onnx_int8"):
        assert record.find("accuracy", variant=variant) is not None
    assert record.find("accuracy", "teacher") is not None
    facts.check(folder)


def test_the_folder_holds_no_training_arguments_and_can_be_read_by_others(finished: Finished) -> None:
    folder, _, _ = finished

    assert not list(folder.rglob("training_args.bin"))
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_the_command_pushes_the_same_and_makes_no_second_commit(finished: Finished, hub: Hub) -> None:
    folder, _, publish = finished

    cli.app(["push", str(folder), publish.repository], standalone_mode=False)

    assert len(hub.history("me/whole")) == 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_order_of_the_callbacks_gives_a_clean_student_with_its_record(
    order: tuple[int, ...], inputs: Path, hub: Hub, tmp_path: Path, unexported: list[Path]
) -> None:
    name = "me/order" + "".join(map(str, order))
    callbacks = [
        DistillCallback(str(inputs / "big"), method="taid"),
        ExportCallback(tmp_path / "student"),
        PublishCallback(f"{hub.url}/{name}", licence="mit"),
    ]
    trainer = build(tmp_path, *(callbacks[place] for place in order))
    assert any(key.startswith("distiller.") for key in trainer.model.state_dict())

    trainer.train()

    assert unexported == [tmp_path / "student"]
    assert load_file(tmp_path / "student" / "model.safetensors").keys() == trainer.model.state_dict().keys()
    training = facts.load(tmp_path / "student").training
    assert training is not None
    assert [method.name for method in training.methods] == ["taid"]
    assert hub.files(name)["compression.json"] == (tmp_path / "student" / "compression.json").read_bytes()


def test_a_second_training_exports_anew(tmp_path: Path, unexported: list[Path]) -> None:
    trainer = build(tmp_path, ExportCallback(tmp_path / "student"))
    trainer.train()
    first = (tmp_path / "student" / "model.safetensors").read_bytes()
    trainer.train()

    assert len(unexported) == 2
    assert (tmp_path / "student" / "model.safetensors").read_bytes() != first


def test_the_best_weights_are_exported_where_the_trainer_puts_them_back(
    inputs: Path, tmp_path: Path, unexported: list[Path]
) -> None:
    scores = iter([1.0, 0.0, 0.5])
    trainer = build(
        tmp_path,
        ExportCallback(tmp_path / "student"),
        DistillCallback(str(inputs / "big")),
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_dataset=rows(),
        compute_metrics=lambda predicted: {"score": next(scores)},
    )
    trainer.train()

    saved = load_file(tmp_path / "student" / "model.safetensors")
    best, last = (load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (1, 3))
    assert all(torch.equal(tensor, best[name]) for name, tensor in saved.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in saved.items())


def test_without_an_export_the_model_is_saved_and_pushed_as_safetensors(hub: Hub, tmp_path: Path) -> None:
    build(tmp_path, PublishCallback(f"{hub.url}/me/plain", licence="mit", folder=tmp_path / "student")).train()

    assert hub.files("me/plain").keys() == {
        "README.md", "compression.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.slow
def test_a_precision_that_misses_its_gate_is_said_and_float32_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a DistillCallback; over an earlier model, whose int8 must not stay beside the new weights."""
    student = tmp_path / "student"
    (student / "onnx_int8").mkdir(parents=True)
    (student / "onnx_int8" / "model.onnx").write_bytes(b"of an earlier run")

    def miss(*args: Any) -> Any:
        raise GateError("decides like float32 in 0.5000 of 4 cases (at least 0.95).")

    monkeypatch.setattr("hf_compress.onnx.precision.compare", miss)
    build(tmp_path, ExportCallback(student, precisions="int8", gate=Gate(features=TEXTS))).train()

    assert [path.name for path in student.glob("onnx*")] == ["onnx"]
    (said,) = [each for each in caplog.records if each.levelno == logging.WARNING and "int8" in each.getMessage()]
    assert "in 0.5000 of 4 cases" in said.getMessage()
    assert facts.load(student).find("parity_max_abs_diff", variant="onnx") is not None


# ---------------------------------------------------------------------- what is not written


def test_nothing_is_exported_or_pushed_when_training_raises(hub: Hub, tmp_path: Path, unexported: list[Path]) -> None:
    callbacks = (
        Stopping(),
        ExportCallback(tmp_path / "student"),
        PublishCallback(f"{hub.url}/me/stopped", licence="mit"),
    )
    with pytest.raises(StoppedError):
        build(tmp_path, *callbacks).train()

    assert not (tmp_path / "student").exists()
    assert "me/stopped" not in hub.repos


def test_trials_of_a_search_are_neither_exported_nor_pushed(hub: Hub, tmp_path: Path, unexported: list[Path]) -> None:
    callbacks = (ExportCallback(tmp_path / "student"), PublishCallback(f"{hub.url}/me/trials", licence="mit"))
    trainer = build(tmp_path, *callbacks, model_init=lambda: new_student(), eval_strategy="epoch", eval_dataset=rows())
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.1, 0.2)}, n_trials=1, backend="optuna"
    )

    assert not (tmp_path / "student").exists()
    assert "me/trials" not in hub.repos


def test_a_process_that_is_not_the_main_one_writes_and_asks_nothing(
    hub: Hub, tmp_path: Path, unexported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks = (ExportCallback(tmp_path / "student"), PublishCallback(f"{hub.url}/me/other-process", licence="mit"))
    trainer = build(tmp_path, *callbacks)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    asked = len(hub.log)
    trainer.train()

    assert not (tmp_path / "student").exists()
    assert not unexported
    assert len(hub.log) == asked


def test_a_failure_of_the_main_process_is_one_on_every_process(
    tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tmp_path, ExportCallback(tmp_path / "student"))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)

    def receive(values: list[Any]) -> None:
        values[0] = "ConfigurationError: the folder is not free"

    monkeypatch.setattr(publishing, "broadcast_object_list", receive)

    with pytest.raises(HfCompressError, match=r"main process failed\. ConfigurationError: the folder is not free"):
        trainer.train()


def test_a_push_of_the_trainers_own_is_left_to_it(
    tmp_path: Path, unexported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tmp_path, ExportCallback(tmp_path / "student"))
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    monkeypatch.setattr(trainer, "push_to_hub", lambda **settings: pytest.fail("the folder was pushed by saving it"))
    trainer.train()

    assert unexported


# ---------------------------------------------------------------------- what is left after a failure


def test_a_failed_push_keeps_the_folder_and_names_the_command_that_sends_it(hub: Hub, tmp_path: Path) -> None:
    callback = PublishCallback(f"{hub.url}/me/refused", licence="mit", folder=tmp_path / "student", private=True)
    hub.plan = [Fault(KINDS["commit"], status=403, times=9)]
    with pytest.raises(HubError, match="The commit to me/refused failed") as caught:
        build(tmp_path, callback).train()
    hub.plan = []

    (note,) = [each for each in caught.value.__notes__ if "hf-compress" in each]
    command = note.partition("`hf-compress ")[2].partition("`")[0].split()
    assert command == ["push", "--private", "--license", "mit", str(tmp_path / "student"), f"{hub.url}/me/refused"]
    assert len(hub.history("me/refused")) == 1  # the hub's own first commit
    cli.app(command, standalone_mode=False)
    assert hub.files("me/refused")["model.safetensors"] == (tmp_path / "student/model.safetensors").read_bytes()
    assert HfApi(endpoint=hub.url, token=Hub.token).model_info("me/refused").private


def test_a_failed_export_keeps_the_trained_model_and_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise StoppedError

    monkeypatch.setattr(publishing.onnx, "export_onnx", fail)
    with pytest.raises(StoppedError) as caught:
        build(tmp_path, ExportCallback(tmp_path / "student")).train()

    assert f"`hf-compress export {tmp_path / 'student'}`" in caught.value.__notes__[-1]
    assert (tmp_path / "student" / "model.safetensors").is_file()


def test_a_failed_measurement_names_both_commands(
    inputs: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise StoppedError

    monkeypatch.setattr(publishing, "evaluate_folder", fail)
    task = inputs / "task.yaml"
    callback = PublishCallback(f"{hub.url}/me/unmeasured", licence="mit", folder=tmp_path / "student", task=task)
    with pytest.raises(StoppedError) as caught:
        build(tmp_path, callback).train()

    said = caught.value.__notes__[-1]
    assert f"`hf-compress evaluate {tmp_path / 'student'} --task {task}` and `hf-compress push" in said
    assert "me/unmeasured" not in hub.repos


# ---------------------------------------------------------------------- what is refused before the first step


@pytest.mark.parametrize(
    ("token", "said"), [(None, "There is no token"), (Hub.reader, "may only read"), (Hub.stranger, "does not belong")]
)
def test_a_push_that_the_hub_refuses_is_found_before_the_first_step(
    hub: Hub, tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch, token: str | None, said: str
) -> None:
    monkeypatch.setattr("hf_compress.remote.get_token", lambda: token)
    with pytest.raises(HubError, match=said):
        build(tmp_path, PublishCallback(f"{hub.url}/me/small", licence="mit", folder=tmp_path / "student")).train()


def test_a_public_repository_for_a_private_student_is_found_before_the_first_step(
    hub: Hub, tmp_path: Path, untrained: None
) -> None:
    HfApi(endpoint=hub.url, token=Hub.token).create_repo("me/public")
    with pytest.raises(HubError, match="is public"):
        build(
            tmp_path, PublishCallback(f"{hub.url}/me/public", licence="mit", folder=tmp_path / "student", private=True)
        ).train()


def test_the_visibility_that_the_distilled_teacher_asks_for_is_found_before_the_first_step(
    inputs: Path, hub: Hub, tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(publishing.hub, "private_for", lambda names, private: asked.append(list(names)) or True)
    HfApi(endpoint=hub.url, token=Hub.token).create_repo("me/open")
    teacher = new_student(num_hidden_layers=3)
    publish = PublishCallback(f"{hub.url}/me/open", licence="mit", folder=tmp_path / "student")
    trainer = build(tmp_path, publish, DistillCallback(teacher, method="kd"))
    teacher.config._name_or_path = "them/gated"
    with pytest.raises(HubError, match="is public"):
        trainer.train()

    assert asked == [["them/gated"]]


def adapted(**settings: Any) -> Any:
    return peft.get_peft_model(new_student(**settings), peft.LoraConfig(task_type="SEQ_CLS"))


@pytest.mark.parametrize(
    ("callback", "student", "kind", "said"),
    [
        (lambda at: ExportCallback(at / "s"), adapted, ConfigurationError, "merge_and_unload"),
        (lambda at: PublishCallback("me/s", folder=at / "s"), adapted, ConfigurationError, "merge_and_unload"),
        (lambda at: ExportCallback(at), None, ConfigurationError, "holds output_dir"),
        (lambda at: ExportCallback(at / "out"), None, ConfigurationError, "holds output_dir"),
        (lambda at: ExportCallback(at / "mine"), None, ConfigurationError, r"holds notes\.txt, which is no part"),
        (lambda at: ExportCallback(at / "mine" / "notes.txt"), None, ConfigurationError, "is a file"),
        (lambda at: PublishCallback("me/s", folder=at / "mine"), None, ConfigurationError, r"holds notes\.txt"),
        (lambda at: published(at, at / "big", teacher=at / "big"), None, ConfigurationError, "is the teacher's folder"),
        (lambda at: PublishCallback("me/s"), None, ConfigurationError, "nothing is exported"),
        (lambda at: PublishCallback("me/s", folder=at / "s", task=at / "none.yaml"), None, ForeignFileError, "none"),
        (lambda at: published(at), lambda: new_student(problem_type="regression"), MismatchError, "no number"),
        (lambda at: published(at), lambda: new_student(label2id={"no": 0, "yes": 1}), UnknownNameError, "negative"),
        (
            lambda at: published(at, teacher=at / "big"),
            lambda: new_student(id2label={0: "positive", 1: "negative"}),
            MismatchError,
            "same classes in the same order",
        ),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_first_step(
    inputs: Path,
    tmp_path: Path,
    untrained: None,
    callback: Callable[[Path], TrainerCallback],
    student: Callable[[], Any] | None,
    kind: type[Exception],
    said: str,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    with pytest.raises(kind, match=said):
        build(tmp_path, callback(tmp_path), student=student() if student else None).train()

    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "s").exists()


def published(at: Path, folder: Path | None = None, **settings: Any) -> PublishCallback:
    return PublishCallback("me/s", folder=folder or at / "s", task=at / "task.yaml", **settings)


def test_a_teacher_that_is_distilled_from_its_folder_is_not_replaced(inputs: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, ExportCallback(inputs / "big"), DistillCallback(str(inputs / "big"), "kd"))
    with pytest.raises(ConfigurationError, match="is the teacher's folder"):
        trainer.train()


def test_two_exports_leave_open_what_is_pushed(tmp_path: Path, untrained: None) -> None:
    exports = [ExportCallback(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(ConfigurationError, match="give folder="):
        build(tmp_path, *exports, PublishCallback("me/s")).train()


def test_texts_of_the_gate_need_a_tokenizer(tmp_path: Path, untrained: None) -> None:
    trainer = build(tmp_path, ExportCallback(tmp_path / "s", precisions=["int8"], gate=LENIENT))
    trainer.processing_class, trainer.data_collator = None, lambda batch: batch
    with pytest.raises(ConfigurationError, match="texts need a tokenizer"):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda: ExportCallback("s", precisions=["int8"]), ConfigurationError, "kept only if its quality holds"),
        (lambda: ExportCallback("s", gate=LENIENT), ConfigurationError, "Give precisions"),
        (lambda: ExportCallback("s", precisions=["int9"], gate=LENIENT), UnknownNameError, "int8"),
        (lambda: PublishCallback("me/s", teacher="big"), ConfigurationError, "Give task="),
        (lambda: PublishCallback("https://hub.example/name"), ConfigurationError, "names no repository"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_once(
    make: Callable[[], Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        make()


# ---------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_write_one_folder(tmp_path: Path) -> None:
    _together.run((__file__, tmp_path))
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()  # both found the whole folder after train()
    assert {"compression.json", "model.safetensors", "onnx"} <= set((tmp_path / "0").read_text().split())
    assert not list(tmp_path.glob(".student*"))


def main(work: Path) -> None:
    callbacks = (ExportCallback(work / "student"), DistillCallback(new_student(num_hidden_layers=3), "kd"))
    build(work, *callbacks, ddp_backend="gloo").train()
    held = " ".join(sorted(path.name for path in (work / "student").iterdir()))
    (work / os.environ["RANK"]).write_text(held)


if __name__ == "__main__":
    main(Path(sys.argv[1]))


@pytest.mark.usefixtures("untrained")
def test_without_a_record_of_the_training_no_licence_follows_and_that_is_found_before_it(
    hub: Hub, tmp_path: Path
) -> None:
    trainer = build(tmp_path, PublishCallback(f"{hub.url}/me/nameless", folder=tmp_path / "student"))
    trainer.train_dataset.info.license = "mit"
    with pytest.raises(ConfigurationError, match="how the model was trained is not recorded"):
        trainer.train()


@pytest.mark.usefixtures("untrained")
def test_the_start_of_the_student_decides_whether_it_can_be_published(hub: Hub, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "big")
    (tmp_path / "big" / "README.md").write_text("---\nlicense: mit\n---\n")
    teacher.config._name_or_path = str(tmp_path / "big")
    distilled = DistillCallback(teacher, method="kd", data_licence="mit")
    student = new_student()
    student.config._name_or_path = "them/start"
    publish = PublishCallback(f"{hub.url}/me/nameless", folder=tmp_path / "student")
    with pytest.raises(ConfigurationError, match="start them/start is not known"):
        build(tmp_path, publish, distilled, student=student).train()
