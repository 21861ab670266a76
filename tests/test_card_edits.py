"""What a maker adds to a card stays; licences follow from teacher and data; scores go to the hub's leaderboards."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hf_compress_cards import card, editing, leaderboards, metadata, plot
from hub.server import Hub, running_hub
from huggingface_hub import EvalResultEntry, HfApi, ModelCard, constants, parse_eval_result_entries
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_bert_classifier
from transformers.modelcard import TrainingSummary

from hf_compress import facts, licences, outgoing, provenance
from hf_compress.errors import ConfigurationError, ForeignFileError
from hf_compress.facts import Data, Measurement, Model, Record, Training

FRONT = "---\ntags:\n- ours\nlicense: mit\n---\n\n"


def block(name: str, text: str) -> str:
    return f"{editing.begin(name)}{text}\n{editing.end(name)}"


def trained(*, teacher: str | None = "mit", data: str | None = "mit", before: tuple[Training, ...] = ()) -> Training:
    return Training(
        task="text-classification",
        teacher=Model(name="me/big", licence=teacher, architecture="BertForSequenceClassification", parameters=9),
        student=Model(architecture="BertForSequenceClassification", parameters=4, start="layers 0 of 2 of the teacher"),
        methods=(),
        task_weight=1.0,
        data=Data(name="rows", rows=3, labelled=3, fingerprint="0" * 16, licence=data),
        steps=1,
        epochs=1.0,
        seconds=1.0,
        seed=0,
        hardware="a processor",
        versions={},
        before=before,
    )


def folder_of(place: Path, record: Record) -> Path:
    place.mkdir()
    (place / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    facts.save(place, record)
    return place


# ---------------------------------------------------------------------------------------------- edits


lines = st.text("abc -#>\n", max_size=30)


@given(lines, lines, lines)
@settings(max_examples=80, deadline=None)
def test_text_between_generated_parts_stays_whatever_it_is(before: str, between: str, after: str) -> None:
    old = FRONT + before + "\n" + block("one", "old 1") + between + "\n" + block("two", "old 2") + after
    new = FRONT + block("one", "new 1") + block("two", "new 2")
    merged = editing.merge(old, new)
    assert "old" not in merged
    kept = "".join(merged[merged.index("---\n\n", 4) + 5 :].replace("new 1", "").replace("new 2", "").split())
    marks = "".join((block("one", "") + block("two", "")).split())
    expected = before + block("one", "") + between + block("two", "") + after
    assert kept == "".join(expected.split())
    assert len(kept) >= len(marks)
    assert editing.merge(merged, new) == merged  # once more changes nothing


def test_a_part_that_is_new_comes_after_the_one_before_it_and_one_that_is_gone_goes() -> None:
    old = FRONT + "# Mine\n\n" + block("one", "1") + "\nmy note\n\n" + block("three", "3")
    merged = editing.merge(old, FRONT + block("one", "1") + block("two", "2"))
    assert merged.index("# Mine") < merged.index("\n1\n") < merged.index("\n2\n") < merged.index("my note")
    assert "three" not in merged


def test_a_card_without_generated_parts_is_kept_whole_and_that_of_the_trainer_is_replaced() -> None:
    new = FRONT + block("one", "1")
    merged = editing.merge("# A card of mine\n\nwith words\n", new)
    assert ModelCard(merged).data.license == "mit"
    assert merged.index("with words") < merged.index("\n1\n")
    trainers = TrainingSummary(model_name="student", source="trainer", hyperparameters={"seed": 0}).to_model_card()
    assert editing.is_generated(trainers)
    assert editing.merge(trainers, new) == new
    assert editing.merge(None, new) == new


def test_a_card_of_the_trainer_that_somebody_has_filled_in_is_kept() -> None:
    trainers = TrainingSummary(model_name="student", source="trainer", hyperparameters={"seed": 0}).to_model_card()
    filled = trainers.replace("More information needed", "Reads complaints of our customers.", 1)
    assert not editing.is_generated(filled)
    assert "Reads complaints" in editing.merge(filled, FRONT + block("one", "1"))
    assert not editing.is_generated("# Mine\n\nThis text was generated from Trainer logs by hand.\n")


def test_a_part_whose_marks_were_deleted_takes_no_text_along() -> None:
    """Its new text comes again where it belongs; whatever else there is stays, however often it is rendered."""
    new = FRONT + block("one", "1") + block("two", "2")
    for begun in ("two", "one"):
        card_of = FRONT + f"<!-- hf-compress: {begun} -->\nwhat was there\n\nMY NOTE\n" + block("one", "0") + "MORE\n"
        for _ in range(3):
            card_of = editing.merge(card_of, new)
            assert "MY NOTE" in card_of
            assert "MORE" in card_of
            assert card_of.count("\n1\n") == card_of.count("\n2\n") == 1


def test_many_marks_without_an_end_are_read_in_no_time() -> None:
    """Each took the whole rest of the text: two minutes for half a megabyte."""
    marks = "<!-- hf-compress: a -->\n" * 20_000
    begun = time.process_time()
    assert marks in editing.merge(FRONT + marks, FRONT + block("one", "1"))
    large = block("two", "words of a long card\n" * 400_000)
    assert "words" not in editing.merge(FRONT + large, FRONT + block("one", "1"))
    assert time.process_time() - begun < 5


def test_the_hubs_name_of_a_metric_is_in_ours() -> None:
    assert all(
        {"mean_squared_error": "mse"}.get(name, name).count(kind) for name, (kind, _) in metadata.METRICS.items()
    )


def test_blanks_and_empty_lines_of_a_maker_stay() -> None:
    code = "```python\ndef one(): ...\n\n\ndef two(): ...\n```\n"
    indented = "    an indented line is code\n"
    new = FRONT + block("one", "1") + block("two", "2")
    for old in (FRONT + code + indented, FRONT + block("one", "0") + "\n\n" + indented + code):
        merged = editing.merge(old, new)
        assert code in merged
        assert f"\n{indented}" in merged


def test_metadata_of_a_maker_stays_and_ours_is_renewed() -> None:
    theirs = "---\nlicense: cc-by-4.0\nlanguage: de\ntags: [mine]\npipeline_tag: fill-mask\nlibrary_name: old\n---\n"
    ours = "---\nlicense: mit\nlibrary_name: transformers\ntags: [ours]\nmetrics: [f1]\n---\n"
    merged = ModelCard(editing.merge(theirs + block("one", "1"), ours + block("one", "2"))).data
    assert (merged.license, merged.library_name, merged.pipeline_tag) == ("cc-by-4.0", "transformers", "fill-mask")
    assert merged.tags == ["ours", "mine"]
    assert merged.language == "de"
    assert merged.metrics == ["f1"]


def test_a_front_matter_that_cannot_be_read_is_said_and_not_thrown_away() -> None:
    bomb = "---\na: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n---\n"
    for broken in (bomb, "---\nlicense: mit: x\n---\n", f"---\n{'a: b # ' * 60_000}\n---\n"):
        with pytest.raises(ForeignFileError, match=r"README\.md"):
            editing.merge(broken + block("one", "1"), FRONT + block("one", "2"))


@pytest.mark.parametrize(
    "lines",
    [
        "# see the guide of the hub\nlanguage: no\nversion: 1.10\nat: 12:30:45\n",
        "language: [en, no] # two\n",
        "widget:\n- text: |\n    tags: this is no key\n\n    one more\n",
        "ignore_metadata_errors: true\n1: x\n",
    ],
)
def test_metadata_that_are_not_ours_stay_to_the_letter(lines: str) -> None:
    """YAML reads `no` as false, 1.10 as 1.1 and 12:30:45 as a number."""
    merged = editing.merge(f"---\n{lines}tags: mine\n---\n# A card\n", FRONT + block("one", "1"))
    assert f"\n{lines}" in merged
    assert yaml.safe_load(merged.split("---")[1])["tags"] == ["ours", "mine"]
    assert editing.merge(merged, FRONT + block("one", "1")) == merged


def test_metadata_in_braces_nulls_and_a_byte_order_mark_are_read() -> None:
    for theirs in ("---\n{license: gpl, mine: {a: 1}}\n---\n", "\ufeff---\nlicense: gpl\nmine: {a: 1}\nempty:\n---\n"):
        merged = editing.merge(f"{theirs}# A card\n", FRONT + block("one", "1"))
        assert yaml.safe_load(merged.split("---")[1]) == {"license": "gpl", "mine": {"a": 1}, "tags": ["ours"]}
        assert merged.count("---\n") == 2


def test_a_text_between_two_rules_at_the_top_is_no_metadata() -> None:
    assert "---\nHello\n---\n" in editing.merge("---\nHello\n---\nthere\n", FRONT + block("one", "1"))


def test_a_real_card_that_is_edited_is_rendered_again_around_the_edits(tmp_path: Path) -> None:
    student = folder_of(tmp_path / "student", Record(training=trained()))
    path = card.write(student)
    path.write_text(path.read_text().replace("## Limits", "## Limits\n\nReplaced.") + "\nStays.\n")
    first = Measurement(subject="student", metric="accuracy", value=0.75, unit="fraction", data=trained().data)
    facts.append(student, first)
    text = card.write(student, repo_id="me/small").read_text()
    assert "75.0 %" in text
    assert "Replaced." not in text
    assert text.endswith("Stays.\n")
    outgoing._check_card(path)
    assert ModelCard(text).data.base_model_relation == "finetune"


# ---------------------------------------------------------------------------------------------- licences


@pytest.mark.parametrize(
    ("teacher", "data", "expected"),
    [
        ("apache-2.0", "MIT", "apache-2.0"),
        ("mit", "CC-BY-NC-4.0", "cc-by-nc-4.0"),
        ("llama3.2", "mit", "llama3.2"),
        ("gemma", "cc-by-nc-4.0", None),
        (None, "mit", None),
        ("mit", None, None),
        ("unknown", "mit", None),
        ("other", "mit", None),
        ("other", "other", None),
        ("cc-by-nd-4.0", "mit", None),
        ("mit", "cc-by-nc-nd-4.0", None),
    ],
)
def test_a_licence_follows_from_teacher_and_data(teacher: str | None, data: str | None, expected: str | None) -> None:
    found, why = licences.inherited(Record(training=trained(teacher=teacher, data=data)))
    assert found == expected
    assert found is None or found in why
    assert found is not None or "known" in why or "together" in why or "no derived works" in why


def test_earlier_stages_bind_too() -> None:
    first = trained(data="cc-by-nc-4.0")
    assert licences.inherited(Record(training=trained(before=(first,))))[0] == "cc-by-nc-4.0"
    unknown = trained(teacher=None)
    assert licences.inherited(Record(training=trained(before=(unknown,))))[0] is None


def test_what_the_maker_says_comes_first(tmp_path: Path) -> None:
    student = folder_of(tmp_path / "student", Record(training=trained()))
    assert licences.of(student) == ("mit", "mit of the teacher me/big, mit of the data 'rows'")
    assert ModelCard(card.write(student).read_text()).data.license == "mit"
    (student / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert licences.of(student)[0] == "cc-by-4.0"
    licences.state(student, "Apache-2.0")
    assert licences.of(student)[0] == "apache-2.0"
    with pytest.raises(ConfigurationError, match="no identifier"):
        licences.state(student, "see LICENSE!")


def test_a_licence_that_was_filled_in_is_no_word_of_the_maker(tmp_path: Path) -> None:
    """It goes with what it followed from: trained again on other data, the card says another one, or none."""
    student = folder_of(tmp_path / "student", Record(training=trained()))
    card.write(student)
    assert licences.of(student)[1] != licences.MAKER
    assert "Licence: mit (mit of the teacher" in card.write(student).read_text()
    for data, expected in (("cc-by-nc-4.0", "cc-by-nc-4.0"), (None, None)):
        facts.save(student, Record(training=trained(data=data)))
        assert ModelCard(card.write(student).read_text()).data.license == expected
    readme = student / "README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: gpl-3.0\n", 1))
    assert licences.of(student) == ("gpl-3.0", licences.MAKER)
    assert "Licence: gpl-3.0 (as its maker says)" in card.write(student).read_text()
    assert licences.of(student) == ("gpl-3.0", licences.MAKER)


def test_the_licence_in_a_card_of_the_trainer_is_that_of_its_start(tmp_path: Path) -> None:
    student = folder_of(tmp_path / "student", Record(training=trained(data="cc-by-nc-4.0")))
    text = TrainingSummary(model_name="student", source="trainer", license="mit", hyperparameters={}).to_model_card()
    (student / "README.md").write_text(text.replace("More information needed", "What it is.", 1))
    assert licences.of(student) == ("mit", licences.MAKER)  # somebody has worked on it, and may mean it
    (student / "README.md").write_text(text)
    assert licences.of(student)[0] == "cc-by-nc-4.0"
    assert ModelCard(card.write(student).read_text()).data.license == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    "lines",
    [
        "license: mit",
        "tags: [a]\nlicense:\n- mit\n- gpl-3.0\nlicense_name: mine\nmodel: b",
        "license: [mit]",
        "license: see LICENSE!",
        "license: unknown",
        "tags: [a]",
    ],
)
def test_what_is_stated_last_is_on_the_card(tmp_path: Path, lines: str) -> None:
    """Also on one that is all its maker's, which is not rendered again when it is pushed."""
    student = folder_of(tmp_path / "student", Record(training=trained(data="gpl-3.0")))
    readme = student / "README.md"
    readme.write_text(f"---\n{lines}\n---\n\n# All mine\n")
    licences.state(student, "apache-2.0")
    assert licences.of_card(readme) == "apache-2.0"
    assert licences.of(student) == ("apache-2.0", licences.MAKER)
    kept = ModelCard(readme.read_text())
    assert (kept.data.get("tags"), kept.data.get("model")) == (
        ["a"] if "tags" in lines else None,
        "b" if "model" in lines else None,
    )
    assert kept.data.get("license_name") is None
    assert kept.text.strip() == "# All mine"
    assert "apache-2.0 (as its maker says)" in card.write(student).read_text()


