"""Document curriculum: pages as text, a teacher's answers as targets, rows from easy to hard."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_compress_plugins.encoders import _competence, _document_layout
from hf_compress_plugins.encoders import document_curriculum as module
from hf_compress_plugins.encoders._competence import (
    STATE,
    STUDENT_LOSS,
    admitted,
    competence,
    easiest_first,
    losses,
)
from hf_compress_plugins.encoders._document_layout import (
    LINE,
    SPACES,
    check_layout,
    encode_layout,
    keeps_layout,
    lines_of,
    spatial_text,
)
from hf_compress_plugins.encoders.document_curriculum import (
    Curriculum,
    CurriculumConfig,
    add_layout_marks,
    anls,
    decode_layout,
    document_curriculum,
    edits,
    short_answer,
    student_text,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    Trainer,
    TrainingArguments,
)

from hf_compress import DistillCallback
from hf_compress.errors import ConfigurationError, ResumeError
from hf_compress.teachers.text import TextTeacher

BATCH, STEPS = 4, 6
LETTERS = "abcdefghijklmnop:?"


def t5_tokenizer() -> T5Tokenizer:
    """T5's own pieces of a tokenizer over a few letters; it drops line breaks and runs of spaces."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(mark + letter, -3.0 - (mark == "")) for mark in ("▁", "") for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def marked() -> T5Tokenizer:
    tokenizer = t5_tokenizer()
    add_layout_marks(tokenizer)
    return tokenizer


TOKENIZER = marked()


def t5(seed: int = 0, dropout: float = 0.1) -> T5ForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=len(TOKENIZER), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=dropout,
            decoder_start_token_id=0,
        )  # fmt: skip
        return T5ForConditionalGeneration(config)


# layout


def test_words_stand_in_the_columns_of_their_places() -> None:
    assert spatial_text(["A", "B"], [(0, 0, 10, 10), (50, 0, 60, 10)]) == "A    B"
    assert spatial_text(["A", "B"], [(24, 0, 34, 10), (55, 0, 65, 10)]) == "  A   B"  # 2.4 and 5.5: 2 and 6
    assert spatial_text(["long", "B"], [(0, 0, 40, 10), (31, 0, 41, 10)]) == "long B"
    assert spatial_text(["A", " ", "B\n"], [(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)]) == "A   B"
    assert spatial_text([], []) == ""


def test_a_character_is_as_wide_as_the_median_word_says() -> None:
    """Widths by character 10, 10 and 40: the mean, 20, would put B into column 5."""
    words, boxes = ["A", "ab", "B"], [(0, 0, 10, 10), (0, 12, 20, 22), (100, 12, 140, 22)]
    assert spatial_text(words, boxes) == "A\nab        B"


def test_words_share_a_line_from_half_of_the_smaller_height_on() -> None:
    upper = (0, 0, 10, 10)
    assert lines_of([upper, (20, 5, 30, 15)]) == [[0, 1]]
    assert lines_of([upper, (20, 5.1, 30, 15.1)]) == [[0], [1]]
    assert lines_of([upper, (20, 8, 30, 12)]) == [[0, 1]]  # 2 of a height of 4
    assert lines_of([(0, 12, 10, 22), upper, (20, 4, 30, 14)]) == [[1, 2], [0]]  # 6 of the upper one, 2 of the lower
    assert lines_of([(20, 0, 30, 10), upper]) == [[1, 0]]


def test_a_gap_of_more_than_one_and_a_half_lines_is_one_empty_line() -> None:
    def page(gap: float) -> str:
        return spatial_text(["A", "B", "C"], [(0, 0, 10, 10), (0, 10, 10, 20), (0, 20 + gap, 10, 30 + gap)])

    assert page(0) == page(15) == "A\nB\nC"
    assert page(15.1) == page(300) == "A\nB\n\nC"


@given(st.randoms(use_true_random=False), st.sampled_from([0.5, 2.0, 8.0]))
@settings(max_examples=20, deadline=None)
def test_neither_the_order_of_words_nor_the_unit_matters(draw: random.Random, scale: float) -> None:
    boxes = [
        (column * 40.0, line * 12.0, column * 40.0 + 30, line * 12.0 + 10) for line in range(3) for column in range(3)
    ]
    words = ["abc", "def", "ghi", "jkl", "mno", "pqr", "stu", "vwx", "yza"]
    order = list(range(9))
    draw.shuffle(order)
    moved = [[scale * part for part in boxes[place]] for place in order]
    assert spatial_text([words[place] for place in order], moved) == spatial_text(words, boxes)


