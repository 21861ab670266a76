"""ALM: two tokenizations of one text, a teacher on other ids."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from alone import output_of
from datasets import Dataset
from hf_compress_plugins.tokenizers import _alignment, _embeddings, _preparation
from hf_compress_plugins.tokenizers import alm as module
from hf_compress_plugins.tokenizers._alignment import FAMILIES, align, byte_forms
from hf_compress_plugins.tokenizers._embeddings import average, old_pieces
from hf_compress_plugins.tokenizers._modeling_expanded_input import longest_suffix, suffix_hash
from hf_compress_plugins.tokenizers.alm import (
    ALM,
    byte_tokenizer,
    chunk_likelihoods,
    distance,
    end_likelihoods,
    expanded,
    fvt,
    gradient_weights,
    groups,
    join,
    join_ends,
    membership,
    space_mask,
    two_tokenizations,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_compress import DistillCallback, export_onnx
from hf_compress.errors import ConfigurationError, MismatchError, UnknownNameError
from hf_compress.teachers.cache import CacheTeacher

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


def run(
    folder: Path,
    method: ALM,
    width: int = 24,
    teacher: nn.Module | CacheTeacher | None = None,
    student: nn.Module | None = None,
    rows: Dataset | None = None,
    **settings: Any,
) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    made = Trainer(
        model=student or model(len(SMALL), 16, 0),
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=rows or data(),
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


def test_a_cache_of_a_teacher_of_other_tokens_gives_what_the_teacher_gives(tmp_path: Path) -> None:
    """Also behind the last token, where nothing is scored and a chunk's end is read."""
    teacher, settings = model(len(LARGE), 24, 1), {"learning_rate": 0.0, "max_steps": 2}
    cached = CacheTeacher(tmp_path / "c", teacher, dtype="float32")
    found = [
        [entry["distill/alm"] for entry in made.state.log_history if "distill/alm" in entry]
        for made in (run(tmp_path, ALM(spaces=spaces()), teacher=one, **settings) for one in (teacher, cached))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    with pytest.raises(ConfigurationError, match="a cache of it without top_k"):
        run(tmp_path, ALM(spaces=spaces()), teacher=CacheTeacher(tmp_path / "few", teacher, top_k=4))


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


@pytest.mark.parametrize("name", ["latents", "gradient_weights", "groups", "join_ends", "distance"])
def test_each_function_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run(tmp_path, ALM(spaces=spaces(), latents="l2", weighting="gradients"), width=16)


@pytest.mark.parametrize("name", ["align", "byte_forms", "roles_of"])
def test_each_function_of_the_preparation_is_reached(name: str) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError

    with mock.patch.object(_preparation, name, fails), pytest.raises(KeyError):
        data()


@pytest.mark.parametrize("name", ["average", "old_pieces", "byte_forms", "suffix_hash"])
def test_each_function_of_the_start_is_reached(name: str) -> None:
    with mock.patch.object(_embeddings, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        expanded(model(len(LARGE), 16, 1), LARGE, BYTES)


CHAT = "{% for m in messages %}START{{ m['role'] }}HEAD{{ m['content'] }}STOP{% endfor %}" + (
    "{% if add_generation_prompt %}STARTassistantHEAD{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "the mat"},
]


def chat_tokenizer(merges: int, start: str, head: str, stop: str, special: list[str]) -> PreTrainedTokenizerFast:
    """`tokenizer` with special tokens and a chat template of them."""
    made = tokenizer(merges)
    made.add_special_tokens({"extra_special_tokens": special})
    made.chat_template = CHAT.replace("START", start).replace("HEAD", head).replace("STOP", stop)
    return made


def llama_and_qwen() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return (
        chat_tokenizer(40, names[0], names[1] + "\n\n", names[2], names),
        chat_tokenizer(4, "<|im_start|>", "\n", "<|im_end|>\n", ["<|im_start|>", "<|im_end|>"]),
    )


def test_messages_are_aligned_by_the_roles_of_both_families() -> None:
    """Llama's header ends in two newlines that are two tokens here, so only the role makes them one with Qwen's."""
    theirs, own = llama_and_qwen()
    llama = dict(FAMILIES["llama3"]) | {"end_header": ("<|end_header_id|>", "Ċ", "Ċ")}
    (row,) = two_tokenizations(
        Dataset.from_dict({"text": [TALK]}), tokenizer=own, teacher_tokenizer=theirs, max_length=64,
        roles="qwen2", teacher_roles=llama,
    )  # fmt: skip
    chunks = [chunk for chunk in row["chunks"] if chunk[0] >= 0]
    names = (theirs.convert_ids_to_tokens(row["teacher_input_ids"]), own.convert_ids_to_tokens(row["input_ids"]))
    spelled = [("".join(names[0][a:b]), "".join(names[1][c:d])) for a, b, c, d in chunks]
    assert spelled[-1] == ("<|eot_id|>", "<|im_end|>Ċ")
    assert "".join(left for left, _ in spelled[:-1]) == "theĠmat" == "".join(right for _, right in spelled[:-1])
    learned = own.decode([token for token in row["labels"] if token >= 0])
    assert learned == "the mat<|im_end|>\n"


def test_a_word_that_is_also_a_role_s_name_stays_text() -> None:
    """Qwen ends a header with a newline; a newline that the other side has no role for is text as any other."""
    qwen = FAMILIES["qwen2"]
    assert align(["user", "Ċ", "a"], ["us", "er", "Ċ", "a"], {}, qwen) == [(0, 1, 0, 2), (1, 2, 2, 3), (2, 3, 3, 4)]
    assert align(["user", "x"], ["us", "er", "x"], qwen, FAMILIES["llama3"]) == [(0, 1, 0, 2), (1, 2, 2, 3)]
    gemma = align(["<start_of_turn>", "model", "Ċ"], ["<|im_start|>", "assistant", "Ċ"], FAMILIES["gemma2"], qwen)
    assert gemma == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_a_prompt_s_last_token_that_one_side_lacks_is_in_no_chunk(longer: str) -> None:
    """It would join the next chunk, which then begins inside that side's prompt."""
    plain, marked = (
        chat_tokenizer(4, "<|im_start|>", head, "<|im_end|>", ["<|im_start|>", "<|im_end|>", "<think>"])
        for head in ("\n", "\n<think>")
    )
    roles = {"start_header": ("<|im_start|>",), "eot": ("<|im_end|>",)}
    sides = ((marked, roles | {"think": ("<think>",)}), (plain, roles))
    (theirs, their_roles), (own, own_roles) = sides if longer == "teacher" else sides[::-1]
    (row,) = two_tokenizations(
        Dataset.from_dict({"text": [TALK]}), tokenizer=own, teacher_tokenizer=theirs, max_length=80,
        roles=own_roles, teacher_roles=their_roles,
    )  # fmt: skip
    chunks = [chunk for chunk in row["chunks"] if chunk[0] >= 0]
    names = theirs.convert_ids_to_tokens(row["teacher_input_ids"]), own.convert_ids_to_tokens(row["input_ids"])
    assert chunks
    for first, second, third, fourth in chunks:
        assert "<think>" not in [*names[0][first:second], *names[1][third:fourth]]


def test_a_beginning_that_one_side_lacks_joins_the_next_chunk() -> None:
    assert align(["<s>", "a"], ["a"], FAMILIES["llama2"], {}) == [(0, 2, 0, 1)]
    assert align(["a"], ["<s>", "a"], {}, FAMILIES["llama2"]) == [(0, 1, 0, 2)]
    with pytest.raises(UnknownNameError, match="llama3"):
        _alignment.roles_of("llama4", LARGE)


def test_a_prompt_is_hidden_from_both_sides_at_the_same_byte(tmp_path: Path) -> None:
    """It ends inside the teacher's token " cat": no chunk holds it, though the student begins a token there."""
    rows = two_tokenizations(
        Dataset.from_dict({"text": ["the cat sat"], "prompt": ["the c"]}), tokenizer=SMALL, teacher_tokenizer=LARGE,
        max_length=16, prompt="prompt",
    )  # fmt: skip
    names = LARGE.convert_ids_to_tokens(rows[0]["teacher_input_ids"])
    assert any(name.startswith("Ġc") and len(name) > 2 for name in names)
    learned = SMALL.decode([token for token in rows[0]["labels"] if token >= 0])
    assert learned == "at sat"
    chunks = [chunk for chunk in rows[0]["chunks"] if chunk[0] >= 0]
    spelled = ["".join(SMALL.convert_ids_to_tokens(rows[0]["input_ids"])[c:d]) for _, _, c, d in chunks]
    assert "".join(spelled) == "Ġsat"
    assert all("".join(names[a:b]) == text for (a, b, _, _), text in zip(chunks, spelled, strict=True))
    both = {name: torch.tensor([rows[0][name]]) for name in rows.column_names}
    members = ALM._members(both)
    assert ALM._valid(*members).sum() == len(chunks)
    logits = torch.zeros(1, 16, len(SMALL))
    logits[:, : chunks[0][2] - 1] = math.nan  # nothing of the prompt is read, but its last token's logits
    assert chunk_likelihoods(logits, both["input_ids"], members[1]).isfinite().all()
    with pytest.raises(MismatchError, match="begin with its prompt"):
        two_tokenizations(
            Dataset.from_dict({"text": ["the cat"], "prompt": ["a"]}), tokenizer=SMALL, teacher_tokenizer=LARGE,
            max_length=16, prompt="prompt",
        )  # fmt: skip


def test_a_chunk_that_one_side_cannot_predict_is_not_valid() -> None:
    """The first token is never predicted: a chunk that is the student's first token alone has a teacher's part only."""
    teacher = membership(torch.tensor([[0, 2]]), torch.tensor([[2, 3]]), 3)
    student = membership(torch.tensor([[0, 1]]), torch.tensor([[1, 3]]), 3)
    assert ALM._valid(teacher, student).tolist() == [[False, True]]
    assert ALM._valid(student, teacher).tolist() == [[False, True]]


BYTES = byte_tokenizer(LARGE)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces with ▁ for a space and bytes for what is in no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"theca", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    made = Tokenizer(
        models.BPE(vocab={p: k for k, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_tokens_of_every_kind_have_a_form_in_bytes() -> None:
    pieces = sentencepiece()
    forms = byte_forms(pieces)
    ids = pieces("the é")["input_ids"]
    assert [forms[index] for index in ids] == ["Ġthe", "Ġ", "Ã", "©"]
    assert forms[0] == "<unk>"
    assert byte_forms(LARGE)[LARGE.eos_token_id] == "<end>"
    marked = tokenizer(4)
    marked.backend_tokenizer.add_special_tokens(["<a b>"])
    marked.backend_tokenizer.add_tokens(["c d"])
    forms, names = byte_forms(marked), marked.get_vocab()
    assert (forms[names["<a b>"]], forms[names["c d"]]) == ("<a b>", "cĠd")
    assert space_mask(pieces, len(pieces))[pieces.get_vocab()["▁the"]]
    with pytest.raises(ConfigurationError, match="WordPiece"):
        byte_forms(tiny_tokenizer())


def test_a_sentence_piece_model_becomes_a_byte_level_one() -> None:
    pieces = sentencepiece()
    names, found = pieces.get_vocab(), old_pieces(pieces, BYTES)
    letters = BYTES.get_vocab()
    assert found[letters["t"]] == [names["t"]]
    assert found[letters["Ã"]] == [names["<0xC3>"]]
    other = old_pieces(pieces, LARGE)
    assert other[LARGE.get_vocab()["Ġthe"]] == [names["▁the"]]
    back = old_pieces(LARGE, pieces)
    assert back[names["▁the"]] == [LARGE.get_vocab()["Ġthe"]]


def test_an_average_by_hand() -> None:
    old = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 1.0]])
    assert average(old, [[2], [0, 1], []]).tolist() == [[5.0, 1.0], [2.0, 1.0], [3.0, 1.0]]
    assert average(old[:, 0], [[0, 2]]).tolist() == [3.0]
    assert average(old.bfloat16(), [[1]]).dtype == torch.bfloat16


def gpt2(vocab: int) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=16, n_layer=1, n_head=2, n_positions=64))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_gets_another_tokenizer(tied: bool) -> None:
    old = gpt2(len(SMALL)) if tied else model(len(SMALL), 16, 0)
    if not tied:
        old.lm_head.bias = nn.Parameter(torch.arange(float(len(SMALL))))
    before = {name: value.clone() for name, value in old.state_dict().items()}

    made = fvt(old, SMALL, LARGE)

    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())
    assert made.config.vocab_size == len(LARGE) == made.get_input_embeddings().weight.shape[0]
    assert made.config.pad_token_id == made.generation_config.eos_token_id == LARGE.eos_token_id
    heads = [one.get_output_embeddings().weight for one in (old, made)]
    inputs = [one.get_input_embeddings().weight for one in (old, made)]
    assert (heads[1] is inputs[1]) == tied
    own, names = LARGE.get_vocab(), SMALL.get_vocab()
    for source, target in (heads, inputs):
        assert torch.equal(target[own["t"]], source[names["t"]])
        assert torch.equal(target[LARGE.eos_token_id], source[SMALL.eos_token_id])
        long = next(token for token in own if token not in names)
        pieces = SMALL.backend_tokenizer.model.tokenize(long)
        assert len(pieces) > 1
        torch.testing.assert_close(target[own[long]], source[[piece.id for piece in pieces]].mean(0))
    if not tied:
        assert made.lm_head.bias.shape == (len(LARGE),)
        assert made.lm_head.bias[own["t"]] == names["t"]
    assert set(made.state_dict()) == set(old.state_dict())


