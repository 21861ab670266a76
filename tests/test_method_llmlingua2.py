"""LLMLingua-2: from a text teacher's shortenings to a compressor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from chat import serving
from datasets import Dataset
from hf_compress_plugins.encoders import llmlingua2 as module
from hf_compress_plugins.encoders.llmlingua2 import (
    INSTRUCTION,
    WORD,
    annotate,
    chunks,
    compress_prompt,
    kept_words,
    llmlingua2,
    threshold,
    well_aligned,
    word_probabilities,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hf_compress import export_onnx, load_onnx
from hf_compress.errors import ConfigurationError
from hf_compress.teachers.text import ChatServer, TextTeacher

TOKENIZER = tiny_tokenizer()
DROPPED = {"the", "a", "of", "and"}


def without_fillers(prompt: str) -> str:
    """A rule as a text teacher, for tests alone."""
    return " ".join(word for word in WORD.findall(prompt.removeprefix(INSTRUCTION)) if word.lower() not in DROPPED)


def teacher(**settings: Any) -> TextTeacher:
    return TextTeacher(without_fillers, name="rule", **settings)


TEXTS = ["the cat of the house and a dog.", "a good film and the bad end of it.", "the end of the day."] * 8


def classifier(seed: int = 0) -> BertForTokenClassification:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
            num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertForTokenClassification(config)


def data(**given_settings: Any) -> Dataset:
    given_settings = {"teacher": teacher(), "tokenizer": TOKENIZER} | given_settings
    return llmlingua2(Dataset.from_dict({"text": TEXTS}), **given_settings)


def test_repeated_words_are_found_in_order() -> None:
    found = annotate(["so", "we", "we", "had", "the", "the", "end"], ["we", "the", "end"])
    assert found.labels == (False, True, False, False, True, False, True)
    assert found.alignment_gap == 0
    assert annotate(["a"], []).variation_rate == 1.0
    assert annotate(["a", "b"], ["c"]).variation_rate == 1.0


def test_equal_values_are_not_dropped_all_at_once() -> None:
    assert well_aligned(np.zeros(10), np.zeros(10)).tolist() == list(range(10))
    rates = np.array([0.0] * 9 + [1.0])
    assert well_aligned(rates, np.zeros(10)).tolist() == list(range(9))
    rates = np.array([0.0] * 8 + [1.0] * 2)  # the percentile is 1, and what is not below it goes
    assert well_aligned(rates, np.zeros(10)).tolist() == list(range(8))
    assert well_aligned(np.zeros(10), rates).tolist() == list(range(8))
    rates = np.array([0.0] * 39 + [0.5])  # the percentile is 0
    assert well_aligned(rates, np.zeros(40)).tolist() == list(range(39))
    assert well_aligned(np.array([]), np.array([])).tolist() == []


def test_a_chunk_that_the_teacher_made_up_is_left_out() -> None:
    def invents(prompts: Any) -> list[str]:
        return [*map(without_fillers, prompts[:-1]), "good music"]

    texts = [{"text": f"good film {number}"} for number in range(20)]
    rows = llmlingua2(texts, teacher=invents, tokenizer=TOKENIZER)
    assert len(rows) == 19
    assert set(rows["variation_rate"]) == {0.0}


def test_certain_words_stay_at_a_limit_of_1_and_no_others_at_theirs() -> None:
    assert kept_words([1.0, 0.5, 1.0], 1.0) == [True, False, True]
    assert kept_words([0.5, 0.5, 0.6], 0.5) == [False, False, True]


def test_chunks_end_where_they_may_and_count_tokens() -> None:
    ends = [place == 2 for place in range(9)]
    assert chunks([1] * 9, ends, 4) == [(0, 3), (3, 7), (7, 9)]
    assert chunks([1] * 9, ends, 9) == [(0, 9)]
    assert chunks([1, 3, 1, 9, 1], [False] * 5, 4) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert chunks([], [], 4) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30), st.integers(1, 12))
def test_chunks_cover_all_words_and_stay_below_the_limit(words: list[tuple[int, bool]], limit: int) -> None:
    sizes, ends = [size for size, _ in words], [end for _, end in words]
    found = chunks(sizes, ends, limit)
    assert [place for start, end in found for place in range(start, end)] == list(range(len(words)))
    assert all(end - start == 1 or sum(sizes[start:end]) <= limit for start, end in found)


def test_a_teacher_is_asked_for_the_text_itself_in_chunks_that_fit() -> None:
    asked: list[str] = []

    def answer(prompts: Any) -> list[str]:
        asked.extend(prompt.removeprefix(INSTRUCTION) for prompt in prompts)
        return asked

    text = "  It's good, very  good.\nThe film was not; a book (of the film) is good and bad "
    rows = llmlingua2([{"text": text}], teacher=answer, tokenizer=TOKENIZER, max_length=16)
    assert asked[0] == "It's good, very  good."
    assert all(part in text for part in asked)
    assert "".join("".join(asked).split()) == "".join(text.split())
    assert max(map(len, rows["input_ids"])) <= 16
    assert sum(label != -100 for row in rows["labels"] for label in row) == len(
        TOKENIZER(WORD.findall(text), is_split_into_words=True, add_special_tokens=False)["input_ids"]
    )


def test_a_line_or_a_full_stop_may_end_a_chunk() -> None:
    asked: list[str] = []
    teacher = lambda prompts: asked.extend(prompts) or list(prompts)  # type: ignore[func-returns-value] # noqa: E731
    for text in ("good film\nbad book very dull", "good. bad book very dull"):
        llmlingua2([{"text": text}], teacher=teacher, tokenizer=TOKENIZER, instruction="", max_length=7)
    assert asked == ["good film", "bad book very dull", "good.", "bad book very dull"]


def test_a_word_has_the_mean_or_the_first_of_its_tokens() -> None:
    assert word_probabilities([0.2, 0.4, 0.9], [0, 0, 1]) == pytest.approx([0.3, 0.9])
    assert word_probabilities([0.2, 0.4, 0.9], [0, 0, 1], reduce="first") == [0.2, 0.9]


def test_a_prompt_s_words_may_be_judged_by_their_first_tokens() -> None:
    """Of "abb" the first of three tokens is to stay, of "caa" the two others."""
    model = Dropping("##b", "c")
    assert compress_prompt("abb caa", model, TOKENIZER, rate=0.9) == "caa"
    assert compress_prompt("abb caa", model, TOKENIZER, rate=0.9, reduce="first") == "abb"


def test_the_limit_counts_the_target_s_tokens() -> None:
    assert threshold([0.1, 0.5, 0.9], [1, 1, 1], rate=0.5) < threshold([0.1, 0.5, 0.9], [1, 1, 8], rate=0.5)


def test_every_part_of_a_word_has_its_label_and_special_tokens_none() -> None:
    row = data()[0]
    encoded = TOKENIZER(WORD.findall(TEXTS[0]), is_split_into_words=True)
    for label, word in zip(row["labels"], encoded.word_ids(), strict=True):
        expected = -100 if word is None else int(WORD.findall(TEXTS[0])[word].lower() not in DROPPED)
        assert label == expected


class Random:
    """Scores of a model that knows nothing."""

    def __init__(self, seed: int, labels: int = 2) -> None:
        self.draw, self.labels, self.read = torch.Generator().manual_seed(seed), labels, list[int]()

    def __call__(self, input_ids: Any, attention_mask: Any) -> Any:
        self.read += input_ids.flatten().tolist()
        return SimpleNamespace(logits=torch.randn(*input_ids.shape, self.labels, generator=self.draw))


class Dropping(Random):
    """Scores of a model that drops the words of one token each that it is given."""

    def __init__(self, *words: str) -> None:
        super().__init__(0)
        self.dropped = torch.tensor(TOKENIZER.convert_tokens_to_ids(list(words)))

    def __call__(self, input_ids: Any, attention_mask: Any) -> Any:
        drop = torch.isin(input_ids.cpu(), self.dropped)
        noise = torch.rand(drop.shape, generator=self.draw)
        return SimpleNamespace(logits=torch.stack([torch.zeros(drop.shape), torch.where(drop, -5, 5 + noise)], -1))


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="abé .,!?-/'\n\t12\u200b", max_size=60), st.floats(0, 1), st.integers(0, 5))
def test_the_output_is_a_subsequence_of_the_input(text: str, rate: float, seed: int) -> None:
    """In words, so that none is new, and in signs but for blanks."""
    short = compress_prompt(text, Random(seed), TOKENIZER, rate=rate, max_length=16)
    words, signs = iter(WORD.findall(text)), iter(text)
    assert all(word in words for word in WORD.findall(short))
    assert all(sign in signs for sign in "".join(short.split()))
    assert short == short.strip()


def test_words_that_were_joined_are_not_glued() -> None:
    model = Dropping("book", "a")
    assert compress_prompt("good book-bad a", model, TOKENIZER, rate=1.0) == "good book-bad a"
    assert compress_prompt("good(book)bad;a\nfilm", model, TOKENIZER, rate=0.8) == "good( )bad;\nfilm"


def test_every_token_of_a_long_text_is_read() -> None:
    """Words of ten tokens each, of which less fit into one reading than half its tokens."""
    text = " ".join(["abcdefghij"] * 8 + ["good"] * 8)
    model = Random(0)
    assert len(WORD.findall(compress_prompt(text, model, TOKENIZER, rate=0.5, max_length=16))) in (7, 8)
    assert [i for i in model.read if i > 4] == [i for i in TOKENIZER(text)["input_ids"] if i > 4]


def test_a_model_is_used_in_eval_mode_and_its_mode_restored() -> None:
    model = classifier()
    for module_ in model.modules():
        if isinstance(module_, torch.nn.Dropout):
            module_.p = 0.5
    texts = [compress_prompt(TEXTS[0], model.train(mode), TOKENIZER, rate=0.5) for mode in (True, False, True)]
    assert model.training
    assert len(set(texts)) == 1


def test_ids_go_to_the_device_of_the_model() -> None:
    class Elsewhere(Random):
        device = torch.device("meta")

        def __call__(self, input_ids: Any, attention_mask: Any) -> Any:
            assert input_ids.device == attention_mask.device == self.device
            return SimpleNamespace(logits=torch.randn(*input_ids.shape, 2))

    assert compress_prompt("good bad film", Elsewhere(0), TOKENIZER, rate=1.0) == "good bad film"


def test_the_target_s_tokens_are_counted() -> None:
    """A dropped word of 20 of the target's tokens leaves room for all the others at half the rate."""
    text = "good abcdefghijklmnopqrst bad film"
    model = Dropping("a")

    def target(word: str, add_special_tokens: bool) -> dict[str, list[str]]:
        return {"input_ids": list(word) if len(word) == 20 else [word]}

    assert compress_prompt(text, model, TOKENIZER, rate=0.5, target_tokenizer=target).split() != text.split()
    few = compress_prompt(text, Dropping("good", "bad", "film"), TOKENIZER, rate=0.5).split()
    many = compress_prompt(text, Dropping("good", "bad", "film"), TOKENIZER, rate=0.5, target_tokenizer=target).split()
    assert many == []
    assert "abcdefghijklmnopqrst" in few


