"""Cards: rendered from the record alone, readable by the hub, and no text of a stranger can become markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import card_blocks
import numpy as np
import pytest
import torch
from hf_compress_cards import figures, plot, render, text, usage, write
from hf_compress_cards.metadata import hub_id
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from prepared import PREPARED
from tiny import MAX_LENGTH, VOCAB, tiny_plain_tokenizer
from tokenizers import pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from hf_compress import facts, onnx, outgoing
from hf_compress.errors import ForeignFileError
from hf_compress.facts import Data, Measurement, Method, Model, Record, Training
from hf_compress.provenance import describe_method
from hf_compress.registry import catalogue, objective

BIBTEX = "@article{hinton2015,\n  title={Distilling the Knowledge in a Neural Network}\n}"
BERT = "BertForSequenceClassification"
TRAINED = Data(name="sentiment", rows=4000, labelled=3000, fingerprint="ab12ab12ab12ab12", hub_id="me/sentiment")
EVALUATED = Data(name="sentiment", rows=1500, fingerprint="cd12cd12cd12cd12", split="test", hub_id="me/sentiment")


def training(**changes: Any) -> Training:
    known = {
        "task": "text-classification",
        "teacher": Model(name="me/teacher", architecture=BERT, parameters=22_700_000, layers=6),
        "student": Model(architecture=BERT, parameters=17_400_000, layers=3, start="layers 0, 2, 4 of teacher"),
        "methods": (Method(name="kd", weight=0.5, settings={"temperature": 2.0}, citation=BIBTEX),),
        "task_weight": 0.5,
        "data": TRAINED.model_copy(update={"licence": "MIT"}),
        "steps": 750,
        "epochs": 3.0,
        "seconds": 412.0,
        "seed": 42,
        "settings": {"learning_rate": 5e-5},
        "hardware": "a processor, 2 cores",
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return Training(**(known | changes))


def measured(subject: str, variant: str, metric: str, value: float, unit: str, **rest: Any) -> Measurement:
    return Measurement(subject=subject, variant=variant, metric=metric, value=value, unit=unit, **rest)


def measurements() -> Iterator[Measurement]:
    for subject, variant, accuracy, size, latency in (
        ("teacher", "torch", 0.871, 90.9e6, 0.0121),
        ("student", "torch", 0.856, 69.6e6, 0.0064),
        ("student", "onnx_int8", 0.851, 17.9e6, 0.0021),
        ("alone", "torch", 0.831, 69.6e6, 0.0064),
    ):
        interval = (accuracy - 0.017, accuracy + 0.017)
        yield measured(subject, variant, "accuracy", accuracy, "fraction", interval=interval, data=EVALUATED)
        yield measured(subject, variant, "bytes", size, "bytes")
        provider = "torch" if variant == "torch" else "CPUExecutionProvider"
        for batch, factor in ((1, 1.0), (32, 20.0)):
            how: dict[str, Any] = {"threads": 1, "batch": batch, "length": 32, "runs": 50, "provider": provider}
            yield measured(subject, variant, "latency_median", latency * factor, "seconds", how=how)
            yield measured(subject, variant, "latency_p90", 1.2 * latency * factor, "seconds", how=how)
    yield measured("student", "torch", "f1_macro", 0.846, "fraction", data=EVALUATED)
    yield measured("student", "torch", "label_loyalty", 0.916, "fraction", data=EVALUATED)
    yield measured("student", "torch", "retention", 0.983, "fraction", interval=(0.968, 0.998))
    yield measured("student", "torch", "gap_closed", 0.625, "ratio", interval=(0.31, 0.94))
    yield measured("student", "torch", "gain", 0.025, "fraction", how={"mcnemar_p": 0.0312})
    yield measured("student", "onnx_int8", "agreement_with_fp32", 0.991, "fraction")


FULL = Record(training=training(), measurements=tuple(measurements()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "student", FULL)


def made(path: Path, record: Record | None, **config: Any) -> Path:
    path.mkdir(parents=True)
    known = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    (path / "config.json").write_text(json.dumps(known | config))
    if record is not None:
        facts.save(path, record)
    return path


INT8 = r"onnx\_int8"
"""As Markdown has it."""


def rows(card: str) -> list[list[str]]:
    """Cells of all table rows."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line.startswith("| ")
    ]


