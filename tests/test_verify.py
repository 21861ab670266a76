"""`verify`: every file that differs is named, what loads is loaded, and what is measured again holds or is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hf_compress_evaluation import folder as evaluation
from hf_compress_evaluation import remeasuring
from onnx import TensorProto, helper, numpy_helper, save
from recipes import LABELS, WORDS, write_rows
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_bert_classifier, tiny_tokenizer
from typer.testing import CliRunner

from hf_compress import cli, facts
from hf_compress.errors import ForeignFileError, MismatchError
from hf_compress.verifying import Finding, failing, verify

ROWS = 200
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: place for place, name in enumerate(LABELS)}}


def write_model(place: Path, *, wrong: bool = False, **settings: object) -> Path:
    """A classifier whose body is random and whose head is fitted to good and bad; `wrong`: to the opposite."""
    model, tokenizer = tiny_bert_classifier(num_labels=2, **NAMES, **settings), tiny_tokenizer()
    texts = [f"{start} was {'very ' * times}{end}" for start in WORDS for times in range(3) for end in ("bad", "good")]
    sides = torch.tensor([[1.0, -1.0], [-1.0, 1.0]] * (len(texts) // 2)) * (-1 if wrong else 1)
    with torch.no_grad():
        read = model.bert(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        model.classifier.weight.copy_((torch.linalg.pinv(read, rtol=1e-3) @ sides).T)
        model.classifier.bias.zero_()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def write_graph(place: Path, *, sign: float) -> Path:
    """A classifier without layers: the sum over its tokens of one row of weights each, in which one word decides."""
    table = np.zeros((len(VOCAB), 2), np.float32)
    for word, side in (("good", 1), ("bad", 0)):
        table[VOCAB.index(word), side] = sign
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", 2])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["logits"], keepdims=0),
    ]
    constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1], np.int64), "axes")]
    graph = helper.make_graph(nodes, "words", [ids], [logits], constants)
    place.mkdir(parents=True, exist_ok=True)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), place / "model.onnx")
    return place


@dataclass(frozen=True)
class Made:
    student: Path
    teacher: Path
    other: Path
    task: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A student that was measured in torch and ONNX beside its teacher, and another student of another size."""
    place = tmp_path_factory.mktemp("made")
    write_rows(place / "test.csv", ROWS)
    task = place / "task.yaml"
    task.write_text(yaml.safe_dump({"task": "text-classification", "data": "test.csv"}))
    student = write_model(place / "student")
    teacher = write_model(place / "teacher", num_hidden_layers=3)
    other = write_model(place / "other", wrong=True, intermediate_size=96)
    write_graph(student / "onnx", sign=1.0)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(student / name, student / "onnx" / name)
    timing = evaluation.Timing(batches=(1,), length=16, runs=5, warmup=1)
    evaluation.evaluate_folder(student, task=task, teacher=teacher, timing=timing)
    facts.register(student, [student / "onnx/model.onnx"])
    return Made(student, teacher, other, task)


