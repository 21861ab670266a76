"""What a maker adds to a card stays; licences follow from teacher and data; scores go to the hub's leaderboards."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hf_compress_cards import card, editing, leaderboards
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress import facts, licences, outgoing
from hf_compress.errors import ConfigurationError
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
    trainers = (
        "# student\n\n<!-- This model card has been generated automatically according to the information the "
        + ("Trainer had access to. -->\n")
    )
    assert editing.merge(trainers, new) == new
    assert editing.merge(None, new) == new


def test_metadata_of_a_maker_stays_and_ours_is_renewed() -> None:
    theirs = "---\nlicense_name: own\nlanguage: de\ntags: [mine]\npipeline_tag: fill-mask\nlibrary_name: old\n---\n"
    ours = "---\nlicense: mit\nlibrary_name: transformers\ntags: [ours]\nmetrics: [f1]\n---\n"
    merged = ModelCard(editing.merge(theirs + block("one", "1"), ours + block("one", "2"))).data
    assert (merged.license_name, merged.library_name, merged.pipeline_tag) == ("own", "transformers", "fill-mask")
    assert merged.tags == ["ours", "mine"]
    assert merged.language == ["de"]
    assert merged.metrics == ["f1"]


def test_a_front_matter_that_is_a_bomb_or_broken_counts_as_none() -> None:
    bomb = "---\na: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n---\n"
    for broken in (bomb, "---\n: [\n---\n"):
        assert "tags:" in editing.merge(broken + block("one", "1"), FRONT + block("one", "2"))


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
    ],
)
def test_a_licence_follows_from_teacher_and_data(teacher: str | None, data: str | None, expected: str | None) -> None:
    found, why = licences.inherited(Record(training=trained(teacher=teacher, data=data)))
    assert found == expected
    assert found is None or found in why
    assert found is not None or "known" in why or "together" in why


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
    assert licences.of_maker(student / "README.md") is None


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