@pytest.mark.parametrize("box", [(0, 0, 0, 10), (0, 10, 10, 10), (0, 0, float("nan"), 10), (0, 0, 10)])
def test_a_box_that_is_none_is_named(box: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="the box of 'word'"):
        spatial_text(["word"], [box])
    with pytest.raises(ConfigurationError, match="2 words have 1 boxes"):
        spatial_text(["a", "b"], [(0, 0, 1, 1)])


@given(st.text("ab \n", max_size=40))
@settings(max_examples=60, deadline=None)
def test_marks_are_read_back(text: str) -> None:
    found = encode_layout(text)
    assert decode_layout(found) == text
    assert "\n" not in found
    assert "  " not in found
    assert found == found.strip()


def test_spaces_that_a_tokenizer_puts_beside_a_mark_are_dropped() -> None:
    assert decode_layout(f"a {LINE} b{SPACES[2]} {SPACES[1]} c d") == "a\nb   c d"


def test_a_run_takes_a_mark_for_each_power_of_two() -> None:
    assert encode_layout(f"a{' ' * 13}b") == f"a{SPACES[8]}{SPACES[4]}{SPACES[1]}b"
    assert encode_layout(f"a{' ' * 200}b").count(SPACES[64]) == 3
    assert encode_layout("a b\n c") == f"a b{LINE}{SPACES[1]}c"


def test_t5_loses_a_layout_without_marks_and_keeps_it_with_them() -> None:
    page, plain = "ab    cd\n\n  ef gh", t5_tokenizer()
    assert plain.decode(plain(page)["input_ids"], skip_special_tokens=True) == "ab cd ef gh"
    assert [keeps_layout(one) for one in (plain, tiny_tokenizer(), ByT5Tokenizer(), TOKENIZER)] == [
        False,
        False,
        True,
        True,
    ]
    ids = TOKENIZER(encode_layout(page))["input_ids"]
    assert decode_layout(TOKENIZER.decode(ids, skip_special_tokens=True)) == page
    with pytest.raises(ConfigurationError, match=r"has no marks .*add_layout_marks"):
        check_layout(plain)


def test_the_check_finds_marks_that_do_not_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decode = marked(), TOKENIZER.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **k: decode(ids, **k).replace(SPACES[4], SPACES[2]))
    with pytest.raises(ConfigurationError, match="although it has the marks"):
        check_layout(tokenizer)


def test_marks_get_rows_of_the_embeddings_where_these_are_too_few() -> None:
    model, tokenizer = (
        T5ForConditionalGeneration(T5Config(**t5().config.to_dict() | {"vocab_size": 40})),
        t5_tokenizer(),
    )
    assert add_layout_marks(tokenizer, model) == 8
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) > 40
    assert add_layout_marks(tokenizer, model) == 0
    large = T5ForConditionalGeneration(T5Config(**t5().config.to_dict() | {"vocab_size": 64}))
    add_layout_marks(t5_tokenizer(), large)
    assert large.get_input_embeddings().weight.shape[0] == 64


# answers


def test_anls_by_hand() -> None:
    assert anls("abcd", ["abce"]) == 0.75
    assert anls("ab", ["cd"]) == anls("ab", ["ac"]) == anls("", ["ab"]) == 0.0
    assert anls(" ABCD", ["abcd "]) == anls("", [""]) == 1.0
    assert anls("abcd", ["zzzz", "abcx", "abxx"]) == 0.75
    assert anls("abcde", ["abc"]) == pytest.approx(0.6)
    assert anls("abcd", []) == 0.0


def test_edits_by_hand() -> None:
    assert edits("kitten", "sitting") == edits("sitting", "kitten") == 3
    assert (edits("", "abc"), edits("abc", "bc"), edits("ab", "ba"), edits("abc", "abc")) == (3, 1, 2, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12 May", "12 May"),
        ("\n  answer: 12   May \n", "12 May"),
        ("'a'", "a"),
        ("'", "'"),
        ("Inc.", "Inc."),
        ("", None),
        ("None.", None),
        ("Answer:", None),
        ("I'm sorry, but I cannot read that.", None),
        ("The document does not say.", None),
        ("12 May\nbecause it stands below Date", None),
        ('""', None),
    ],
)
def test_what_is_learned_of_an_answer(text: str, said: str | None) -> None:
    assert short_answer(text) == said