def test_the_tables_hold_what_was_measured_in_a_readable_unit(folder: Path) -> None:
    card = rows(render(folder))
    head = ["model", "variant", "accuracy", "F1 (macro)", "same label as the teacher", "size on disk"]
    assert card[:3] == [
        head,
        ["teacher", "torch", "87.1 % (85.4 to 88.8 %)", "not measured", "–", "90.9 MB"],
        ["student", "torch", "85.6 % (83.9 to 87.3 %)", "84.6 %", "91.6 %", "69.6 MB"],
    ]
    assert card[4][0] == "alone (same start, trained without the teacher)"
    int8 = next(row for row in card if row[1] == INT8 and "ms" in row[2])
    assert int8 == ["student", INT8, "2.1 ms / 2.52 ms", "42 ms / 50.4 ms", "CPUExecutionProvider", "1", "32"]
    assert ["agreement with fp32", "student", INT8, "99.1 %"] in card


def test_what_a_task_asked_for_is_shown_beside_and_slices_by_name(tmp_path: Path) -> None:
    def taken(subject: str) -> Iterator[Measurement]:
        yield measured(subject, "torch", "accuracy", 0.8, "fraction", data=EVALUATED)
        yield measured(subject, "torch", "matthews_correlation", 0.6124, "correlation", interval=(0.5, 0.7))
        yield measured(subject, "torch", "accuracy_by_class", 0.75, "fraction", how={"class": "<b>good</b>"})
        yield measured(subject, "torch", "accuracy_by_length", 0.5, "fraction", how={"tokens": "1-17"})

    kl = measured("student", "torch", "kl", 0.0512, "nats")
    card = rows(render(made(tmp_path / "m", Record(measurements=(*taken("teacher"), *taken("student"), kl)))))
    assert card[:3] == [
        ["model", "variant", "accuracy", "Matthews correlation", "KL from the teacher"],
        ["teacher", "torch", "80.0 %", "0.612 (0.500 to 0.700)", "–"],
        ["student", "torch", "80.0 %", "0.612 (0.500 to 0.700)", "0.0512 nats"],
    ]
    assert ["accuracy by class: &lt;b&gt;good&lt;/b&gt;", "student", "torch", "75.0 %"] in card
    assert ["accuracy by length: 1-17 tokens", "student", "torch", "50.0 %"] in card


def test_the_text_says_how_it_was_made_and_what_follows(folder: Path) -> None:
    card = " ".join(render(folder).split())
    for told in (
        "a BertForSequenceClassification with 17.4 M parameters and 3 layers, distilled from me/teacher (22.7 M",
        "M parameters) with kd. 98.3 %",
        "98.3 % (96.8 to 99.8 %) of the teacher's quality is kept.",
        "62.5 % (31.0 to 94.0 %) of the gap between the same start trained without the teacher and the",
        "2.5 % is the difference in accuracy to the same start trained without the teacher (McNemar p = 0.031).",
        "Start of the student: layers 0, 2, 4 of teacher",
        "4000 rows, 3000 of them labelled, fingerprint ab12ab12ab12ab12, licence MIT",
        "750 steps, 3 epochs, 412 seconds, seed 42, weight of the task's own loss 0.5",
        r"learning\_rate = 5e-05",
        "Measured on sentiment, split test: 1500 rows",
        "No ONNX export is recorded",
    ):  # fmt: skip
        assert told in card
    assert f"```bibtex\n{BIBTEX}\n```" in render(folder)


