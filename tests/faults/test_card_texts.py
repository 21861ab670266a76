"""Whatever texts users and models bring, a card gives them back as texts: in its metadata and in its body."""

from __future__ import annotations

import ast
import inspect
import re
import tempfile
from pathlib import Path
from typing import Any

import hf_compress_cards
import jinja2
import pytest
import yaml
from hf_compress_cards import card, metadata, text
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import nodes
from markdown_it import MarkdownIt
from test_cards import MARK, check_markdown, made, training

from hf_compress import outgoing
from hf_compress.facts import Data, Measurement, Method, Model, Record
from hf_compress.facts import load as load_record

NASTY = [
    "---", "--- ", "...", "a\n---\nb: c", "\n---\n# out", "--- #", "{{ name }}", "{% for a in b %}", "{# a #}", "${a}",
    "<script>alert(1)</script>", "<!--", "-->", "</details>", "&lt;", "a|b", "|---|", "\\|", "`", "```\nout", "~~~",
    "[a](javascript:b)", "![a](b)", "[a]: b", "[^1]: b", "<a@b.c>", "http://a.b", "www.a.b", "# h", "## h ##", "C#",
    "- a", "+ a", "* a", "1. a", "1) a", "> a", "=", "===", "+", "-", "_a_", "**a**", "$a$", "\t", "  a  b  ",
    "\u202eabc", "\u2066a\u2069", "\u200fa", "\u200eb", "\ufeffa", "\u200b", "a\u2028b", "a\x85b", "\x00", "\x1b[31m",
    "null", "~", "true", "no", "on", "1", "1e3", "1_000", "0o17", "0x1f", "0b1", "12:30:45", "2001-01-01", ".5", "+1",
    ".inf", ".nan", "-.inf", "<<", "=", "?", "? a", ": a", "a: b", "a #b", "!tag", "&a", "*a", "%a", "@a", "'", '"',
    "{a", "[a", "]", ",", "é\u0301", "名前", "\U0001f600", "x" * 600, "word " * 60,
]  # fmt: skip
texts = st.sampled_from(NASTY) | st.text(max_size=30) | st.lists(st.sampled_from(NASTY), max_size=3).map(" ".join)
PLACES = (
    "data", "fingerprint", "licence", "split", "config", "teacher", "revision", "architecture", "student", "start",
    "method", "setting", "value", "hardware", "version", "task", "variant", "metric", "unit", "provider", "threads",
    "length", "name",
)  # fmt: skip
DECIDING = ("architecture", "student", "task", "variant", "metric", "unit", "method", "data")
"""Places whose text may decide which sentences and rows there are, and not only what stands in them."""


def record_of(t: dict[str, str]) -> Record:
    data = Data(name=t["data"], rows=1, fingerprint=t["fingerprint"], licence=t["licence"], split=t["split"],
                config=t["config"])  # fmt: skip
    how: dict[str, Any] = {"threads": t["threads"], "batch": 1, "length": t["length"], "provider": t["provider"]}

    def measured(metric: str, unit: str, variant: str = "torch", **rest: Any) -> Measurement:
        return Measurement(subject="student", variant=variant, metric=metric, value=0.5, unit=unit, **rest)

    return Record(
        training=training(
            teacher=Model(name=t["teacher"], revision=t["revision"], architecture=t["architecture"], parameters=1),
            student=Model(architecture=t["student"], parameters=1, start=t["start"]),
            methods=(Method(name=t["method"], weight=1, settings={t["setting"]: t["value"]}, citation=t["value"]),),
            data=data, settings={t["setting"]: t["value"]}, hardware=t["hardware"], versions={"torch": t["version"]},
            task=t["task"],
        ),
        measurements=(
            measured("accuracy", "fraction", data=data),
            measured("accuracy", "fraction", variant=t["variant"], data=data),
            measured(t["metric"], t["unit"], data=data),
            measured("latency_median", "seconds", how=how),
        ),
    )  # fmt: skip


