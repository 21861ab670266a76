"""StochasTok: which tokens are split, what goes with them, and a Trainer that reads them."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.general.kd import KD
from hf_compress_plugins.tokenizers import stochastok as module
from hf_compress_plugins.tokenizers.stochastok import (
    StochasTokConfig,
    augment,
    byte_vocabulary,
    expand,
    expansions,
    stochastok,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError

SENTENCES = [
    "the river bends where the older trees lean over the water",
    "a reader reads the letter and then writes another letter",
    "there is another river under the bridge, and it is colder",
    "naïve café 東京 – the weather there was rather hotter",
]
VOCABULARY = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5, b"d": 6, b"xy": 7}
PAIRS = {3: [(0, 1)], 4: [(1, 2)], 5: [(0, 4), (3, 2)]}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of some 350 tokens, with one special and one added token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        SENTENCES * 4,
        trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    found.add_tokens(["[X]"])
    return found


def rows() -> list[dict[str, list[int]]]:
    ids = [tokenizer()(text)["input_ids"] for text in SENTENCES * 2]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]


def drawn(*values: int) -> Any:
    """Draws these, one after the other."""
    left = list(values)
    return lambda bound: left.pop(0)


# ---------------------------------------------------------------------- the table and the draws


def test_the_expansions_of_a_small_vocabulary_by_hand() -> None:
    """abc = a|bc = ab|c; xy has parts that are no tokens, and single bytes have none."""
    assert expansions(VOCABULARY) == PAIRS


def test_trials_by_hand() -> None:
    """[abc, d, ab] with p = 1: split abc at 0 into ab|c, lose one on d (place 2), split the first ab again."""
    new, origin = expand(
        [5, 6, 3], PAIRS, position=drawn(0, 2, 0), choose=lambda options: options[-1], config=StochasTokConfig(p=1.0)
    )
    assert (new, origin) == ([0, 1, 2, 6, 3], [0, 0, 0, 1, 2])


def test_the_number_of_trials_is_that_of_the_original_length() -> None:
    """⌊0.29 · 7⌋ = 2 draws from the current lengths 7 and 8; each is taken."""
    asked: list[int] = []
    new, _ = expand(
        [5] * 7,
        PAIRS,
        position=lambda length: asked.append(length) or 0,  # type: ignore[func-returns-value]
        choose=lambda options: options[-1],
        config=StochasTokConfig(p=0.29),
    )
    assert asked == [7, 8]
    assert new == [0, 1, 2, 5, 5, 5, 5, 5, 5]


@pytest.mark.parametrize(("most", "length"), [(0, 5), (1, 6), (2, 7), (None, 10)])
def test_the_limit_counts_splits(most: int | None, length: int) -> None:
    config = StochasTokConfig(p=1.0, max_num_to_expand=most)
    new, _ = expand([3] * 5, PAIRS, position=drawn(0, 2, 4, 6, 8), choose=lambda options: options[0], config=config)
    assert len(new) == length


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**32), st.floats(0, 3))
def test_the_text_stays_and_every_part_is_of_its_token(sentence: int, seed: int, p: float) -> None:
    spelt = {index: token for token, index in byte_vocabulary(tokenizer()).items()}
    ids = [index for index in rows()[sentence]["input_ids"] if index in spelt]
    draw = torch.Generator().manual_seed(seed)
    new, origin = expand(
        ids,
        expansions(byte_vocabulary(tokenizer())),
        position=lambda length: int(torch.randint(length, (), generator=draw)),
        choose=lambda options: options[int(torch.randint(len(options), (), generator=draw))],
        config=StochasTokConfig(p=p),
    )
    assert 0 <= len(new) - len(ids) <= int(len(ids) * p)
    assert origin == sorted(origin)
    parts: dict[int, bytes] = dict.fromkeys(range(len(ids)), b"")
    for token, place in zip(new, origin, strict=True):
        parts[place] += spelt[token]
    assert list(parts.values()) == [spelt[index] for index in ids]


def test_positions_and_expansions_are_drawn_evenly() -> None:
    """One trial on ten tokens, four times 1,000 rows: each place and each of abc's two cuts as often as the others."""
    places: Counter[int] = Counter()
    cuts: Counter[int] = Counter()
    draw = torch.Generator().manual_seed(0)
    for _ in range(4000):
        changed = augment({"input_ids": [5] * 10}, draw, pairs=PAIRS, config=StochasTokConfig(p=0.1), max_length=None)[
            "input_ids"
        ]
        (place,) = [i for i in range(10) if changed[i : i + 2] in ([0, 4], [3, 2])]
        places[place] += 1
        cuts[changed[place]] += 1
    assert all(abs(places[place] - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5 for place in range(10))
    assert abs(cuts[0] - 2000) < 4 * (4000 * 0.25) ** 0.5


# ---------------------------------------------------------------------- a row


def change(row: dict[str, Any], p: float = 30.0, max_length: int | None = None) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return augment(row, draw, pairs=PAIRS, config=StochasTokConfig(p=p), max_length=max_length)


def test_labels_and_mask_go_with_their_tokens() -> None:
    """At p = 30 all is split to single bytes: abc counts not, d is padding, ab counts."""
    row = {"input_ids": [5, 6, 3], "labels": [-100, 6, 3], "attention_mask": [1, 0, 1], "name": "x"}
    changed = change(row)
    assert changed == {
        "input_ids": [0, 1, 2, 6, 0, 1],
        "labels": [-100, -100, -100, 6, 0, 1],
        "attention_mask": [1, 1, 1, 0, 1, 1],
        "name": "x",
    }
    assert row["input_ids"] == [5, 6, 3]
    assert change({key: torch.tensor(value) for key, value in row.items() if key != "name"}) == {
        key: value for key, value in changed.items() if key != "name"
    }
    assert {len(values) for key, values in change(row, max_length=4).items() if key != "name"} == {4}
    assert change({"input_ids": []}) == {"input_ids": []}


@pytest.mark.parametrize("labels", [[5, 6, 0], [6, 3, 5], [5, 6], [1]])
def test_labels_of_another_kind_are_refused(labels: list[int]) -> None:
    with pytest.raises(MismatchError, match="labels must be the input_ids"):
        change({"input_ids": [5, 6, 3], "labels": labels})


# ---------------------------------------------------------------------- the tokenizer


def test_the_bytes_of_a_tokenizer_s_tokens() -> None:
    vocabulary = byte_vocabulary(tokenizer())
    assert len(vocabulary) == len(tokenizer()) - 2
    assert {bytes([byte]) for byte in range(256)} <= vocabulary.keys()
    special = {tokenizer().eos_token_id, tokenizer().convert_tokens_to_ids("[X]")}
    assert not special & set(vocabulary.values())
    spelt = {index: token for token, index in vocabulary.items()}
    assert b"".join(spelt[index] for index in tokenizer()(SENTENCES[3])["input_ids"]).decode() == SENTENCES[3]


def test_added_and_special_tokens_are_never_split_nor_made() -> None:
    kept = {tokenizer().eos_token_id, tokenizer().convert_tokens_to_ids("[X]")}
    data = stochastok([{"input_ids": [*kept, *range(260, 340)]}], tokenizer=tokenizer(), config=StochasTokConfig(p=9.0))
    changed = data.row(0, epoch=0)["input_ids"]
    assert Counter(token for token in changed if token in kept) == Counter(kept)
    assert len(changed) > 160


def word_level() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"▁a": 0, "b": 1})))


