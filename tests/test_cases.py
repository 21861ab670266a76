"""Faults that users of other distillation tools reported, each as its whole kind; `cases.py` is the table."""

from __future__ import annotations

import ast
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cases
import families
import pytest
import torch
import toys
import transformers
from datasets import Dataset
from hf_compress_plugins.encoders.minilm import MiniLM
from hf_compress_plugins.general.features import Features
from hf_compress_plugins.general.gkd import gkd
from hf_compress_plugins.general.kd import KD
from hf_compress_plugins.language.taid import TAID
from hf_compress_plugins.tokenizers._alignment import byte_forms
from hf_compress_plugins.tokenizers._preparation import two_tokenizations
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import PREPARED, SIGNED
from safetensors.torch import load_file
from scene import logits
from stub import GradientKeeper, StubForTokenClassification, arguments, stub_trainer
from tiny import tiny_bert_classifier
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HubStrategy

from hf_compress import DistillCallback, registry, shrink, testing
from hf_compress.divergences import kl
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Needs, Rows, Sizes, Step, kind_of, positions, sizes
from hf_compress.on_policy import rebuild
from hf_compress.teachers.cache import CacheTeacher
from hf_compress.teachers.ensemble import EnsembleTeacher
from hf_compress.teachers.server import ServerTeacher

CLASSIFY, TAG, MASK, GENERATE = "text-classification", "token-classification", "fill-mask", "text-generation"
PUSHED = ("every_save", "checkpoint", "all_checkpoints")
METHODS = [replace(case, **PREPARED.get(case.method, {})) for case in testing.cases()]


def draws(rows: int, time: int, classes: int, seed: int) -> Tensor:
    """(row, time, class) float64."""
    return logits(rows * time, classes, seed).view(rows, time, classes)


def taught(
    folder: Path, student: Tensor, teacher: Tensor, labels: Tensor | None = None, method: Any = "kd", **settings: Any
) -> tuple[Trainer, list[Tensor]]:
    """A run on logits (row, time, class) themselves, and the gradient of the student's at each step."""
    distill = {name: settings.pop(name) for name in ("alpha", "kind") if name in settings}
    keeper = GradientKeeper()
    callback = DistillCallback(StubForTokenClassification(teacher), method, **distill)
    made = stub_trainer(folder, student, labels, [callback, keeper], **settings)
    made.train()
    return made, [gradients["rows"] for gradients in keeper.gradients]


def trained(
    folder: Path,
    student: nn.Module,
    teacher: Any,
    method: Any = "kd",
    *,
    data: list[dict[str, Any]],
    collate: Any = testing.collate,
    callbacks: tuple[TrainerCallback, ...] = (),
    distill: Mapping[str, Any] | None = None,
    metrics: Any = None,
    **settings: Any,
) -> tuple[Trainer, GradientKeeper]:
    """A run of two models, and the gradients of its steps."""
    keeper = GradientKeeper()
    made = Trainer(
        model=student,
        args=arguments(folder, **settings),
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data),
        data_collator=collate,
        compute_metrics=metrics,
        callbacks=[DistillCallback(teacher, method, **(distill or {})), keeper, *callbacks],
    )
    made.train()
    return made, keeper


def unlabelled(task: str) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"]} for row in testing.rows(task)]


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance, msg=name)


class At(TrainerCallback):
    """Calls a function with the model at the beginning of each step."""

    def __init__(self, function: Callable[[nn.Module], None]) -> None:
        self.function = function

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.function(model)


# ---------------------------------------------------------------------- the table


def test_every_test_that_the_table_names_is_there() -> None:
    folder = Path(__file__).parent
    checks = {check.__name__.removeprefix("check_") for check in testing.CHECKS}
    named = {held for report in cases.REPORTS for held in report.held_by} | set(OWN_RUN.values())
    for held in named:
        kind, _, name = held.partition(": ")
        if kind == "conformance":
            assert name in checks, held
            continue
        file, _, function = held.partition("::")
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, held


def test_every_report_is_short_and_has_its_line_in_the_table() -> None:
    lines = cases.render().splitlines()
    assert len(lines) == len(cases.REPORTS) + 2
    for report, line in zip(cases.REPORTS, lines[2:], strict=True):
        assert 2 < len(report.reported.split()) <= 12, report.reported
        assert report.held_by
        for text in (report.reported, report.thread, *report.held_by):
            assert text in line


# ---------------------------------------------------------------------- the value of the loss


def test_a_short_last_window_is_divided_by_its_own_count(tmp_path: Path) -> None:
    """Four rows, three a window: the second window is the fourth row alone."""
    student, teacher = (draws(4, 12, 5, seed) for seed in (0, 1))
    real = torch.arange(12) < torch.tensor(testing.LENGTHS)[:, None]
    labels = torch.arange(48).view(4, 12) % 5
    labels[~real] = IGNORED
    window: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}

    _, found = taught(tmp_path, student, teacher, labels, max_steps=-1, num_train_epochs=1, learning_rate=0, **window)

    _, (alone,) = taught(tmp_path, student[3:], teacher[3:], labels[3:])
    assert len(found) == 2
    assert not found[1][:3].any()
    torch.testing.assert_close(found[1][3:], alone)