def test_a_card_without_metadata_is_given_them_when_a_licence_is_stated(tmp_path: Path) -> None:
    student = folder_of(tmp_path / "student", Record())
    (student / "README.md").write_text("# All mine\n")
    licences.state(student, "mit")
    assert (student / "README.md").read_text() == "---\nlicense: mit\n---\n\n# All mine\n"


def test_of_several_licences_in_a_card_none_is_taken(tmp_path: Path) -> None:
    student = folder_of(tmp_path / "student", Record(training=trained()))
    (student / "README.md").write_text("---\nlicense: [mit, gpl-3.0]\n---\n")
    found, why = licences.of(student)
    assert found is None
    assert "gpl-3.0" in why
    (student / "README.md").write_text("---\nlicense: [gpl-3.0]\n---\n")
    assert licences.of(student)[0] == "gpl-3.0"


def test_the_start_of_the_student_and_further_models_bind_too() -> None:
    bound = Model(name="them/start", licence="cc-by-nc-4.0", architecture="Bert", parameters=4)
    unknown = bound.model_copy(update={"licence": None})
    for of, expected in ((bound, "cc-by-nc-4.0"), (unknown, None)):
        assert licences.inherited(Record(training=trained().model_copy(update={"student": of})))[0] == expected
        frozen = {"reference": of}
        assert licences.inherited(Record(training=trained().model_copy(update={"frozen": frozen})))[0] == expected