@pytest.fixture
def student(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.student, tmp_path / "student"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`hf-compress verify` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr("hf_compress.cli.shared.quiet", lambda: None)  # it is for a process of its own

    def call(*arguments: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(cli.app, ["verify", *map(str, arguments)])
        return done.exit_code, done.stdout, done.stderr

    return call


def states(found: tuple[Finding, ...]) -> dict[tuple[str, str], str]:
    return {(each.kind, each.what): each.state for each in found}


# ---------------------------------------------------------------------- hashes and loading


def test_a_folder_as_it_was_measured_holds(student: Path) -> None:
    before = (student / facts.FILE).read_bytes()
    found = states(verify(student))
    assert found["hash", "model.safetensors"] == "holds"
    assert found["hash", "onnx/model.onnx"] == "holds"
    assert found["load", "torch weights"] == "holds"
    assert found["load", "onnx/model.onnx"] == "holds"
    assert found["hash", "tokenizer.json"] == "not checked"
    assert "fails" not in found.values()
    assert (student / facts.FILE).read_bytes() == before


def test_every_fault_is_named_and_files_that_no_record_names_are_told(student: Path) -> None:
    (student / "onnx/model.onnx").unlink()
    with (student / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    (student / "notes.txt").write_text("mine")
    found = verify(student)
    said = {each.what: each.note for each in failing(found)}
    assert said["onnx/model.onnx"] == "missing"
    assert said["model.safetensors"].startswith("changed: ")
    assert states(found)["hash", "notes.txt"] == "not checked"


def test_weights_that_are_nan_or_missing_and_graphs_that_are_none_do_not_load(student: Path) -> None:
    weights = load_file(student / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    (student / "onnx/model.onnx").write_bytes(b"no graph")
    said = {each.what: each.note for each in failing(verify(student)) if each.kind == "load"}
    assert said["torch weights"] == "NaN or infinity in 1 of them, e.g. classifier.bias"
    assert "is not a readable ONNX graph" in said["onnx/model.onnx"]
    del weights["classifier.bias"]
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    said = {each.what: each.note for each in failing(verify(student)) if each.kind == "load"}
    assert "lacks 1 weights" in said["torch weights"]


def test_a_record_of_nothing_is_no_proof(student: Path) -> None:
    (student / facts.FILE).unlink()
    (only,) = failing(verify(student))
    assert (only.kind, only.note) == ("record", "records no file and no measurement")


def test_a_recorded_name_that_leads_out_is_a_fault_and_not_read(student: Path) -> None:
    record = facts.load(student)
    out = facts.Evidence(file="../secret.json", bytes=1, sha256="0" * 64)
    facts.save(student, record.model_copy(update={"evidence": (*record.evidence, out)}))
    (only,) = failing(verify(student))
    assert (only.what, only.note, only.found) == ("../secret.json", "leads out of its folder.", None)


# ---------------------------------------------------------------------- measuring


def measured(student: Path, made: Made, **settings: object) -> dict[str, Finding]:
    known = {"task": made.task, "teacher": made.teacher, "tolerance_latency": 1e6}
    return {each.what: each for each in remeasuring.remeasure(student, **(known | settings))}  # type: ignore[arg-type]


def test_what_was_measured_is_found_again(student: Path, made: Made) -> None:
    found = measured(student, made)
    scores = ("accuracy", "f1_macro", "label_loyalty", "probability_loyalty")
    for variant in ("torch", "onnx"):
        for metric in (*scores, "bytes"):
            each = found[f"student {variant} {metric}"]
            assert (each.state, each.note) == ("holds", ""), each
            assert each.found == pytest.approx(each.recorded, abs=1e-6)
        assert found[f"student {variant} latency_median, 1 x 16 tokens"].state == "holds"
    assert found["student torch parameters"].state == "holds"
    assert found["teacher torch accuracy"].state == "holds"
    assert found["student torch latency_p90, 1 x 16 tokens"].state == "not checked"
    assert not failing(tuple(found.values()))


def test_without_the_teacher_what_needs_it_is_not_measured_and_says_why(student: Path, made: Made) -> None:
    found = measured(student, made, teacher=None)
    assert found["student torch accuracy"].state == "holds"
    for name in ("student torch label_loyalty", "teacher torch accuracy", "teacher torch bytes"):
        assert (found[name].state, found[name].note) == ("not checked", "give --teacher")


def test_other_rows_are_an_error_that_names_both(student: Path, made: Made, tmp_path: Path) -> None:
    write_rows(tmp_path / "other.csv", 10)
    task = tmp_path / "task.yaml"
    task.write_text(yaml.safe_dump({"task": "text-classification", "data": "other.csv"}))
    with pytest.raises(MismatchError, match=rf"'other' \(10 rows, .*'test' \({ROWS} rows"):
        measured(student, made, task=task)


def test_a_latency_beyond_the_factor_is_named_either_way(student: Path, made: Made) -> None:
    record = facts.load(student)
    for factor in (1e-3, 1e3):
        changed = [
            m.model_copy(update={"value": m.value * factor}) if m.metric == "latency_median" else m
            for m in record.measurements
        ]
        facts.save(student, record.model_copy(update={"measurements": tuple(changed)}))
        found = failing(tuple(measured(student, made, tolerance_latency=9.0).values()))
        assert {each.what for each in found} == {
            f"{name} latency_median, 1 x 16 tokens" for name in ("teacher torch", "student torch", "student onnx")
        }


def test_a_score_holds_in_its_interval_and_not_beyond(student: Path, made: Made) -> None:
    record = facts.load(student)
    now = record.find("accuracy")
    assert now is not None
    for value, interval, state, note in (
        (now.value - 0.02, (now.value - 0.03, now.value + 0.01), "holds", "differs, within"),
        (now.value - 0.02, (now.value - 0.03, now.value - 0.01), "fails", "outside the recorded"),
        (now.value - 0.02, None, "fails", "no interval was recorded"),
    ):
        later = now.model_copy(update={"value": value, "interval": interval})
        facts.save(student, record.model_copy(update={"measurements": (*record.measurements, later)}))
        found = measured(student, made)["student torch accuracy"]
        assert found.state == state
        assert note in found.note


def test_a_graph_of_another_student_fails_on_its_scores(student: Path, made: Made) -> None:
    write_graph(student / "onnx", sign=-1.0)
    found = measured(student, made)
    assert found["student onnx accuracy"].state == "fails"
    assert found["student torch accuracy"].state == "holds"


def test_weights_that_give_nan_and_a_graph_that_is_gone_fail_by_name(student: Path, made: Made) -> None:
    weights = load_file(student / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    (student / "onnx/model.onnx").unlink()
    found = measured(student, made)
    assert "cannot be measured: predict: the outputs of row 0" in found["student torch accuracy"].note
    assert found["student onnx accuracy"].note == "there is no onnx/model.onnx"
    assert {found[f"student {variant} accuracy"].state for variant in ("torch", "onnx")} == {"fails"}


# ---------------------------------------------------------------------- the command


def test_another_students_weights_fail_on_quality_size_and_hash_each_named(
    student: Path, made: Made, command: Callable[..., tuple[int, str, str]]
) -> None:
    for name in ("model.safetensors", "config.json"):
        shutil.copy(made.other / name, student / name)
    asked = (student, "--measure", "--task", made.task, "--teacher", made.teacher, "--tolerance-latency", 1e6)
    code, out, err = command(*asked, "--json")
    assert code == 1
    found = json.loads(out)
    assert found["holds"] is False
    failed = {(each["kind"], each["what"]): each for each in found["findings"] if each["state"] == "fails"}
    assert failed.keys() >= {
        ("hash", "model.safetensors"),
        ("measurement", "student torch accuracy"),
        ("measurement", "student torch label_loyalty"),
        ("measurement", "student torch parameters"),
        ("measurement", "student torch bytes"),
    }
    for each in failed.values():
        assert each["recorded"] != each["found"]
    for name in (
        "model.safetensors (hash)",
        "student torch accuracy (measurement)",
        "student torch bytes (measurement)",
    ):
        assert name in err


def test_a_folder_that_holds_is_exit_code_0_and_a_table(
    student: Path, made: Made, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = command(student, "--measure", "--task", made.task, "--tolerance-latency", 1e6)
    assert code == 0
    assert re.search(r"^All \d+ checks hold", err, re.MULTILINE)
    text = " ".join(out.replace("│", " ").split())
    assert "student torch accuracy measurement" in text
    assert "not checked, give --teacher: " in text
    assert command(student)[0] == 0


def test_faults_are_shown_also_where_the_measuring_is_refused(
    student: Path, made: Made, command: Callable[..., tuple[int, str, str]]
) -> None:
    (student / "onnx/model.onnx").unlink()
    task = made.task.with_name("elsewhere.yaml")
    code, out, err = command(student, "--measure", "--task", task, "--json")
    assert code == 1
    assert "onnx/model.onnx (hash)" in err
    assert json.loads(out)["holds"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--measure",), "give --task task.yaml"), (("--task", "task.yaml"), "give --measure too")],
)
def test_options_that_need_each_other_are_refused_first(student: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CliRunner().invoke(cli.app, ["verify", str(student), *options], catch_exceptions=False)


def test_a_malformed_record_is_an_error(student: Path) -> None:
    (student / facts.FILE).write_text('{"version": 1, "evidence": [{"file": 3}]}')
    with pytest.raises(ForeignFileError, match="evidence"):
        verify(student)