@pytest.mark.parametrize(("size", "steps"), [(2, 1), (1, 2)])
def test_one_token_of_1_nat_and_three_of_3_are_2_5_on_average(size: int, steps: int, tmp_path: Path) -> None:
    """The teacher is sure of class 0, of which the student's log-probability is -1 or -3; a mean of means is 2."""
    nats = torch.tensor([[1.0], [3.0]], dtype=torch.float64).expand(2, 3)
    student = torch.stack([-nats, torch.log1p(-(-nats).exp())], -1)
    teacher = torch.tensor([0.0, -math.inf], dtype=torch.float64).expand(2, 3, 2)
    labels = torch.tensor([[IGNORED, 0, IGNORED], [0, 0, 0]])
    window = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}

    made, _ = taught(tmp_path, student, teacher, labels, KD(temperature=1.0), **window)

    assert toys.logged(made, "distill_loss") == pytest.approx([2.5])
    assert toys.logged(made, "task_loss") == pytest.approx([2.5])


@pytest.mark.parametrize("guess", [True, False])
@pytest.mark.parametrize("task", [CLASSIFY, GENERATE])
def test_four_steps_of_accumulation_do_not_multiply_whatever_the_trainer_guesses(
    guess: bool, task: str, tmp_path: Path
) -> None:
    """Rows of one length; the guess is whether the model's forward takes loss arguments."""
    data = [{k: v[:3] if isinstance(v, list) else v for k, v in row.items()} for row in testing.rows(task)]
    found = []
    for size, steps in ((4, 1), (1, 4)):
        student, teacher = testing.models(task, torch.float64)
        keeper, callback = GradientKeeper(), DistillCallback(teacher, "kd")
        made = Trainer(
            model=student,
            args=arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps),
            train_dataset=Dataset.from_list(data),
            data_collator=testing.collate,
            callbacks=[keeper],
        )
        made.model_accepts_loss_kwargs = guess
        made.add_callback(callback)
        callback.attach(made)
        made.train()
        found.append(keeper.gradients[0])
    assert_same(found[1], found[0])


def _needs(case: testing.Case) -> Needs:
    return case.objective().needs(*(sizes(model) for model in testing.pair(case)))


def _on_vocabulary(case: testing.Case) -> bool:
    """Whether a method compares distributions over tokens."""
    if case.task not in (MASK, GENERATE):
        return False
    needs = _needs(case)
    return needs.same_tokens and "logits" in needs.student & (needs.teacher or frozenset())


@pytest.mark.parametrize("case", [case for case in METHODS if _on_vocabulary(case)], ids=str)
def test_as_many_tokens_again_that_no_model_has_change_nothing(case: testing.Case) -> None:
    def padded(taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: tap.detach() for name, tap in taps.items()}
        return found | {"logits": F.pad(found["logits"], (0, testing.VOCAB), value=-math.inf)}

    plain = testing.signals(case, torch.float64)
    own = {name: tap.requires_grad_() for name, tap in padded(plain.student).items()}
    frozen = {role: padded(taps) for role, taps in plain.frozen.items()}

    value, gradients = testing.value(case, replace(plain, student=own, teacher=padded(plain.teacher), frozen=frozen))

    expected, before = testing.value(case, plain)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients["logits"][..., : testing.VOCAB], before["logits"])
    assert not gradients["logits"][..., testing.VOCAB :].any()


def _each_position() -> list[str]:
    """Methods with a value at each position that need no data and no further model of their own."""
    on_tokens = [case for case in METHODS if case.task in (TAG, MASK, GENERATE) and case.prepare is None]
    alone = [case for case in on_tokens if not _needs(case).frozen]
    return sorted({case.method for case in alone if case.objective().overrides("per_position")})


@pytest.mark.parametrize("method", _each_position())
def test_a_text_eight_times_as_long_has_the_same_loss(method: str, tmp_path: Path) -> None:
    student, teacher, labels = draws(2, 8, 5, 0), draws(2, 8, 5, 1), torch.arange(16).view(2, 8) % 5
    logs = []
    for times in (1, 8):
        given = (one.repeat(1, times, 1) for one in (student, teacher))
        made, _ = taught(tmp_path, *given, labels.repeat(1, times), method, alpha=0.5)
        logs.append([toys.logged(made, name) for name in ("loss", "distill_loss", "task_loss")])
    assert logs[1] == [pytest.approx(values) for values in logs[0]]


def _distributions(task: str, output: Any, labels: Tensor | None) -> Tensor:
    """(distribution, outcome) logits, as the task's own loss reads them."""
    if task == "extractive QA":
        found: Tensor = torch.cat([output.start_logits, output.end_logits])
        return found
    if task == "token classification" and labels is not None:
        return output.logits[labels != IGNORED]  # type: ignore[no-any-return]  # a model's output
    scores: Tensor = output.logits
    return torch.stack([torch.zeros_like(scores), scores], -1).flatten(0, 1) if task == "multi-label" else scores


