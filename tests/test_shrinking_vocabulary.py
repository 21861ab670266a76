"""A smaller vocabulary: texts of kept tokens encode and compute as before, all others still encode."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, tiny_bert_classifier, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hf_compress import shrink, shrink_vocabulary
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.shrinking import cut_vocabulary
from hf_compress.shrinking.pieces import Pieces

MARKS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXTS = [
    "the quick brown fox jumps over the lazy dog and the slow fox",
    "a film was good and the music was fine, but the story was dull",
    "lower newer wider lowest widest newest",
    "été naïve café",
    "1234 numbers 99 and 2024",
]
WORDS_OF = sorted({word for text in TEXTS for word in text.split()})
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@cache
def bpe(alphabet: str) -> str:
    """Trained on the texts: over bytes, or over characters with bytes for the others."""
    if alphabet == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        first = pre_tokenizers.ByteLevel.alphabet()
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        parts = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
        made.decoder = decoders.Sequence(list(parts))
        first = []
    marks = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256))] if alphabet != "bytes" else MARKS
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=marks, initial_alphabet=first, show_progress=False, min_frequency=1
    )
    made.train_from_iterator(TEXTS, trainer)
    return made.to_str()


@cache
def unigram() -> str:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=MARKS, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS * 3, trainer)
    return made.to_str()


def merges(spec: dict[str, Any]) -> dict[str, Any]:
    return {"vocab": spec["model"]["vocab"], "merges": [tuple(merge) for merge in spec["model"]["merges"]]}


def scores(spec: dict[str, Any]) -> dict[str, Any]:
    return {"vocab": [tuple(entry) for entry in spec["model"]["vocab"]]}


def plain(text: str) -> Any:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "WordPiece": tiny_tokenizer,
    "BPE of bytes": lambda: hf.RobertaTokenizer(**merges(json.loads(bpe("bytes")))),
    "BPE with its end after": lambda: hf.GPT2Tokenizer(**merges(json.loads(bpe("bytes")))),
    "BPE with bytes": lambda: plain(bpe("characters")),
    "Unigram": lambda: hf.XLMRobertaTokenizer(**scores(json.loads(unigram()))),
    "Unigram, plain": lambda: plain(unigram()),
}
every = pytest.mark.parametrize("kind", TOKENIZERS)


@cache
def tokenizer(kind: str) -> Any:
    return TOKENIZERS[kind]()


def masked_lm(tokens: Any, **changes: Any) -> Any:
    """BERT with the tokenizer's ids, random everywhere."""
    names = {f"{name}_id": getattr(tokens, f"{name}_id") for name in ("pad_token", "bos_token", "eos_token")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=len(tokens), **SIZES, **names, **changes)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@cache
def smaller(kind: str) -> Any:
    """Cut to what two of the texts use."""
    return cut_vocabulary(masked_lm(tokenizer(kind)), tokenizer(kind), [*TEXTS[:2], "film story"])


def pieces(tokens: Any, text: str) -> list[str]:
    return tokens.convert_ids_to_tokens(tokens(text)["input_ids"])


