"""A checkpoint that is torn or lacks something is passed over, or refused where it is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from datasets import Dataset
from hf_compress_plugins.language.taid import TAID
from transformers import Trainer, TrainerCallback

from hf_compress import checkpoints, testing
from hf_compress.errors import ResumeError
from hf_compress.testing import weights_hash

STEPS = 4
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of four steps with a checkpoint at each, and the hash of its weights."""
    folder = tmp_path_factory.mktemp("whole")
    made = run(folder)
    made.train()
    return folder, weights_hash(made.model)


def run(folder: Path):  # type: ignore[no-untyped-def]  # a Trainer
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "random"}
    return toys.run(folder, TAID(), per_device_train_batch_size=2, **settings)[0]


def gone(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(  # a changed byte tells nobody without a manifest: that is what it is for
    ("damage", "manifest"), [(gone, True), (cut, True), (emptied, True), (changed, True), (gone, False), (cut, False)]
)
@pytest.mark.parametrize("name", FILES)
def test_a_torn_one_is_passed_over(
    name: str,
    damage: Callable[[Path], None],
    manifest: bool,
    whole: tuple[Path, str],
    fault: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    shutil.rmtree(folder / "checkpoint-4")
    newest = folder / "checkpoint-3"
    if not manifest:
        (newest / checkpoints.MANIFEST).unlink()
    damage(newest / name)
    fault("killed runs", "torn checkpoints")

    with pytest.raises(ResumeError, match=r"checkpoint-3 h"):
        run(folder).train(resume_from_checkpoint=str(newest))
    again = run(folder)
    again.train(resume_from_checkpoint=True)

    assert "checkpoint-3, which h" in caplog.text
    assert "goes on from checkpoint-2" in caplog.text
    assert weights_hash(again.model) == whole[1]


def test_if_all_are_torn_it_says_so(whole: tuple[Path, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    for checkpoint in checkpoints.found(folder):
        gone(checkpoint / "optimizer.pt")
    with pytest.raises(ResumeError, match=r"no checkpoint is whole: checkpoint-4, which has no optimizer\.pt"):
        run(folder).train(resume_from_checkpoint=True)


def test_without_any_the_trainer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint"):
        run(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_of_two_processes_is_not_continued_by_one(whole: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3"))
    assert checkpoints.fault(checkpoint) is None
    said = checkpoints.fault(checkpoint, processes=2)
    assert said == "has no rng_state_0.pth: it was written by another number of processes"
    assert checkpoints.fault(checkpoint, processes=None) is None


@pytest.mark.parametrize("text", ['{"files": {}}', '{"files": {"../other": {}}}', "[]", "{"])
def test_a_manifest_of_a_stranger_decides_nothing(text: str, whole: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3"))
    (checkpoint / checkpoints.MANIFEST).write_text(text)
    assert checkpoints.fault(checkpoint) is not None


def test_a_long_log_that_is_not_finite_is_our_own(whole: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3"))
    (checkpoint / checkpoints.MANIFEST).unlink()
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"] = [{"loss": float("nan")}] * 100
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert checkpoints.fault(checkpoint) is None


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_torn_one_is_refused_however_it_is_named(
    as_type: Callable[[Path], object], whole: tuple[Path, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    gone(folder / "checkpoint-3" / "optimizer.pt")
    made = run(folder)
    for train in (made.train, run(folder).train):
        with pytest.raises(ResumeError, match=r"checkpoint-3 has no optimizer\.pt") as raised:
            train(as_type(folder / "checkpoint-3"))
        assert not getattr(raised.value, "__notes__", [])


def test_a_second_train_asks_too(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.train()
    gone(tmp_path / "checkpoint-4" / "scheduler.pt")
    made.args.max_steps = 6
    with pytest.raises(ResumeError, match=r"checkpoint-4 has no scheduler\.pt"):
        made.train(resume_from_checkpoint=True)


def test_an_error_in_a_run_names_the_checkpoint_that_is_left(tmp_path: Path) -> None:
    made = run(tmp_path)

    class Ends(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise OSError("the disk is full")

    made.add_callback(Ends())
    with pytest.raises(OSError, match="the disk is full") as raised:
        made.train()
    assert raised.value.__notes__ == ["checkpoint-2 is whole: train(resume_from_checkpoint=True) goes on from it."]


def test_without_the_networks_of_a_method_it_is_not_whole(tmp_path: Path) -> None:
    """As after a kill between the Trainer's files and ours."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    toys.run(tmp_path, toys.WithAdam(), **settings)[0].train()
    for name in ("networks.safetensors", checkpoints.MANIFEST):
        gone(tmp_path / "checkpoint-2" / name)
    again, _ = toys.run(tmp_path, toys.WithAdam(), **settings)
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2]


def test_ours_is_there_before_an_older_one_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def rotate(**kwargs: Any) -> None:
        newest = max(tmp_path.glob("checkpoint-*"))
        held.append({path.name for path in newest.iterdir()} >= {"networks.safetensors", "networks-optimizers.pt"})

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    toys.run(tmp_path, toys.WithAdam(), max_steps=2, save_strategy="steps", save_steps=1)[0].train()
    assert held == [True, True]


def test_a_trainer_with_a_train_of_its_own(tmp_path: Path) -> None:
    class Own(Trainer):
        def train(self) -> Any:
            return super().train()

    assert toys.run(tmp_path, TAID(), kind=Own, max_steps=1)[0].train().global_step == 1


def test_a_shard_that_its_index_names_is_missing(whole: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3"))
    gone(checkpoint / checkpoints.MANIFEST)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoints.fault(checkpoint) == "has no model-2.safetensors"


def test_a_link_is_no_part_of_a_manifest(whole: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(whole[0] / "checkpoint-3", tmp_path / "checkpoint-3"))
    (checkpoint / "linked").symlink_to(tmp_path)
    (tmp_path / "far.txt").write_text("elsewhere")
    (checkpoint / "far.txt").symlink_to(tmp_path / "far.txt")
    checkpoints.seal(checkpoint)
    assert checkpoints.fault(checkpoint) is None


def test_a_search_seals_its_own_checkpoints_and_no_others(tmp_path: Path) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run(tmp_path).train()
    before = {path: path.read_bytes() for path in tmp_path.glob("checkpoint-*/*")}
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    held = Dataset.from_list(testing.rows("text-generation"))
    given = {"model": None, "model_init": _student, "eval_dataset": held}
    searching, _ = toys.run(tmp_path, toys.WithAdam(), give=lambda _: given, **settings)
    searching.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        compute_objective=lambda _: 0.0,
        n_trials=1,
    )
    assert {path: path.read_bytes() for path in tmp_path.glob("checkpoint-*/*")} == before
    sealed = list(tmp_path.glob("run-*/checkpoint-*"))
    assert len(sealed) == 2
    for folder in sealed:
        assert (folder / "networks.safetensors").exists()
        assert (folder / checkpoints.MANIFEST).exists()
        assert checkpoints.fault(folder) is None


def _student() -> Any:
    return testing.models("text-generation")[0]