@pytest.mark.parametrize("task", ["single-label", "multi-label", "token classification", "extractive QA"])
def test_each_kind_of_head_is_averaged_over_its_distributions(task: str, tmp_path: Path) -> None:
    student, teacher = families.models("BERT", task)
    data, batch = families.rows("BERT", task), families.collate(families.rows("BERT", task))
    log_q, log_p = (
        _distributions(task, model(**batch), batch.get("labels")).detach().log_softmax(-1)
        for model in (student, teacher.eval())
    )

    made, _ = trained(tmp_path, student, teacher, KD(temperature=1.0), data=data, collate=families.collate)

    expected = F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / len(log_p)
    assert toys.logged(made, "distill_loss") == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_teacher_that_is_sure_of_the_label_teaches_as_the_label(alpha: float, tmp_path: Path) -> None:
    """Both terms have one scale: whatever weighs them, the loss is the cross-entropy with the label."""
    student, labels = draws(2, 3, 5, 0), torch.arange(6).view(2, 3) % 5
    teacher = F.one_hot(labels, 5).double().log()

    made, (found,) = taught(tmp_path, student, teacher, labels, KD(temperature=1.0), alpha=alpha)

    leaf = student.clone().requires_grad_()
    entropy = F.cross_entropy(leaf.flatten(0, 1), labels.flatten())
    entropy.backward()
    assert toys.logged(made, "loss") == pytest.approx([entropy.item()])
    torch.testing.assert_close(found, leaf.grad)


N = IGNORED


@pytest.mark.parametrize(
    ("inputs", "scored"),
    [
        ({"labels": [[N, N, N, 3, 4, 2]]}, [2, 3, 4]),
        ({"labels": [[N, N, N, 3, 4, 2]], "attention_mask": [[0, 0, 1, 1, 1, 1]]}, [2, 3, 4]),
        ({"labels": [[N, N, 3, 4, N, N]], "attention_mask": [[1, 1, 1, 1, 0, 0]]}, [1, 2]),
        ({"shift_labels": [[N, N, 3, 4, 2, N]]}, [2, 3, 4]),
        ({"attention_mask": [[1, 1, 1, 1, 0, 0]]}, [0, 1, 2]),
        ({"attention_mask": [[0, 0, 1, 1, 1, 1]]}, [2, 3, 4]),
        ({}, [0, 1, 2, 3, 4]),
    ],
    ids=["prompt", "padded on the left", "on the right", "shifted", "no labels, right", "no labels, left", "all"],
)
def test_the_token_before_each_answer_token_is_scored_and_no_other(inputs: dict[str, Any], scored: list[int]) -> None:
    batch = {name: torch.tensor(value) for name, value in inputs.items()}
    assert positions("causal", {"input_ids": torch.ones(1, 6, dtype=torch.long)} | batch).index.tolist() == scored


def test_the_loss_reacts_where_answer_tokens_are_predicted_and_nowhere_else(tmp_path: Path) -> None:
    student, teacher = draws(1, 6, 5, 0), draws(1, 6, 5, 1)
    labels = torch.tensor([[N, N, N, 3, 4, 2]])

    _, (gradient,) = taught(tmp_path, student, teacher, labels, kind="causal", alpha=1.0)

    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [2, 3, 4]


@pytest.mark.parametrize("nothing", [-math.inf, math.nan])
def test_what_a_teacher_gives_where_nothing_is_scored_is_not_read(nothing: float, tmp_path: Path) -> None:
    student, teacher, labels = draws(2, 4, 5, 0), draws(2, 4, 5, 1), torch.arange(8).view(2, 4) % 5
    labels[0, :2] = labels[1, 3] = IGNORED
    clean, (expected,) = taught(tmp_path, student, teacher, labels)
    teacher[labels == IGNORED] = nothing

    made, (found,) = taught(tmp_path, student, teacher, labels)

    torch.testing.assert_close(found, expected)
    assert not found[labels == IGNORED].any()
    assert toys.logged(made, "distill_loss") == toys.logged(clean, "distill_loss")


class Endpoint:
    """A server that says nothing of what comes after a text's last token."""

    model = "big"

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            values = self.teacher(torch.tensor([body["prompt"]])).logits[0].log_softmax(-1)
        rows = [{str(token): {"logprob": float(p)} for token, p in enumerate(row)} for row in values[:-1]]
        choice = {"prompt_logprobs": [None, *rows], "text": ""}
        return SimpleNamespace(text="", json=lambda: {"choices": [choice]})


def test_a_server_that_leaves_the_last_place_out_teaches_as_its_model(tmp_path: Path) -> None:
    found = []
    for served in (False, True):
        student, teacher = testing.models(GENERATE)
        endpoint: Any = Endpoint(teacher)
        given = ServerTeacher(endpoint, vocab=testing.VOCAB, top_k=testing.VOCAB) if served else teacher
        _, keeper = trained(tmp_path, student, given, data=testing.rows(GENERATE))
        found.append(keeper.gradients[0])
    assert_same(found[1], found[0], 1e-4)