def test_what_both_tokenizers_spell_alike_is_read_alike() -> None:
    """From many merges to few: a text without any of the dropped merges gives the same logits for the same tokens."""
    old = model(len(LARGE), 16, 0)
    made = fvt(old, LARGE, BYTES)
    ids = torch.tensor([BYTES("xyz")["input_ids"]])
    same = torch.tensor([[LARGE.get_vocab()[token] for token in BYTES.convert_ids_to_tokens(ids[0])]])
    shared = [LARGE.get_vocab()[token] for token in BYTES.convert_ids_to_tokens(range(len(BYTES)))]
    torch.testing.assert_close(made(input_ids=ids).logits, old(input_ids=same).logits[..., shared])


def test_special_tokens_are_matched_by_role() -> None:
    theirs, own = llama_and_qwen()
    found = old_pieces(own, theirs, roles="qwen2", new_roles="llama3")
    names, others = own.get_vocab(), theirs.get_vocab()
    assert found[others["<|start_header_id|>"]] == [names["<|im_start|>"]]
    assert found[others["<|eot_id|>"]] == [names["<|im_end|>"]]
    assert found[others["<end>"]] == [names["<end>"]]
    assert len(found[others["<|end_header_id|>"]]) == 1  # of Qwen's newline
    alone = old_pieces(own, theirs)
    assert len(alone[others["<|start_header_id|>"]]) > 5