def test_tokenizers_that_cannot_be_cut_at_any_byte_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'▁a' is not in the byte-level alphabet"):
        stochastok([], tokenizer=word_level())
    with pytest.raises(ConfigurationError, match=r"in two parts reads .*Use a byte-level BPE"):
        stochastok([], tokenizer=tiny_tokenizer())
    bytes_alone = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    with pytest.raises(ConfigurationError, match="none consists of two others"):
        stochastok([], tokenizer=PreTrainedTokenizerFast(tokenizer_object=bytes_alone))


@pytest.mark.parametrize("setting", [{"p": -0.1}, {"p": float("nan")}, {"p": float("inf")}, {"max_num_to_expand": -1}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(setting))} must be at least 0"):
        StochasTokConfig(**setting)


# ---------------------------------------------------------------------- in a Trainer


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 6


def collate(batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return testing.collate(list(batch))


def model(width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), max_position_embeddings=256, **sizes))


def trainer(folder: Path, data: Any, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    """Two rows a step, four steps an epoch, three epochs."""
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=3,
        learning_rate=1e-2,
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        save_steps=6,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    own = [data.callback()] if hasattr(data, "callback") else []
    return Trainer(
        model=model(),
        args=args,
        train_dataset=data,
        data_collator=collate,
        processing_class=tokenizer(),
        callbacks=[*own, *callbacks],
    )


def prepared(p: float = 0.5) -> Any:
    return stochastok(rows(), tokenizer=tokenizer(), config=StochasTokConfig(p=p))


def test_a_trainer_reads_as_many_tokens_more_as_there_are_splits(tmp_path: Path) -> None:
    """Three epochs over eight rows: the plain tokens, and one more for each split; with p = 0 it is the plain run."""
    found = {}
    for name, data in (("plain", rows()), ("p=0", prepared(0.0)), ("p=0.5", prepared())):
        made = trainer(tmp_path, data)
        made.train()
        found[name] = made
    plain = 3 * sum(len(row["input_ids"]) for row in rows())
    expanded = [prepared().row(index, epoch=epoch)["input_ids"] for epoch in range(3) for index in range(8)]
    splits = sum(map(len, expanded)) - plain

    assert 0.1 * plain < splits < 0.5 * plain
    assert len({tuple(row) for row in expanded}) == 24  # another expansion in each epoch, also of the same sentence
    assert found["plain"].state.num_input_tokens_seen == plain
    assert found["p=0.5"].state.num_input_tokens_seen == plain + splits
    assert testing.weights_hash(found["p=0"].model) == testing.weights_hash(found["plain"].model)
    assert testing.weights_hash(found["p=0.5"].model) != testing.weights_hash(found["plain"].model)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_in_mid_epoch_is_the_uninterrupted_one(workers: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", prepared())
    whole.train()
    trainer(tmp_path / "parts", prepared(), Stop()).train()
    resumed = trainer(tmp_path / "parts", prepared(), dataloader_num_workers=workers)
    resumed.train(resume_from_checkpoint=True)

    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    assert testing.weights_hash(resumed.model) == testing.weights_hash(whole.model)


def test_teacher_and_student_read_the_same_expanded_tokens(tmp_path: Path) -> None:
    teacher = model(width=48)
    read: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    made = trainer(tmp_path, prepared(), DistillCallback(teacher, KD()))
    for name, one in (("teacher", teacher), ("student", made.model)):
        one.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: read[name].append(kwargs["input_ids"]), with_kwargs=True
        )
    made.train()
    assert len(read["student"]) == 12
    assert all(torch.equal(a, b) for a, b in zip(read["student"], read["teacher"], strict=True))


def test_another_seed_splits_other_tokens() -> None:
    drawn = [stochastok(rows(), tokenizer=tokenizer(), seed=seed).row(0, epoch=0)["input_ids"] for seed in range(9)]
    assert len(set(map(tuple, drawn))) > 1


def test_spawned_workers_can_be_given_the_data() -> None:
    assert pickle.loads(pickle.dumps(prepared())).row(0, epoch=1) == prepared().row(0, epoch=1)


@pytest.mark.parametrize("name", ["expansions", "expand", "augment", "byte_vocabulary"])
def test_every_function_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=InterruptedError(name)), pytest.raises(InterruptedError):
        trainer(tmp_path, prepared()).train()