@pytest.mark.parametrize("task", [CLASSIFY, TAG, MASK, GENERATE])
def test_padding_to_any_length_gives_one_gradient(task: str, tmp_path: Path) -> None:
    """The task's own loss, logits, hidden states with their projections, and attention."""
    found = []
    for length in (12, 32):
        student, teacher = testing.models(task, torch.float64)
        made, keeper = trained(
            tmp_path,
            student,
            teacher,
            ["kd", "features", MiniLM(relation_heads=4)],
            data=testing.rows(task),
            collate=lambda batch, length=length: testing.collate(batch, length),
        )
        found.append((keeper.gradients[0], toys.logged(made, "loss")))
    assert_same(found[1][0], found[0][0], 1e-5 if task == GENERATE else 1e-9)
    assert found[1][1] == pytest.approx(found[0][1])


def test_stored_targets_follow_their_rows_into_any_order(tmp_path: Path) -> None:
    """Filled in one order and padding, read in another over three epochs: the live teacher's losses."""
    data = testing.rows(GENERATE, 8)
    batches = [testing.collate(data[5:], 20), testing.collate(data[:5])]
    CacheTeacher(tmp_path / "cache", testing.models(GENERATE)[1], dtype="float32").fill(batches)
    losses = []
    for teacher in (testing.models(GENERATE)[1], CacheTeacher(tmp_path / "cache")):
        order: dict[str, Any] = {"train_sampling_strategy": "random", "seed": 7, "per_device_train_batch_size": 3}
        student = testing.models(GENERATE)[0]
        made, _ = trained(tmp_path, student, teacher, data=data, max_steps=-1, num_train_epochs=3, **order)
        losses.append(toys.logged(made, "distill_loss"))
    assert len(losses[0]) == 9
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 20.0], ids=["flat", "plain", "peaked"])
def test_the_likeliest_tokens_keep_their_share_of_the_whole_vocabulary(sharpness: float, tmp_path: Path) -> None:
    student, teacher = testing.models(GENERATE)
    teacher.lm_head.weight.data.mul_(sharpness)
    batch = testing.collate(testing.rows(GENERATE))
    cache = CacheTeacher(tmp_path, teacher, top_k=4, dtype="float32")
    cache.fill([batch])
    where = positions("causal", batch).index
    own, theirs = (
        model.eval()(input_ids=batch["input_ids"]).logits.flatten(0, 1)[where] for model in (student, teacher)
    )

    _, stored = cache.apart(batch)

    assert stored is not None
    log_p, log_q, kept = theirs.log_softmax(-1), own.log_softmax(-1), stored.rows(where, own)
    likeliest = log_p.topk(4).indices
    torch.testing.assert_close(kept.gather(1, likeliest), log_p.gather(1, likeliest), rtol=1e-4, atol=1e-4)
    whole, joined = kl(log_p, log_q), kl(kept, log_q)
    assert (joined > -1e-6).all()
    assert (joined <= whole + 1e-4).all()


@pytest.mark.parametrize("memory", ["dense", "chunked"])
@pytest.mark.parametrize("stored", [None, 8, testing.VOCAB + 8])
def test_a_masked_language_model_is_compared_where_both_vocabularies_are_real(
    memory: Any, stored: int | None, tmp_path: Path
) -> None:
    """60 tokens; the student has 72 entries, the teacher 68; its likeliest may be stored."""
    words = words_of(list(range(testing.VOCAB)))
    teacher = testing.models(MASK)[1]
    teacher.resize_token_embeddings(testing.VOCAB + 8, mean_resizing=False)
    teacher.save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    teacher = type(teacher).from_pretrained(tmp_path / "teacher")
    found = []
    for extra in (0, 12):
        student = testing.models(MASK)[0]
        student.resize_token_embeddings(testing.VOCAB + extra, mean_resizing=False)
        given: Any = teacher if stored is None else CacheTeacher(tmp_path / f"{extra}", teacher, top_k=stored)
        made = Trainer(
            model=student,
            args=arguments(tmp_path),
            train_dataset=Dataset.from_list(testing.rows(MASK)),
            data_collator=testing.collate,
            processing_class=words,
            callbacks=[DistillCallback(given, "kd", memory=memory, alpha=1.0)],
        )
        made.train()
        found.append(toys.logged(made, "distill_loss"))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def words_of(order: list[int]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, word k at place `order.index(k)`."""
    words = {("[UNK]" if word == 0 else f"w{word}"): place for place, word in enumerate(order)}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]")


# ---------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("where", ["folder", "hub", "vocab.txt"])
def test_a_teacher_whose_tokenizer_gives_the_words_other_ids_is_refused(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal in size, so that nothing else would tell; known by its folder, or by the hub id in its config."""
    ours, theirs = words_of(list(range(50))), words_of([0, *reversed(range(1, 50))])
    folder = tmp_path / "models--me--big" / "snapshots" / "1"
    teacher = testing.models(CLASSIFY)[1]
    teacher.save_pretrained(folder)
    if where == "vocab.txt":  # as BERT's first releases
        (folder / where).write_text("\n".join(theirs.convert_ids_to_tokens(range(50))))
    else:
        theirs.save_pretrained(folder)
    refs = folder.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MismatchError, match="tokens of the tokenizer have another id"):
        Trainer(
            model=testing.models(CLASSIFY)[0],
            args=arguments(tmp_path),
            processing_class=ours,
            callbacks=[DistillCallback("me/big" if where == "hub" else str(folder), "kd")],
        )