WORDS, BOXES = ["ab:", "cd", "ef"], [(0, 0, 30, 10), (60, 0, 80, 10), (0, 14, 20, 24)]
DOCUMENTS = [
    {"words": WORDS, "boxes": BOXES, "question": "a?", "answers": ["cd"]},
    {"words": WORDS, "boxes": BOXES, "question": "b?", "answers": ["abcd"]},
    {"words": WORDS, "boxes": BOXES, "question": "c?", "answers": ["x"]},
    {"words": WORDS, "boxes": BOXES, "question": "d?", "answers": None},
]
SAID = {"a?": "cd", "b?": "abce", "c?": "none", "d?": "Answer: ef"}
PAGE = "ab:   cd\nef"


def by_table(prompt: str) -> str:
    """A table as a text teacher, for tests alone; it knows the page by its layout."""
    assert PAGE in prompt
    return next(said for question, said in SAID.items() if f"Question: {question}\n" in prompt)


def labelled(**given_settings: Any) -> Any:
    return document_curriculum(
        DOCUMENTS, **{"teacher": TextTeacher(by_table, name="table"), "tokenizer": TOKENIZER} | given_settings
    )


def test_targets_are_the_teacher_s_answers_and_gold_tells_only_where_it_is_wrong() -> None:
    rows = labelled()

    assert rows["row"][:] == [0, 1, 3]
    assert rows["answer"][:] == ["cd", "abce", "ef"]
    assert rows["disagreement"][:] == [0.0, 0.25, None]
    for row in rows:
        assert TOKENIZER.decode(row["labels"]) == f"{row['answer']}</s>"
        assert (row["target_tokens"], row["input_tokens"]) == (len(row["labels"]), len(row["input_ids"]))
        read = decode_layout(TOKENIZER.decode(row["input_ids"], skip_special_tokens=True))
        assert read == f"{DOCUMENTS[row['row']]['question']}\n{PAGE}"
        text = student_text(WORDS, BOXES, read.split("\n")[0], tokenizer=TOKENIZER)
        assert TOKENIZER(text)["input_ids"] == row["input_ids"]
    assert not any(rows["cut"][:])


def test_in_reading_order_no_place_is_told() -> None:
    rows = labelled(layout="reading", teacher=lambda prompts: ["cd" for prompt in prompts if "ab: cd ef\n" in prompt])
    assert len(rows) == 4
    assert TOKENIZER.decode(rows[0]["input_ids"], skip_special_tokens=True) == f"a?{LINE} ab: cd ef"
    plain = labelled(layout="reading", tokenizer=t5_tokenizer(), teacher=lambda prompts: ["cd"] * len(prompts))
    assert len(plain) == 4  # nothing that T5's tokenizer could destroy
    with pytest.raises(ConfigurationError, match="needs boxes"):
        student_text(WORDS, None, "a?", tokenizer=TOKENIZER)


def test_a_layout_that_the_tokenizer_would_destroy_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(ConfigurationError, match="the page's layout would be lost"):
        labelled(tokenizer=t5_tokenizer(), teacher=lambda prompts: pytest.fail("was asked"))


def test_answers_that_explain_are_dropped_by_length_and_none_left_is_an_error() -> None:
    assert labelled(max_target_length=3)["answer"][:] == ["cd", "ef"]
    with pytest.raises(ConfigurationError, match=r"none of 4 answers is left.*'more than 1 tokens': 3"):
        labelled(max_target_length=1)
    assert labelled(parse=lambda text: None if text == "cd" else text)["answer"][:] == ["abce", "none", "Answer: ef"]


def test_of_a_long_document_the_end_is_cut_and_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = labelled(max_length=8)
    assert (rows["cut"][:], rows["input_tokens"][:]) == ([True] * 3, [8] * 3)
    assert TOKENIZER.decode(rows[0]["input_ids"]).startswith("a?<layout:line>")
    assert "3 of 3 documents have more than max_length=8" in caplog.text
    with pytest.raises(ConfigurationError, match=r"must end with \{document\}"):
        labelled(student_prompt="{document}\n{question}")
    with pytest.raises(ConfigurationError, match="teacher_prompt needs"):
        labelled(teacher_prompt="{document}")


