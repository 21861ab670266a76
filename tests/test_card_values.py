"""What `ci/cards` does without an environment: taking a card's code, and comparing its metadata with its record."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_blocks import BARE, OPTIMUM, WHEEL, blocks, write_inputs
from card_values import METRICS, STUDENTS, WITHOUT, Copy, compared
from hf_compress_cards import card, serving
from hf_compress_evaluation import task
from hub.store import card_errors
from PIL import Image

from hf_compress import facts
from hf_compress.facts import Data, Evidence, Measurement, Method, Model, Record, Training

RESULT = Path(__file__).parent.parent / "evaluation" / "results" / "cards.json"
ROWS = Data(name="rows, all of them", rows=9, fingerprint="0" * 16, hub_id="me/rows", config="en", split="test")
OWN = Data(name="mine", rows=9, fingerprint="1" * 16)


def score(metric: str, value: float, data: Data | None = OWN, **rest: Any) -> Measurement:
    return Measurement(metric=metric, value=value, data=data, **({"subject": "student", "unit": "fraction"} | rest))


RECORD = Record(
    training=Training(
        task="text-classification",
        teacher=Model(name="me/big", licence="MIT", architecture="BertForSequenceClassification", parameters=9),
        student=Model(architecture="BertForSequenceClassification", parameters=4, start="layers 0 of 2 of the teacher"),
        methods=(Method(name="kd", weight=1.0), Method(name="taid", weight=1.0)),
        task_weight=1.0,
        data=Data(name="rows", rows=3, fingerprint="2" * 16, licence="mit", hub_id="me/train"),
        steps=1,
        epochs=1.0,
        seconds=1.0,
        seed=0,
        hardware="a processor",
        versions={},
    ),
    measurements=(
        score("accuracy", 0.25),
        score("accuracy", 0.75, ROWS),
        score("accuracy", 0.5),
        score("accuracy", 0.125, variant="onnx_int8"),
        score("f1_macro", 1 / 3),
        score("kl", 0.1, unit="nats"),
        score("accuracy", 0.875, None),
        score("accuracy", 0.9375, subject="teacher"),
        score("latency_median", 0.001, None, unit="seconds"),
    ),
)


def on_hub(folder: Path, record: Record) -> Copy:
    """What a hub would hold of the folder that this record describes."""
    folder.mkdir()
    config = {"architectures": ["BertForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    facts.save(folder, record)
    text = card.write(folder).read_text(encoding="utf-8")
    files = sorted(folder.glob(".eval_results/*.yaml"))
    return Copy(
        name=folder.name,
        card=text,
        record=json.loads((folder / "compression.json").read_text(encoding="utf-8")),
        config=config,
        leaderboards=tuple(yaml.safe_load(path.read_text(encoding="utf-8")) for path in files),
    )


def test_the_metadata_of_a_card_are_those_of_its_record(tmp_path: Path) -> None:
    copy = on_hub(tmp_path / "small", RECORD)
    assert card_errors(copy.card) == []
    assert compared(copy) == (17, [])  # 4 results, 1 leaderboard, 4 tags, 2 metrics; base model, relation and the like
    assert compared(on_hub(tmp_path / "stated", RECORD.model_copy(update={"licence": "gemma"})))[1] == []
    assert compared(on_hub(tmp_path / "nothing", Record()))[1] == []
    other = RECORD.training.model_copy(update={"task": "text-regression", "teacher": None})  # type: ignore[union-attr]
    assert compared(on_hub(tmp_path / "other", RECORD.model_copy(update={"training": other})))[1] == []


def in_card(old: str, new: str) -> Callable[[Copy], Copy]:
    def change(copy: Copy) -> Copy:
        assert old in copy.card
        return replace(copy, card=copy.card.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("license", in_card("license: mit", "license: apache-2.0")),
        ("license", in_card("license: mit\n", "")),
        ("license", lambda copy: replace(copy, record=copy.record | {"licence": "apache-2.0"})),
        ("pipeline_tag", in_card("pipeline_tag: text-classification", "pipeline_tag: token-classification")),
        ("base_model", in_card("- me/big", "- me/bigger")),
        ("base_model_relation", in_card("base_model_relation: finetune\n", "")),
        ("datasets", in_card("- me/train", "- me/test")),
        ("metrics", in_card("- f1\n", "")),
        ("tags", in_card("- taid\n", "")),
        ("model name", in_card("- name: small", "- name: large")),
        ("model-index", in_card("value: 0.125", "value: 0.126")),
        ("model-index", in_card("name: Accuracy, onnx_int8", "name: Accuracy, onnx")),
        ("model-index", in_card("split: test", "split: train")),
        ("model-index", in_card("config: en", "config: de")),
        ("model-index", lambda copy: replace(copy, record=copy.record | {"measurements": []})),
        ("leaderboards", lambda copy: replace(copy, leaderboards=())),
    ],
)
def test_a_value_that_differs_is_named(tmp_path: Path, key: str, change: Callable[[Copy], Copy]) -> None:
    _, faults = compared(change(on_hub(tmp_path / "small", RECORD)))
    assert any(fault.startswith(f"{key}: ") for fault in faults), faults


def test_every_score_that_a_task_may_ask_for_has_a_place_or_is_known_to_have_none() -> None:
    assert {name for names in task.METRICS.values() for name in names} == METRICS.keys() | WITHOUT


# ---------------------------------------------------------------------------------------------- code


def test_each_block_of_a_card_is_run_where_the_card_says(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    (folder / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    names = ("onnx/model.onnx", "onnx/tokenizer.json")
    facts.save(folder, Record(evidence=tuple(Evidence(file=name, bytes=0, sha256="0" * 64) for name in names)))
    found = blocks(card.render(folder, repo_id="me/student"))
    assert [(block.shows, block.home) for block in found] == [
        ("transformers", WHEEL), ("hf_compress", WHEEL), ("optimum", OPTIMUM), ("onnxruntime", BARE),
    ]  # fmt: skip
    assert found[-1].packages == serving.NEEDS["text"]
    assert not any(block.packages for block in found[:-1])
    for block in found:
        compile(block.code, "card", "exec")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```python\nimport jax\n```", "imports jax"),
        ("```python\nprint(1)\n```", "imports nothing"),
        ("```python\nimport onnxruntime\n```", "one line of pip"),
        ("`pip install onnxruntime`\n\n```bash\nls\n```\n\n```python\nimport onnxruntime\n```", "one line of pip"),
        ("`pip install a`, `pip install b`\n\n```python\nimport onnxruntime\n```", "one line of pip"),
        ("`pip install --index-url x a`\n\n```python\nimport onnxruntime\n```", "no name of a package"),
    ],
)
def test_a_block_of_which_nothing_says_where_it_runs_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        blocks(text)


def test_the_files_that_code_names_are_there_when_it_runs(tmp_path: Path) -> None:
    assert write_inputs('open("image.png")\nrun("../other.png", "a b.wav", "speech.wav")', tmp_path) == [
        "image.png", "speech.wav",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "speech.wav"]
    assert Image.open(tmp_path / "image.png").mode == "RGB"
    with wave.open(str(tmp_path / "speech.wav")) as sound:
        assert (sound.getframerate(), sound.getnframes()) == (16_000, 8_000)


# ---------------------------------------------------------------------------------------------- results


def test_every_block_was_run_for_every_student() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert all(row["ok"] for row in found["rows"])
    what = ("hf-compress pull", "transformers", "hf_compress", "optimum", "onnxruntime")
    ran = [(row["student"], row["what"]) for row in found["rows"] if not row["what"].startswith("validated; ")]
    assert ran == [(name, each) for name in STUDENTS for each in what]
    assert [row["student"] for row in found["rows"] if row["what"].startswith("validated; ")] == [*STUDENTS]
    for name, packages in found["packages"].items():
        assert ("torch" in packages) == (not name.endswith(" alone")), name
        assert "pytest" not in packages or name == OPTIMUM
    assert "hf-compress" in found["packages"][WHEEL]