def of_bytes(*, begins: bool) -> PreTrainedTokenizerFast:
    """A token for each byte, with a beginning of the text or without."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: place for place, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _with_ends(made, begins=begins)


def of_pieces(*, begins: bool) -> PreTrainedTokenizerFast:
    """Whole letters, of which é and 🙂 are several bytes, and pairs of them; bytes for what is in no piece."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abé🙂", "▁a", "é🙂", "ab"]
    merges = [("▁", "a"), ("é", "🙂"), ("a", "b")]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return _with_ends(made, begins=begins)


def _with_ends(made: Tokenizer, *, begins: bool) -> PreTrainedTokenizerFast:
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


SIDES = [of_bytes(begins=False), of_bytes(begins=True), of_pieces(begins=False), of_pieces(begins=True)]


@settings(max_examples=20, deadline=None)
@given(st.text("ab é🙂ü", min_size=1, max_size=12), st.sampled_from(SIDES), st.sampled_from(SIDES))
def test_chunks_cover_the_text_in_equal_bytes_whoever_marks_its_beginning(
    text: str, own: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast
) -> None:
    """Letters of several bytes are one token here and several there."""
    (row,) = two_tokenizations(_Rows(text), tokenizer=own, teacher_tokenizer=theirs, max_length=64, column="text")
    spelled = []
    for start, end, first, last in (chunk for chunk in row["chunks"] if chunk[0] >= 0):
        sides = ((theirs, row["teacher_input_ids"][start:end]), (own, row["input_ids"][first:last]))
        left, right = ("".join(byte_forms(side)[token] for token in ids).replace("<s>", "") for side, ids in sides)
        assert left == right
        spelled.append(left)
    letters = byte_forms(SIDES[0])
    assert "".join(spelled) == "".join(letters[token] for token in SIDES[0](text)["input_ids"])


class _Rows:
    """One text, as a data set that maps without a file."""

    column_names = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def map(self, function: Callable[[dict[str, str]], dict[str, Any]], **_: Any) -> list[dict[str, Any]]:
        return [function({"text": self.text})]


@pytest.mark.parametrize("pad", [0, 2], ids=["pad is a word too", "pad is the end"])
def test_an_answer_has_the_same_values_whatever_it_is_padded_to(pad: int) -> None:
    """Reverse KL on what the student wrote: two tokens and the end, among answers of two or of six."""
    student, teacher = testing.models(GENERATE, torch.float64)
    values = []
    for room in (0, 4):
        written = torch.tensor([[7, 0, 5, 0, 2, *[pad] * room], [7, 9, 5, 8, 6, *[9] * room]])
        batch = rebuild(written, torch.ones(2, 2, dtype=torch.long), [2])
        where = positions("causal", batch)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        rows = [model.eval()(**given).logits.flatten(0, 1)[where.index] for model in (student, teacher)]
        values.append(gkd(*rows, beta=1.0)[where.example == 0])
    assert len(values[0]) == 3
    torch.testing.assert_close(values[1], values[0])