def test_the_metadata_are_what_the_hub_reads(folder: Path) -> None:
    data = ModelCard(render(folder)).data
    known = {
        key: data.get(key) for key in ("library_name", "pipeline_tag", "base_model", "datasets", "tags", "model_name")
    }
    assert known == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": ["me/teacher"],
        "datasets": ["me/sentiment"],
        "tags": ["distillation", "hf_compress", "kd"],
        "model_name": "student",
    }
    found = {
        (r.metric_type, r.metric_name, r.metric_value, r.dataset_name, r.dataset_type, r.dataset_split)
        for r in data.eval_results
    }
    assert found == {
        ("accuracy", "Accuracy", 0.856, "sentiment", "me/sentiment", "test"),
        ("accuracy", "Accuracy, onnx_int8", 0.851, "sentiment", "me/sentiment", "test"),
        ("f1", "F1 (macro)", 0.846, "sentiment", "me/sentiment", "test"),
    }


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("record", [None, Record()])
def test_a_folder_without_measurements_says_so_and_its_card_is_valid(
    tmp_path: Path, record: Record | None, alone: bool
) -> None:
    made_alone = training(teacher=None, methods=(), settings={}).model_dump(mode="json")
    folder = made(tmp_path / "student", record, **({"compression": made_alone} if alone else {}))
    write(folder)
    card = (folder / "README.md").read_text()
    outgoing._check_card(folder / "README.md")
    assert "Quality, agreement with the teacher and size were not measured." in card
    assert "Latency was not measured." in card
    assert "Not measured: quality against labels;" in card
    assert "latency at batch 1; latency at batch 32" in card
    assert ("How it was trained is not recorded." in card) == (facts.load(folder).training is None)
    assert ("Teacher: none" in card) == (facts.load(folder).training is not None)
    assert "quality_latency" not in card
    assert ModelCard(card).data.get("eval_results") is None
    assert not (folder / "evidence").exists()


def test_a_size_that_nobody_counted_is_not_on_the_card(tmp_path: Path) -> None:
    unknown = training(teacher=Model(name="me/teacher", architecture="served"))
    card = render(made(tmp_path / "student", Record(training=unknown)))
    assert re.findall(r"\S+ \S+ parameters", card) == ["17.4 M parameters"] * 2, card
    with pytest.raises(ValueError, match="must be counted"):
        training(student=Model(architecture=BERT))


def test_a_folder_of_nothing_has_a_card(tmp_path: Path) -> None:
    assert "student is a model. How it was trained is not recorded." in render(tmp_path / "student")


def test_what_the_hub_would_refuse_or_misread_is_left_out(tmp_path: Path) -> None:
    odd = training(
        teacher=Model(name="not a hub id", architecture="X", parameters=1),
        data=Data(name="mine", rows=1, fingerprint="0" * 16, hub_id="a--b"),
        student=Model(architecture="Own", parameters=1),
        task="Text Classification!",
    )
    nameless = Measurement(subject="student", metric="accuracy", value=0.5, unit="fraction")
    folder = made(
        tmp_path / "student", Record(training=odd, measurements=(nameless,)), architectures=None, license=None
    )
    data = ModelCard(render(folder)).data.to_dict()
    assert data == {"library_name": "transformers", "tags": ["distillation", "hf_compress", "kd"]}


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("bert-base-uncased", True),
        ("me/model.v2_x", True),
        ("a b", False),
        ("a/b/c", False),
        ("../x", False),
        ("a--b", False),
        (None, False),
        ("", False),
        ("x.git", False),
    ],
)  # fmt: skip
def test_only_names_that_a_hub_could_know_become_links(name: str | None, valid: bool) -> None:
    assert (hub_id(name) is not None) == valid


def test_the_licence_is_named_where_the_config_knows_it(tmp_path: Path) -> None:
    card = render(made(tmp_path / "student", FULL, license="apache-2.0"))
    assert ModelCard(card).data.license == "apache-2.0"
    assert "licence of this model is not recorded" not in card


def test_a_malformed_record_is_refused_and_no_card_is_written(folder: Path) -> None:
    (folder / "compression.json").write_text('{"version": 2}')
    with pytest.raises(ForeignFileError, match="version"):
        write(folder)
    assert not (folder / "README.md").exists()


def test_the_card_is_written_with_its_plot_as_evidence_and_again_the_same(folder: Path) -> None:
    first = write(folder).read_bytes()
    assert b"(evidence/quality_latency.png)" in first
    facts.check(folder)
    assert [entry.file for entry in facts.load(folder).evidence] == ["evidence/quality_latency.png"]
    image = folder / "evidence/quality_latency.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in image.parent.iterdir()) == [image.name]
    drawn = image.read_bytes()
    assert (write(folder).read_bytes(), image.read_bytes()) == (first, drawn)


