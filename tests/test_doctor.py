"""Why a distillation did not help: runs that have one fault each, and a run that has none."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_compress_evaluation.doctor import courses, findings, gradients, places, predictions, recorded, texts
from hf_compress_evaluation.doctor.examining import Given, examine
from hf_compress_evaluation.doctor.findings import ORDER, Finding
from hf_compress_evaluation.doctor.gradients import Pull, Pulls
from hf_compress_evaluation.folder import Timing, evaluate_folder
from hf_compress_plugins.general.features import Features
from hf_compress_plugins.general.kd import KD, kd
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import LABELS
from test_cli import Said, call
from tiny import WORDS, tiny_bert_classifier, tiny_tokenizer
from transformers import BertForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_compress import DistillCallback, facts, fitting, trainer_log
from hf_compress.errors import ForeignFileError, UnknownNameError
from hf_compress.facts import Measurement, Record
from hf_compress.objective import IGNORED

NEUTRAL = [word for word in WORDS if word not in ("good", "bad")]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
ROWS = 160


def sentences(rows: int, seed: int) -> list[tuple[str, int]]:
    """Seven words, one of which decides the class; no two sets of sentences have one in common."""
    draw = random.Random(seed)
    found = []
    for row in range(rows):
        said = draw.choices(NEUTRAL, k=6)
        said.insert(draw.randrange(7), ("bad", "good")[row % 2])
        found.append((" ".join(said), row % 2))
    return found


def write(path: Path, rows: Sequence[tuple[str, Any]], *, named: bool = True) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, LABELS[label] if named and isinstance(label, int) else label] for text, label in rows)
    return path


def train(model: Any, rows: Sequence[tuple[str, int]], folder: Path, *callbacks: Any, **how: Any) -> Path:
    """A stock Trainer's run, saved with its log."""
    tokenizer = tiny_tokenizer()
    words, labels = zip(*rows, strict=True)
    usual = {"max_steps": 120, "learning_rate": 1e-3, "logging_steps": 5, "save_strategy": "no", "warmup_steps": 5}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=16, report_to=[], disable_tqdm=True, use_cpu=True, **(usual | how)
    )
    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=fitting.encode(tokenizer, words, np.array(labels), 16),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=list(callbacks),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder


def fresh() -> BertForSequenceClassification:
    """A student of one layer that knows nothing."""
    return tiny_bert_classifier(num_labels=2, num_hidden_layers=1, initializer_range=0.1, seed=5, **NAMES)


@dataclass(frozen=True)
class Scene:
    """A good teacher, its student and their rows, in one folder."""

    place: Path

    @property
    def big(self) -> Path:
        return self.place / "big"

    @property
    def teacher(self) -> BertForSequenceClassification:
        return BertForSequenceClassification.from_pretrained(self.big)

    def given(self, **changes: Any) -> Given:
        named = {"teacher": self.big, "task": self.place / "task.yaml", "data": self.place / "train.csv"}
        return Given(**(named | changes))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    place = tmp_path_factory.mktemp("doctor")
    rows = sentences(ROWS, 0)
    write(place / "train.csv", rows)
    write(place / "test.csv", sentences(ROWS, 1))
    (place / "task.yaml").write_text("task: text-classification\ndata: test.csv\n")
    big = tiny_bert_classifier(num_labels=2, num_hidden_layers=2, initializer_range=0.1, **NAMES)
    train(big, rows, place / "big", label_smoothing_factor=0.2)
    alone = tiny_bert_classifier(num_labels=2, num_hidden_layers=1, seed=3, **NAMES)
    alone.save_pretrained(place / "alone")
    tiny_tokenizer().save_pretrained(place / "alone")
    train(fresh(), rows, place / "student", DistillCallback(big, KD(temperature=2.0)), max_steps=150)
    evaluate_folder(
        place / "student",
        task=place / "task.yaml",
        teacher=place / "big",
        alone=place / "alone",
        timing=Timing(batches=()),
    )
    return Scene(place)


def by_name(found: Sequence[Finding]) -> dict[str, Finding]:
    assert [one.name for one in found] == [one.name for one in findings.ordered(found)]
    assert sorted(one.name for one in found) == sorted(ORDER)  # each once
    return {one.name: one for one in found}


def wrong(found: Sequence[Finding]) -> dict[str, str]:
    return {one.name: one.verdict for one in found if one.verdict in ("bad", "look")}


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


# ---------------------------------------------------------------------- runs


def test_a_healthy_run_has_nothing_out_of_order(scene: Scene) -> None:
    found = examine(scene.place / "student", scene.given())
    assert wrong(found) == {}, [one for one in found if one.name in wrong(found)]
    left = {one.name for one in found if one.verdict == "not looked at"}
    assert left == {"rates tried"}
    assert findings.most_likely(found) is None
    assert (
        findings.summary(found)
        == f"Nothing out of order in the {len(ORDER) - 1} things looked at; 1 were not looked at."
    )