@pytest.mark.parametrize("squash", [torch.sigmoid, lambda scores: scores.softmax(-1)], ids=["sigmoid", "softmax"])
def test_scores_of_a_teacher_that_are_squashed_already_are_told_once(
    squash: Callable[[Tensor], Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Between 0 and 1 they differ too little to teach anything, and nothing else would show it."""
    student, teacher, labels = 3 * draws(4, 3, 5, 0), 3 * draws(4, 3, 5, 1), torch.ones(4, 3, dtype=torch.long)
    for scores, told in ((teacher, 0), (squash(teacher), 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_compress"):
            taught(tmp_path, student, scores, labels, max_steps=3)
        assert sum("between 0 and 1" in record.getMessage() for record in caplog.records) == told


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("task", [CLASSIFY, TAG, MASK, GENERATE])
def test_evaluation_in_mid_training_is_on_the_scale_of_training(task: str, tmp_path: Path) -> None:
    """A student that stays as it is: at each step the losses of evaluation are those of training."""
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape[0])
        return {"seen": 1.0}

    keep: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "learning_rate": 0.0}
    keep |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    made, _ = trained(tmp_path, *testing.models(task), data=testing.rows(task), metrics=metrics, **keep)
    assert shapes == [4, 4]
    assert toys.logged(made, "eval_seen") == [1.0, 1.0]
    for name in ("task_loss", "distill_loss"):
        found = toys.logged(made, "eval_loss" if name == "task_loss" else f"eval_{name}")
        assert found == pytest.approx(toys.logged(made, name), rel=1e-5)


# ---------------------------------------------------------------------- the teacher


class WithReference(toys.Toy):
    """The distance of the student from a further frozen model."""

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(frozen=("reference",))

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        return (rows.student_logits - rows.frozen["reference"]).square().mean(-1)


def dropping(seed: int) -> nn.Module:
    """A teacher with dropout, in training mode."""
    model = testing.models(CLASSIFY)[1]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.classifier.bias.data.add_(seed)
    return model.train()


@pytest.mark.parametrize("role", ["model", "ensemble", "reference"])
def test_no_frozen_model_is_ever_in_training_mode_or_in_the_optimizer(role: str, tmp_path: Path) -> None:
    """Though somebody puts it in training mode at every step."""
    several = [dropping(seed) for seed in range(1 if role == "model" else 2)]
    teacher: Any = EnsembleTeacher(several) if role == "ensemble" else several[0]
    method: Any = WithReference() if role == "reference" else "kd"
    seen: list[bool] = []
    for model in several:
        model.register_forward_hook(lambda module, *_: seen.append(any(one.training for one in module.modules())))

    made, _ = trained(
        tmp_path,
        testing.models(CLASSIFY)[0],
        teacher,
        method,
        data=testing.rows(CLASSIFY),
        callbacks=(At(lambda _: [model.train() for model in several]),),
        distill={"frozen": {"reference": several[1]}} if role == "reference" else {},
        max_steps=3,
        learning_rate=0.0,
    )

    assert seen == [False] * 3 * len(several)
    assert len(set(toys.logged(made, "distill_loss"))) == 1
    held = {id(parameter) for group in made.optimizer.param_groups for parameter in group["params"]}
    for parameter in (parameter for model in several for parameter in model.parameters()):
        assert id(parameter) not in held
        assert parameter.grad is None
        assert parameter.requires_grad  # as the user had it


@pytest.mark.parametrize("role", ["model", "ensemble", "reference"])
def test_every_frozen_model_is_on_the_device_of_training(role: str, tmp_path: Path) -> None:
    """Also where the Trainer leaves the student to be placed later, as under FSDP."""
    several = [testing.models(CLASSIFY)[1] for _ in range(1 if role == "model" else 2)]
    teacher: Any = EnsembleTeacher(several) if role == "ensemble" else several[0]
    frozen = {"reference": several[1]} if role == "reference" else {}
    callback = DistillCallback(teacher, WithReference() if frozen else "kd", frozen=frozen)
    made = Trainer(model=testing.models(CLASSIFY)[0], args=arguments(tmp_path), callbacks=[])
    made.add_callback(callback)
    with mock.patch.object(TrainingArguments, "device", torch.device("meta")):
        callback.attach(made)
    assert made.model.device.type == "cpu"
    for model in several:
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("task", [CLASSIFY, GENERATE])
def test_a_checkpoint_in_mid_run_is_the_student_for_its_auto_class(task: str, tmp_path: Path) -> None:
    """Learned parts and schedules lie beside the student's weights under one prefix, and nothing of the teacher."""
    auto = {
        CLASSIFY: transformers.AutoModelForSequenceClassification,
        GENERATE: transformers.AutoModelForCausalLM,
    }[task]
    before: list[dict[str, Tensor]] = []
    keeps = At(lambda model: before.append({name: value.clone() for name, value in model.state_dict().items()}))
    student, teacher = testing.models(task)
    keys = set(student.state_dict())
    save: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}

    method = [TAID(adaptive=False), Features()]
    trained(tmp_path, student, teacher, method, data=testing.rows(task), callbacks=(keeps,), **save)

    stored = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert {name for name in stored if not name.startswith("distiller.")} == keys
    for tensor in (tensor for tensor in teacher.state_dict().values() if tensor.dim()):
        assert not any(tensor.shape == other.shape and torch.equal(tensor, other) for other in stored.values())
    loaded, report = auto.from_pretrained(tmp_path / "checkpoint-1", output_loading_info=True)
    assert not report["missing_keys"]
    assert_same(dict(loaded.state_dict()), {name: before[1][name] for name in keys}, 0.0)
    assert kind_of(loaded) == kind_of(student)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [tensor.numel() for tensor in tree_leaves(found) if isinstance(tensor, Tensor)]
        self.elements = max([self.elements, *given])
        return found


def test_logits_in_chunks_make_nothing_of_the_size_of_positions_by_vocabulary(tmp_path: Path) -> None:
    """256 tokens, 4,096 entries, both models' forward and backward; the same gradient."""
    vocab, time, width, chunk = 4096, 256, 8, 16
    config: dict[str, Any] = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": width}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    row = torch.randint(0, vocab, (time,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for memory in ("dense", "chunked"):
        student, teacher = (_seeded(LlamaForCausalLM, LlamaConfig(**config), seed).double() for seed in (0, 1))
        distill = {"memory": memory, "chunk": chunk}
        with Largest() as largest:
            _, keeper = trained(tmp_path, student, teacher, data=[{"input_ids": row, "labels": row}], distill=distill)
        found.append((largest.elements, keeper.gradients[0]))
    (whole, expected), (largest_chunk, gradients) = found
    assert whole >= (time - 1) * vocab
    assert largest_chunk <= max(chunk, width) * vocab < whole / 8
    assert_same(gradients, expected)


def _seeded(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config)


def test_a_teacher_without_half_of_its_layers_recovers(tmp_path: Path) -> None:
    """One cut and one callback, no labels: most of what the cut broke is gone, on rows that it has not seen too."""
    teacher = tiny_bert_classifier(num_labels=testing.CLASSES, num_hidden_layers=2)
    student = shrink(teacher, layers=1)
    data = [{"input_ids": row["input_ids"]} for row in testing.rows(CLASSIFY, 48)]
    held = testing.collate([{"input_ids": row["input_ids"]} for row in testing.rows(CLASSIFY, 16, seed=9)])

    def distance() -> float:
        with torch.no_grad():
            log_p, log_q = (model.eval()(**held).logits.log_softmax(-1) for model in (teacher, student))
        return kl(log_p, log_q).mean().item()

    before = distance()
    steps: dict[str, Any] = {"max_steps": 40, "per_device_train_batch_size": 16, "optim": "adamw_torch"}
    made, _ = trained(tmp_path, student, teacher, data=data, learning_rate=3e-3, **steps)
    losses = toys.logged(made, "distill_loss")
    assert losses[-1] < losses[0] / 4
    assert distance() < before / 2


# ---------------------------------------------------------------------- inside the Trainer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_gpu": 2}, "torchrun"),
        *(({"push_to_hub": True, "hub_strategy": HubStrategy(name)}, "hub_strategy='end'") for name in PUSHED),
    ],
    ids=["DataParallel", *PUSHED],
)
def test_set_ups_that_would_push_or_lose_what_is_trained_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = testing.models(CLASSIFY)
    made, callback = Trainer(model=student, args=arguments(tmp_path)), DistillCallback(teacher, "kd")
    made.add_callback(callback)
    for name, value in changes.items():
        monkeypatch.setattr(TrainingArguments, name, value)
        vars(made.args).pop(name, None)
    with pytest.raises(ConfigurationError, match=message):
        callback.attach(made)
    assert not hasattr(student, "distiller")