# order


def test_the_competence_by_hand() -> None:
    config = CurriculumConfig(T_c=100)
    assert competence(0, config) == pytest.approx(0.1)
    assert competence(25, config) == pytest.approx(0.5074, abs=5e-5)
    assert competence(99, config) < competence(100, config) == competence(1000, config) == 1.0
    assert [admitted(0, rows, config) for rows in (1, 10, 11, 30, 100)] == [1, 1, 2, 3, 10]
    assert competence(0, CurriculumConfig(T_c=1, c0=1.0)) == 1.0
    assert admitted(0, 100, CurriculumConfig(T_c=1, c0=0.07)) == 7  # 0.07 · 100 is above 7 in binary
    with pytest.raises(ConfigurationError, match="c0 in"):
        CurriculumConfig(T_c=1, c0=0.0)


def numbered(count: int) -> list[dict[str, Any]]:
    """Rows whose input says their number, by an id of its own, and whose difficulty falls with it."""
    return [
        {"input_ids": [4 + place, 1], "attention_mask": [1, 1], "labels": [4 + place % 7, 1], "hard": -float(place)}
        for place in range(count)
    ]


ROWS = numbered(20)


def curriculum(**given_settings: Any) -> Curriculum:
    defaults = {"batch": BATCH, "steps": STEPS, "config": CurriculumConfig(T_c=4), "difficulty": "hard"}
    return Curriculum(ROWS, **defaults | given_settings)


def test_each_step_reads_from_the_easiest_rows_without_repetition() -> None:
    data = curriculum()
    for step in range(STEPS):
        places = data.places(step).tolist()
        count = admitted(step, 20, data.config)
        assert set(places) <= set(range(20 - count, 20))  # the last rows are the easiest
        assert len(set(places)) == (BATCH if count >= BATCH else count)
    assert [admitted(step, 20, data.config) for step in range(5)] == [2, 11, 15, 18, 20]
    assert {place for step in range(100) for place in curriculum(steps=100).places(step).tolist()} == set(range(20))


def test_the_admitted_rows_are_drawn_evenly() -> None:
    data = curriculum(steps=4000, config=CurriculumConfig(T_c=1, c0=1.0), batch=2)
    counts = torch.bincount(torch.cat([data.places(step) for step in range(1, 4000)]), minlength=20)
    assert (counts - 400).abs().max() < 80  # four standard deviations


def test_rows_are_a_function_of_seed_and_index() -> None:
    one, other = curriculum(), curriculum()
    assert [one.places(step).tolist() for step in (5, 0, 3)] == [other.places(step).tolist() for step in (5, 0, 3)]
    assert one.places(5).tolist() != curriculum(seed=1).places(5).tolist()
    assert one.places(4).tolist() != one.places(5).tolist()
    assert len(one) == BATCH * STEPS
    with pytest.raises(IndexError):
        one[len(one)]


def test_equally_difficult_rows_come_in_drawn_order() -> None:
    drawn = easiest_first(torch.tensor([1.0] * 30 + [0.0]), seed=0).tolist()
    assert (drawn[0], sorted(drawn)) == (30, list(range(31)))
    assert drawn[1:] != list(range(30))
    assert drawn != easiest_first(torch.tensor([1.0] * 30 + [0.0]), seed=1).tolist()
    assert easiest_first(torch.tensor([3.0, 1.0, 2.0]), seed=0).tolist() == [1, 2, 0]


def test_a_difficulty_is_a_finite_number_a_row() -> None:
    assert torch.equal(curriculum(difficulty=[row["hard"] for row in ROWS]).orders, curriculum().orders)
    with pytest.raises(ConfigurationError, match="one finite number for each of 20 rows"):
        curriculum(difficulty=[1.0])
    with pytest.raises(ConfigurationError, match="1 of them not finite"):
        curriculum(difficulty=[float("nan")] + [0.0] * 19)
    with pytest.raises(ConfigurationError, match="1 of 3 rows have no 'disagreement'"):
        Curriculum(labelled(), batch=1, steps=1, config=CurriculumConfig(T_c=1), difficulty="disagreement")
    with pytest.raises(ConfigurationError, match="needs rows"):
        Curriculum([], batch=1, steps=1, config=CurriculumConfig(T_c=1))


# runs