def test_models_that_do_not_belong_to_their_tokenizer_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="do not belong together"):
        fvt(model(len(LARGE) - 1, 16, 0), LARGE, SMALL)
    with pytest.raises(ConfigurationError, match="at most 0"):
        expanded(model(len(LARGE), 16, 0), LARGE, BYTES, longest=0)


def test_bytes_are_read_and_written() -> None:
    assert len(BYTES) == 257
    for text in TEXTS:
        ids = BYTES(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert BYTES.decode(ids) == text
    assert BYTES.eos_token == BYTES.pad_token == "<end>"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sets(st.text("0123", min_size=1, max_size=4)))
def test_the_longest_known_sequence_is_found_at_each_token(ids: list[int], known: set[str]) -> None:
    words = sorted(known | {"0"}, key=lambda word: suffix_hash([int(letter) for letter in word]))
    hashes = torch.tensor([suffix_hash([int(letter) for letter in word]) for word in words])
    found = longest_suffix(torch.tensor([ids]), hashes, 3)[0].tolist()
    text = "".join(map(str, ids))
    for end, place in enumerate(found, 1):
        ending = [word for word in words if len(word) <= 3 and text[:end].endswith(word)]
        assert (words[place - 1] if place else "") == max(ending, key=len, default="")


def byte_rows() -> Dataset:
    texts = Dataset.from_dict({"text": TEXTS})
    return two_tokenizations(texts, tokenizer=BYTES, teacher_tokenizer=LARGE, max_length=64, teacher_max_length=40)


