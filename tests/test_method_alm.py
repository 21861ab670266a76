"""ALM: two tokenizations of one text, a teacher on other ids."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.tokenizers import alm as module
from hf_compress_plugins.tokenizers.alm import (
    ALM,
    align,
    chunk_likelihoods,
    distance,
    end_likelihoods,
    gradient_weights,
    groups,
    join,
    join_ends,
    membership,
    space_mask,
    two_tokenizations,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_compress import DistillCallback
from hf_compress.errors import ConfigurationError, MismatchError

TEXTS = [
    "the cat sat on the mat, and the cat was thin",
    "thé naïve café at the corner\nof the street",
    "a rat ate the mats",
]


def tokenizer(merges: int) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


SMALL, LARGE = tokenizer(4), tokenizer(40)


def model(vocab: int, width: int, seed: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab, hidden_size=width, intermediate_size=width, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2,
            )
        )  # fmt: skip


def data() -> Dataset:
    texts = Dataset.from_dict({"text": TEXTS})
    return two_tokenizations(texts, tokenizer=SMALL, teacher_tokenizer=LARGE, max_length=64, teacher_max_length=40)


def spaces() -> tuple[Any, Any]:
    return space_mask(SMALL, len(SMALL)), space_mask(LARGE, len(LARGE))


def run(folder: Path, method: ALM, width: int = 24, teacher: nn.Module | None = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    made = Trainer(
        model=model(len(SMALL), 16, 0),
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=data(),
        processing_class=SMALL,
        callbacks=[DistillCallback(teacher or model(len(LARGE), width, 1), method)],
    )
    made.train()
    return made


def test_chunks_spell_the_same_bytes_also_of_letters_of_two() -> None:
    for row in data():
        own = SMALL.convert_ids_to_tokens(row["input_ids"])
        theirs = LARGE.convert_ids_to_tokens(row["teacher_input_ids"])
        chunks = [chunk for chunk in row["chunks"] if chunk[0] >= 0]
        assert len(chunks) > 5
        for start, end, first, last in chunks:
            assert "".join(theirs[start:end]) == "".join(own[first:last])
        assert [chunk[0] for chunk in chunks[1:]] == [chunk[1] for chunk in chunks[:-1]]


def test_what_is_cut_differently_is_no_chunk() -> None:
    assert align(["ab", "c"], ["a", "b", "c", "d"]) == [(0, 1, 0, 2), (1, 2, 2, 3)]
    assert align(["abc"], ["ab"]) == []
    assert align(["ab", "cd"], ["ax", "cd"]) == [(1, 2, 1, 2)]


def test_leading_spaces_are_made_equal() -> None:
    assert align(["Ġa", "b"], ["a", "b"]) == [(0, 1, 0, 1), (1, 2, 1, 2)]


def test_likelihoods_by_hand() -> None:
    """Three tokens of a uniform model over four: the first is not predicted, a chunk of two costs 2 ln 4."""
    member = membership(torch.tensor([[0, 1]]), torch.tensor([[1, 3]]), 3)
    assert member.tolist() == [[[1, 0], [0, 1], [0, 1]]]
    logits, ids = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    assert chunk_likelihoods(logits, ids, member).tolist() == [[0.0, pytest.approx(-2 * math.log(4))]]
    ends = end_likelihoods(logits, member, torch.tensor([True, False, False, False]))
    assert ends.tolist() == [[pytest.approx(-math.log(4))] * 2]


def test_an_end_is_read_after_the_chunk_s_last_token() -> None:
    logits = torch.zeros(1, 3, 2)
    logits[0, 1] = torch.tensor([0.0, math.log(3.0)])
    member = membership(torch.tensor([[0, 2]]), torch.tensor([[2, 3]]), 3)
    ends = end_likelihoods(logits, member, torch.tensor([False, True]))
    assert ends.tolist() == [[pytest.approx(math.log(0.75)), pytest.approx(math.log(0.5))]]


def test_chunks_are_joined_up_to_a_likely_end() -> None:
    ends = torch.tensor([[-5.0, -0.1, -5.0, -0.1, -5.0]])
    group = groups(ends, 0.1)
    assert group.tolist() == [[0, 0, 1, 1, 2]]
    assert join(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]), group).tolist() == [[3.0, 12.0, 16.0, 0.0, 0.0]]
    valid = torch.tensor([[True, True, True, True, False]])
    assert join_ends(ends, group, valid)[0, :2].tolist() == pytest.approx([-0.1, -0.1])
    assert join_ends(ends, group, valid)[0, 2:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", module.DISTANCES)
def test_a_distance_is_least_where_both_agree(kind: Any) -> None:
    at = torch.tensor([-3.0, -2.0, -1.0], dtype=torch.float64)
    values = distance(torch.full_like(at, -2.0), at, kind=kind, temperature=2.0)
    assert values.argmin() == 1
    assert distance(torch.zeros(1), torch.zeros(1), kind=kind, temperature=1.0).isfinite().all()


def test_a_student_learns_from_a_teacher_of_other_tokens(tmp_path: Path) -> None:
    made = run(tmp_path, ALM(spaces=spaces(), sft=False, temperature=10.0), max_steps=30)
    losses = [entry["distill/alm"] for entry in made.state.log_history if "distill/alm" in entry]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    made.save_model(str(tmp_path / "student"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    assert loaded.config.vocab_size == len(SMALL)
    assert not made.model.generation_config.to_dict().get("spaces")


def test_the_teacher_reads_its_own_ids(tmp_path: Path) -> None:
    teacher = model(len(LARGE), 24, 1)
    seen: list[Any] = []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    run(tmp_path, ALM(spaces=spaces()), teacher=teacher)
    rows = sorted(map(tuple, seen[-1]["input_ids"].tolist()))
    assert rows == sorted(tuple(row["teacher_input_ids"]) for row in data())
    assert "labels" not in seen[-1]


def test_losses_are_averaged_or_weighed_by_their_gradients(tmp_path: Path) -> None:
    mean = run(tmp_path, ALM(spaces=spaces(), latents="l2"), width=16).state.log_history[0]
    weighed = run(tmp_path, ALM(spaces=spaces(), latents="l2", weighting="gradients"), width=16).state.log_history[0]
    names = ("distill/alm", "distill/alm.sft", "distill/alm.latents")
    weights = [weighed[name] / (3 * mean[name]) for name in names]
    assert sum(weights) == pytest.approx(1.0, rel=1e-4)
    assert max(weights) > 2 * min(weights)


def test_weights_are_inverse_to_the_norms_of_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    weights = gradient_weights({"a": 3 * parameter, "b": parameter}, [parameter])
    assert weights == pytest.approx({"a": 0.25, "b": 0.75})


def test_without_joining_the_mean_runs_over_the_chunks_of_the_window(tmp_path: Path) -> None:
    found = []
    for size, steps in ((3, 1), (1, 3)):
        settings: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        made = run(tmp_path, ALM(ends=False, join=False, sft=False), train_sampling_strategy="sequential", **settings)
        found.append(made.state.log_history[0]["distill_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("latents", ["none", "l2"])
def test_joining_changes_no_other_loss(latents: str, tmp_path: Path) -> None:
    joined, apart = (
        run(tmp_path, ALM(spaces=spaces(), latents=latents, join=join), width=16).state.log_history[0]
        for join in (True, False)
    )
    names = {"distill/alm.sft"} | ({"distill/alm.latents"} if latents != "none" else set())
    for name in names:
        assert apart[name] == pytest.approx(joined[name], rel=1e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="give ALM"):
        ALM()
    with pytest.raises(MismatchError, match="one width"):
        run(tmp_path, ALM(spaces=spaces(), latents="l2"), width=24)
    for settings in ({"temperature": 0.0}, {"threshold": 2.0}, {"distance": "kl"}, {"weighting": "sum"}):
        with pytest.raises(ConfigurationError, match="alm"):
            ALM(spaces=spaces(), **settings)


@pytest.mark.parametrize("name", ["align", "latents", "gradient_weights", "groups", "join_ends", "distance"])
def test_each_function_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run(tmp_path, ALM(spaces=spaces(), latents="l2", weighting="gradients"), width=16)