def test_a_run_alone_is_looked_at_as_far_as_it_goes(scene: Scene) -> None:
    """What takes rows or a teacher is listed with the options that are lacking, and no others."""
    found = by_name(examine(scene.place / "student", Given()))
    assert found["agreement on training rows"].remedy == "give --teacher ID|FOLDER and --data train.csv"
    assert found["truncation"].remedy == "give --data train.csv or --task task.yaml"
    assert found["duplicates"].remedy == "give --data train.csv and --task task.yaml"
    assert found["learning curve"].verdict == found["weights"].verdict == "ok"
    some = by_name(examine(scene.place / "student", Given(data=scene.place / "train.csv")))
    assert some["gradients"].remedy == "give --teacher ID|FOLDER"
    assert some["duplicates"].remedy == "give --task task.yaml"
    assert some["truncation"].verdict == "ok"


def test_a_teacher_whose_classes_are_permuted_is_named_first(scene: Scene, tmp_path: Path) -> None:
    teacher = scene.teacher
    with torch.no_grad():
        teacher.classifier.weight.copy_(teacher.classifier.weight.flip(0))
        teacher.classifier.bias.copy_(teacher.classifier.bias.flip(0))
    other = copied(scene.big, tmp_path / "big")
    teacher.save_pretrained(other)
    found = examine(scene.place / "student", scene.given(teacher=other))
    order = by_name(found)["label order of the teacher"]
    assert (order.verdict, order.values["classes_renamed"]) == ("bad", 2)
    assert order.values["accuracy_in_best_order"] == pytest.approx(1 - order.values["accuracy"])
    assert findings.most_likely(found) == order
    assert by_name(found)["label order of the student"].verdict == "ok"


def test_a_teacher_whose_names_are_in_another_order_is_named(scene: Scene, tmp_path: Path) -> None:
    other = copied(scene.big, tmp_path / "big")
    config = json.loads((other / "config.json").read_text())
    config |= {
        "id2label": dict(enumerate(reversed(LABELS))),
        "label2id": {n: i for i, n in enumerate(reversed(LABELS))},
    }
    (other / "config.json").write_text(json.dumps(config))
    found = examine(scene.place / "student", scene.given(teacher=other))
    assert by_name(found)["label names"].verdict == "bad"
    assert findings.most_likely(found) == by_name(found)["label names"]
    assert by_name(found)["teacher's accuracy"].values["test_accuracy"] < 0.1  # its logits are read by name


def test_names_of_the_data_that_are_no_class_are_counted_and_not_shown(scene: Scene, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.csv", [(text, "secret" if label else "bad one") for text, label in sentences(20, 5)])
    found = by_name(examine(scene.place / "student", scene.given(data=rows)))
    assert found["label names"].verdict == "bad"
    assert found["label names"].figure == "2 of 2 names in the data are no class of the student"
    assert "secret" not in findings.as_json(found.values())
    assert found["classes"].verdict == "not looked at"


def test_a_one_hot_teacher_is_named(scene: Scene, tmp_path: Path) -> None:
    teacher = scene.teacher
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)
        teacher.classifier.bias.mul_(20)
    other = copied(scene.big, tmp_path / "big")
    teacher.save_pretrained(other)
    soft = by_name(examine(scene.place / "student", scene.given(teacher=other)))["soft targets"]
    assert soft.verdict == "bad", soft
    assert soft.values["temperature"] == 2.0
    assert soft.values["entropy"] <= soft.values["entropy_at_temperature"] < 0.05 * math.log(2)


def test_a_teacher_no_better_than_the_student_alone_is_named(scene: Scene, tmp_path: Path) -> None:
    """Measured here: the teacher has random weights, the baseline is good. The student still follows a good one."""
    poor = copied(scene.big, tmp_path / "big")
    tiny_bert_classifier(num_labels=2, seed=3, **NAMES).save_pretrained(poor)
    found = examine(scene.place / "student", scene.given(teacher=poor, alone=scene.big))
    against = by_name(found)["teacher against alone"]
    assert (against.verdict, against.looked_at) == ("bad", f"accuracy on {ROWS} rows, measured here")
    assert against.values["alone"] > 0.9 > 0.7 > against.values["teacher"]
    assert by_name(found)["teacher's accuracy"].verdict == "bad"
    assert by_name(found)["agreement on training rows"].verdict == "bad"
    assert findings.most_likely(found) == against


def test_a_learning_rate_of_zero_is_named(scene: Scene, tmp_path: Path) -> None:
    rows = sentences(ROWS, 0)
    run = train(fresh(), rows, tmp_path / "run", DistillCallback(scene.teacher, KD()),
                learning_rate=0.0, max_steps=100)  # fmt: skip
    found = examine(run, Given())
    assert wrong(found) == {"learning rate": "bad", "learning curve": "bad"}
    assert "never fell" in by_name(found)["learning curve"].meaning
    assert findings.summary(found).startswith("Most likely: learning rate (0).")