def test_an_older_token_s_embedding_is_added_where_it_ends() -> None:
    old = model(len(LARGE), 16, 0)
    made = expanded(old, LARGE, BYTES)
    ids = torch.tensor([BYTES("the cat")["input_ids"]])
    names, own = LARGE.get_vocab(), made.inner.get_input_embeddings().weight
    embedded, theirs = made.embed(ids)[0], old.get_input_embeddings().weight
    for end, letter in enumerate(ids[0].tolist(), 1):
        spelled = "".join(BYTES.convert_ids_to_tokens(ids[0, :end]))
        longest = max((token for token in names if spelled.endswith(token)), key=len)
        torch.testing.assert_close(embedded[end - 1], own[letter] + theirs[names[longest]])
    assert longest == "Ġcat"


def test_an_expanded_model_writes_with_a_cache_what_it_writes_without(tmp_path: Path) -> None:
    made = expanded(model(len(LARGE), 16, 0), LARGE, BYTES).eval()
    ids = torch.tensor([BYTES("the cat sat")["input_ids"]])
    last = made.prepare_inputs_for_generation(ids, next_sequence_length=1)["inputs_embeds"]
    assert torch.equal(last, made.embed(ids)[:, -1:])
    assert not torch.equal(last, made.embed(ids[:, -1:]))
    once = made.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    longer = ids
    for _ in range(12):
        longer = torch.cat([longer, made(input_ids=longer).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(once, longer)
    made.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded(input_ids=ids).logits, made(input_ids=ids).logits)
    call = f"model(input_ids=torch.tensor({ids.tolist()})).logits"
    torch.testing.assert_close(
        output_of(tmp_path / "student", "AutoModelForCausalLM", call), made(input_ids=ids).logits
    )


@pytest.mark.slow
def test_an_expanded_model_is_exported(tmp_path: Path) -> None:
    """The look-up is in the graph: the exported model is compared with it at several lengths."""
    expanded(model(len(LARGE), 16, 0), LARGE, BYTES).save_pretrained(tmp_path / "student")
    BYTES.save_pretrained(tmp_path / "student")
    parity = export_onnx(tmp_path / "student").measurements[0]
    assert parity.metric == "parity_max_abs_diff"
    assert parity.value < 1e-4


@pytest.mark.parametrize("start", [fvt, expanded])
def test_a_byte_student_learns_from_its_subword_teacher(start: Any, tmp_path: Path) -> None:
    teacher = model(len(LARGE), 16, 1)
    student = start(teacher, LARGE, BYTES)
    whole = {name: value.clone() for name, value in student.state_dict().items()}
    masks = space_mask(BYTES, len(BYTES)), space_mask(LARGE, len(LARGE))
    rows = byte_rows()
    assert all(sum(chunk[0] >= 0 for chunk in row["chunks"]) > 5 for row in rows)
    made = run(
        tmp_path, ALM(spaces=masks, sft=False, latents="l2", temperature=10.0), teacher=teacher, student=student,
        rows=rows, max_steps=30,
    )  # fmt: skip
    losses = [entry["distill/alm"] for entry in made.state.log_history if "distill/alm" in entry]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, whole[name])}
    assert changed == set(whole) - {"hashes"}
