"""Long-context students: what they are made of, the lengths that their attentions allow, the terms on real models."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.encoders import _long_attention as attention
from hf_compress_plugins.encoders import efficient_attention as module
from hf_compress_plugins.encoders.efficient_attention import (
    EfficientAttention,
    keep_sparse,
    long_context_student,
    long_rows,
    set_length,
    soft_targets_apart,
)
from hf_compress_plugins.encoders.minilm import MiniLM
from scene import logits, sizes
from stub import GradientKeeper, arguments
from tiny import tiny_plain_tokenizer, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BigBirdConfig,
    BigBirdForMaskedLM,
    LongformerConfig,
    LongformerForMaskedLM,
    NystromformerConfig,
    NystromformerForMaskedLM,
    PreTrainedConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
)

from hf_compress import DistillCallback
from hf_compress.divergences import softened_kl
from hf_compress.errors import ConfigurationError, MismatchError, UnknownNameError

WORDS = 30
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BLOCKS = {"block_size": 2, "num_random_blocks": 1}
"""Sparse from 15 tokens on."""


def made(model: type, config: type, seed: int = 0, **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config(**(SIZES | settings))).eval()


def longformer(**settings: Any) -> LongformerForMaskedLM:
    return made(LongformerForMaskedLM, LongformerConfig, **({"attention_window": [4, 8, 8, 4]} | settings))


def big_bird() -> BigBirdForMaskedLM:
    return made(BigBirdForMaskedLM, BigBirdConfig, **BLOCKS)


def nystromformer(segment: int = 16, **settings: Any) -> NystromformerForMaskedLM:
    return made(
        NystromformerForMaskedLM,
        NystromformerConfig,
        **({"num_landmarks": 4, "segment_means_seq_len": segment} | settings),
    )


def ids(length: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(5, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model: Any, given: Tensor, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(given, **({"attention_mask": torch.ones_like(given)} | inputs)).logits
    return found


# ---------------------------------------------------------------------- the loss


def test_positions_at_a_time_give_the_same_and_keep_the_logits_alone() -> None:
    values, gradients, kept = [], [], []
    teacher = logits(10, 7, 1)
    for positions in (10, 3):
        saved: list[int] = []
        student = logits(10, 7, 0).requires_grad_()

        def pack(tensor: Tensor, saved: list[int] = saved, student: Tensor = student) -> Tensor:
            given = {each.untyped_storage().data_ptr() for each in (student, teacher)}
            saved.append(tensor.numel() * (tensor.untyped_storage().data_ptr() not in given))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = soft_targets_apart(student, teacher, temperature=3.0, positions=positions)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(student.grad)
        kept.append(sum(saved))
    torch.testing.assert_close(values[0], softened_kl("x", logits(10, 7, 0), teacher, temperature=3.0))
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[0] >= 70 > kept[1]
    with pytest.raises(MismatchError):
        soft_targets_apart(logits(4, 7, 0), teacher, temperature=1.0, positions=2)


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


def rows(length: int, count: int = 4, padding: int = 3, **columns: Any) -> list[dict[str, Any]]:
    """Rows of one length, each padded by some tokens more than the one before, labels at every third token."""
    found = []
    for place, row in enumerate(ids(length, count).tolist()):
        real = length - padding * place
        labels = [token if at % 3 == 0 and at < real else -100 for at, token in enumerate(row)]
        found.append({"input_ids": row, "attention_mask": [1] * real + [0] * (length - real), "labels": labels})
        found[-1] |= columns
    return found


def train(
    folder: Path, student: Any, teacher: Any, data: Any, method: Any = None, **settings: Any
) -> tuple[Trainer, list[dict[str, Tensor]]]:
    keeper = GradientKeeper()
    memory = {name: settings.pop(name) for name in ("memory", "chunk") if name in settings}
    trainer = Trainer(
        model=student,
        args=arguments(folder, **({"learning_rate": 0.0} | settings)),
        train_dataset=Dataset.from_list(data),
        data_collator=collate,
        callbacks=[DistillCallback(teacher, method or EfficientAttention(), **memory), keeper],
    )
    trainer.train()
    return trainer, keeper.gradients


@pytest.mark.parametrize("kind", ["longformer", "big_bird", "nystromformer"])
def test_the_three_terms_on_each_attention(kind: str, tmp_path: Path) -> None:
    """Longformer reads 18 tokens, which it pads to its windows inside."""
    teacher = {"longformer": longformer, "big_bird": big_bird, "nystromformer": nystromformer}[kind]()
    student = long_context_student(teacher)
    assert student.config.num_hidden_layers == 2
    data = rows(18 if kind == "longformer" else 16, padding=0 if kind == "nystromformer" else 3)
    trainer, gradients = train(tmp_path, copy.deepcopy(student), teacher, data)
    assert all(gradient.isfinite().all() for gradient in gradients[0].values())
    batch = collate(data)
    labels, real = batch.pop("labels"), batch["attention_mask"].bool()
    if kind == "big_bird":  # random blocks are drawn in training alone
        return
    with torch.no_grad():
        own, theirs = (model.eval()(**batch, output_hidden_states=True) for model in (student, teacher))
    log = trainer.state.log_history[0]
    soft = softened_kl("x", own.logits[real], theirs.logits[real], temperature=2.0).mean()
    cosine = nn.functional.cosine_similarity(own.hidden_states[-1][real], theirs.hidden_states[-1][real], dim=-1)
    mlm = nn.functional.cross_entropy(own.logits.flatten(0, 1), labels.flatten())
    assert log["distill/efficient_attention.soft"] == pytest.approx(5 * soft.item(), rel=1e-4)
    assert log["distill/efficient_attention.cosine"] == pytest.approx(1 - cosine.mean().item(), rel=1e-4)
    assert log["task_loss"] == pytest.approx(mlm.item(), rel=1e-4)


def test_masked_tokens_alone_run_in_chunks(tmp_path: Path) -> None:
    """With cosine=0 no whole logits are kept, and the gradients are those of whole ones."""
    teacher = longformer()
    student = long_context_student(teacher)
    method = {"restrict": True, "cosine": 0.0}
    found = [
        train(tmp_path, copy.deepcopy(student), teacher, rows(16), EfficientAttention(**method), memory=memory, chunk=3)
        for memory in ("dense", "chunked")
    ]
    for name, gradient in found[0][1][0].items():
        torch.testing.assert_close(found[1][1][0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    with pytest.raises(ConfigurationError, match="relates logits"):
        train(tmp_path, student, teacher, rows(16), EfficientAttention(restrict=True), memory="chunked")


@pytest.mark.parametrize("own", [True, False])
def test_a_global_attention_mask_reaches_each_model_that_takes_one(own: bool, tmp_path: Path) -> None:
    teacher = longformer()
    student = long_context_student(teacher) if own else long_context_student(made(BertForMaskedLM, BertConfig))
    seen: list[Any] = []
    for model in (student, teacher):
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module, kwargs.get("global_attention_mask"))), with_kwargs=True
        )
    mask = [1] + [0] * 15
    train(tmp_path, student, teacher, rows(16, global_attention_mask=mask), remove_unused_columns=True)
    got = {"teacher" if model is teacher.longformer else "student": given for model, given in seen}
    assert got["teacher"].tolist() == [mask] * 4
    assert (got["student"] is not None) == own


# ---------------------------------------------------------------------- lengths


def test_a_short_row_for_a_big_bird_is_refused_before_it_turns_to_full_attention(tmp_path: Path) -> None:
    teacher = big_bird()
    student = long_context_student(teacher)
    assert attention.shortest(teacher.config) == 15
    with pytest.raises(MismatchError, match="at least 15 tokens and full attention below, and a row has 14"):
        train(tmp_path, student, teacher, rows(14))
    assert not attention.switched(student)
    assert not attention.switched(teacher)


def test_a_big_bird_that_is_kept_sparse_is_sparse_again_after_a_short_batch(tmp_path: Path) -> None:
    plain, kept = big_bird(), big_bird()
    keep_sparse(kept)
    keep_sparse(kept)
    assert len(kept.bert._forward_pre_hooks) == 1
    before = read(plain, ids(20))
    short = read(plain, ids(8))
    assert attention.switched(plain)  # what transformers does
    assert not torch.allclose(read(plain, ids(20)), before)
    torch.testing.assert_close(read(kept, ids(8)), short)
    torch.testing.assert_close(read(kept, ids(20)), before)
    read(kept, ids(8))
    torch.testing.assert_close(read(kept, ids(15)), read(big_bird(), ids(15)))  # the shortest that are sparse
    assert kept.bert.encoder.layer[0].attention.self.training is False
    for method in (None, EfficientAttention(restrict=True, cosine=0.0)):
        with pytest.raises(MismatchError, match=r"Call keep_sparse\(student\)"):
            train(tmp_path, copy.deepcopy(plain), kept, rows(16), method)
    long_context_student(plain)  # a teacher that was switched
    torch.testing.assert_close(read(plain.eval(), ids(20)), before)
    keep_sparse(longformer())  # nothing to keep


def test_a_nystromformer_mixes_sentences_of_another_length_and_is_refused(tmp_path: Path) -> None:
    model = nystromformer(segment=16)
    assert read(model, ids(8)).shape == (2, 8, WORDS)  # two rows of half the length pass for one of the whole
    with pytest.raises(RuntimeError):
        read(model, ids(8)[:1])
    student = long_context_student(model)
    with pytest.raises(MismatchError, match="rows of 16 tokens, and a row has 12: sentences would be mixed"):
        train(tmp_path, copy.deepcopy(student), model, rows(12))
    for one in (model, student):
        set_length(one, 12)
    train(tmp_path, student, model, rows(12, padding=0))
    assert student.config.segment_means_seq_len == 12
    assert read(model, ids(12)[:1]).isfinite().all()


def test_a_nystromformer_with_as_many_landmarks_as_tokens_is_no_student(tmp_path: Path) -> None:
    full = nystromformer(segment=4)
    student = long_context_student(full)
    with pytest.raises(ConfigurationError, match="as many landmarks as tokens"):
        train(tmp_path, student, full, rows(16))
    sparse = long_context_student(full, config={"length": 16})
    assert {module.seq_len for module in sparse.modules() if hasattr(module, "num_landmarks")} == {16}
    train(tmp_path, sparse, full, rows(16, padding=0))  # the teacher may have full attention
    for wrong in (4, 18):
        with pytest.raises(ConfigurationError, match="multiple of the 4 landmarks"):
            set_length(sparse, wrong)
    with pytest.raises(MismatchError, match="takes padding into its means"):
        train(tmp_path, sparse, full, rows(16))
    with pytest.raises(ConfigurationError, match="do not divide its length of 18 tokens"):
        train(tmp_path, nystromformer(segment=18), full, rows(18))
    with pytest.raises(ConfigurationError, match="is for a Nyströmformer"):
        set_length(longformer(), 16)


@pytest.mark.parametrize(("model", "most"), [(longformer, 62), (big_bird, 64)])
def test_rows_beyond_the_positions_are_refused(model: Any, most: int) -> None:
    config = model().config
    attention.check_length(config, most, "student")
    with pytest.raises(MismatchError, match=f"the student has positions for {most} tokens, and a row has {most + 1}"):
        attention.check_length(config, most + 1, "student")
    attention.check_length(None, 10**6, "teacher")


def test_attentions_of_longformer_are_refused_by_methods_on_attention(tmp_path: Path) -> None:
    teacher = longformer()
    with pytest.raises(MismatchError, match="was not reached"):
        train(tmp_path, long_context_student(teacher), teacher, rows(16), MiniLM(relation_heads=2))


# ---------------------------------------------------------------------- students


@pytest.mark.parametrize(
    ("depth", "number", "expected"),
    [(12, 6, [0, 2, 4, 7, 9, 11]), (4, 2, [0, 3]), (6, 3, [0, 2, 5]), (3, 1, [2]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_every_other_layer(depth: int, number: int, expected: list[int]) -> None:
    assert attention.alternate(depth, number) == expected


def test_half_of_the_layers_with_embeddings_and_head() -> None:
    teacher = longformer()
    student = long_context_student(teacher)
    own, theirs = student.state_dict(), teacher.state_dict()
    for name in own:
        torch.testing.assert_close(own[name], theirs[name.replace("layer.1.", "layer.3.")])
    assert student.config.attention_window == [4, 4]
    assert long_context_student(teacher, config={"layers": 3}).config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["bert", "roberta", "tagger"])
def test_a_longformer_whose_window_sees_all_computes_what_the_full_attention_does(name: str, tmp_path: Path) -> None:
    """As long as the teacher's positions go; beyond them the positions begin again."""
    teacher = {
        "bert": lambda: made(BertForMaskedLM, BertConfig),
        "roberta": lambda: made(RobertaForMaskedLM, RobertaConfig),
        "tagger": lambda: made(BertForTokenClassification, BertConfig, num_labels=3, pad_token_id=2),
    }[name]()
    config = {"attention": "longformer", "window": 48, "length": 100, "layers": 4}
    student = long_context_student(teacher, config=config).eval()
    given, mask = ids(20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    expected = read(teacher, given, attention_mask=mask)
    torch.testing.assert_close(read(student, given, attention_mask=mask)[mask.bool()], expected[mask.bool()])
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    torch.testing.assert_close(read(again.eval(), given), read(student, given))
    narrow = long_context_student(teacher, config=config | {"window": 4}).eval()
    assert not torch.allclose(read(narrow, given), read(teacher, given))
    assert read(narrow, ids(100)).isfinite().all()
    table = student.longformer.embeddings.position_embeddings.weight
    first = teacher.config.pad_token_id + 1
    repeat = len(teacher.base_model.embeddings.position_embeddings.weight) - (first if name == "roberta" else 0)
    torch.testing.assert_close(table[first], table[first + repeat])
    layer = narrow.longformer.encoder.layer[0].attention.self
    torch.testing.assert_close(layer.key_global.weight, layer.key.weight)


def test_a_longformer_learns_from_a_bert(tmp_path: Path) -> None:
    teacher = made(BertForMaskedLM, BertConfig)
    student = long_context_student(teacher, config={"attention": "longformer", "window": 4, "length": 100})
    assert student.config.num_hidden_layers == 2
    trainer, _ = train(tmp_path, student, teacher, rows(20), max_steps=12, learning_rate=0.02)
    losses = [entry["distill_loss"] for entry in trainer.state.log_history if "distill_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(MismatchError, match="the teacher has positions for 64 tokens, and a row has 80"):
        train(tmp_path, student, teacher, rows(80))


@pytest.mark.parametrize(
    ("config", "teacher", "said"),
    [
        ({"attention": "linear"}, longformer, "must be 'teacher' or 'longformer'"),
        ({"length": 0}, longformer, "at least 1 token"),
        ({"length": 50}, longformer, "whose positions stay"),
        ({"layers": 5}, longformer, "layers must lie in 1 … 4"),
        ({"layers": 0}, longformer, "layers must lie in 1 … 4"),
        ({"attention": "longformer"}, longformer, "needs a length"),
        ({"attention": "longformer", "length": 90}, longformer, "of a BERT or RoBERTa"),
        ({"attention": "longformer", "length": 90, "window": 5}, None, "even and at least 4"),
        ({"attention": "longformer", "length": 90, "window": 2}, None, "even and at least 4"),
    ],
)
def test_students_that_cannot_be_made_are_refused(config: dict[str, Any], teacher: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        long_context_student((teacher or (lambda: made(BertForMaskedLM, BertConfig)))(), config=config)


def test_an_unknown_setting_of_a_student_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="windows"):
        long_context_student(longformer(), config={"windows": 3})
    with pytest.raises(ConfigurationError, match="'relu'"):
        long_context_student(
            made(BertForMaskedLM, BertConfig, hidden_act="relu"), config={"attention": "longformer", "length": 70}
        )


# ---------------------------------------------------------------------- rows


def test_texts_stand_one_after_another_in_rows_of_one_length() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["a good film", "dull", "the end was very slow", "love"]
    found = long_rows(Dataset.from_dict({"text": texts, "n": [0, 1, 2, 3]}), tokenizer=tokenizer, length=6)
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    stream = [t for text in texts for t in (*tokenizer(text, add_special_tokens=False)["input_ids"], last)]
    assert found.column_names == ["input_ids", "attention_mask"]
    assert found["input_ids"][:] == [[first, *stream[at : at + 4], last] for at in range(0, len(stream) - 3, 4)]
    assert found["attention_mask"][:] == [[1] * 6] * len(found)
    plain = long_rows(Dataset.from_dict({"text": texts}), tokenizer=tiny_plain_tokenizer(), length=6)
    assert plain[0]["input_ids"] == [*stream[:5], last]  # no first special token
    with pytest.raises(ConfigurationError, match="has no 'body'"):
        long_rows(found, tokenizer=tokenizer, length=6, column="body")
    with pytest.raises(ConfigurationError, match="shorter than one row of 60"):
        long_rows(Dataset.from_dict({"text": texts}), tokenizer=tokenizer, length=60)
    with pytest.raises(ConfigurationError, match="at least 3 tokens"):
        long_rows(Dataset.from_dict({"text": texts}), tokenizer=tokenizer, length=2)


# ---------------------------------------------------------------------- settings


def test_what_it_is_not_for_is_refused_with_the_remedy() -> None:
    with pytest.raises(MismatchError, match="outputs are 'rows'"):
        EfficientAttention().needs(sizes(2, "rows"), sizes(4, "rows"))
    with pytest.raises(MismatchError, match=r"Take long_context_student\(teacher\)"):
        EfficientAttention().needs(sizes(2, width=4), sizes(4, width=8))
    assert EfficientAttention(cosine=0.0).needs(sizes(2, width=4), sizes(4, width=8)).student == {"logits"}
    assert EfficientAttention(soft=0.0, restrict=True).needs(sizes(2), None).mean_over == "tokens"


@pytest.mark.parametrize(
    "wrong", [{"soft": -1.0}, {"soft": 0.0, "cosine": 0.0}, {"cosine": float("inf")}, {"temperature": 0.0}], ids=str
)
def test_settings_that_cannot_be_served_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"^efficient_attention: "):
        EfficientAttention(**wrong)
    assert module.POSITIONS == 1024


def test_encoder_decoders_whose_logits_follow_other_tokens_are_refused() -> None:
    """Their logits are of the decoder's tokens, the batch's mask of the encoder's."""
    both = replace(sizes(2, "tokens"), config=PreTrainedConfig(is_encoder_decoder=True))
    with pytest.raises(MismatchError, match="masked language models"):
        EfficientAttention().needs(both, both)