def shown(body: str) -> str:
    """What a reader sees of it, runs of white space as one blank; code blocks left out."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    lines = ["".join(child.content or " " for child in token.children or []) for token in tokens]
    return " ".join(" ".join(lines).split())


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(PLACES, texts)), st.sampled_from(["mit", "cc-by-4.0", "1e3"]))
@example(dict.fromkeys(PLACES, "1e3"), "1e3")
@example(dict.fromkeys(PLACES, "0\u00b9"), "mit")
@example(dict.fromkeys(PLACES, "- a"), "mit")
@example(dict.fromkeys(PLACES, "## h ##"), "mit")
def test_a_card_gives_back_what_it_was_made_from(t: dict[str, str], licence: str) -> None:
    try:
        record = record_of(t)
    except ValueError:  # a path, or half of a surrogate pair
        assume(False)
    with tempfile.TemporaryDirectory() as place:
        folder = made(Path(place) / "student", record, license=licence)
        path = folder / "README.md"
        path.write_text(card.render(folder, repo_id=f"me/{t['name']}"), encoding="utf-8", newline="")
        outgoing._check_card(path)
        loaded, written = ModelCard.load(path), path.read_text(encoding="utf-8")
        record = load_record(folder)

    blocks = REGEX_YAML_BLOCK.match(written)
    assert blocks is not None
    body = MARK.sub("", written[blocks.end() :])
    assert REGEX_YAML_BLOCK.search(body) is None
    assert not re.search(r"(?m)^---\s*$", body)
    assert not re.search(r"<[A-Za-z/!?]", body)
    check_markdown(body)

    expected = {text.plain(t[place]) for place in PLACES if place not in ("metric", "setting", "value", "name")}
    expected |= {last := text.plain(t["name"].rsplit("/", 1)[-1])}
    expected |= {text.plain(t["metric"].replace("_", " ")), text.plain(f"{t['setting']} = {t['value']}")}
    seen = shown(body)  # of a long text its beginning
    assert [value for value in expected if value[:400].strip() not in seen] == []

    data = loaded.data
    assert data.eval_results == (metadata.eval_results(record, data.pipeline_tag) or None)
    assert (data.license, data.library_name) == (licence, "transformers")
    assert data.tags == [
        tag for tag in dict.fromkeys(["distillation", "hf_compress", text.plain(t["method"], 80)]) if tag
    ]
    if data.eval_results is not None:
        assert data.model_name == (last or data.model_name)
        assert {result.dataset_name for result in data.eval_results} == {text.plain(t["data"])}
    check_quotes(blocks[2])


def check_quotes(block: str) -> None:
    """No text of the metadata looks like a number, to any reader of YAML: PyYAML reads 1e3 and 0o17 as texts."""
    for event in yaml.parse(block, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent) and event.style is None and re.match(r"[-+.]?\d|[-+]?\.", event.value):
            assert isinstance(yaml.safe_load(event.value), int | float), event.value


# ---------------------------------------------------------------------- one way into a card


def template() -> nodes.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("hf_compress_cards"))
    assert environment.loader is not None
    source, _, _ = environment.loader.get_source(environment, "card.md.jinja")
    return environment.parse(source)


def test_the_template_prints_through_nothing_but_its_environment() -> None:
    """No filter that marks a text as safe, nothing included from elsewhere; the report's: tests/test_report.py."""
    tree = template()
    assert {found.name for found in tree.find_all(nodes.Filter)} == {"join", "map"}
    forbidden = (
        nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.CallBlock, nodes.FilterBlock, nodes.Macro,
        nodes.MarkSafe, nodes.MarkSafeIfAutoescape, nodes.ScopedEvalContextModifier, nodes.EvalContextModifier,
    )  # fmt: skip
    assert not list(tree.find_all(forbidden))
    assert card._template().environment.finalize is text.escape
    (folder,) = Path(hf_compress_cards.__file__).parent.glob("templates")
    assert sorted(path.name for path in folder.iterdir()) == ["card.md.jinja", "report.html.jinja"]


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(PLACES, texts)))
def test_without_what_the_escaping_lets_through_no_text_is_left(t: dict[str, str]) -> None:
    """The same card with its escaping replaced by nothing is the same for all texts: no variable goes past it."""
    plain = dict.fromkeys(PLACES, "a") | dict.fromkeys(DECIDING, "Aa")
    try:
        record = record_of(t | dict.fromkeys(DECIDING, "Aa") | {"value": t["value"] or "a"})
    except ValueError:
        assume(False)
    empty = card._template().environment.overlay(finalize=lambda value: "")
    left = [
        empty.get_template("card.md.jinja").render(card._context(each, {}, name, Path("none")))
        for each, name in ((record, t["name"] or "a"), (record_of(plain), "a"))
    ]
    assert left[0] == left[1]


def test_safe_texts_are_made_in_three_places() -> None:
    """By the functions that escape, of the front matter that a YAML writer made, and around parts of the template."""
    found = set()
    for path in Path(hf_compress_cards.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                made = [
                    ast.unparse(call) for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Safe"
                ]
                found |= {f"{path.stem}.{function.name}: {call}" for call in made}
    assert {line.partition(":")[0] for line in found} == {
        "text.fence", "text.table", "card._context", "editing.begin", "editing.end",
    }  # fmt: skip
    in_context = {line.partition(": ")[2] for line in found if line.startswith("card.")}
    assert in_context == {
        "Safe(to_yaml(metadata(record, name=name, tag=tag, licence=licence)))",
        "Safe(PLOT)",
    }
    parts = [found for found in template().find_all(nodes.Call) if getattr(found.node, "name", "") in ("begin", "end")]
    assert len(parts) == 12
    assert all(isinstance(each.args[0], nodes.Const) for each in parts)  # no text of a record
    assert "escape" in inspect.getsource(text.table)


@pytest.mark.parametrize("name", ["- a", "+ a", "# h", "## h ##", "1. a", "12) a", "> a", "-", "a #"])
def test_a_name_at_the_start_of_a_line_is_no_list_and_no_heading(tmp_path: Path, name: str) -> None:
    body = MARK.sub("", card.render(made(tmp_path / "student", None), repo_id=f"me/{name}").split("---\n", 2)[2])
    check_markdown(body)
    assert f"{name} {name} is a BertForSequenceClassification" in shown(body)