sentences = st.lists(
    st.one_of(st.sampled_from(WORDS_OF), st.text(string.ascii_lowercase + "é ,1", min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
).map(" ".join)


@every
@settings(max_examples=60, deadline=None)
@given(text=sentences)
def test_a_text_whose_tokens_are_kept_encodes_to_the_same_pieces(kind: str, text: str) -> None:
    before, found = tokenizer(kind), smaller(kind)
    ids = before(text)["input_ids"]

    after = found.tokenizer(text)["input_ids"]

    if set(ids) <= set(found.ids):
        assert pieces(found.tokenizer, text) == pieces(before, text)
        assert [found.ids[token] for token in after] == ids
    unknown = before.unk_token_id is not None and before.unk_token_id in ids
    if kind not in ("WordPiece",) and not unknown:
        assert found.tokenizer.unk_token_id not in after or found.tokenizer.unk_token == found.tokenizer.eos_token
        assert found.tokenizer.decode(after) == before.decode(ids)


@every
def test_the_texts_that_were_counted_encode_to_the_same_pieces_and_give_the_same_logits(kind: str) -> None:
    before, found, teacher = tokenizer(kind), smaller(kind), masked_lm(tokenizer(kind))

    assert len(found.tokenizer) == len(found.ids) == found.student.config.vocab_size < len(before)
    for text in TEXTS[:2]:
        assert pieces(found.tokenizer, text) == pieces(before, text)
        with torch.no_grad():
            expected = teacher(**before(text, return_tensors="pt")).logits[..., list(found.ids)]
            logits = found.student(**found.tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert found.change.kept == 1.0
    assert found.student.config.compression_start == f"vocabulary {len(found.ids)} of {len(before)} of the teacher"


@every
def test_special_tokens_keep_their_meaning(kind: str) -> None:
    before, found = tokenizer(kind), smaller(kind)

    for name in ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token"):
        assert getattr(found.tokenizer, name) == getattr(before, name)
        if (old := getattr(before, f"{name}_id")) is not None:
            new = getattr(found.tokenizer, f"{name}_id")
            assert found.ids[new] == old
            if name in ("pad_token", "bos_token", "eos_token"):
                assert getattr(found.student.config, f"{name}_id") == new
    text = TEXTS[0]
    assert found.tokenizer(text, text)["input_ids"][-1] == found.ids.index(before(text, text)["input_ids"][-1])


@every
def test_model_and_tokenizer_load_from_one_folder(kind: str, tmp_path: Path) -> None:
    found = smaller(kind)
    found.student.save_pretrained(tmp_path)
    found.tokenizer.save_pretrained(tmp_path)

    loaded = hf.AutoTokenizer.from_pretrained(tmp_path)
    model = hf.AutoModelForMaskedLM.from_pretrained(tmp_path)

    assert loaded.get_vocab() == found.tokenizer.get_vocab()
    assert loaded(TEXTS[0])["input_ids"] == found.tokenizer(TEXTS[0])["input_ids"]
    assert model.get_input_embeddings().num_embeddings == len(loaded)
    assert "tmp" not in (tmp_path / "tokenizer_config.json").read_text()


def test_merges_of_kept_pieces_keep_their_parts() -> None:
    """By hand: ab + c gives abc; b + c is ranked later and never used for it."""
    vocabulary = {piece: at for at, piece in enumerate(["a", "b", "c", "ab", "bc", "abc", "abca"])}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("abc", "a")]))
    found = Pieces(json.loads(made.to_str()))

    kept = found.choose({"abc": 3, "bc": 1}, size=None, min_count=2)
    spec, ids = found.cut(kept)

    assert found.parts("abc") == {"a", "b", "c", "ab", "abc"}
    assert kept == {"a", "b", "c", "ab", "abc"}
    assert ids == [0, 1, 2, 3, 5]
    assert spec["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert Tokenizer.from_str(json.dumps(spec)).encode("abcbc").tokens == ["abc", "b", "c"]


def test_a_word_s_end_may_be_marked() -> None:
    vocabulary = {piece: at for at, piece in enumerate(["a", "b", "a</w>", "b</w>", "ab</w>", "aab</w>"])}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b</w>"), ("a", "ab</w>")], end_of_word_suffix="</w>"))
    found = Pieces(json.loads(made.to_str()))

    assert found.parts("aab</w>") == {"a", "b</w>", "ab</w>", "aab</w>"}
    assert found.necessary() == {"a", "b", "a</w>", "b</w>"}


def test_frequent_tokens_come_first_and_rare_ones_may_be_left_out() -> None:
    tokens, teacher = tiny_tokenizer(), tiny_bert_classifier()
    texts = ["film film film book book music"]
    least = len(Pieces(json.loads(tokens.backend_tokenizer.to_str())).necessary())

    one = cut_vocabulary(teacher, tokens, texts, size=least + 1)
    common = cut_vocabulary(teacher, tokens, texts, min_count=2)

    assert set(one.tokenizer.get_vocab()) & set(WORDS) - {"a"} == {"film"}
    assert set(common.tokenizer.get_vocab()) & set(WORDS) - {"a"} == {"film", "book"}
    assert one.change.kept == pytest.approx(3 / 6)
    assert one.tokenizer.tokenize("book") == ["b", "##o", "##o", "##k"]
    assert (one.change.before, one.change.after) == (len(tokens), least + 1)
    assert one.change.parameters_before - one.change.parameters_after == 32 * (len(tokens) - least - 1)


def test_settings_of_generation_get_the_new_ids() -> None:
    tokens = tokenizer("BPE with its end after")
    end = tokens.eos_token_id
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=len(tokens), n_embd=16, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end)
    ).eval()
    comma, digit = tokens.convert_tokens_to_ids([",", "7"])
    model.generation_config.suppress_tokens = [comma, digit]
    model.generation_config.pad_token_id = end

    student, smaller_tokens = shrink_vocabulary(model, tokens, TEXTS[:1])

    new = smaller_tokens.eos_token_id
    assert new == len(smaller_tokens) - 1 != end
    assert (student.config.eos_token_id, student.generation_config.pad_token_id) == (new, new)
    assert student.generation_config.suppress_tokens == smaller_tokens.convert_tokens_to_ids([",", "7"])
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    prompt = "the quick"
    answer = student.generate(**smaller_tokens(prompt, return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert answer.max() < len(smaller_tokens)
    assert model.generation_config.suppress_tokens == [comma, digit]


def test_a_padded_vocabulary_loses_its_padding_and_the_student_may_be_cut_further() -> None:
    tokens = tiny_tokenizer()
    teacher = tiny_bert_classifier(vocab_size=len(tokens) + 7, num_attention_heads=4)

    small, _ = shrink_vocabulary(teacher, tokens, ["a good film"])
    student = shrink(small, layers=1, hidden=16, heads=2)

    assert student.config.vocab_size == small.config.vocab_size < len(tokens)
    assert student.get_input_embeddings().weight.shape == (small.config.vocab_size, 16)


def test_an_encoder_decoder_is_cut_at_both_ends() -> None:
    tokens = tokenizer("Unigram, plain")
    config = hf.T5Config(
        vocab_size=len(tokens), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    teacher = hf.T5ForConditionalGeneration(config).eval()

    found = cut_vocabulary(teacher, tokens, TEXTS[:1])

    rows = found.tokenizer(TEXTS[0], return_tensors="pt")
    before = tokens(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        logits = found.student(**rows, decoder_input_ids=rows["input_ids"]).logits
        expected = teacher(**before, decoder_input_ids=before["input_ids"]).logits[..., list(found.ids)]
    torch.testing.assert_close(logits, expected)


def test_positions_that_depend_on_the_id_of_padding_stay() -> None:
    tokens = tokenizer("BPE of bytes")
    config = hf.RobertaConfig(
        vocab_size=len(tokens), **SIZES, pad_token_id=tokens.pad_token_id, max_position_embeddings=40
    )
    teacher = hf.RobertaForMaskedLM(config).eval()

    student, _ = shrink_vocabulary(teacher, tokens, TEXTS[:1])

    assert student.config.pad_token_id == teacher.config.pad_token_id == 1


def test_outputs_that_depend_on_ids_are_found_out() -> None:
    """RoBERTa counts positions from the id of padding, which moves here as rare pieces before it go."""
    made = Tokenizer(models.WordLevel({"rare": 0, "a": 1, "b": 2, "<pad>": 3, "<unk>": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    config = hf.RobertaConfig(
        vocab_size=5, **SIZES, pad_token_id=3, bos_token_id=4, eos_token_id=4, max_position_embeddings=40
    )

    with pytest.raises(ConfigurationError, match="gives another logits, so its numbers depend on ids"):
        shrink_vocabulary(hf.RobertaForMaskedLM(config).eval(), tokens, ["a b a"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"size": 10}, r"size=10: \d+ pieces must stay \(special"),
        ({"size": 0}, "size and min_count at least 1"),
        ({"min_count": 0}, "size and min_count at least 1"),
        ({"texts": "one"}, r"one text: pass \[text\]"),
        ({"texts": []}, "texts hold no token"),
        ({"tokenizer": object()}, "object is none"),
        (
            {"model": hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=8, patch_size=4))},
            "no token embeddings",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(asked: dict[str, Any], message: str) -> None:
    usual = {"model": tiny_bert_classifier(), "tokenizer": tiny_tokenizer(), "texts": ["a film"]} | asked

    with pytest.raises(ConfigurationError, match=message):
        shrink_vocabulary(**usual)


def test_a_tokenizer_with_more_ids_than_the_model_embeds_is_refused() -> None:
    with pytest.raises(MismatchError, match="the model embeds 40"):
        shrink_vocabulary(tiny_bert_classifier(vocab_size=40), tiny_tokenizer(), ["a film"])
