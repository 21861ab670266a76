"""The record: what it holds comes back as it was, what must not be in it is refused, it is only appended to."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from hf_compress import facts, files
from hf_compress.errors import ForeignFileError
from hf_compress.facts import Data, Measurement, Method, Model, Record, Training

TOKEN = "hf_" + "AbCdEfGhIj" * 3


def data(**changes: Any) -> Data:
    return Data(**({"name": "reviews", "rows": 10, "fingerprint": "0123456789abcdef"} | changes))


def training(**changes: Any) -> Training:
    student = Model(architecture="BertForSequenceClassification", parameters=1000, layers=2, start="layers 0, 3 of 4")
    given: dict[str, Any] = {
        "task": "text-classification",
        "teacher": student,
        "student": student,
        "methods": (Method(name="kd", weight=0.5, settings={"temperature": 2.0, "map": {"1": [1, None]}}),),
        "task_weight": 1.0,
        "data": data(),
        "steps": 3,
        "epochs": 0.5,
        "seconds": 1.5,
        "seed": 42,
        "hardware": "a processor, 2 cores",
        "versions": {"torch": "2.13.0+cpu"},
    }
    return Training(**(given | changes))


def measurement(value: float = 0.5, **changes: Any) -> Measurement:
    return Measurement(**({"subject": "student", "metric": "accuracy", "value": value, "unit": "fraction"} | changes))


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    record = Record(
        training=training(),
        measurements=(
            measurement(data=data(licence="mit"), interval=(0.25, 0.75), seed=0),
            measurement(1 / 3, how={"threads": 2, "nested": [1, 2.0, True, None, "ü\r\n\x00"], "none": None, "": {}}),
        ),
    )

    facts.save(tmp_path, record)

    assert facts.load(tmp_path) == record
    assert facts.load(tmp_path).measurements[1].how["none"] is None
    assert "none" in facts.load(tmp_path).measurements[1].how
    assert os.listdir(tmp_path) == ["compression.json"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(codec=None), max_size=30),
    number=st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(),
)
@example(text="\ud800", number=0)
@example(text="/home/somebody/model", number=2**70)
@example(text="x" * 20_001, number=1e308)
def test_any_setting_survives_or_is_refused(text: str, number: float, tmp_path: Path) -> None:
    try:
        record = Record(measurements=(measurement(how={"text": text, text: [number]}),))
    except ValidationError:
        return
    facts.save(tmp_path, record)

    found = facts.load(tmp_path)

    assert found == record
    assert type(found.measurements[0].how[text][0]) is type(number)  # type: ignore[index]  # a list, as given


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    for make in (
        lambda: measurement(value),
        lambda: measurement(interval=(0.0, value)),
        lambda: measurement(how={"a": value}),
        lambda: measurement(how={"a": [{"b": value}]}),
        lambda: training(epochs=value),
        lambda: training(settings={"learning_rate": value}),
    ):
        with pytest.raises(ValidationError, match="finite"):
            make()


PATHS = [
    "/home/somebody/model",
    "trained from /home/somebody/model",
    "'/data/x/y'",
    "path=/data/x/",
    "//data/x/y",
    "file:///data",
    "see file:/data",
    "~/models",
    "~somebody/models",
    "C:\\models",
    "c:/models/x",
]


@pytest.mark.parametrize("text", [*PATHS, TOKEN, f"key {TOKEN}"])
def test_paths_and_tokens_are_refused_wherever_text_may_stand(text: str) -> None:
    for make in (
        lambda: measurement(metric=text),
        lambda: measurement(how={"a": text}),
        lambda: measurement(how={"a": [{"b": text}]}),
        lambda: measurement(how={text: 1}),
        lambda: measurement(how={"a": {text: 1}}),
        lambda: data(name=text),
        lambda: training(settings={text: 1}),
        lambda: training(versions={"torch": text}),
        lambda: training(versions={text: "1"}),
        lambda: training(methods=(Method(name="kd", weight=1, settings={text: 1}),)),
        lambda: training(hardware=text),
        lambda: facts.Evidence(file=text, bytes=1, sha256="0" * 64),
    ):
        with pytest.raises(ValidationError, match=r"facts must not hold (an absolute path|a token)"):
            make()


@pytest.mark.parametrize(
    "text",
    [
        "https://arxiv.org/abs/1503.02531/v1",
        "and/or",
        "tokens / second",
        "1/2/3",
        "~3/4 of the rows",
        "{a / b} / {c / d}",
        "onnx/fp16/model.onnx",
        "./x/y",
        "ratio a:b",
        "owner/name",
    ],
)
def test_text_with_slashes_that_is_no_path_is_kept(text: str) -> None:
    assert measurement(metric=text).metric == text


@pytest.mark.parametrize("what", ["host", "home", "user", "HF_TOKEN"])
def test_names_of_this_machine_are_refused_and_the_old_record_stays(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"host": "secretbox", "home": "secrethome", "user": "secretuser", "HF_TOKEN": "sometoken.with+signs"}[what]
    monkeypatch.setattr(socket, "gethostname", lambda: name if what == "host" else "elsewhere")
    monkeypatch.setattr(os.path, "expanduser", lambda path: name if what == "home" else "/elsewhere")
    monkeypatch.setattr(getpass, "getuser", lambda: name if what == "user" else "somebody")
    monkeypatch.setenv("HF_TOKEN", name if what == "HF_TOKEN" else "")
    facts.append(tmp_path, measurement())
    before = (tmp_path / facts.FILE).read_bytes()

    with pytest.raises(ValueError, match=rf"facts must not hold the {what} of this machine \({name[:3]}…\)") as error:
        facts.append(tmp_path, measurement(how={"note": f"made on {name}!"}))

    assert name not in str(error.value)
    assert (tmp_path / facts.FILE).read_bytes() == before
    facts.append(tmp_path, measurement(how={"note": f"not{name}"}))  # a part of a word is another word


def test_a_machine_without_a_user_database_has_no_name_to_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid")

    monkeypatch.setattr(getpass, "getuser", nobody)

    assert facts.append(tmp_path, measurement()).measurements


def test_measurements_are_appended_and_the_newest_is_found(tmp_path: Path) -> None:
    facts.append(tmp_path, measurement(0.25, how={"threads": 1}), measurement(0.5, how={"threads": 2}))
    record = facts.append(tmp_path, measurement(0.75, how={"threads": 1, "batch": 8}), measurement(1.0, variant="onnx"))

    assert record == facts.load(tmp_path)
    assert [found.value for found in record.measurements] == [0.25, 0.5, 0.75, 1.0]
    for how, value in (({}, 0.75), ({"threads": 2}, 0.5), ({"threads": 1}, 0.75), ({"batch": 8}, 0.75)):
        found = record.find("accuracy", **how)
        assert found is not None
        assert found.value == value
    onnx = record.find("accuracy", variant="onnx")
    assert onnx is not None
    assert onnx.value == 1.0
    assert record.find("accuracy", threads=3) is None
    assert record.find("accuracy", subject="teacher") is None


def test_a_failed_append_leaves_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts.append(tmp_path, measurement())

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            facts.append(tmp_path, measurement(0.9))

    assert facts.load(tmp_path) == before
    assert os.listdir(tmp_path) == [facts.FILE]


def test_a_folder_without_a_record_has_an_empty_one(tmp_path: Path) -> None:
    assert facts.load(tmp_path) == Record()


def test_the_part_about_training_is_lifted_from_the_config(tmp_path: Path) -> None:
    made = training()
    config = {"model_type": "bert", "compression": made.model_dump(mode="json", exclude_none=True)}
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert facts.load(tmp_path) == Record(training=facts.load(tmp_path).training)
    assert facts.load(tmp_path).training is not None
    record = facts.append(tmp_path, measurement())
    (tmp_path / "config.json").write_text("{}")

    assert facts.load(tmp_path) == record
    assert record.training is not None
    assert record.training.student == made.student


def test_a_config_without_one_gives_an_empty_record(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')

    assert facts.load(tmp_path) == Record()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"is a record of version 2, this release reads 1\. Update hf-compress"),
        ({"version": "1"}, r"is a record of version '1', this release reads 1"),
        ({"version": None}, r"is a record of version None"),
        ({"extra": 1}, r"extra: Extra inputs are not permitted\. Restore the file"),
        ({"measurements": [{"metric": "m"}]}, r"measurements\.0\.subject: Field required"),
        ({"measurements": [measurement().model_dump() | {"more": 1}]}, r"measurements\.0\.more: Extra inputs"),
        ({"measurements": [measurement().model_dump() | {"how": {"a": TOKEN}}]}, "facts must not hold a token"),
        ({"evidence": [{"file": "a", "bytes": -1, "sha256": "0" * 64}]}, r"evidence\.0\.bytes"),
        ({"evidence": [{"file": "a", "bytes": 1, "sha256": "xyz"}]}, r"evidence\.0\.sha256"),
        ({"training": {}}, r"training\.task: Field required"),
    ],
)
def test_a_malformed_record_names_file_field_and_remedy(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / facts.FILE).write_text(json.dumps({"version": 1} | change))

    with pytest.raises(ForeignFileError, match=message) as error:
        facts.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path / facts.FILE))


def test_a_number_that_is_none_in_the_file_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"version": 1, "measurements": [measurement().model_dump() | {"value": float("nan")}]})
    (tmp_path / facts.FILE).write_text(text)

    with pytest.raises(ForeignFileError, match="NaN is not a JSON number"):
        facts.load(tmp_path)


def evidence(folder: Path) -> list[Path]:
    paths = [folder / "onnx" / "int8" / "model.onnx", folder / "evidence" / "Kurve 1.parquet"]
    for place, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"content %d" % place)
    return paths


def test_files_are_recorded_and_found_unchanged(tmp_path: Path) -> None:
    record = facts.register(tmp_path, evidence(tmp_path))

    assert [entry.file for entry in record.evidence] == ["onnx/int8/model.onnx", "evidence/Kurve 1.parquet"]
    assert [entry.bytes for entry in record.evidence] == [9, 9]
    assert record.evidence[0].sha256 == files.sha256(tmp_path / "onnx/int8/model.onnx")
    facts.check(tmp_path)


@pytest.mark.parametrize("prefix", ["", "onnx/"])
def test_a_flipped_byte_and_a_missing_file_are_found(prefix: str, tmp_path: Path) -> None:
    graph, curve = evidence(tmp_path)
    facts.register(tmp_path, [graph, curve])
    graph.write_bytes(b"content 9")  # as long as before

    with pytest.raises(ForeignFileError, match=r"model\.onnx: has changed since it was recorded"):
        facts.check(tmp_path, prefix)
    facts.check(tmp_path, "evidence/")
    graph.unlink()
    with pytest.raises(ForeignFileError, match=r"model\.onnx: is recorded in compression\.json but missing"):
        facts.check(tmp_path, prefix)


def test_a_file_recorded_again_has_its_later_hash_alone(tmp_path: Path) -> None:
    graph, curve = evidence(tmp_path)
    facts.register(tmp_path, [graph, curve])
    graph.write_bytes(b"longer content")

    record = facts.register(tmp_path, [graph])

    assert sorted((entry.file, entry.bytes) for entry in record.evidence) == [
        ("evidence/Kurve 1.parquet", 9),
        ("onnx/int8/model.onnx", 14),
    ]
    facts.check(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "link", "/etc"])
def test_a_record_that_names_a_file_outside_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "outside")
    entry = {"file": name, "bytes": 6, "sha256": files.sha256(tmp_path / "outside")}
    (folder / facts.FILE).write_text(json.dumps({"version": 1, "evidence": [entry]}))

    with pytest.raises(ForeignFileError, match="leads out of its folder"):
        facts.check(folder)


def test_a_snapshot_of_the_hub_cache_can_be_checked(tmp_path: Path) -> None:
    """Its files are links to the blobs beside it; a changed blob is found through them."""
    source = tmp_path / "source"
    facts.register(source, evidence(source))
    repository = tmp_path / "models--me--model"
    snapshot, blobs = repository / "snapshots" / "0a1b", repository / "blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in source.rglob("*") if path.is_file()]:
        blob, link = blobs / files.sha256(path), snapshot / path.relative_to(source)
        blob.write_bytes(path.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))

    facts.check(snapshot)

    (snapshot / "onnx/int8/model.onnx").resolve().write_bytes(b"content 9")
    with pytest.raises(ForeignFileError, match=r"model\.onnx: has changed"):
        facts.check(snapshot)


def test_the_schema_can_be_produced_and_names_every_part() -> None:
    schema = json.loads(json.dumps(Record.model_json_schema()))

    assert set(schema["properties"]) == {"version", "training", "measurements", "evidence", "licence"}
    assert {"Data", "Evidence", "Measurement", "Method", "Model", "Setting", "Training"} <= set(schema["$defs"])
    assert schema["additionalProperties"] is False


def test_a_record_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        measurement().value = 1.0  # type: ignore[misc]  # on purpose


def test_the_fingerprint_is_of_the_rows_in_order() -> None:
    rows = [{"text": "a", "label": 0}, {"text": "ü \ud800", "label": 1}]
    found = facts.fingerprint(rows)

    assert len(found) == 16
    assert found == facts.fingerprint([{"label": 0, "text": "a"}, rows[1]])
    assert found != facts.fingerprint(rows[::-1])
    assert found != facts.fingerprint([rows[0], rows[1] | {"label": "1"}])
    assert found != facts.fingerprint(rows[:1])


@pytest.mark.parametrize("make", [np.array, torch.tensor, lambda values: bytes(v % 256 for v in values)])
def test_the_fingerprint_is_of_the_whole_content(make: Any) -> None:
    """What `repr` shortens is read in full."""
    values = list(range(5000))
    other = [*values[:2500], 7, *values[2501:]]

    assert facts.fingerprint([{"x": make(values)}]) == facts.fingerprint([{"x": make(values)}])
    assert facts.fingerprint([{"x": make(values)}]) != facts.fingerprint([{"x": make(other)}])


def test_the_fingerprint_of_images_is_of_their_pixels() -> None:
    black, white = (lambda: Image.new("L", (2, 2), 0)), (lambda: Image.new("L", (2, 2), 255))

    assert facts.fingerprint([{"x": black()}]) == facts.fingerprint([{"x": black()}])
    assert facts.fingerprint([{"x": black()}]) != facts.fingerprint([{"x": white()}])
    assert facts.fingerprint([{"x": black()}]) != facts.fingerprint([{"x": Image.new("L", (4, 1), 0)}])


def test_an_object_without_content_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="no content that can be compared between runs"):
        facts.fingerprint([{"x": object()}])


def test_versions_and_hardware_name_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    versions, hardware = facts.versions(), facts.hardware()

    assert versions["python"] == platform.python_version()
    assert "torch" in versions
    assert "cores" in hardware or " x " in hardware
    assert training(versions=versions, hardware=hardware).hardware == hardware
    assert socket.gethostname() not in hardware
