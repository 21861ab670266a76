"""`plan`: the students that `shrink` would make, measured before one is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_compress_evaluation import planning
from hf_compress_evaluation.planning import Plan
from tiny import tiny_bert_classifier, tiny_tokenizer
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from hf_compress import cli, registry, shrink
from hf_compress.errors import ConfigurationError, UnknownNameError

DEPTH = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teacher")
    tiny_bert_classifier(num_hidden_layers=DEPTH).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def found(teacher: Path) -> Plan:
    return planning.plan(teacher, [3, 1], max_mb=1.0, max_ms=1e6, runs=2)


@pytest.mark.slow
def test_sizes_are_those_of_the_student_that_shrink_makes(found: Plan, tmp_path: Path) -> None:
    assert [row.layers for row in found.students] == [1, 3]
    for row in found.students:
        student = shrink(tiny_bert_classifier(num_hidden_layers=DEPTH), layers=row.layers)
        student.save_pretrained(tmp_path)
        header = 200 * len(student.state_dict())
        assert row.parameters == student.num_parameters()
        assert row.bytes < (tmp_path / "model.safetensors").stat().st_size < row.bytes + header
        assert row.int8_bytes == pytest.approx(planning.INT8 * row.bytes, abs=1)
    assert found.teacher.layers == DEPTH
    assert found.teacher.parameters > found.students[-1].parameters


def test_latency_and_a_step_with_the_teacher_are_measured(found: Plan) -> None:
    for row in found.students:
        assert set(row.latency) == set(planning.BATCHES)
        assert all(seconds > 0 for seconds in row.latency.values())  # tiny models on a busy machine: no order holds
        assert row.step_seconds is not None
        assert row.step_seconds > 0
        assert (row.no_export, row.note) == (None, "")


def test_methods_are_those_of_the_task_with_its_default_first(found: Plan) -> None:
    default = {entry.name for entry in registry.default_for("text-classification")}
    assert set(found.methods[: len(default)]) == default == set(found.default)
    assert set(found.methods) == {
        name for name, entry in registry.catalogue().methods.items() if "text-classification" in entry.tasks
    }


def test_planning_trains_a_copy_and_leaves_the_callers_threads_and_stdout_alone(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    planning.plan(teacher, [1], runs=1, tell=lines.append)
    assert capsys.readouterr().out == ""
    assert lines[0] == f"teacher: {DEPTH} layers"
    assert any(line.startswith("student: 1 layers: 3 steps") for line in lines)


def row(layers: int, size: int, seconds: float) -> planning.Row:
    latency = {1: seconds, 32: 32 * seconds}
    return planning.Row(layers=layers, parameters=size, bytes=4 * size, int8_bytes=size, latency=latency)


@pytest.mark.parametrize(
    ("max_mb", "max_ms", "over", "said"),
    [
        (None, None, [(), ()], "The largest student has 2 layers (20 MB of int8 ONNX, estimated, 4.0 ms for one row"),
        (15.0, None, [(), ("MB",)], "The largest student within 15 MB has 1 layer (10 MB"),
        (30.0, 3.0, [(), ("ms",)], "The largest student within 30 MB and 3 ms has 1 layer"),
        (5.0, 1.0, [("MB", "ms"), ("MB", "ms")], "No student is within 5 MB and 1 ms: the smallest has 1 layer"),
    ],
)
def test_limits_mark_what_is_over_and_choose_the_largest_within(
    max_mb: float | None, max_ms: float | None, over: list[tuple[str, ...]], said: str
) -> None:
    students = [row(1, 10_000_000, 0.002), row(2, 20_000_000, 0.004)]
    marks = [planning._over(each, max_mb, max_ms) for each in students]
    assert marks == over
    within = [each for each, mark in zip(students, marks, strict=True) if not mark]
    assert planning._said(students, within, max_mb, max_ms).startswith(said)


def test_a_model_that_takes_no_tokens_is_sized_and_says_what_is_not_measured(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    found = planning.plan(tmp_path, [1], task="image-classification", runs=1)
    (only,) = found.students
    assert only.parameters > 0
    assert (only.latency, only.step_seconds, only.int8_bytes) == ({}, None, None)
    assert only.note == "it takes pixel_values, and steps are taken on tokens"
    with pytest.raises(ConfigurationError, match="takes pixel_values"):
        planning.plan(tmp_path, [1], task="image-classification", max_ms=1.0)


@pytest.mark.parametrize("layers", [[0], [DEPTH + 1], []])
def test_layers_that_the_teacher_lacks_are_refused_before_anything_is_measured(
    teacher: Path, layers: list[int]
) -> None:
    with pytest.raises(ConfigurationError, match=rf"must lie in 1 … {DEPTH}"):
        planning.plan(teacher, layers, tell=lambda line: pytest.fail(line))


def test_an_unknown_task_names_the_nearest(teacher: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'text-classification'"):
        planning.plan(teacher, [1], task="text-clasification")


def test_the_command_prints_a_table_or_json_alone(found: Plan, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_compress.cli.shared.quiet", lambda: None)  # it is for a process of its own
    monkeypatch.setattr(planning, "plan", lambda *args, **kwargs: found)
    shown = CliRunner().invoke(cli.app, ["plan", str(teacher), "--layers", "1,3"], catch_exceptions=False)
    text = " ".join(shown.stdout.split())
    assert "int8: estimated, 0.26 of float32" in text
    assert text.endswith(" ".join(found.said.split()))
    assert "…" not in shown.stdout
    made = CliRunner().invoke(cli.app, ["plan", str(teacher), "--layers", "1,3", "--json"], catch_exceptions=False)
    values = json.loads(made.stdout)
    assert values["largest"] == 3
    assert [each["layers"] for each in values["students"]] == [1, 3]
    with pytest.raises(ConfigurationError, match="expected numbers"):
        CliRunner().invoke(cli.app, ["plan", str(teacher), "--layers", "few"], catch_exceptions=False)
