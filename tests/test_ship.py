"""A recipe's run: whole stages, done once, found impossible before anything trains, with the evidence it claims."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_compress_cards import card
from hub.server import Hub, running_hub
from huggingface_hub import constants
from recipes import ROWS, write_inputs, write_rows
from safetensors.numpy import load_file, save_file

from hf_compress import facts, fitting, licences, ship
from hf_compress.errors import (
    ConfigurationError,
    ForeignFileError,
    HfCompressError,
    HubError,
    MismatchError,
    UnknownNameError,
)
from hf_compress.outgoing import ALLOWED
from hf_compress.recipe import Recipe, validated

RATES = [1e-3, 1e-4]
WHOLE: dict[str, Any] = {
    "teacher_training": {"learning_rate": 1e-3, "epochs": 2, "batch_size": 12},
    "alone": {"learning_rates": RATES, "epochs": 1},
    "labelled_only": True,
}
STAGES = ("teacher", "alone", "student-labelled", "student", "export", "evaluate", "card", "push")


class StoppedError(HfCompressError):
    """What a test lets a stage fail with."""


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with changed entries, those of a mapping one by one; None takes an entry of a mapping away."""
    found = dict(values)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(found.get(key), dict):
            found[key] = {k: v for k, v in (found[key] | value).items() if v is not None or k == "quantize"}
        else:
            found[key] = value
    return found


def made_recipe(inputs: Path, output: Path, values: dict[str, Any], **changes: Any) -> Recipe:
    """The recipe with the paths of `inputs` and another output."""
    found = merged(values, changes | {"output": str(output)})
    if (inputs / found["teacher"]).is_dir():
        found["teacher"] = str(inputs / found["teacher"])
    found["data"] = found["data"] | {part: str(inputs / found["data"][part]) for part in ROWS if part in found["data"]}
    return validated(Recipe, found, "recipe.yaml")


def run(recipe: Recipe) -> ship.Shipped:
    return ship.run(recipe, tell=lambda line: None, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="module")
def finished(
    inputs: Path, values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ship.Shipped]:
    """Every stage once, with every comparison: the one run that the tests below look at and copy."""
    output = tmp_path_factory.mktemp("finished") / "made"
    return output, run(made_recipe(inputs, output, values, **WHOLE))