def test_the_record_tells_where_a_student_was_loaded_from_and_its_earlier_trainings(tmp_path: Path) -> None:
    model = tiny_bert_classifier(num_labels=2)
    assert provenance.describe_model(model, 2).licence is None
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    model.config._name_or_path = str(tmp_path)
    found = provenance.describe_model(model, 2)
    assert (found.name, found.licence) == (None, "cc-by-nc-4.0")
    model.config._name_or_path = "them/start"
    assert provenance.describe_model(model, 2).name == "them/start"
    model.config.compression_start = "layers 0 of 2 of the teacher"  # whose licence counts anyway
    assert provenance.describe_model(model, 2).name is None

    first, second = trained(data="gpl-3.0"), trained()
    nested = second.model_copy(update={"before": (first,)})
    model.config.compression = nested.model_dump(mode="json", exclude_none=True)
    assert provenance.earlier_stages(model) == (first, second)
    model.config.compression = {"no": "record"}
    assert provenance.earlier_stages(model) == ()


def licence_told(student: Path) -> tuple[str | None, str]:
    """In the metadata, and in the text, of a card that is written once more."""
    text = card.write(student).read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(("- Licence", "- The licence")))
    return ModelCard(text).data.get("license"), line


def test_a_card_does_not_bind_itself(tmp_path: Path) -> None:
    """The licence that it repeats is not taken for its maker's word when it is written again."""
    student = folder_of(tmp_path / "student", Record(training=trained()))
    followed = ("mit", "- Licence: mit (mit of the teacher me/big, mit of the data 'rows').")
    assert [licence_told(student), licence_told(student)] == [followed, followed]
    facts.save(student, Record(training=trained(teacher="cc-by-nc-4.0")))
    licence, line = licence_told(student)
    assert licence == "cc-by-nc-4.0"
    assert "cc-by-nc-4.0 of the teacher" in line
    facts.save(student, Record(training=trained(teacher=None)))
    assert licence_told(student)[0] is None
    assert licences.said_in(student / "README.md") is None