def test_the_plot_compares_only_what_was_measured_alike() -> None:
    how: dict[str, Any] = {"threads": 1, "batch": 1, "length": 32, "provider": "CUDAExecutionProvider"}
    other = (
        measured("student", "onnx", "accuracy", 0.9, "fraction"),
        measured("student", "onnx", "latency_median", 0.001, "seconds", how=how),
    )
    condition, drawn = plot.marks(FULL.model_copy(update={"measurements": FULL.measurements + other}))
    assert condition == ("CPU", "1", "32")
    assert [(mark.subject, mark.variant, mark.latency) for mark in drawn] == [
        ("teacher", "torch", 0.0121),
        ("student", "torch", 0.0064),
        ("student", "onnx_int8", 0.0021),
        ("alone", "torch", 0.0064),
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$x^$", "\u540d\u524d", "a\nb", "x" * 300, r"\frac", ""])
def test_the_plot_draws_names_of_any_kind(tmp_path: Path, name: str) -> None:
    how: dict[str, Any] = {"batch": 1, "threads": name, "provider": name}
    odd = (
        measured(name, name, "accuracy", 1.0, "fraction"),
        measured(name, name, "latency_median", 3e-3, "seconds", how=how),
    )
    assert plot.draw(Record(measurements=odd), tmp_path / "plot.png") == tmp_path / "plot.png"


def test_the_newest_measurement_counts(tmp_path: Path) -> None:
    later = measured("student", "torch", "accuracy", 0.9, "fraction", data=EVALUATED)
    folder = made(tmp_path / "student", FULL.model_copy(update={"measurements": (*FULL.measurements, later)}))
    assert rows(render(folder))[2][2] == "90.0 %"
    assert 0.9 in [result.metric_value for result in ModelCard(render(folder)).data.eval_results]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.5, "fraction", "50.0 %"),
        (22_713_216, "count", "22.7 M"),
        (812, "count", "812"),
        (91_300_000, "bytes", "91.3 MB"),
        (12, "bytes", "12 B"),
        (0.00412, "seconds", "4.12 ms"),
        (1.25, "nats", "1.25 nats"),
    ],
)
def test_values_are_shown_in_the_unit_of_a_reader(value: float, unit: str, shown: str) -> None:
    assert figures.show(measured("student", "torch", "x", value, unit)) == shown


NASTY = [
    "<script>alert(1)</script>",
    "<!-- ",
    "<b",
    "&lt;b&gt;",
    "<https://evil.test>",
    "https://evil.test",
    "www.evil.test",
    "[x](https://evil.test)",
    "![x](http://evil.test/p.png)",
    "a|b",
    "\\",
    "\\|",
    "---",
    "a\n---\nb",
    "\n---\n",
    "a\r\nb",
    "\x85---\x85",
    "\u2028---\u2028",
    "```",
    "``` \n---\n# out\n```",
    "`a`",
    "{{ 7 * 7 }}",
    "{% include 'x' %}",
    "# h",
    "$x$",
    "*b*",
    "_i_",
    "~~s~~",
    "\u202eabc",
    "null",
    "true",
    "3",
    "2024-01-01",
    "- a",
    "a: b",
    "'",
    '"',
    "%",
    "@x",
    "!tag",
    "&a",
    "*a",
    "x" * 600,
    "\u540d\u524d",
    "\u00e9",
]
hostile = st.sampled_from(NASTY) | st.text(max_size=40) | st.lists(st.sampled_from(NASTY), max_size=4).map("".join)


