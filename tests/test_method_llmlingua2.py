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


def test_chunks_end_with_a_full_stop_where_they_can() -> None:
    words = ["a", "b", ".", "c", "d", "e", "f", "g", "h"]
    assert chunks(words, 4) == [(0, 3), (3, 7), (7, 9)]
    assert chunks([], 4) == []


def test_a_word_has_the_mean_or_the_first_of_its_tokens() -> None:
    assert word_probabilities([0.2, 0.4, 0.9], [0, 0, 1]) == pytest.approx([0.3, 0.9])
    assert word_probabilities([0.2, 0.4, 0.9], [0, 0, 1], reduce="first") == [0.2, 0.9]


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

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Any, attention_mask: Any) -> Any:
        return SimpleNamespace(logits=torch.randn(*input_ids.shape, 2, generator=self.draw))


def is_subsequence(short: str, text: str) -> bool:
    letters = iter(text)
    return all(letter in letters or letter == " " for letter in short if not letter.isspace())


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="abé .,!?-'\n\t12", max_size=60), st.floats(0, 1), st.integers(0, 5))
def test_the_output_is_a_subsequence_of_the_input(text: str, rate: float, seed: int) -> None:
    short = compress_prompt(text, Random(seed), TOKENIZER, rate=rate, max_length=16)
    assert is_subsequence(short, text)
    assert len(WORD.findall(short)) <= len(WORD.findall(text))


def test_rates_and_forced_words() -> None:
    text = "one two 3 four . five six seven eight nine ten"
    assert compress_prompt(text, Random(0), TOKENIZER, rate=1.0) == text
    assert compress_prompt("", Random(0), TOKENIZER, rate=0.5) == ""
    kept = compress_prompt(text, Random(0), TOKENIZER, rate=0.3, force=(".",), keep_digits=True)
    assert {".", "3"} <= set(kept.split())
    counts = [len(WORD.findall(compress_prompt(text, Random(0), TOKENIZER, rate=rate))) for rate in (0.2, 0.5, 0.8)]
    assert counts == sorted(counts)
    assert abs(counts[1] - 5.5) <= 1
    with pytest.raises(ConfigurationError, match="rate"):
        compress_prompt(text, Random(0), TOKENIZER, rate=1.5)


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


@pytest.mark.parametrize("name", ["annotate", "well_aligned", "chunks"])
def test_each_function_of_the_preparation_is_reached(name: str) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        data()


@pytest.mark.parametrize("name", ["word_probabilities", "threshold", "kept_words", "chunks"])
def test_each_function_of_the_compressor_is_reached(name: str) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        compress_prompt("one two", Random(0), TOKENIZER, rate=0.5)