@pytest.fixture
def again(
    inputs: Path, values: dict[str, Any], finished: tuple[Path, ship.Shipped], tmp_path: Path
) -> Callable[..., Recipe]:
    """The finished recipe with changes, its output a copy of what was made."""
    output = tmp_path / "made"
    shutil.copytree(finished[0], output)
    return lambda **changes: made_recipe(inputs, output, merged(values, WHOLE), **changes)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training anything fails the test."""
    monkeypatch.setattr(fitting, "fit", lambda *args, **kwargs: pytest.fail("trained first"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A loopback hub, the owner's token in the environment."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    with running_hub() as hub:
        yield hub


def stop(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: object) -> None:
        raise StoppedError(stage)

    monkeypatch.setattr(ship.Work, stage, fail)


# ---------------------------------------------------------------------- what is made


def test_all_stages_run_in_order_and_leave_nothing_but_their_products(finished: tuple[Path, ship.Shipped]) -> None:
    output, made = finished
    assert made.ran == STAGES
    assert made.folder == output / "student"
    assert {path.name for path in output.iterdir()} == {
        "teacher", "alone", "student-labelled", "student", "commit", "stages.json", "destination.txt",
    }  # fmt: skip
    hidden = [path for path in output.rglob(".*") if path.name.startswith(".")]
    assert hidden == []


def test_the_files_follow_the_umask(finished: tuple[Path, ship.Shipped]) -> None:
    """safetensors alone would make the weights readable by their owner only."""
    student = finished[0] / "student"
    modes = {path.name: path.stat().st_mode & 0o777 for path in student.iterdir() if path.is_file()}
    mask = os.umask(0o022)
    os.umask(mask)
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_every_subject_and_variant_is_measured(finished: tuple[Path, ship.Shipped]) -> None:
    record = finished[1].record
    pairs = {(m.subject, m.variant) for m in record.measurements if m.metric == "accuracy"}
    assert pairs == {
        ("teacher", "torch"), ("alone", "torch"), ("student-labelled", "torch"),
        ("student", "torch"), ("student", "onnx"), ("student", "onnx_int8"),
    }  # fmt: skip
    assert {m.data.rows for m in record.measurements if m.metric == "accuracy" and m.data} == {ROWS["test"]}
    assert record.training is not None
    assert record.training.data.rows == ROWS["train"] + ROWS["unlabelled"]
    assert record.training.data.labelled == ROWS["train"]
    assert [method.name for method in record.training.methods] == ["features", "kd"]


def test_derived_figures_follow_from_the_measured_ones(finished: tuple[Path, ship.Shipped]) -> None:
    record = finished[1].record

    def value(metric: str, subject: str = "student") -> float | None:
        found = record.find(metric, subject)
        return None if found is None else found.value

    teacher, alone, student = (value("accuracy", subject) for subject in ("teacher", "alone", "student"))
    assert teacher
    assert alone is not None
    assert student is not None
    assert value("retention") == pytest.approx(student / teacher)
    assert value("gain") == pytest.approx(student - alone)
    closed = value("gap_closed")
    assert closed is None or (teacher > alone and closed == pytest.approx((student - alone) / (teacher - alone)))


def test_the_record_says_how_each_learning_rate_of_the_baseline_did(finished: tuple[Path, ship.Shipped]) -> None:
    output, made = finished
    found = [m for m in made.record.measurements if m.metric == "choice_accuracy"]
    assert [m.how["learning_rate"] for m in found] == RATES
    assert all(m.data is not None and m.data.rows == ROWS["choice"] for m in found)
    chosen = [m for m in found if m.how["chosen"]]
    assert [m.value for m in chosen] == [max(m.value for m in found)]
    assert json.loads((output / "alone" / "choice.json").read_text())["chosen"] == f"{chosen[0].how['learning_rate']:g}"


def test_what_the_export_measured_survives_the_evaluation(finished: tuple[Path, ship.Shipped]) -> None:
    record = finished[1].record
    parity = record.find("parity_max_abs_diff", variant="onnx")
    assert parity is not None
    assert 0 <= parity.value < 1e-3
    agreement = record.find("agreement_with_fp32", variant="onnx_int8")
    assert agreement is not None
    assert agreement.how["rows"] == ROWS["choice"]
    assert record.find("accuracy_drop", variant="onnx_int8") is not None


def test_the_commit_holds_the_allowed_files_of_the_student_and_no_other(finished: tuple[Path, ship.Shipped]) -> None:
    output, made = finished
    student, commit = contents(output / "student"), contents(output / "commit")
    assert commit == {name: data for name, data in student.items() if ALLOWED.fullmatch(name)}
    assert {"model.safetensors", "README.md", "compression.json", "onnx/model.onnx", "onnx_int8/model.onnx"} <= set(
        commit
    )
    assert "nothing was pushed" in made.destination
    assert "made/student" in made.destination


def test_the_card_is_a_function_of_record_and_configs(finished: tuple[Path, ship.Shipped], tmp_path: Path) -> None:
    made, student = finished[0] / "student", tmp_path / "student"
    for path in (made / "compression.json", *made.rglob("*config.json")):  # also of tokenizers, beside the graphs
        (student / path.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, student / path.relative_to(made))
    text = card.render(student)
    assert (finished[0] / "student" / "README.md").read_text(encoding="utf-8") == text

    record = facts.load(student)
    other = tuple(m.model_copy(update={"value": 0.123, "interval": None}) for m in record.measurements)
    facts.save(student, record.model_copy(update={"measurements": other}))
    results = card.render(student).split("## Results")[1].split("### Speed")[0]
    assert set(re.findall(r"\d+\.\d+ %", results)) == {"12.3 %"}
    assert text != card.render(student)


# ---------------------------------------------------------------------- what is done again, and what is not


def test_a_second_run_does_nothing_and_changes_no_byte(again: Callable[..., Recipe], untrained: None) -> None:
    recipe = again()
    output, told = Path(recipe.output), list[str]()
    before, times = contents(output), {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    made = ship.run(recipe, tell=told.append, progress=False)
    assert made.ran == ()
    assert told == [f"{stage}: done already" for stage in STAGES]
    assert contents(output) == before
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.parent != output} == {
        path: time for path, time in times.items() if path.parent != output
    }


@pytest.mark.parametrize(
    ("changes", "repeated"),
    [
        ({"training": {"learning_rate": 2e-3}}, STAGES[2:]),
        ({"methods": ["kd"]}, STAGES[2:]),
        ({"training": {"batch_size": 6}}, STAGES[1:]),
        ({"student": {"keep": "first"}}, STAGES[1:]),
        ({"alone": {"learning_rates": [1e-3]}}, ("alone", "evaluate", "card", "push")),
        ({"teacher_training": {"epochs": 1}}, STAGES),
        ({"data": {"max_length": 8}}, STAGES),
        ({"seed": 1}, STAGES),
        ({"export": {"max_drop": 0.5}}, STAGES[4:]),
        ({"measure": {"runs": 3}}, STAGES[5:]),
        ({"private": True}, STAGES[7:]),
    ],
)
def test_a_changed_setting_runs_again_what_depends_on_it(
    again: Callable[..., Recipe],
    changes: dict[str, Any],
    repeated: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stage in ("_teacher", "_alone", "_distil", "_export", "_evaluate", "_card", "_push"):
        monkeypatch.setattr(ship.Work, stage, lambda *args, **kwargs: None)
    assert run(again(**changes)).ran == repeated


def test_changed_rows_run_everything_again(
    again: Callable[..., Recipe], inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_rows(inputs / "other.csv", ROWS["train"], seed=1)
    for stage in ("_teacher", "_alone", "_distil", "_export", "_evaluate", "_card", "_push"):
        monkeypatch.setattr(ship.Work, stage, lambda *args, **kwargs: None)
    recipe = again(data={"train": other.name})
    assert run(recipe).ran == STAGES


def test_other_weights_in_the_teachers_folder_run_everything_again(
    again: Callable[..., Recipe], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("_teacher", "_alone", "_distil", "_export", "_evaluate", "_card", "_push"):
        monkeypatch.setattr(ship.Work, stage, lambda *args, **kwargs: None)
    big = Path(shutil.copytree(inputs / "big", tmp_path / "big"))
    recipe = again(teacher=str(big))
    run(recipe)
    assert run(recipe).ran == ()
    weights = load_file(big / "model.safetensors")
    save_file({name: 2 * array for name, array in weights.items()}, big / "model.safetensors", {"format": "pt"})
    assert run(recipe).ran == STAGES


def test_a_setting_that_goes_back_does_not_find_the_old_stages_done(
    again: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two, the student was replaced: the old export is gone although its note would still match."""
    with monkeypatch.context() as patch:
        stop("_export", patch)
        with pytest.raises(StoppedError):
            run(again(training={"learning_rate": 2e-3}))
    recipe = again()
    assert run(recipe).ran == ("student-labelled", *STAGES[3:])
    assert (Path(recipe.output) / "student" / "onnx" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("gone", "repeated"),
    [("student", STAGES[3:]), ("student/onnx", STAGES[4:]), ("alone", ("alone", "evaluate", "card", "push"))],
)
def test_a_product_that_was_deleted_is_made_again(
    again: Callable[..., Recipe], gone: str, repeated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("_alone", "_distil", "_export", "_evaluate", "_card", "_push"):
        monkeypatch.setattr(ship.Work, stage, lambda *args, **kwargs: None)
    recipe = again()
    shutil.rmtree(Path(recipe.output) / gone)
    assert run(recipe).ran == repeated


def test_a_stage_that_fails_keeps_what_was_made_and_the_next_run_goes_on_there(
    again: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = again(training={"learning_rate": 2e-3})
    output = Path(recipe.output)
    with monkeypatch.context() as patch:
        stop("_export", patch)
        with pytest.raises(StoppedError):
            run(recipe)
    student = contents(output / "student")
    assert "model.safetensors" in student
    monkeypatch.setattr(fitting, "fit", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run(recipe).ran == STAGES[4:]
    assert (output / "student" / "model.safetensors").read_bytes() == student["model.safetensors"]


def test_int8_that_misses_its_gate_is_left_out_and_said(
    again: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ship.GateError("int8 decides otherwise.")

    monkeypatch.setattr(ship, "quantize_onnx", refuse)
    told: list[str] = []
    made = ship.run(again(export={"max_drop": 0.0}), tell=told.append, progress=False)
    assert "  int8: not kept. int8 decides otherwise." in told
    assert made.ran == STAGES[4:]
    assert {m.variant for m in made.record.measurements} == {"torch", "onnx"}
    assert not list(made.folder.glob("onnx_int8*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from hf_compress import fitting, ship
from hf_compress.recipe import read_recipe

def kill(shown, args, state, control, **kwargs):
    if shown.name == "student" and state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

fitting._Shown.on_step_end = kill
ship.run(read_recipe(Path(sys.argv[1])), progress=False)
"""


def test_a_run_killed_in_the_middle_of_training_ends_with_the_same_weights(
    inputs: Path,
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    recipe = made_recipe(inputs, killed, values)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml")], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    left = killed / ".student.training"
    assert [path.name for path in left.glob("checkpoint-*")] == ["checkpoint-3"]
    (left / "checkpoint-9").mkdir()
    shutil.copyfile(left / "checkpoint-3" / "trainer_state.json", left / "checkpoint-9" / "trainer_state.json")

    stop("_export", monkeypatch)
    with caplog.at_level("INFO", "hf_compress"), pytest.raises(StoppedError):
        run(recipe)
    assert "checkpoint-9 was not written to its end" in caplog.text
    assert "student: continues from checkpoint-3" in caplog.text
    with pytest.raises(StoppedError):
        run(made_recipe(inputs, whole, values))
    assert (killed / "student" / "model.safetensors").read_bytes() == (
        whole / "student" / "model.safetensors"
    ).read_bytes()
    assert not left.exists()


def test_a_checkpoint_of_other_settings_is_not_continued(
    inputs: Path, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(model: object, tokenizer: object, rows: object, how: object, target: Path, **settings: object) -> None:
        assert not (fitting.unfinished(target) / "checkpoint-3").exists()
        (fitting.unfinished(target) / "checkpoint-3").mkdir(parents=True)
        raise StoppedError("killed")

    monkeypatch.setattr(fitting, "fit", fit)
    output = tmp_path / "made"
    with pytest.raises(StoppedError):
        run(made_recipe(inputs, output, values))
    assert (output / ".student.training" / "checkpoint-3").exists()
    with pytest.raises(StoppedError):
        run(made_recipe(inputs, output, values, training={"learning_rate": 5e-4}))
    with pytest.raises(AssertionError):  # the same settings again: what is there is kept
        run(made_recipe(inputs, output, values, training={"learning_rate": 5e-4}))


def test_without_test_rows_the_record_still_has_what_the_export_measured(
    again: Callable[..., Recipe], untrained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship.Work, "_alone", lambda work: None)
    monkeypatch.setattr(ship.Work, "_teacher", lambda work: None)
    monkeypatch.setattr(ship.Work, "_distil", lambda *args, **kwargs: None)
    record = run(again(data={"test": None})).record
    assert record.find("bytes", variant="onnx") is not None
    assert record.find("parity_max_abs_diff", variant="onnx") is not None
    assert sum(m.metric == "choice_accuracy" for m in record.measurements) == len(RATES)


def test_texts_are_cut_to_what_the_model_takes(
    inputs: Path, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe keeps 128 tokens by default, the teacher has 64 positions."""
    (tmp_path / "long.csv").write_text(f"text,label\n{'film ' * 100},0\n{'bad ' * 90},1\n")
    stop("_export", monkeypatch)
    data = {"train": str(tmp_path / "long.csv"), "max_length": 128}
    with pytest.raises(StoppedError):
        run(made_recipe(inputs, tmp_path / "made", values, data=data, training={"epochs": 1}))


# ---------------------------------------------------------------------- found before anything trains


def bad_rows(folder: Path, text: str) -> str:
    (folder / "bad.csv").write_text(text, encoding="utf-8")
    return str(folder / "bad.csv")


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("text,label\n", ForeignFileError, "holds no row"),
        ("text,label\nfine,0\nworse,2\n", MismatchError, "label of row 1 is 2.* classes 0 to 1"),
        ("text,label\nfine,neutral\n", UnknownNameError, r"label .*row 0.* 'neutral'"),
        ("sentence,label\nfine,0\n", UnknownNameError, r"column in .*\(which has sentence, label\) 'text'"),
        ("text,lable\nfine,0\n", UnknownNameError, r"column in .*\(which has text, lable\) 'label'"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_rows_that_cannot_be_used_are_found_before_training(
    inputs: Path,
    values: dict[str, Any],
    tmp_path: Path,
    untrained: None,
    part: str,
    text: str,
    kind: type[Exception],
    said: str,
) -> None:
    for settings in ({}, WHOLE | {"data": {"labels": ["negative", "positive"]}}):
        changes = merged(settings, {"data": settings.get("data", {}) | {part: bad_rows(tmp_path, text)}})
        with pytest.raises(kind, match=said):
            run(made_recipe(inputs, tmp_path / "made", values, **changes))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("sentence,label\nfine,0\n", UnknownNameError, "'text'"),
        ("text,lable\nfine,0\n", UnknownNameError, "'label'"),
        ("text,label\nfine,0\nbad,0\n", ConfigurationError, "1 class"),
        ("text,label\nfine,0\nbad,-1\n", MismatchError, "row 1 is -1"),
        ("text,label\nfine,0\nbad,900000000\n", MismatchError, "900000000"),
        ("text,label\nfine,0.5\nbad,1\n", MismatchError, "row 0 is 0.5"),
    ],
)
def test_labels_that_name_no_classes_are_found_before_the_teacher_is_trained(
    inputs: Path,
    values: dict[str, Any],
    tmp_path: Path,
    untrained: None,
    text: str,
    kind: type[Exception],
    said: str,
) -> None:
    data = {"train": bad_rows(tmp_path, text), "choice": None, "test": None, "unlabelled": None}
    changes = {"teacher_training": {}, "export": {"quantize": None}, "data": data}
    with pytest.raises(kind, match=said):
        run(made_recipe(inputs, tmp_path / "made", values, **changes))


def without_weights(big: Path) -> None:
    (big / "model.safetensors").unlink()


def without_head(big: Path) -> None:
    weights = {name: array for name, array in load_file(big / "model.safetensors").items() if "classifier" not in name}
    save_file(weights, big / "model.safetensors", {"format": "pt"})


def of_no_kind(big: Path) -> None:
    (big / "config.json").write_text("{}")


def gone(big: Path) -> None:
    shutil.rmtree(big)


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (without_weights, ForeignFileError, "cannot be loaded as the teacher"),
        (without_head, MismatchError, "no weights for .*classifier.*teacher_training"),
        (of_no_kind, ForeignFileError, "cannot be loaded as"),
        (gone, ForeignFileError, "cannot be loaded as"),
    ],
)
def test_a_teacher_that_cannot_teach_is_found_before_training(
    inputs: Path,
    values: dict[str, Any],
    tmp_path: Path,
    untrained: None,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    kind: type[Exception],
    said: str,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    big = Path(shutil.copytree(inputs / "big", tmp_path / "big"))
    spoil(big)
    with pytest.raises(kind, match=said) as caught:
        run(made_recipe(inputs, tmp_path / "made", values, teacher=str(big)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"data": {"test": "nowhere.csv"}}, ForeignFileError, r"nowhere\.csv: does not exist"),
        ({"data": {"train": "rows.xlsx"}}, ForeignFileError, r"rows\.xlsx: does not exist"),
        ({"student": {"layers": 4}}, ConfigurationError, r"student\.layers is 4, and the teacher has 3 layers"),
        ({"student": {"layers": [0, 3]}}, ConfigurationError, r"the teacher has 3 layers"),
        ({"student": {"layers": 2, "hidden": 16}}, ConfigurationError, r"Give heads=1 too"),
        ({"student": {"layers": 2, "intermediate": 99}}, ConfigurationError, r"intermediate must lie in 1 … 64"),
        ({"methods": ["kdd"]}, UnknownNameError, "Did you mean 'kd'"),
        ({"methods": [{"name": "kd", "temprature": 1}]}, ConfigurationError, "has no setting"),
        ({"alone": {}, "data": {"choice": None}}, ConfigurationError, r"`alone` .*data\.choice"),
        ({"data": {"choice": None, "test": None}}, ConfigurationError, r"int8 .*quantize: null"),
        ({"push": "https://hub.example/only-a-name"}, ConfigurationError, "names no repository"),
    ],
)
def test_settings_that_cannot_work_are_found_before_training(
    inputs: Path,
    values: dict[str, Any],
    tmp_path: Path,
    untrained: None,
    changes: dict[str, Any],
    kind: type[Exception],
    said: str,
) -> None:
    with pytest.raises(kind, match=said):
        run(made_recipe(inputs, tmp_path / "made", values, teacher_training={}, **changes))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["student", "teacher", "commit"])
def test_somebody_elses_folder_in_the_output_is_never_replaced(
    inputs: Path, values: dict[str, Any], tmp_path: Path, untrained: None, name: str
) -> None:
    theirs = tmp_path / "made" / name / "mine.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(ConfigurationError, match=rf"holds {name}, and no run of a recipe made it"):
        run(made_recipe(inputs, tmp_path / "made", values))
    assert theirs.read_text() == "mine"


def test_an_output_that_cannot_be_written_is_found_before_training(
    inputs: Path, values: dict[str, Any], tmp_path: Path, untrained: None
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(made_recipe(inputs, tmp_path / "file" / "made", values))


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "There is no token"),
        ("hf_" + "Nobody".ljust(30, "9"), "who you are"),
        (Hub.reader, "may only read"),
        (Hub.stranger, "does not belong"),
    ],
)
def test_a_push_that_the_hub_refuses_is_found_before_training(
    inputs: Path,
    values: dict[str, Any],
    tmp_path: Path,
    hub: Hub,
    untrained: None,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    said: str,
) -> None:
    monkeypatch.setattr("hf_compress.remote.get_token", lambda: token)
    with pytest.raises(HubError, match=said) as caught:
        run(made_recipe(inputs, tmp_path / "made", values, push=f"{hub.url}/me/small"))
    assert token is None or token not in str(caught.value)
    assert not hub.repos
    assert not (tmp_path / "made").exists()


def test_a_push_without_a_licence_is_found_before_training(
    inputs: Path, values: dict[str, Any], tmp_path: Path, hub: Hub, untrained: None
) -> None:
    with pytest.raises(ConfigurationError, match=r"licence of the teacher .*licence: apache-2\.0"):
        run(made_recipe(inputs, tmp_path / "made", values, push=f"{hub.url}/me/small"))
    assert not (tmp_path / "made").exists()


# ---------------------------------------------------------------------- the push


def test_a_push_makes_exactly_one_commit_and_a_second_run_none(again: Callable[..., Recipe], hub: Hub) -> None:
    recipe = again(push=f"{hub.url}/me/small", licence="mit")
    first = run(recipe)
    assert first.ran == ("card", "push")
    assert licences.of_card(first.folder / "README.md") == "mit"
    made, start = hub.history("me/small")
    assert start.parent is None
    assert made.oid in first.destination
    assert hub.files("me/small") == {
        name: data for name, data in contents(first.folder).items() if ALLOWED.fullmatch(name)
    }
    assert b'model="me/small"' in hub.files("me/small")["README.md"]
    assert not hub.received(recipe.output)

    second = run(recipe)
    assert second.ran == ()
    assert len(hub.history("me/small")) == 2