def test_a_diverging_run_is_named(scene: Scene, tmp_path: Path) -> None:
    rows = sentences(ROWS, 0)
    run = train(fresh(), rows, tmp_path / "run", DistillCallback(scene.teacher, KD()),
                learning_rate=1.0, max_steps=40, logging_steps=2)  # fmt: skip
    found = by_name(examine(run, Given()))
    assert found["learning curve"].verdict == "bad"
    assert "diverged" in found["learning curve"].meaning
    assert found["learning rate"].verdict == "look"


def test_a_term_of_no_weight_is_named(scene: Scene, tmp_path: Path) -> None:
    run = train(fresh(), sentences(ROWS, 0), tmp_path / "run",
                DistillCallback(scene.teacher, KD(weight=1e-4)), max_steps=100)  # fmt: skip
    found = by_name(examine(run, scene.given()))
    assert found["weight of the terms"].verdict == "bad"
    assert 0 < found["weight of the terms"].values["kd"] < 0.01
    assert found["gradients"].verdict == "look"
    assert "kd: no pull" in found["gradients"].meaning


def test_test_rows_among_the_training_rows_are_named(scene: Scene, tmp_path: Path) -> None:
    test = [(f" {text.upper()} ", label) for text, label in sentences(ROWS, 1)]
    data = write(tmp_path / "train.csv", [*sentences(ROWS, 0), *test[: ROWS // 4]])
    found = examine(scene.place / "student", scene.given(data=data))
    assert wrong(found) == {"duplicates": "bad"}
    assert by_name(found)["duplicates"].values["fraction"] == 0.25


def test_rows_that_are_cut_off_are_named(scene: Scene) -> None:
    found = by_name(examine(scene.place / "student", scene.given(max_length=6)))
    assert found["truncation"].verdict == "bad"
    assert (found["truncation"].values["fraction"], found["truncation"].values["longest"]) == (1.0, 9)


def test_texts_of_another_script_are_named(scene: Scene, tmp_path: Path) -> None:
    data = write(tmp_path / "train.csv", [(f"фильм {row}", row % 2) for row in range(20)])
    assert by_name(examine(scene.place / "student", scene.given(data=data)))["unknown tokens"].verdict == "bad"


def test_a_teacher_of_other_tokens_is_named(scene: Scene, tmp_path: Path) -> None:
    other = copied(scene.big, tmp_path / "big")
    value = json.loads((other / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["good"], vocabulary["film"] = vocabulary["film"], vocabulary["good"]
    (other / "tokenizer.json").write_text(json.dumps(value))
    found = by_name(examine(scene.place / "student", scene.given(teacher=other)))["tokenizers"]
    assert found.verdict == "bad"
    assert 0.5 <= found.values["different"] / found.values["texts"] < 1


def test_weights_that_are_no_numbers_are_named_and_not_run(scene: Scene, tmp_path: Path) -> None:
    run = copied(scene.place / "student", tmp_path / "student")
    student = BertForSequenceClassification.from_pretrained(run)
    with torch.no_grad():
        student.classifier.bias[0] = math.nan
    student.save_pretrained(run)
    found = examine(run, scene.given())
    assert wrong(found) == {"weights": "bad"}


def test_rows_without_labels_are_looked_at_too(scene: Scene, tmp_path: Path) -> None:
    data = write(tmp_path / "train.csv", [(text, "") for text, _ in sentences(40, 0)])
    found = by_name(examine(scene.place / "student", scene.given(data=data)))
    assert found["agreement on training rows"].verdict == "ok"
    assert "accuracy" not in found["soft targets"].values
    assert found["classes"].verdict == "not looked at"
    assert found["label order of the teacher"].verdict == "ok"  # of the test rows
    only = by_name(examine(scene.place / "student", Given(data=data, teacher=scene.big)))
    assert only["teacher's accuracy"].verdict == only["label order of the teacher"].verdict == "not looked at"


# ---------------------------------------------------------------------- where a run lies


def test_the_newest_checkpoint_of_a_trainer_is_taken(scene: Scene, tmp_path: Path) -> None:
    run = train(fresh(), sentences(ROWS, 0), tmp_path / "run",
                DistillCallback(scene.teacher, KD()), max_steps=20, logging_steps=1, save_strategy="steps",
                save_steps=9)  # fmt: skip
    for path in run.iterdir():
        if path.is_file():
            path.unlink()
    place = places.find(run)
    assert (place.student, place.log) == (run / "checkpoint-20", run / "checkpoint-20" / trainer_log.FILE)
    found = by_name(examine(run, scene.given()))
    assert found["learning curve"].verdict != "not looked at"
    assert found["agreement on training rows"].verdict != "not looked at"
    assert found["steps"].verdict == found["gradients"].verdict == "not looked at"


def test_a_recipes_output_is_known_also_before_it_is_done(scene: Scene, tmp_path: Path) -> None:
    made = tmp_path / "made"
    copied(scene.place / "student", made / "student")
    copied(scene.big, made / "teacher")
    place = places.find(made)
    assert (place.student, place.teacher, place.alone) == (made / "student", made / "teacher", None)
    found = by_name(examine(made, Given(data=scene.place / "train.csv")))
    assert found["agreement on training rows"].verdict == "ok"  # of the teacher beside it
    begun = tmp_path / "begun"
    copied(scene.place / "student", begun / ".student.training" / "checkpoint-7")
    assert places.find(begun).student == begun / ".student.training" / "checkpoint-7"


def test_a_recipes_baseline_is_run_where_the_record_does_not_say(scene: Scene, tmp_path: Path) -> None:
    made = tmp_path / "made"
    copied(scene.place / "student", made / "student")
    copied(scene.place / "alone", made / "alone")
    here = Given(task=scene.place / "task.yaml")
    before = by_name(examine(made, here))["student against alone"]
    facts.save(made / "student", facts.load(made / "student").model_copy(update={"measurements": ()}))
    after = by_name(examine(made, here))["student against alone"]
    assert [one.looked_at.partition(", ")[2] for one in (before, after)] == ["from the record", "measured here"]
    assert after.values == pytest.approx(before.values)


def test_a_baseline_is_compared_class_by_class_or_not_at_all(scene: Scene, tmp_path: Path) -> None:
    plain = by_name(examine(scene.place / "student", scene.given(alone=scene.place / "alone")))
    model = BertForSequenceClassification.from_pretrained(scene.place / "alone")
    with torch.no_grad():  # the same decisions, the classes in another order
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.config.id2label = {0: LABELS[1], 1: LABELS[0]}
    model.config.label2id = {LABELS[1]: 0, LABELS[0]: 1}
    model.save_pretrained(tmp_path / "turned")
    tiny_tokenizer().save_pretrained(tmp_path / "turned")
    turned = by_name(examine(scene.place / "student", scene.given(alone=tmp_path / "turned")))
    name = "student against alone"
    assert turned[name].values == plain[name].values
    tiny_bert_classifier(num_labels=3, num_hidden_layers=1).save_pretrained(tmp_path / "three")
    tiny_tokenizer().save_pretrained(tmp_path / "three")
    other = by_name(examine(scene.place / "student", scene.given(alone=tmp_path / "three")))[name]
    assert other.verdict == "not looked at"
    assert "not those of the student" in other.remedy


def test_rows_are_read_with_their_labels(tmp_path: Path) -> None:
    """Ids, names, none at all, and those that are no class, which are counted."""
    ids = {name: index for index, name in enumerate(LABELS)}
    path = tmp_path / "rows.jsonl"
    values = ["positive", 0, 1.0, -100, None, "", 7, "other", 0.5]
    path.write_text("".join(json.dumps({"text": str(at), "label": str(v) if isinstance(v, str) else v}) + "\n"
                            for at, v in enumerate(values) if isinstance(v, str) or v is None))  # fmt: skip
    table = places.read(path, where="test", text="text", label="label", label2id=ids)
    assert (table.labels.tolist(), table.names, table.unknown) == ([1, IGNORED, IGNORED, IGNORED], 2, 1)
    assert [places._class(value, ids) for value in values] == [1, 0, 1, -100, -100, -100, None, None, None]
    assert places._class(-1, ids) == places._class(math.nan, ids) == IGNORED
    many = places.Table(where="test", texts=tuple(map(str, range(50))), labels=np.arange(50), names=0, unknown=0)
    assert [int(text) for text in many.sample(7).texts] == many.sample(7).labels.tolist() == [0, 8, 16, 24, 32, 40, 49]
    assert many.sample(50) is many


def test_what_is_no_run_or_malformed_is_refused(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="no student/ and no checkpoint-N/"):
        examine(tmp_path, Given())
    run = copied(scene.place / "student", tmp_path / "student")
    (run / trainer_log.FILE).write_text('{"log_history": 1}')
    with pytest.raises(ForeignFileError, match="log_history"):
        examine(run, Given())
    with pytest.raises(UnknownNameError, match="sentence"):
        examine(scene.place / "student", scene.given(text="sentence"))
    with pytest.raises(ForeignFileError, match="nowhere"):
        examine(scene.place / "student", Given(data=tmp_path / "nowhere.csv"))


def test_another_task_is_looked_at_from_outside(scene: Scene, tmp_path: Path) -> None:
    run = copied(scene.place / "student", tmp_path / "student")
    config = json.loads((run / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (run / "config.json").write_text(json.dumps(config))
    found = by_name(examine(run, scene.given()))
    assert found["learning curve"].verdict == "ok"
    assert found["gradients"].remedy == "models are run for text classification alone"


def test_a_student_that_chooses_no_class_is_not_scored(scene: Scene, tmp_path: Path) -> None:
    run = copied(scene.place / "student", tmp_path / "student")
    config = json.loads((run / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (run / "config.json").write_text(json.dumps(config))
    found = by_name(examine(run, scene.given()))
    assert found["weights"].verdict == "ok"
    assert found["label names"].remedy == "the student does not choose one class a row"


# ---------------------------------------------------------------------- gradients


def test_the_pulls_are_the_gradients_of_the_weighted_terms(scene: Scene) -> None:
    """Against autograd by hand; two terms of weights, one batch."""
    training = facts.load(scene.place / "student").training
    assert training is not None
    method = training.methods[0].model_copy(update={"weight": 0.5})
    training = training.model_copy(update={"methods": (method,), "task_weight": 2.0})
    tokenizer = tiny_tokenizer()
    words, labels = zip(*sentences(gradients.BATCH, 0), strict=True)
    rows = fitting.encode(tokenizer, words, np.array(labels), 16)
    student, teacher = fresh(), scene.teacher
    found = gradients.measure(student, teacher, tokenizer, training, rows)

    batch = DataCollatorWithPadding(tokenizer)([rows[at] for at in range(len(rows))])
    output = student.eval()(**batch)
    terms = [2.0 * output.loss, 0.5 * kd(output.logits, teacher(**batch).logits, temperature=2.0).mean()]
    by_hand = [torch.autograd.grad(t, list(student.bert.parameters()), retain_graph=True) for t in terms]
    flat = [torch.cat([each.flatten() for each in one]) for one in by_hand]
    assert [pull.term for pull in found.terms] == ["task", "kd"]
    assert [pull.norm for pull in found.terms] == pytest.approx([float(one.norm()) for one in flat], rel=1e-4)
    assert found.terms[0].cosine is None
    assert found.terms[1].cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-4)
    assert found.left == pytest.approx(float(sum(flat).norm()) / float(sum(one.norm() for one in flat)), abs=1e-4)
    assert found.without == ()
    assert not hasattr(student, "distiller")
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_method_that_learned_parts_of_its_own_is_left_out(scene: Scene) -> None:
    """Its projection is not in a model folder, so its gradient would be of another run."""
    training = facts.load(scene.place / "student").training
    assert training is not None
    narrow = tiny_bert_classifier(num_labels=2, hidden_size=16, num_hidden_layers=1, **NAMES)
    methods = (training.methods[0], facts.Method(name="features", weight=1.0, settings={"layers": "last"}))
    words, labels = zip(*sentences(8, 0), strict=True)
    rows = fitting.encode(tiny_tokenizer(), words, np.array(labels), 16)
    changed = training.model_copy(update={"methods": methods})
    found = gradients.measure(narrow, scene.teacher, tiny_tokenizer(), changed, rows)
    assert (found.without, [pull.term for pull in found.terms]) == (("features",), ["task", "kd"])
    assert "without features" in gradients.judge(found, 8).looked_at
    assert isinstance(gradients.objectives(changed)[1], Features)


def test_a_method_that_cannot_be_made_again_leaves_the_rest(scene: Scene, tmp_path: Path) -> None:
    """Of another installation, or one that does not run without its data."""
    run = copied(scene.place / "student", tmp_path / "student")
    record = facts.load(run)
    assert record.training is not None
    training = record.training.model_copy(update={"methods": (facts.Method(name="of_a_stranger", weight=1.0),)})
    facts.save(run, record.model_copy(update={"training": training}))
    found = by_name(examine(run, scene.given()))
    assert "UnknownNameError: There is no method 'of_a_stranger'" in found["gradients"].remedy
    assert found["tokenizers"].verdict == found["agreement on training rows"].verdict == "ok"


def test_models_are_run_on_a_sample_and_duplicates_counted_on_all(scene: Scene) -> None:
    found = by_name(examine(scene.place / "student", scene.given(rows=10)))
    assert found["agreement on training rows"].values["rows"] == found["truncation"].values["rows"] == 10
    assert found["duplicates"].values["test_rows"] == found["classes"].values["rows"] == ROWS


def pulls(*terms: tuple[str, float, float | None], left: float = 1.0) -> Pulls:
    return Pulls(terms=tuple(Pull(term=t, norm=n, cosine=c) for t, n, c in terms), left=left, without=())


@pytest.mark.parametrize(
    ("found", "verdict", "said"),
    [
        (pulls(("task", 1.0, None), ("kd", 1.0, 0.5)), "ok", ""),
        (pulls(("task", 1.0, None), ("kd", 1.0, -0.9), left=0.1), "ok", ""),  # at a minimum of the sum
        (pulls(("task", 1.0, None), ("kd", 0.5, -0.9), left=0.5), "look", "kd: pulls against the labels"),
        (pulls(("task", 1.0, None), ("kd", 0.009, -0.9), left=0.9), "look", "kd: no pull"),
        (pulls(("task", 1.0, None)), "not looked at", ""),
        (pulls(("task", 0.0, None), ("kd", 0.0, None)), "not looked at", ""),
    ],
)
def test_pulls_are_judged(found: Pulls, verdict: str, said: str) -> None:
    judged = gradients.judge(found, 8)
    assert judged.verdict == verdict
    assert said in judged.meaning
    assert bool(said) == bool(judged.meaning)


# ---------------------------------------------------------------------- courses

FALLS = [2 * math.exp(-step / 5) + 0.5 for step in range(40)]


@pytest.mark.parametrize(
    ("course", "verdict", "said"),
    [
        (FALLS, "ok", ""),
        ([1.0] * 20, "bad", "never fell"),
        ([1.0] * 10 + [1.05] * 10, "bad", "never fell"),
        ([1.0, 15.0, 10.0, 7.0, 5.0, 3.0, 2.0, 2.0], "bad", "diverged"),
        ([1.0 - 0.0004 * step for step in range(40)], "bad", "never fell"),
        ([3.0 - 0.05 * step for step in range(40)], "look", "falling still"),
        ([*FALLS[:20], *(0.6 + 0.1 * step for step in range(20))], "bad", "diverged"),
        ([*FALLS[:10], 9.0, *FALLS[10:]], "look", "jumped"),
        ([1.0, 2.0, 4.0, 8.0, 9.0, 9.0, 9.0, 9.0], "bad", "diverged"),
        ([*FALLS[:20], math.nan], "bad", "overflowed"),
        ([1.0, math.inf], "bad", "overflowed"),
        ([1.0] * 7, "not looked at", ""),
    ],
)
def test_courses_are_told_apart(course: list[float], verdict: str, said: str) -> None:
    found = courses.learning_curve(np.array(course))
    assert (found.verdict, said in found.meaning) == (verdict, True)


def test_noise_alone_is_not_a_falling_loss() -> None:
    """A plateau with noise of a tenth: the last quarter may be lower by chance."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        course = np.array([*FALLS[:20], *([0.5] * 60)]) + rng.normal(0, 0.1, 80)
        assert courses.learning_curve(course).verdict == "ok"


def test_terms_that_move_against_each_other_are_seen() -> None:
    up, down = np.linspace(1, 2, 20), np.linspace(2, 1, 20)
    assert courses.terms_over_time(up, down).verdict == "look"
    assert "task's own loss rose" in courses.terms_over_time(up, down).meaning
    assert "teacher's terms rose" in courses.terms_over_time(down, up).meaning
    for task, distilled in [(down, down), (down, np.ones(20)), (up, down * 0.01 + 2)]:
        assert courses.terms_over_time(task, distilled).verdict == "ok"
    assert courses.terms_over_time(up[:5], down[:5]).verdict == "not looked at"


def test_the_share_of_a_term_is_its_largest(scene: Scene) -> None:
    """A term that was learned is small in the end, and had its effect."""
    training = facts.load(scene.place / "student").training
    assert training is not None
    methods = (facts.Method(name="kd", weight=0.5), facts.Method(name="features", weight=1.0))
    training = training.model_copy(update={"methods": methods, "task_weight": 1.0})
    log: list[Mapping[str, Any]] = [
        {"step": 1, "task_loss": 1.0, "distill/kd": 2.0, "distill/features.a": 0.001},
        {"step": 2, "task_loss": 1.0, "distill/kd": 0.0, "distill/features.a": 0.001},
        {"step": 3, "eval_loss": 1.0},
    ]
    found = courses.weight_of_terms(log, training)
    assert found.values == pytest.approx({"kd": 1 / 2.001, "features.a": 0.001 / 1.001, "task": 1 / 1.001})
    assert (found.verdict, found.meaning.startswith("features.a: less than 1%")) == ("look", True)
    assert courses.weight_of_terms([{"distill/kd": math.nan}], training).verdict == "not looked at"
    assert courses.weight_of_terms(log, None).verdict == "not looked at"
    assert courses.values([{"a": True}, {"a": "x"}, {"a": 2}, {"a": 10**400}, {}], "a").tolist() == [2.0]


NUMBERS = st.one_of(st.floats(), st.integers(-(10**310), 10**310), st.none(), st.booleans(), st.text(max_size=2))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["loss", "task_loss", "distill_loss", "distill/kd"]), NUMBERS), max_size=12
    )
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow in numbers near the largest
def test_any_log_gives_findings(scene: Scene, log: list[dict[str, Any]]) -> None:
    training = facts.load(scene.place / "student").training
    found = [
        courses.learning_curve(courses.values(log, "loss")),
        courses.terms_over_time(courses.values(log, "task_loss"), courses.values(log, "distill_loss")),
        courses.weight_of_terms(log, training),
    ]
    json.loads(findings.as_json(found))
    assert findings.summary(found)


# ---------------------------------------------------------------------- predictions


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.integers(0, 1000))
def test_the_best_order_undoes_a_permutation(order: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, 200)
    labels[:5] = range(5)
    chosen = np.array([order.index(label) for label in labels])
    found, best, own = predictions.best_order(chosen, labels, 5)
    assert (found.tolist(), best) == (list(order), 1.0)
    assert own == pytest.approx(float((chosen == labels).mean()))


@pytest.mark.parametrize("classes", [2, 5, 77])
def test_a_model_that_guesses_has_no_other_order(classes: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(500, classes)).astype(np.float32)
        found = predictions.label_order("teacher", logits, rng.integers(0, classes, 500), "test")
        assert found.verdict != "bad"


def logits_of(chosen: Sequence[int], classes: int = 2) -> np.ndarray[Any, np.dtype[np.float32]]:
    return 4 * np.eye(classes, dtype=np.float32)[list(chosen)]


def test_the_entropy_of_targets_by_hand() -> None:
    logits = np.log(np.array([[0.75, 0.25], [0.5, 0.5]], np.float32))
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert predictions.entropy(logits, 1.0) == pytest.approx((first + math.log(2)) / 2)
    assert predictions.entropy(1e6 * logits, 1e9) == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("trained", "temperature", "verdict"),
    [(1.0, 1.0, "bad"), (0.9, 1.0, "look"), (math.nan, 1.0, "look"), (1.0, 4.0, "ok"), (1.0, None, "bad")],
)
def test_a_higher_temperature_softens_targets(trained: float, temperature: float | None, verdict: str) -> None:
    logits = 1.8 * logits_of([0, 1] * 10)  # 0.9993 on one class
    assert predictions.soft_targets(logits, trained, temperature).verdict == verdict


@pytest.mark.parametrize(
    ("train", "test", "verdicts"),
    [
        (1.0, 0.99, {"agreement on training rows": "ok", "agreement on test rows": "ok"}),
        (1.0, 0.92, {"agreement on training rows": "ok", "agreement on test rows": "look"}),
        (1.0, 0.6, {"agreement on training rows": "ok", "agreement on test rows": "bad"}),
        (0.85, 0.85, {"agreement on training rows": "look", "agreement on test rows": "ok"}),
        (0.6, 0.6, {"agreement on training rows": "bad", "agreement on test rows": "ok"}),
    ],
)
def test_agreement_tells_underfit_from_overfit(train: float, test: float, verdicts: dict[str, str]) -> None:
    def scored(where: str, loyal: float, rows: int = 400) -> predictions.Scored:
        student = [0] * round(loyal * rows) + [1] * round((1 - loyal) * rows)
        labels = np.zeros(rows, np.int64)
        return predictions.Scored(where=where, labels=labels, student=logits_of(student), teacher=logits_of([0] * rows))

    found = predictions.agreements([scored("training", train), scored("test", test)])
    assert {one.name: one.verdict for one in found} == verdicts
    assert found[0].values["label_loyalty"] == pytest.approx(train)


def test_a_teacher_is_held_against_a_constant_and_its_student() -> None:
    labels = np.array([0, 1] * 100)
    right, one, half = logits_of(labels), logits_of([0] * 200), logits_of([0, 0, 0, 1] * 50)

    def verdict(teacher: Any, student: Any) -> tuple[str, str]:
        scored = predictions.Scored(where="training", labels=labels, student=student, teacher=teacher)
        found = predictions.teacher_accuracy([scored])
        return found.verdict, found.meaning

    assert verdict(right, right) == ("ok", "")
    assert verdict(one, one)[0] == "bad"
    assert verdict(half, right) == ("look", "On training rows the student is better than its teacher.")
    masked = predictions.Scored(where="training", labels=np.full(200, IGNORED), student=right, teacher=right)
    assert predictions.teacher_accuracy([masked]).verdict == "not looked at"


def test_what_few_rows_tell_apart_is_no_lead() -> None:
    assert predictions.lead(0.9, 0.8, 1000, "").verdict == "ok"
    assert predictions.lead(0.9, 0.8, 20, "").verdict == "look"
    assert predictions.lead(0.8, 0.8, 1000, "").verdict == "bad"


# ---------------------------------------------------------------------- texts and record


def test_classes_and_labels_are_counted() -> None:
    assert texts.classes(np.array([0, 1] * 10), 2).verdict == "ok"
    assert texts.classes(np.array([0] * 19 + [1]), 2).verdict == "look"
    assert "A class without a row" in texts.classes(np.array([0, 1] * 10), 3).meaning
    assert texts.labelled(10, 0, task_weight=1.0, where="").verdict == "look"
    assert texts.labelled(10, 0, task_weight=0.0, where="").verdict == "ok"
    assert texts.labelled(10, 5, task_weight=1.0, where="").verdict == "ok"


def test_a_tokenizer_that_was_not_shared_may_differ() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens(["goodfilm"])
    for shared, verdict in [(True, "bad"), (False, "ok")]:
        found = texts.tokenizers(one, other, ["a goodfilm", "a film"], shared=shared)
        assert (found.verdict, found.values["different"]) == (verdict, 1)


def changed(scene: Scene, *measurements: Measurement, **settings: Any) -> Record:
    record = facts.load(scene.place / "student")
    assert record.training is not None
    own = record.training.model_copy(update={"settings": {**record.training.settings, **settings}})
    return record.model_copy(update={"training": own, "measurements": record.measurements + measurements})


def measured(scene: Scene, subject: str, value: float, metric: str = "accuracy", **how: Any) -> Measurement:
    data = facts.load(scene.place / "student").find("accuracy")
    assert data is not None
    return Measurement(subject=subject, metric=metric, value=value, unit="fraction", data=data.data, how=how)


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [({"learning_rate": 2e-5}, "ok"), ({"learning_rate": 1e-9}, "look"), ({"learning_rate": 0.5}, "look"),
     ({"learning_rate": 0.5, "optim": "sgd"}, "ok"), ({"learning_rate": 0}, "bad"),
     ({"learning_rate": None}, "not looked at")],
)  # fmt: skip
def test_learning_rates_are_judged(scene: Scene, settings: dict[str, Any], verdict: str) -> None:
    assert recorded.of_training(changed(scene, **settings).training)[0].verdict == verdict


@pytest.mark.parametrize(("warmup", "verdict"), [(0.1, "ok"), (0.8, "look"), (100, "look"), (0, "ok"), ("x", "ok")])
def test_steps_and_warm_up_are_judged(scene: Scene, warmup: Any, verdict: str) -> None:
    assert recorded.of_training(changed(scene, warmup_steps=warmup).training)[1].verdict == verdict


def test_one_rate_against_the_best_of_three_is_unfair_where_the_student_did_not_win(scene: Scene) -> None:
    tried = [measured(scene, "alone", value, "choice_accuracy", learning_rate=rate, chosen=rate == 5e-5)
             for rate, value in ((2e-5, 0.7), (5e-5, 0.9), (1e-4, 0.8))]  # fmt: skip
    equal = measured(scene, "alone", facts.load(scene.place / "student").find("accuracy").value)  # type: ignore[union-attr]
    found = {one.name: one for one in recorded.of_measurements(changed(scene, *tried, equal))}
    assert found["rates tried"].verdict == found["student against alone"].verdict == "look"
    assert found["rates tried"].values["best"] == 5e-5
    won = {one.name: one for one in recorded.of_measurements(changed(scene, *tried))}
    assert won["rates tried"].verdict == won["student against alone"].verdict == "ok"
    assert equal.data is not None
    for data in (None, equal.data.model_copy(update={"fingerprint": "of other rows"})):
        elsewhere = equal.model_copy(update={"data": data})
        assert recorded.of_measurements(changed(scene, elsewhere))[0].verdict == "not looked at"


def test_harm_is_told_but_its_causes_come_first(scene: Scene) -> None:
    better = measured(scene, "alone", 1.0)
    record = changed(scene, better, learning_rate=1e-9)
    found = [*recorded.of_training(record.training), recorded.against_alone(0.5, 1.0, 200, "")]
    assert found[2].verdict == "bad"
    likely = findings.most_likely(found)
    assert likely is not None
    assert likely.name == "learning rate"
    assert findings.most_likely(found[2:]) == found[2]


# ---------------------------------------------------------------------- the command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    return lambda *arguments: call(capsys, *arguments)


def test_the_command_tells_findings_and_writes_nothing(scene: Scene, command: Callable[..., Said]) -> None:
    student = scene.place / "student"
    before = {path.name: path.read_bytes() for path in student.iterdir()}
    options = ("--teacher", scene.big, "--task", scene.place / "task.yaml", "--data", scene.place / "train.csv")
    said = command("doctor", student, *options, "--max-length", 6)
    assert said.code == 0, said.err
    assert "truncation" in said.out.splitlines()[3]  # worst first
    assert "not looked at: rates tried" in said.out
    assert said.err.splitlines()[-1].startswith("Most likely: truncation (100.0% of the rows are longer")
    assert not any(text in said.out + said.err for text, _ in sentences(ROWS, 0) + sentences(ROWS, 1))
    assert {path.name: path.read_bytes() for path in student.iterdir()} == before


def test_json_is_all_that_it_prints(scene: Scene, command: Callable[..., Said]) -> None:
    said = command("doctor", scene.place / "student", "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert [one["name"] for one in found["findings"]] == [one.name for one in examine(scene.place / "student", Given())]
    assert found["most_likely"] is None
    assert found["summary"] == said.err.splitlines()[-1]
    nan = Finding(name="weights", verdict="bad", values={"loss": math.nan})
    assert json.loads(findings.as_json([nan]))["findings"][0]["values"] == {"loss": None}


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path, command: Callable[..., Said]) -> None:
    assert "holds no config.json, no student/" in command("doctor", tmp_path).error