@pytest.mark.parametrize("before", [None, "mit", "cc-by-4.0"])
def test_a_licence_that_is_stated_reaches_the_metadata(tmp_path: Path, before: str | None) -> None:
    student = folder_of(tmp_path / "student", Record(training=trained()))
    if before:
        (student / "README.md").write_text(f"---\nlicense: {before}\n---\n")
    card.write(student)
    licences.state(student, "apache-2.0")
    assert licence_told(student) == ("apache-2.0", "- Licence: apache-2.0 (as its maker says).")


def test_the_licence_of_a_makers_card_stays_as_the_hub_spells_it(tmp_path: Path) -> None:
    student = folder_of(tmp_path / "student", Record(training=trained(teacher="gemma")))
    (student / "README.md").write_text("---\nlicense: MIT\n---\n# Mine\n")
    for _ in range(2):
        assert licence_told(student) == ("mit", "- Licence: mit (as its maker says).")
    edited = (student / "README.md").read_text().replace("license: mit", "license: cc-by-4.0")
    (student / "README.md").write_text(edited)
    assert licence_told(student) == ("cc-by-4.0", "- Licence: cc-by-4.0 (as its maker says).")


def test_the_licence_of_a_teacher_is_read_from_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n# big\n")
    assert licences.of_source(tmp_path) == "mit"
    assert licences.of_source(tmp_path / "none") is None
    assert licences.of_source("") is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert licences.of_source(tmp_path) is None