class Seen:
    """Collates, and keeps the numbers of the rows that a training run reads."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.on = True

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.on and len(batch) < 10:  # the losses of the student are taken in larger batches
            self.rows += [row["input_ids"][0] - 4 for row in batch]
        return {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "attention_mask", "labels")}


def trained(
    folder: Path, data: Curriculum, *, resume: int | None = None, callbacks: Sequence[Any] = (), **given_settings: Any
) -> tuple[Trainer, Seen]:
    defaults: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 32,
        "train_sampling_strategy": "sequential", "learning_rate": 1e-2, "save_steps": 3, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "seed": 3, "logging_steps": 1,
    }  # fmt: skip
    seen = Seen()
    trainer = Trainer(
        t5(),
        TrainingArguments(str(folder), **defaults | given_settings),
        data_collator=seen,
        train_dataset=data,
        callbacks=[data.callback(), *callbacks],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return trainer, seen


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_reads_the_rows_of_the_schedule_and_a_resumed_run_is_the_same(
    tmp_path: Path, accumulation: int
) -> None:
    sizes = {"per_device_train_batch_size": BATCH // accumulation, "gradient_accumulation_steps": accumulation}
    whole, seen = trained(tmp_path, curriculum(), **sizes)
    assert seen.rows == [place for step in range(STEPS) for place in curriculum().places(step).tolist()]

    again, rest = trained(tmp_path, curriculum(), resume=3, **sizes)
    assert rest.rows == seen.rows[3 * BATCH :]
    assert torch.equal(weights(again), weights(whole))


REFRESHED = {"difficulty": STUDENT_LOSS, "config": CurriculumConfig(T_c=8, refresh=2)}


def test_the_student_s_losses_decide_the_order_and_a_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[Tensor] = []
    real = Curriculum.decide

    def keep(data: Curriculum, interval: int, difficulty: Tensor) -> None:
        assert interval == len(decided)
        decided.append(difficulty)
        real(data, interval, difficulty)

    monkeypatch.setattr(Curriculum, "decide", keep)
    data = curriculum(**REFRESHED)
    whole, seen = trained(tmp_path, data)
    assert (len(decided), len({tuple(one.tolist()) for one in decided})) == (3, 3)
    expected = curriculum(**REFRESHED)
    orders = [easiest_first(one, seed=0) for one in decided]
    for step in range(STEPS):
        interval = max(step - 1, 0) // 2
        expected.orders[interval % 2] = orders[interval]
        expected.newest.fill_(interval)
        assert seen.rows[step * BATCH : (step + 1) * BATCH] == expected.places(step).tolist()
        worst = set(orders[interval][admitted(step, 20, data.config) :].tolist())
        assert worst.isdisjoint(seen.rows[step * BATCH : (step + 1) * BATCH])
    torch.testing.assert_close(decided[0], losses(t5(), ROWS, Seen(), batch=3))

    monkeypatch.undo()
    again, rest = trained(tmp_path, curriculum(**REFRESHED), resume=3)
    assert rest.rows == seen.rows[3 * BATCH :]
    assert torch.equal(weights(again), weights(whole))
    assert set(again.state.stateful_callbacks[STATE]) == {"newest", "orders"}


def test_a_run_that_reads_ahead_resumes_where_an_order_has_just_been_taken(tmp_path: Path) -> None:
    whole, seen = trained(tmp_path, curriculum(**REFRESHED, fetched=2), save_steps=4)
    again, rest = trained(tmp_path, curriculum(**REFRESHED, fetched=2), resume=4)
    assert rest.rows == seen.rows[4 * BATCH :]
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(ConfigurationError, match="3 steps are read ahead, and an order holds for refresh=2"):
        curriculum(**REFRESHED, fetched=3)
    with pytest.raises(ConfigurationError, match="ignore_data_skip would read its first rows again"):
        trained(tmp_path, curriculum(**REFRESHED, fetched=2), resume=4, ignore_data_skip=True)


def test_losses_are_the_model_s_own_row_by_row_and_leave_it_in_training() -> None:
    model = t5().train()
    rows = [ROWS[0], {**ROWS[1], "labels": [5, -100]}, ROWS[2]]
    found = losses(model, rows, Seen(), batch=2)
    assert all(part.training for part in model.modules())
    assert found.shape == (3,)
    model.eval()
    for row, value in zip(rows, found, strict=True):
        with torch.no_grad():
            own = model(**Seen()([row])).loss
        assert value.item() == pytest.approx(own.item(), rel=1e-6)


def test_a_checkpoint_without_orders_is_not_resumed(tmp_path: Path) -> None:
    trained(tmp_path, curriculum(), max_steps=3)
    with pytest.raises(ResumeError, match="has no orders of 20 rows"):
        trained(tmp_path, curriculum(**REFRESHED), resume=3)


def test_an_order_is_not_read_before_it_is_known() -> None:
    data = curriculum(steps=20, **REFRESHED)
    assert [data.interval_of(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]
    with pytest.raises(ConfigurationError, match="reads by order 1 of the student's losses, and the newest is 0"):
        data.places(3)
    for interval in (1, 2):
        data.decide(interval, torch.arange(20.0))
    assert [len(data.places(step)) for step in (3, 5)] == [BATCH, BATCH]
    data.decide(3, torch.arange(20.0).flip(0))
    assert (
        data.places(3).tolist() == curriculum(**REFRESHED | {"difficulty": torch.arange(20.0)}).places(3).tolist()
    )  # by order 2
    assert curriculum(steps=20, fetched=2, **REFRESHED).interval_of(5) == 1


def test_distillation_reads_the_same_rows(tmp_path: Path) -> None:
    """The student's losses are taken without entering the hook of a distillation, whose teacher reads the batches."""
    _, alone = trained(tmp_path / "alone", curriculum(**REFRESHED), learning_rate=0.0)
    teacher, read = t5(seed=1), list[int]()
    teacher.register_forward_hook(lambda module, args, kwargs, output: read.append(1), with_kwargs=True)
    distill = DistillCallback(teacher, method="kd", alpha=0.5)
    made, seen = trained(tmp_path / "taught", curriculum(**REFRESHED), callbacks=[distill], learning_rate=0.0)
    start = next(at for at in range(len(seen.rows)) if seen.rows[at : at + len(alone.rows)] == alone.rows)
    assert start < 2 * BATCH  # what a dry forward reads
    assert STEPS <= len(read) <= STEPS + 2  # and not the rows whose losses are taken
    assert all("distill_loss" in entry for entry in made.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("data", "changed", "says"),
    [
        ({}, {"train_sampling_strategy": "random"}, "train_sampling_strategy is"),
        ({}, {"per_device_train_batch_size": 2}, "takes 2 rows a step for 6 steps"),
        ({"steps": 5}, {}, "for 6 steps.*steps=5"),
    ],
)
def test_a_trainer_that_would_read_other_rows_is_refused(
    tmp_path: Path, data: Mapping[str, Any], changed: Mapping[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        trained(tmp_path, curriculum(**data), **changed)


def test_a_callback_that_is_missing_or_of_other_data_is_told(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=BATCH, train_sampling_strategy="sequential",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="without its callback"):
        Trainer(t5(), args, data_collator=Seen(), train_dataset=curriculum()).train()
    other = curriculum().callback()
    with pytest.raises(ConfigurationError, match="of another Curriculum"):
        Trainer(t5(), args, data_collator=Seen(), train_dataset=curriculum(), callbacks=[other]).train()


def test_a_student_learns_the_teacher_s_answers(tmp_path: Path) -> None:
    rows = labelled()
    model = t5(dropout=0.0)
    train = Curriculum(rows, batch=3, steps=60, config=CurriculumConfig(T_c=20))
    args = TrainingArguments(
        str(tmp_path), max_steps=60, per_device_train_batch_size=3, train_sampling_strategy="sequential",
        learning_rate=3e-2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(TOKENIZER, model)
    before = losses(model, rows.select_columns(["input_ids", "attention_mask", "labels"]), collate, batch=3)
    Trainer(model, args, collate, train_dataset=train, callbacks=[train.callback()]).train()
    after = losses(model, rows.select_columns(["input_ids", "attention_mask", "labels"]), collate, batch=3)
    assert (after < before / 3).all()
    question = TOKENIZER(student_text(WORDS, BOXES, "a?", tokenizer=TOKENIZER), return_tensors="pt")
    assert TOKENIZER.decode(model.eval().generate(**question, max_new_tokens=8)[0], skip_special_tokens=True) == "cd"


def test_examples_of_the_pages() -> None:
    import doctest

    for part in (module, _competence, _document_layout):
        assert doctest.testmod(part).failed == 0