def hostile_record(t: list[str]) -> Record:
    data = Data(name=t[0], rows=1, fingerprint=t[1], licence=t[2], split=t[3], config=t[4])
    how = {"threads": t[5], "batch": 1, "length": t[6], "provider": t[7]}
    return Record(
        training=training(
            teacher=Model(name=t[0], revision=t[1], architecture=t[2], parameters=1),
            student=Model(architecture=t[3], parameters=1, start=t[4]),
            methods=(Method(name=t[5], weight=1, settings={t[6]: t[7], "list": [t[0], {t[1]: None}]}, citation=t[2]),),
            data=data,
            settings={t[3]: t[4]},
            hardware=t[5],
            versions={t[6]: t[7]},
            task=t[0],
        ),
        measurements=(
            Measurement(subject="student", variant=t[1], metric="accuracy", value=0.5, unit="fraction", data=data),
            Measurement(subject=t[2], variant=t[3], metric=t[4], value=1, unit=t[5], data=data),
            Measurement(subject=t[2], variant=t[3], metric="latency_median", value=1, unit="seconds", how=how),
        ),
    )


MARK = re.compile(r"<!-- hf-compress: (?:end )?\w+ -->")


@settings(max_examples=60, deadline=None)
@given(st.lists(hostile, min_size=8, max_size=8), hostile)
def test_no_text_of_a_stranger_becomes_markup(texts: list[str], architecture: str) -> None:
    try:
        record = hostile_record(texts)
    except ValueError:  # a path, a token or half a surrogate pair: the record refuses it
        assume(False)
    with tempfile.TemporaryDirectory() as place:
        folder = made(Path(place) / "student", record, architectures=[architecture])
        card = render(folder)
        (folder / "README.md").write_text(card, encoding="utf-8", newline="")
        outgoing._check_card(folder / "README.md")

    assert len([line for line in re.split(r"\r\n|\r|\n|\x85|\u2028", card) if line.rstrip() == "---"]) == 2
    block = REGEX_YAML_BLOCK.search(card)
    assert block is not None
    body = card[block.end() :]
    assert REGEX_YAML_BLOCK.search(body) is None
    assert not re.search(r"<[A-Za-z/!?]", MARK.sub("", body))
    marks = MARK.findall(body)
    assert marks[0::2] == [mark.replace(" end ", " ") for mark in marks[1::2]]
    check_markdown(MARK.sub("", body))

    data = ModelCard(card).data
    assert data.tags == [
        name for name in dict.fromkeys(["distillation", "hf_compress", text.plain(texts[5], 80)]) if name
    ]
    for result in data.eval_results or []:
        assert (result.dataset_name, result.metric_value) == (text.plain(texts[0]), 0.5)
        assert result.dataset_config in (text.plain(texts[4]), None)


