"""A checkpoint that is torn or lacks something is passed over, or refused where it is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import toys
from hf_compress_plugins.language.taid import TAID

from hf_compress import checkpoints
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
    assert checkpoints.fault(checkpoint, processes=2) == "has no rng_state_0.pth"
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