def test_rates_and_forced_words() -> None:
    text = "one two 3 four . five six seven eight nine ten"
    assert compress_prompt(text, Random(0), TOKENIZER, rate=1.0) == text
    assert compress_prompt("", Random(0), TOKENIZER, rate=0.5) == ""
    kept = compress_prompt(text, Random(0), TOKENIZER, rate=0.3, force=(".",), keep_digits=True)
    assert {".", "3"} <= set(kept.split())
    counts = [len(WORD.findall(compress_prompt(text, Random(0), TOKENIZER, rate=rate))) for rate in (0.2, 0.5, 0.8)]
    assert counts == sorted(counts)
    assert abs(counts[1] - 5.5) <= 1
    for rate in (1.5, -0.1, float("nan")):
        with pytest.raises(ConfigurationError, match="rate"):
            compress_prompt(text, Random(0), TOKENIZER, rate=rate)
    with pytest.raises(ConfigurationError, match="3 labels"):
        compress_prompt(text, Random(0, labels=3), TOKENIZER, rate=0.5)
    with pytest.raises(ConfigurationError, match="no room"):
        compress_prompt(text, Random(0), TOKENIZER, rate=0.5, max_length=2)


def test_trained_saved_loaded_and_exported_it_compresses_as_it_was_taught(tmp_path: Path) -> None:
    trainer = Trainer(
        model=classifier(),
        args=TrainingArguments(
            str(tmp_path / "run"), max_steps=60, per_device_train_batch_size=8, learning_rate=5e-3, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=data(),
        processing_class=TOKENIZER,
        data_collator=DataCollatorForTokenClassification(TOKENIZER),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "student").eval()
    rate = 5 / 9
    short = compress_prompt(TEXTS[0], loaded, TOKENIZER, rate=rate)
    assert {"cat", "house", "dog", "."} < set(WORD.findall(short))  # four that it learned to keep, and one more
    assert len(WORD.findall(short)) == 5
    export_onnx(tmp_path / "student")
    graph = load_onnx(tmp_path / "student" / "onnx")
    assert compress_prompt(TEXTS[0], graph, TOKENIZER, rate=rate) == short


def test_a_chat_server_teaches_and_is_asked_once(tmp_path: Path) -> None:
    with serving(without_fillers) as server:
        model = TextTeacher(ChatServer(url=server.url, model="m", temperature=0.3), cache=tmp_path)
        first, second = data(teacher=model), data(teacher=model)
        assert len(server.requests) == 3
        assert server.requests[0]["messages"][0]["content"].startswith(INSTRUCTION)
    assert first["labels"][:] == second["labels"][:] == data()["labels"][:]


def test_texts_and_answers_without_words_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="has no words"):
        llmlingua2(Dataset.from_dict({"text": ["", " "]}), teacher=teacher(), tokenizer=TOKENIZER)
    with pytest.raises(ConfigurationError, match="none of 24"):
        data(teacher=lambda prompts: ["" for _ in prompts])
    for wrong in ({"window": 0}, {"percentile": 101.0}):
        with pytest.raises(ConfigurationError, match="window must be"):
            data(**wrong)
    with pytest.raises(ConfigurationError, match="Pass a fast tokenizer"):
        data(tokenizer=mock.Mock(is_fast=False, num_special_tokens_to_add=lambda pair: 2))


@pytest.mark.parametrize("name", ["annotate", "well_aligned", "chunks"])
def test_each_function_of_the_preparation_is_reached(name: str) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        data()


@pytest.mark.parametrize("name", ["word_probabilities", "threshold", "kept_words", "chunks", "joined"])
def test_each_function_of_the_compressor_is_reached(name: str) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        compress_prompt("one two", Random(0), TOKENIZER, rate=0.5)
