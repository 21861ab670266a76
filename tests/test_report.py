"""The report: one page of everything that is known and of where student and teacher differ, for its maker alone."""

from __future__ import annotations

import ast
import html
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hf_compress_cards
import jinja2
import numpy as np
import pytest
from hf_compress_cards import curves, plot, report, svg, text
from hf_compress_evaluation import quality
from hf_compress_evaluation import report as measuring
from hf_compress_evaluation.folder import Timing, evaluate_folder
from hf_compress_evaluation.scoring.classes import Classes
from hf_compress_evaluation.task import read_task
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2 import nodes
from recipes import write_rows, write_teacher
from test_cards import EVALUATED, FULL, NASTY, hostile, hostile_record, made, measured, training
from test_cli import Said, call
from tiny import tiny_tokenizer
from transformers import BertConfig, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_compress import DistillCallback, facts, fitting, outgoing, shrink, trainer_log
from hf_compress.comparison import ClassShare, Comparison, Disagreement, Right, Share
from hf_compress.errors import ConfigurationError, ForeignFileError, MismatchError
from hf_compress.facts import Record

# ---------------------------------------------------------------------- what a page is made from


def logged(count: int, terms: tuple[str, ...] = ("distill/kd",)) -> list[dict[str, Any]]:
    """What a Trainer logs of so many values and two evaluations."""
    found: list[dict[str, Any]] = []
    for at in range(1, count + 1):
        falling = math.exp(-3 * at / count)
        entry = {"step": 10 * at, "loss": 1 + falling, "task_loss": 0.6 + falling / 2, "distill_loss": 0.4 + falling}
        found.append({**entry, **dict.fromkeys(terms, 40 * falling**2 + 0.01), "grad_norm": math.nan})
    found += [{"step": 5 * count * at, "eval_loss": 1 / at, "eval_distill_loss": 0.5 / at} for at in (1, 2)]
    return [*found, {"step": 10 * count, "train_loss": 1.2, "train_runtime": 3.0}]


def written(path: Path, log: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"log_history": log, "best_model_checkpoint": "/root/secret/checkpoint-10"}))
    return path


def compared(texts: list[str], names: tuple[str, str] = ("negative", "positive")) -> Comparison:
    def share(rows: int, value: float) -> Share:
        return Share(rows=rows, value=value, interval=(value - 0.03, value + 0.03))

    return Comparison(
        teacher="me/teacher",
        variant="torch",
        data=EVALUATED,
        same=share(1500, 0.916),
        classes=tuple(
            ClassShare(name=name, same=share(750, 0.9), instead=(other, 70)) for name, other in (names, names[::-1])
        ),
        differ=126,
        right=Right(teacher=70, student=50, neither=6),
        examples=tuple(
            Disagreement(
                row=7 * at, text=each, teacher=names[0], teacher_probability=0.987, student=names[1],
                student_probability=0.91, label=names[0],
            )
            for at, each in enumerate(texts)
        ),
    )  # fmt: skip