class LossAlone(nn.Module):
    """As a fused loss leaves it: no logits in training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss}


@pytest.mark.parametrize("task", [CLASSIFY, GENERATE])
def test_an_output_that_carries_a_loss_alone_is_refused(task: str, tmp_path: Path) -> None:
    student, teacher = testing.models(task)
    before = testing.weights_hash(student)
    kind = {"kind": kind_of(student)}
    with pytest.raises(MismatchError, match=r"has no logits, it has \['loss'\].*turn it off"):
        trained(tmp_path, LossAlone(student), teacher, data=testing.rows(task), distill=kind)
    assert testing.weights_hash(student) == before


class StrictForSequenceClassification(DistilBertForSequenceClassification):
    """A student that takes nothing beside what it names."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("remove", [True, False])
def test_a_column_that_the_teacher_alone_reads_reaches_it_alone(remove: bool, tmp_path: Path) -> None:
    """A BERT tells a pair's second text by `token_type_ids`, which a DistilBERT has not."""
    data = [row | {"token_type_ids": [k % 2 for k in range(len(row["input_ids"]))]} for row in testing.rows(CLASSIFY)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = testing.collate(batch)
        if "token_type_ids" in batch[0]:
            types = [{"input_ids": row["token_type_ids"]} for row in batch]
            found["token_type_ids"] = testing.collate(types)["input_ids"]
        return found

    small: dict[str, Any] = {"vocab_size": testing.VOCAB, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    quiet: dict[str, Any] = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    config = DistilBertConfig(**small, **quiet, num_labels=testing.CLASSES)
    student = _seeded(StrictForSequenceClassification, config, 0)
    teacher, batch = testing.models(CLASSIFY)[1], collate(data)
    del batch["labels"]
    with torch.no_grad():
        log_p = (teacher.eval()(**batch).logits / 2).log_softmax(-1)
        log_q = (student.eval()(batch["input_ids"], batch["attention_mask"]).logits / 2).log_softmax(-1)

    keep: dict[str, Any] = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    made, _ = trained(tmp_path, student, teacher, data=data, collate=collate, remove_unused_columns=remove, **keep)

    expected = pytest.approx([4 * kl(log_p, log_q).mean().item()], rel=1e-5)
    assert toys.logged(made, "distill_loss") == expected
    assert toys.logged(made, "eval_distill_loss") == expected


def test_a_tied_student_of_the_teacher_s_layers_saves_and_loads(tmp_path: Path) -> None:
    config: dict[str, Any] = {"vocab_size": testing.VOCAB, "hidden_size": 16, "intermediate_size": 16}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}
    teacher = _seeded(LlamaForCausalLM, LlamaConfig(**config), 0)
    before = testing.weights_hash(teacher)

    made, _ = trained(tmp_path, shrink(teacher, layers=1), teacher, data=testing.rows(GENERATE), max_steps=2)

    student = made.model
    assert testing.weights_hash(teacher) == before
    theirs = {tensor.untyped_storage().data_ptr() for tensor in teacher.state_dict().values()}
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in student.state_dict().values()}
    made.save_model(str(tmp_path / "student"))
    assert "lm_head.weight" not in load_file(tmp_path / "student" / "model.safetensors")
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["missing_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert testing.weights_hash(loaded) == testing.weights_hash(student)


@pytest.mark.parametrize("task", [CLASSIFY, TAG, MASK, GENERATE])
def test_a_data_set_of_token_ids_alone_is_enough(task: str, tmp_path: Path) -> None:
    """Neither labels nor masks, and the Trainer's own collator."""
    student, teacher = testing.models(task)
    data = [{"input_ids": row["input_ids"][:3]} for row in testing.rows(task)]

    made, keeper = trained(tmp_path, student, teacher, data=data, collate=None, distill={"alpha": 1.0})

    (entry,) = [entry for entry in made.state.log_history if "loss" in entry]
    assert entry["loss"] == pytest.approx(entry["distill_loss"]) == pytest.approx(entry["distill/kd"])
    assert entry["loss"] > 0
    assert "task_loss" not in entry
    assert all(gradient.isfinite().all() for gradient in keeper.gradients[0].values())


class Returns(nn.Module):
    """A model whose output is put into another container."""

    def __init__(self, model: nn.Module, container: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.container, self.config = model, container, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.container(self.inner(input_ids=input_ids, attention_mask=attention_mask).logits)


CONTAINERS: Mapping[str, Callable[[Tensor], Any]] = {
    "dict": lambda scores: {"logits": scores},
    "tuple": lambda scores: (scores,),
    "tensor": lambda scores: scores,
}
ARRAYS: Mapping[str, Callable[[Tensor], Any]] = {
    "array": lambda scores: scores.numpy(),
    "dict of arrays": lambda scores: {"logits": scores.numpy()},
    "list of arrays": lambda scores: [scores.numpy()],
}
"""As heads outside torch give them, scikit-learn's or ONNX Runtime's."""


def _gradients(folder: Path, student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    _, keeper = trained(folder, student, teacher, data=unlabelled(CLASSIFY), distill={"kind": "rows"})
    return {name.removeprefix("inner."): gradient for name, gradient in keeper.gradients[0].items()}


@pytest.mark.parametrize("theirs", [*CONTAINERS, *ARRAYS])
@pytest.mark.parametrize("own", CONTAINERS)
def test_any_container_of_either_model_gives_one_gradient(own: str, theirs: str, tmp_path: Path) -> None:
    student, teacher = testing.models(CLASSIFY)
    wrapped = Returns(student, CONTAINERS[own]), Returns(teacher, {**CONTAINERS, **ARRAYS}[theirs])
    assert_same(_gradients(tmp_path, *wrapped), _gradients(tmp_path, *testing.models(CLASSIFY)))


ADVERTISED = {
    "text-regression": ("BERT", "regression"),
    "question-answering": ("BERT", "extractive QA"),
    "audio-classification": ("wav2vec2", "single-label"),
    "text2text-generation": ("T5", "encoder-decoder LM"),
    "automatic-speech-recognition": ("Whisper", "speech to text"),
}
"""Tasks that methods advertise and the conformance suite has no models for: family and task of `families.py`."""
OWN_RUN = {
    "dm_codec": "test_method_dm_codec.py::test_every_term_has_its_weight",
    "ff_g2m": "test_method_ff_g2m.py::test_the_whole_graph_as_one_batch_gives_the_published_loss",
    "sid": "test_method_sid.py::test_the_student_and_the_fake_score_move_and_the_teacher_does_not",
    "encoder_decoder": "test_method_encoder_decoder.py::test_a_step_is_the_weighed_sum_of_both_passes",
    "diswot": "test_method_diswot.py::test_a_search_tries_every_configuration_that_fits_and_builds_the_best",
    "document_curriculum": "test_method_document_curriculum.py::test_a_student_learns_the_teacher_s_answers",
    "krr_st": "test_method_krr_st.py::test_the_product_is_a_data_set_that_a_trainer_learns_from",
    "llmlingua2": "test_method_llmlingua2.py::test_trained_saved_loaded_and_exported_it_compresses_as_it_was_taught",
    "reasoning_traces": "test_method_reasoning_traces.py::test_a_wrong_answer_is_asked_again_until_one_is_right",
    "stochastok": "test_method_stochastok.py::test_a_trainer_reads_as_many_tokens_more_as_there_are_splits",
    "token_recycling": "test_method_token_recycling.py::test_the_output_of_a_trained_model_is_greedy_s",
}
"""Methods on whose tasks the suite has no models, and the test that runs each as it is meant to be used."""
ENTRIES = {name: entry for name, entry in registry.catalogue().methods.items() if entry.distribution == registry.OWN}
PAIRS = [
    (name, task)
    for name, entry in sorted(ENTRIES.items())
    for task in entry.tasks
    if task not in testing.TASKS and name not in OWN_RUN
]


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_a_method_trains_on_every_task_that_it_advertises(name: str, task: str, tmp_path: Path) -> None:
    student, teacher = families.models(*ADVERTISED[task])
    start = testing.weights_hash(student)
    data = families.rows(*ADVERTISED[task])

    made, keeper = trained(tmp_path, student, teacher, name, data=data, collate=families.collate, max_steps=2)

    assert made.model.config.compression["task"] == task
    assert len(keeper.gradients) == 2
    losses = toys.logged(made, "distill_loss")
    assert min(losses) > 0 or (name in SIGNED and all(losses))
    assert testing.weights_hash(student) != start


def test_every_method_is_run_by_a_test() -> None:
    assert ENTRIES.keys() - {case.method for case in METHODS} == OWN_RUN.keys()