def check_markdown(body: str) -> None:
    """By a CommonMark parser: no HTML, no link, no foreign image, no heading but ours, tables whole."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    ours = {"h1", "Results", "Speed", "Other measurements", "How it was made", "Use", "Limits", "Citation"}
    for token, following in zip(tokens, [*tokens[1:], tokens[-1]], strict=True):
        assert token.type not in ("html_block", "hr", "blockquote_open", "code_block", "s_open")
        if token.type == "heading_open":
            assert token.tag == "h1" or following.content in ours
        kinds = {child.type for child in token.children or []}
        assert kinds <= {"text", "softbreak", "text_special", "code_inline"}, (kinds, token.content)
    assert sum(token.type == "heading_open" and token.tag == "h1" for token in tokens) == 1


@settings(max_examples=200, deadline=None)
@given(hostile)
def test_an_escaped_text_shows_what_it_was_made_from(value: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    (inline,) = [token for token in parser.parse(f"| a |\n|---|\n| x{text.escape(value)} |") if token.type == "inline"][
        1:
    ]
    shown = "".join(child.content for child in inline.children or [])
    assert shown.strip() == f"x{text.plain(value)}"


@settings(max_examples=200, deadline=None)
@given(hostile)
def test_a_code_block_cannot_be_left(value: str) -> None:
    tokens = MarkdownIt("commonmark", {"html": True}).parse(f"{text.fence(value, 'bibtex')}\n\nafter")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


@settings(max_examples=200, deadline=None)
@given(hostile)
def test_a_name_in_the_usage_code_stays_a_name(value: str) -> None:
    assert eval(text.literal(value)) == text.plain(value)
    code = usage.torch_code(value, "text-classification", None)
    compile(code, "card", "exec")
    assert code.count("\n") == 4


def blocks(card: str) -> list[str]:
    return [code for code, _ in card_blocks.python(card)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import tiny_bert_classifier, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "student"
    tiny_bert_classifier().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_code_for_torch_runs(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.parent)
    (code,) = blocks(render(tiny))
    exec(code, {})
    assert "'label': 'LABEL_" in capsys.readouterr().out


def test_the_code_for_onnx_runtime_runs_and_agrees(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "student"))
    onnx.export_onnx(folder)
    monkeypatch.chdir(tmp_path)
    torch_code, onnx_code, optimum_code, _ = blocks(render(folder))  # the last without torch: tests/test_serving.py
    compile(optimum_code, "card", "exec")  # Optimum lives in another environment
    assert 'ORTModelForSequenceClassification.from_pretrained("student", subfolder="onnx")' in optimum_code
    capsys.readouterr()
    exec(torch_code, {})
    exec(onnx_code, {})
    by_torch, by_onnx = (
        re.findall(r"'label': '(\w+)', 'score': ([\d.]+)", line) for line in capsys.readouterr().out.splitlines()
    )
    assert by_torch[0][0] == by_onnx[0][0]
    assert float(by_torch[0][1]) == pytest.approx(float(by_onnx[0][1]), abs=1e-4)
    names = {path.as_posix() for path in outgoing.collect(folder)}
    assert names >= {f"onnx/{path.name}" for path in (folder / "onnx").iterdir()}


@pytest.mark.parametrize(
    ("architecture", "tag", "told"),
    [
        ("LlamaForCausalLM", "text-generation", 'pipeline("text-generation"'),
        ("GPT2LMHeadModel", "text-generation", 'pipeline("text-generation"'),
        ("BertForMaskedLM", "fill-mask", "mask_token"),
        ("BertForQuestionAnswering", "question-answering", "BertForQuestionAnswering.from_pretrained"),
        ("ViTForImageClassification", "image-classification", "ViTForImageClassification.from_pretrained"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition", '"speech.wav"'),
        ("T5ForConditionalGeneration", "text2text-generation", "model.generate(**inputs, max_new_tokens=100)"),
        ("MarianMTModel", "text2text-generation", "model.generate(**inputs, max_new_tokens=100)"),
        ("BertModel", "feature-extraction", 'pipeline("feature-extraction"'),
    ],
)
def test_the_task_follows_from_the_head(tmp_path: Path, architecture: str, tag: str, told: str) -> None:
    card = render(made(tmp_path / "student", None, architectures=[architecture]))
    assert ModelCard(card).data.pipeline_tag == tag
    assert told in blocks(card)[0]


def language_model() -> tuple[Any, Any]:
    config = LlamaConfig(
        vocab_size=len(VOCAB), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH, initializer_range=0.5, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config), tiny_plain_tokenizer()


def encoder_decoder() -> tuple[Any, Any]:
    config = BartConfig(
        vocab_size=len(VOCAB), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128, init_std=0.5,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config), tiny_plain_tokenizer()


def speech_model() -> tuple[Any, Any]:
    """Whisper for one second of sound, with a tokenizer of single bytes."""
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: at for at, name in enumerate([*letters, *names])}
    end, start = (vocab[name] for name in names[:2])
    config = WhisperConfig(
        vocab_size=len(vocab), num_mel_bins=8, encoder_layers=1, decoder_layers=1, d_model=16, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=50,
        max_target_positions=300, init_std=0.5, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=start, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], additional_special_tokens=names[1:])
    return WhisperForConditionalGeneration(config), WhisperProcessor(
        WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer
    )


@pytest.mark.parametrize(
    ("made", "variant_files", "head"),
    [
        (language_model, {"model.onnx"}, "ORTModelForCausalLM"),
        (encoder_decoder, {"encoder_model.onnx", "decoder_model_merged.onnx"}, "ORTModelForSeq2SeqLM"),
        (speech_model, {"encoder_model.onnx", "decoder_model_merged.onnx"}, "ORTModelForSpeechSeq2Seq"),
    ],
)
def test_the_code_of_what_generates_runs_and_agrees(
    made: Any,
    variant_files: set[str],
    head: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    model, processor = made()
    model.eval().save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    onnx.export_onnx(tmp_path / "student")
    sound = np.sin(np.arange(12_000, dtype=np.float32) ** 1.3)
    monkeypatch.chdir(tmp_path)
    Path("speech.wav").write_bytes(b"")
    speech = "transformers.pipelines.automatic_speech_recognition"
    monkeypatch.setattr(f"{speech}.ffmpeg_read", lambda content, rate: sound)  # a program that is not everywhere

    torch_code, onnx_code, optimum_code, *served = blocks(render(tmp_path / "student"))
    assert {path.name for path in (tmp_path / "student" / "onnx").glob("*.onnx")} == variant_files
    assert usage.onnx_variants(facts.load(tmp_path / "student")) == ["onnx"]
    assert len(served) == (made is language_model)
    assert "from hf_compress import load_onnx" in onnx_code
    assert f'{head}.from_pretrained("student", subfolder="onnx")' in optimum_code
    capsys.readouterr()
    torch.manual_seed(0)  # the pipeline for text draws
    exec(torch_code, {})
    by_torch = capsys.readouterr().out
    torch.manual_seed(0)
    exec(onnx_code, {})
    assert capsys.readouterr().out == by_torch
    assert len(set(by_torch)) > 9, by_torch  # not one token again and again


def test_rendering_imports_no_torch() -> None:
    code = (
        "import sys, hf_compress_cards; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TRAINING = sorted(name for name, entry in catalogue().methods.items() if "objective" in entry.parts)


@pytest.mark.parametrize("name", TRAINING)
def test_each_method_is_named_with_its_settings_and_its_citation(tmp_path: Path, name: str) -> None:
    method = describe_method(objective(name)(**PREPARED.get(name, {}).get("settings", {})))
    card = render(made(tmp_path / "student", Record(training=training(methods=(method,)))))
    (row,) = [cells for cells in rows(card) if cells[0] == text.escape(name)]
    for setting, value in method.settings.items():
        assert text.escape(setting) in row[2], setting
        if isinstance(value, int) and not isinstance(value, bool):
            assert str(value) in row[2], setting
    declared = catalogue().methods[name].declared
    assert f"```bibtex\n{declared['bibtex']}\n```" in card
    assert f"with {text.escape(name)}." in " ".join(card.split())


def test_two_data_sets_are_told_apart(tmp_path: Path) -> None:
    def score(name: str, value: float, subject: str = "student", metric: str = "spearmanr") -> Measurement:
        data = Data(name=name, rows=9, labelled=9, fingerprint=name * 8)
        unit = "ratio" if metric == "retention" else "correlation"
        return Measurement(
            subject=subject, metric=metric, value=value, unit=unit, data=data, how={"metric": "spearmanr"}
        )

    record = Record(
        measurements=(
            *(score("ab", 0.25), score("ab", 0.5, "teacher"), score("ab", 0.5, metric="retention")),
            *(score("cd", 0.75), score("cd", 0.8, "teacher"), score("cd", 0.9375, metric="retention")),
            Measurement(subject="student", metric="bytes", value=1000, unit="bytes"),
        )
    )
    text = render(made(tmp_path / "student", record))
    for line in (
        "| teacher | torch | ab | 0.500 | not measured |",
        "| student | torch | ab | 0.250 | 1 kB |",
        "| student | torch | cd | 0.750 | 1 kB |",
        "- 50.0 % of the teacher's quality is kept on ab.",
        "- 93.8 % of the teacher's quality is kept on cd.",
    ):
        assert line in text, line


def test_one_layer_is_one(tmp_path: Path) -> None:
    data = Data(name="rows", rows=1, fingerprint="0" * 16)
    small, big = (Model(architecture=BERT, parameters=5, layers=number) for number in (1, 2))
    training = Training(
        task="text-classification", teacher=big, student=small, methods=(), task_weight=1.0, data=data, steps=1,
        epochs=1.0, seconds=1.0, seed=0, hardware="a processor", versions={},
    )  # fmt: skip
    text = render(made(tmp_path / "student", Record(training=training)))
    assert "5 parameters and 1 layer, distilled" in text
    assert "5 parameters, 1 layer\n" in text
    assert "5 parameters, 2 layers\n" in text