def test_the_card_of_a_hub_id_is_fetched_and_a_hub_that_is_gone_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download would try six times, with pauses of 23 seconds in all, at the end of every training."""
    with running_hub() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in (
            ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True), ("ENDPOINT", hub.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_CACHE", str(tmp_path)),
        ):  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        api = HfApi(endpoint=hub.url, token=Hub.token)
        api.create_repo("me/big")
        api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id="me/big")
        assert licences.of_source("me/big") == "mit"
        assert licences.of_source("me/none") is None
        hub.dead = True
        asked = len(hub.log)
        assert licences.of_source("me/big") == "mit"  # from the cache
        assert len(hub.log) == asked
        started = time.monotonic()
        assert licences.of_source("me/other") is None
        assert time.monotonic() - started < licences.PATIENCE


# ---------------------------------------------------------------------------------------------- leaderboards


def test_scores_on_benchmarks_of_the_hub_are_written_for_its_leaderboards(tmp_path: Path) -> None:
    data = Data(
        name="sst2", rows=9, labelled=9, fingerprint="0" * 16, hub_id="nyu-mll/glue", config="sst2", split="test"
    )
    scores = [
        Measurement(subject="student", variant=variant, metric="accuracy", value=value, unit="fraction", data=data)
        for variant, value in (("torch", 0.875), ("onnx", 0.75))
    ]
    own = Measurement(subject="student", metric="accuracy", value=0.5, unit="fraction", data=trained().data)
    student = folder_of(tmp_path / "student", Record(measurements=(*scores, own)))
    card.write(student)
    place = student / ".eval_results"
    assert [path.name for path in place.iterdir()] == ["nyu-mll-glue-sst2.yaml"]
    read = parse_eval_result_entries(yaml.safe_load((place / "nyu-mll-glue-sst2.yaml").read_text()))
    assert [(one.dataset_id, one.task_id, one.value) for one in read] == [
        ("nyu-mll/glue", "sst2", 0.875),
        ("nyu-mll/glue", "sst2", 0.75),
    ]
    assert isinstance(read[0], EvalResultEntry)
    assert read[1].notes == "Accuracy, fraction, onnx, split test"
    assert Path(".eval_results/nyu-mll-glue-sst2.yaml") in outgoing.collect(student)

    facts.save(student, Record(measurements=(own,)))
    card.write(student)
    assert not list(place.iterdir())  # nothing of it was measured any more
    assert leaderboards.entries(Record()) == {}


def test_results_that_somebody_else_has_written_stay(tmp_path: Path) -> None:
    data = Data(name="sst2", rows=9, labelled=9, fingerprint="0" * 16, hub_id="nyu-mll/glue")
    score = Measurement(subject="student", metric="accuracy", value=0.5, unit="fraction", data=data)
    student = folder_of(tmp_path / "student", Record(measurements=(score,)))
    place = student / ".eval_results"
    place.mkdir()
    theirs = {name: place / name for name in ("gsm8k.yaml", "nyu-mll-glue-default.yaml")}
    for path in theirs.values():
        path.write_text("- dataset: {id: them/it, task_id: a}\n  value: 1\n")
    card.write(student)
    assert {path.read_text() for path in theirs.values()} == {"- dataset: {id: them/it, task_id: a}\n  value: 1\n"}
    theirs["nyu-mll-glue-default.yaml"].unlink()
    card.write(student)
    assert parse_eval_result_entries(yaml.safe_load(theirs["nyu-mll-glue-default.yaml"].read_text()))[0].value == 0.5
    facts.save(student, Record())
    card.write(student)
    assert [path.name for path in place.iterdir()] == ["gsm8k.yaml"]


def test_an_error_is_not_drawn_as_if_more_were_better(tmp_path: Path) -> None:
    def measured(metric: str, value: float, unit: str, **how: int) -> Measurement:
        return Measurement(subject="student", metric=metric, value=value, unit=unit, how=how)

    latency = measured("latency_median", 0.1, "seconds", batch=1)
    error = measured("mean_squared_error", 0.5, "of the score, squared")
    assert plot.marks(Record(measurements=(error, latency))) == (None, [])
    assert len(plot.marks(Record(measurements=(error, measured("pearsonr", 0.5, "correlation"), latency)))[1]) == 1