class Page(HTMLParser):
    """Elements, attributes and texts of a page, whose tags must close in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.others: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.texts).split())


OURS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "p", "strong",
    "code", "ul", "ol", "li", "dl", "dt", "dd", "div", "span", "table", "thead", "tbody", "tr", "th", "td", "figure",
    "figcaption", "blockquote",
}  # fmt: skip
NAMES = {
    "lang", "charset", "name", "content", "http-equiv", "class", "role", "aria-label", "tabindex", "scope", "dir",
    "style", "viewbox", "d", "id", "x", "y", "width", "height", "transform", "clip-path", "href", "stroke-linejoin",
    "stroke-linecap",
}  # fmt: skip


def check(source: str) -> Page:
    """Only our elements and attributes, nothing that is fetched, nothing that runs."""
    page = Page(source)
    assert page.tags <= OURS | {tag.lower() for tag in svg.TAGS}
    assert {name for _, name, _ in page.attributes} <= NAMES
    assert page.others == []
    for tag, name, value in page.attributes:
        assert name != "href" or re.fullmatch("#m[0-9a-f]+", value), (tag, value)
        urls = [] if name == "aria-label" else re.findall(r"url(\S*)", value)
        assert all(re.fullmatch(r"\(#p[0-9a-f]+\)", each) for each in urls), (tag, value)
        assert "//" not in value or name == "aria-label"
    assert "//" not in "".join(re.findall(r"<style>(.*?)</style>", source, re.DOTALL))
    return page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "student", FULL)


# ---------------------------------------------------------------------- the page


def test_the_page_holds_what_was_measured_and_how_it_was_made(folder: Path) -> None:
    written(folder / "trainer_state.json", logged(12))
    source = report.render(folder, comparison=compared(["the film was not good"]))
    shown = check(source).shown
    for told in (
        "A BertForSequenceClassification with 17.4 M parameters and 3 layers, distilled from me/teacher (22.7 M",
        "98.3 % (96.8 to 99.8 %) of the teacher's quality is kept.",
        "layers 0, 2, 4 of teacher",
        "4000 rows, fingerprint ab12ab12ab12ab12, licence MIT; 3000 rows labelled",
        "weight 0.5; temperature = 2.0",
        "750 steps, 3 epochs, 412 seconds, seed 42",
        "Losses in training : loss task_loss distill_loss",
        "distill/kd, before its weight",
        "Losses in evaluation : eval_loss eval_distill_loss",
        "decides as me/teacher does in 91.6 % (88.6 to 94.6 %) of 1500 rows, and differently in 126.",
        "the label is the teacher's in 70, the student's in 50, and neither's in 6.",
        "negative 750 90.0 % (87.0 to 93.0 %) positive (70)",
        "the film was not good teacher: negative 98.7 % student: positive 91.0 % label: negative row 0",
        "For you alone: this page holds rows of your data.",
    ):  # fmt: skip
        assert told in shown, told
    assert "secret" not in source
    first = [re.sub("<[^>]+>", "|", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", source)[:4]]
    assert [row.split("|")[1] for row in first] == [
        "teacher", "alone (same start, trained without the teacher)", "student", "student",
    ]  # fmt: skip
    assert (
        first[3] == "|student||onnx_int8||85.1 % (83.4 to 86.8 %)||not measured||not measured||17.9 MB||2.1 ms||42 ms|"
    )


def test_the_page_stands_alone_and_fits_a_phone_and_paper(folder: Path) -> None:
    source = report.render(folder)
    page = check(source)
    assert source.startswith("<!DOCTYPE html>\n")
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'" in source
    assert "@media print" in source
    assert len(source) < 200_000
    assert source == report.render(folder)  # the same again


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    shown = check(report.render(made(tmp_path / "student", None))).shown
    for told in (
        "How this model was trained is not recorded.",
        "Quality, agreement with the teacher and size were not measured.",
        "latency at batch 1",
        "the course of the training (no trainer_state.json was given or lies in the folder)",
        "which rows student and teacher decide differently (--task and --teacher were not given)",
    ):
        assert told in shown
    for absent in ("For you alone", "Latency under every condition", "Training Losses", "row by row"):
        assert absent not in shown


def test_earlier_stages_are_told_each(tmp_path: Path) -> None:
    staged = training(before=(training(steps=11, teacher=None, task="fill-mask"),))
    shown = check(report.render(made(tmp_path / "student", Record(training=staged)))).shown
    assert shown.index("Stage 1 Task fill-mask") < shown.index("11 steps") < shown.index("Stage 2 Task text-class")


# ---------------------------------------------------------------------- texts of strangers


HTML = [
    "</title><script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "--><b>",
    "]]><svg onload=alert(1)>", "&lt;b&gt;", "</svg><script>", "{{ 7 * 7 }}", "{% raw %}", "\ufffe\uffff\x0b\u202eabc",
    "<a href=javascript:alert(1)>x</a>", "x" * 3000, "url(https://evil.test)", "$\\frac{1}{2}$",
]  # fmt: skip


def test_no_text_of_any_kind_becomes_markup(tmp_path: Path) -> None:
    for at, nasty in enumerate(HTML):
        try:
            record = hostile_record([nasty] * 8)
        except ValueError:  # the record refuses it
            record = Record()
        folder = made(tmp_path / f"{at}", record, architectures=[nasty])
        log = written(tmp_path / f"{at}.json", [{"step": 1, f"distill/{nasty}": 1.0, f"eval_{nasty}loss": 2.0}])
        page = check(report.render(folder, history=log, comparison=compared([nasty], (nasty, nasty[::-1]))))
        shown = text.plain(nasty)[:400]
        assert " ".join(shown.split()) in page.shown


@settings(max_examples=15, deadline=None)
@given(st.lists(hostile, min_size=8, max_size=8), hostile)
def test_no_text_of_a_stranger_becomes_markup(texts: list[str], architecture: str) -> None:
    try:
        record = hostile_record(texts)
    except ValueError:  # a path, a token or half a surrogate pair: the record refuses it
        assume(False)
    with tempfile.TemporaryDirectory() as place:
        folder = made(Path(place) / "student", record, architectures=[architecture])
        check(report.render(folder, comparison=compared(texts, (texts[0], architecture))))


def test_names_in_a_plot_are_texts(tmp_path: Path) -> None:
    how: dict[str, Any] = {"batch": 1, "threads": 1, "provider": "cpu", "length": 8}
    found = []
    for at, nasty in enumerate([*HTML, *NASTY][: plot.MARKS - 5]):
        found.append(measured(nasty, "torch", "accuracy", 0.5 + at / 100, "fraction"))
        found.append(measured(nasty, "torch", "latency_median", 1e-3 * (at + 1), "seconds", how=how))
    page = check(report.render(made(tmp_path / "student", Record(measurements=tuple(found)))))
    assert "</title><script>alert(1)</script>, torch" in page.shown


def test_markup_is_made_in_one_place_and_the_template_marks_none() -> None:
    calls = [
        path.stem
        for path in Path(hf_compress_cards.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Markup")
    ]
    assert calls == ["svg"]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("hf_compress_cards"))
    assert environment.loader is not None
    tree = environment.parse(environment.loader.get_source(environment, "report.html.jinja")[0])
    assert {found.name for found in tree.find_all(nodes.Filter)} == {"join", "map", "length"}
    assert not list(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)))
    assert report._template().environment.autoescape is True


# ---------------------------------------------------------------------- it stays here


@pytest.mark.parametrize(
    "prefix", ["", "evidence/", "evidence/a/", "onnx/", "onnx_int8/", "additional_chat_templates/"]
)
def test_the_allow_list_of_a_push_refuses_a_report(prefix: str) -> None:
    for name in ("report.html", "a.html", "model.html", "README.html", "config.json.html", "compression.html"):
        assert not outgoing.ALLOWED.fullmatch(prefix + name)


def test_a_report_in_the_folder_is_not_collected(folder: Path) -> None:
    written(folder / "trainer_state.json", logged(2))
    for name in ("report.html", "evidence/report.html", "onnx/report.html"):
        (folder / name).parent.mkdir(exist_ok=True)
        report.write(folder, folder / name, comparison=compared(["mine"]))
    assert sorted(path.as_posix() for path in outgoing.collect(folder)) == ["compression.json", "config.json"]
    assert "report.html" in outgoing._stays(folder, outgoing.collect(folder))
    assert facts.load(folder) == FULL


@pytest.mark.parametrize("name", ["README.md", "report", "report.htm", "LICENSE.html", "evidence/rows.json", "a.svg"])
def test_a_name_that_a_push_might_send_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="never be pushed"):
        report.write(folder, folder / name)
    assert not (folder / name).exists()


# ---------------------------------------------------------------------- curves


def test_losses_and_terms_have_a_panel_each_and_a_gap_where_nothing_finite_is(tmp_path: Path) -> None:
    log = logged(3, ("distill/kd", "distill/features"))
    log[1]["loss"] = math.nan
    log[2]["distill/kd"] = 1e300
    log[0]["task_loss"] = "high"
    found = curves.panels(written(tmp_path / "s.json", log))
    assert [(panel.title, [curve.name for curve in panel.curves]) for panel in found] == [
        ("Losses in training", ["loss", "task_loss", "distill_loss"]),
        ("Losses in evaluation", ["eval_loss", "eval_distill_loss"]),
        ("distill/kd, before its weight", ["distill/kd"]),
        ("distill/features, before its weight", ["distill/features"]),
    ]
    assert [curve.steps for curve in found[0].curves] == [(10, 30), (20, 30), (10, 20, 30)]
    assert found[2].curves[0].steps == (10, 20)
    assert found[1].curves[0].values == (1.0, 0.5)


def test_a_long_curve_is_drawn_as_means_and_says_so(tmp_path: Path, folder: Path) -> None:
    log = written(tmp_path / "s.json", [{"step": at, "loss": float(at)} for at in range(1, 3 * curves.POINTS + 1)])
    (panel,) = curves.panels(log)
    assert (len(panel.curves[0].values), panel.curves[0].of) == (curves.POINTS, 3 * curves.POINTS)
    assert panel.curves[0].values[:2] == panel.curves[0].steps[:2] == (2, 5)
    assert "loss: 900 values, drawn as means of 300 parts." in report.render(folder, history=log)


def test_the_log_of_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    assert trainer_log.find(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "other"):
        written(tmp_path / name / trainer_log.FILE, [])
    assert trainer_log.find(tmp_path) == tmp_path / "checkpoint-10" / trainer_log.FILE
    own = written(tmp_path / trainer_log.FILE, [])
    assert trainer_log.find(tmp_path) == own


@pytest.mark.parametrize("log", [None, "loss", {"loss": 1}, [1], ["loss"]])
def test_what_is_no_log_is_refused(tmp_path: Path, log: Any) -> None:
    with pytest.raises(ForeignFileError, match="log_history"):
        curves.panels(written(tmp_path / "s.json", log))


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path, folder: Path) -> None:
    odd = [{"step": True, "loss": 1}, {"step": 1}, {"loss": 1}, {"step": 10**40, "loss": 1}, {"step": 1, "loss": None}]
    assert curves.panels(written(tmp_path / "s.json", odd)) == ()
    many = logged(2, tuple(f"distill/{at}" for at in range(curves.PANELS)))
    source = report.render(folder, history=written(tmp_path / "many.json", many))
    assert len(re.findall("<svg", source)) == 1 + curves.PANELS
    assert "Not drawn: distill/10, before its weight; distill/11, before its weight." in source


# ---------------------------------------------------------------------- student and teacher


def test_agreement_and_disagreements_by_hand() -> None:
    """Four rows, two classes: the teacher chooses 0 0 0 1, the student 0 1 1 1."""
    names = ["no", "yes"]
    teacher = np.log(np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], np.float32))
    student = np.log(np.array([[0.9, 0.1], [0.3, 0.7], [0.1, 0.9], [0.2, 0.8]], np.float32))
    labels, differing = np.array([0, 1, 0, 1]), np.array([1, 2])
    chosen = {"teacher": teacher.argmax(-1), "student": student.argmax(-1)}

    no, yes = measuring._classes(chosen["student"], chosen["teacher"], names, 0)
    assert (no.name, no.same.rows, no.same.value, no.instead) == ("no", 3, pytest.approx(1 / 3), ("yes", 2))
    assert (yes.name, yes.same.rows, yes.same.value, yes.instead) == ("yes", 1, 1.0, None)
    assert measuring._right(chosen, labels, differing) == Right(teacher=1, student=1, neither=0)

    logits = {"teacher": teacher, "student": student}
    first, second = measuring._examples(logits, ("a", "b", "c", "d"), labels, names, differing)
    assert (first.text, first.row, first.teacher, first.student, first.label) == ("b", 1, "no", "yes", "yes")
    assert (first.teacher_probability, first.student_probability) == pytest.approx((0.8, 0.7))
    assert (second.text, second.label) == ("c", "no")
    assert measuring._examples(logits, ("a",) * 4, None, names, differing[:0]) == ()


def test_no_more_rows_and_classes_are_shown_than_a_page_holds() -> None:
    rng = np.random.default_rng(0)
    logits = {who: rng.normal(size=(400, 80)).astype(np.float32) for who in ("teacher", "student")}
    names = [str(index) for index in range(80)]
    found = measuring._examples(logits, ("a",) * 400, None, names, np.arange(400))
    sure = [min(each.teacher_probability, each.student_probability) for each in found]
    assert len(found) == measuring.EXAMPLES
    assert sure == sorted(sure, reverse=True)
    classes = measuring._classes(logits["student"].argmax(-1), logits["teacher"].argmax(-1), names, 0)
    assert len(classes) == measuring.CLASSES
    assert [each.same.rows for each in classes] == sorted((each.same.rows for each in classes), reverse=True)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `student` was distilled from `big` and measured, `alone` beside it, and `task.yaml`."""
    place = tmp_path_factory.mktemp("real")
    teacher, tokenizer = write_teacher(place / "big"), tiny_tokenizer()
    write_rows(place / "test.csv", 60)
    (place / "task.yaml").write_text("task: text-classification\ndata: test.csv\n")
    words = [f"the {noun} was {how}" for noun, how in itertools.product(("film", "book", "end"), ("good", "bad"))]
    rows = fitting.encode(tokenizer, words, np.array([1, 0] * 3), 16)
    shrink(teacher, layers=2).save_pretrained(place / "alone")
    tokenizer.save_pretrained(place / "alone")
    trainer = Trainer(
        model=shrink(teacher, layers=2),
        processing_class=tokenizer,
        args=TrainingArguments(
            str(place / "student"), max_steps=8, logging_steps=1, eval_strategy="steps", eval_steps=2,
            save_strategy="no", learning_rate=1e-3, report_to=[], disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[DistillCallback(teacher)],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    evaluate_folder(
        place / "student",
        task=place / "task.yaml",
        teacher=place / "big",
        alone=place / "alone",
        timing=Timing(batches=(1,), length=8, runs=2, warmup=1),
    )
    return place


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    return lambda *arguments: call(capsys, *arguments)


def test_the_command_writes_the_page_of_a_real_run_and_nothing_else(
    real: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    before = {path.name: path.read_bytes() for path in (real / "student").iterdir()}
    page = tmp_path / "report.html"
    said = command(
        "report", real / "student", "--output", page, "--task", real / "task.yaml", "--teacher", real / "big"
    )
    assert (said.code, said.out) == (0, ""), said.err
    assert said.err.endswith(f"wrote {page}, which is never pushed\n")
    assert {path.name: path.read_bytes() for path in (real / "student").iterdir()} == before
    source = page.read_text(encoding="utf-8")
    shown = check(source).shown
    assert len(re.findall("<svg", source)) == 1 + 2 + 2  # quality, two of losses, kd and features
    assert "decides as big does in" in shown
    assert str(real) not in source


def test_the_comparison_is_that_of_the_record(real: Path) -> None:
    found = measuring.compare(real / "student", task=real / "task.yaml", teacher=real / "big")
    recorded = facts.load(real / "student").find("label_loyalty")
    assert recorded is not None
    assert (found.same.value, found.same.interval, found.data) == (recorded.value, recorded.interval, recorded.data)
    assert found.differ == round(60 * (1 - found.same.value)) > 0
    assert sum(each.same.rows for each in found.classes) == 60
    assert found.right is not None
    assert found.right.teacher + found.right.student + found.right.neither == found.differ
    assert len(found.examples) == min(found.differ, measuring.EXAMPLES)
    for each in found.examples:
        assert each.teacher != each.student
        assert each.text == texts_of(real)[each.row]


def texts_of(real: Path) -> tuple[str, ...]:
    return (
        Classes()
        .load(
            read_task(real / "task.yaml"),
            BertConfig(label2id={"negative": 0, "positive": 1}, id2label={0: "negative", 1: "positive"}),
        )
        .texts
    )


def test_rows_without_labels_are_compared_too(real: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", 12, labelled=False)
    (tmp_path / "task.yaml").write_text("task: text-classification\ndata: rows.csv\nlabel: null\n")
    found = measuring.compare(real / "student", task=tmp_path / "task.yaml", teacher=real / "big")
    assert found.right is None
    assert all(each.label is None for each in found.examples)
    check(report.render(real / "student", comparison=found))


def test_a_teacher_of_other_classes_is_refused(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "predict", lambda *args, **kwargs: pytest.fail("ran first"))
    other = Path(shutil.copytree(real / "big", tmp_path / "big"))
    config = json.loads((other / "config.json").read_text())
    config |= {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="same classes in the same order"):
        measuring.compare(real / "student", task=real / "task.yaml", teacher=other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "task.yaml"), "--task and --teacher go together"),
        (("--teacher", "big"), "--task and --teacher go together"),
        (("--output", "README.md"), "never be pushed"),
        (("--history", "nowhere.json"), "nowhere.json: does not exist."),
    ],
)
def test_the_command_refuses_before_it_runs_a_model(
    folder: Path,
    tmp_path: Path,
    command: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in command("report", folder, *options).error
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


# ---------------------------------------------------------------------- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=5000",
)  # fmt: skip
MEASURE = """
const found = {wide: [], plots: [], texts: [], boxes: 0, style: ''};
const page = document.getElementById('page').contentDocument, root = page.documentElement;
found.width = root.clientWidth;
found.scroll = root.scrollWidth;
found.height = root.scrollHeight;
for (const each of page.body.querySelectorAll('*')) {
  const box = each.getBoundingClientRect();
  if (!each.closest('table, svg *') && box.right > root.clientWidth + 0.5) found.wide.push(each.tagName);
}
for (const each of page.querySelectorAll('svg')) {
  const box = each.getBoundingClientRect();
  found.plots.push([box.width, box.height]);
  for (const text of each.querySelectorAll('text')) found.texts.push(text.getBoundingClientRect().height);
}
found.boxes = page.querySelectorAll('.scroll').length;
document.getElementById('found').textContent = JSON.stringify(found);
"""


def browse(address: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Opens a page in a browser of its own; nothing may be said on its console."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, address.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    return done


def framed(source: str, place: Path, width: int, height: int) -> Path:
    """A page that shows the report in a frame of a given width, which a window cannot have, and measures it."""
    frame = f'<iframe id="page" style="border: 0; display: block" width="{width}" height="{height}"'
    place.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="margin: 0">{frame} srcdoc="{html.escape(source)}"></iframe>'
        f'<pre id="found" hidden></pre><script>onload = () => {{ {MEASURE} }}</script>',
        encoding="utf-8",
    )
    return place


def page_of_everything(folder: Path) -> str:
    """Every part of a page, and names and texts that are hard to break."""
    log = written(folder.parent / "log.json", logged(60, ("distill/kd", "distill/features")))
    texts = [*HTML, "مرحبا بالعالم", "the film was not good, but not as bad as some had said it was", "x" * 300]
    return report.render(folder, history=log, comparison=compared(texts, ("negative", "n" * 60)))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("which", ["real", "everything"])
def test_a_browser_shows_all_of_it_at_any_width_and_prints_it(
    which: str, real: Path, folder: Path, tmp_path: Path, command: Callable[..., Said]
) -> None:
    page = tmp_path / f"{which}.html"
    if which == "real":
        task = ("--task", real / "task.yaml", "--teacher", real / "big")
        assert command("report", real / "student", "--output", page, *task).code == 0
    else:
        page.write_text(page_of_everything(folder), encoding="utf-8")
    source = page.read_text(encoding="utf-8")
    browse(page, "--dump-dom")  # as it is: its own policy in force, nothing said on the console
    for width in (320, 390, 1280):
        probe = framed(source, tmp_path / "probe.html", width, 900)
        dom = browse(probe, "--window-size=1400,1000", "--dump-dom").stdout
        found = json.loads(html.unescape(re.findall(r'<pre id="found"[^>]*>(.*?)</pre>', dom, re.DOTALL)[0]))
        assert found["width"] == width
        assert found["scroll"] <= width, found
        assert found["wide"] == []
        assert len(found["plots"]) == len(re.findall("<svg", source)) > 0
        assert all(200 < wide <= width and tall > 100 for wide, tall in found["plots"]), found["plots"]
        assert min(found["texts"]) > (6 if width == 320 else 7)
        assert found["boxes"] == source.count('class="scroll"')
        whole = framed(source, tmp_path / "probe.html", width, found["height"])
        picture = tmp_path / f"{which}-{width}.png"
        browse(whole, f"--window-size={max(width, 500)},{found['height'] + 100}", f"--screenshot={picture}")
        assert picture.read_bytes().startswith(b"\x89PNG")
    paper = tmp_path / f"{which}.pdf"
    browse(page, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    assert paper.read_bytes().startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) < 12
    if kept := os.environ.get("HF_COMPRESS_PICTURES"):
        for path in tmp_path.glob(f"{which}*"):
            shutil.copy(path, kept)
