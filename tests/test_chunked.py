"""Logits a few positions at a time: the same values and gradients, where it is proven that they can be had so."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import toys
import transformers
from stub import GradientKeeper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_compress import DistillCallback, chunked, heads, testing
from hf_compress.errors import ConfigurationError, MismatchError, NumericalError
from hf_compress.heads import Head, Lazy, UnprovenError
from hf_compress.objective import Needs, Objective, Rows, Step, kind_of

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 61, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 61,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", GROUPED),
    "llama, tied": ("Llama", "ForCausalLM", GROUPED | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 61, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}),
    "gemma2, soft cap": ("Gemma2", "ForCausalLM", GROUPED | {"head_dim": 4, "final_logit_softcapping": 3.0}),
    "granite, divided": ("Granite", "ForCausalLM", GROUPED | {"logits_scaling": 8.0}),
    "cohere, multiplied": ("Cohere", "ForCausalLM", GROUPED | {"logit_scale": 0.25}),
    "mixtral, balanced": ("Mixtral", "ForCausalLM", GROUPED | {"experts_implementation": "eager",
                          "num_local_experts": 4, "output_router_logits": True,
                          "router_aux_loss_coef": 0.1}),
    "qwen2": ("Qwen2", "ForCausalLM", GROUPED),
    "bert": ("Bert", "ForMaskedLM", SIZES | QUIET),
    "roberta": ("Roberta", "ForMaskedLM", SIZES | QUIET),
    "modernbert": ("ModernBert", "ForMaskedLM", {k: v for k, v in SIZES.items() if k != "initializer_range"}
                   | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}),
    "t5": ("T5", "ForConditionalGeneration", T5),
    "t5, untied": ("T5", "ForConditionalGeneration", T5 | {"tie_word_embeddings": False}),
}  # fmt: skip


def model(family: str, head: str, settings: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    made: PreTrainedModel = getattr(transformers, f"{family}{head}")(config).double()
    return made


def rows(masked: bool) -> list[dict[str, Any]]:
    """Rows of `testing.LENGTHS` tokens; of a masked model every third has a label."""
    found = testing.rows("text-generation", 4)
    for row in found if masked else ():
        row["labels"] = [token if place % 3 == 0 else -100 for place, token in enumerate(row["labels"])]
    return found


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number of positions for each micro-batch whose logits are taken in chunks."""
    found: list[int] = []
    original = chunked.loss_on_logits

    def spy(apart: Any, where: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(len(where.index))
        return original(apart, where, *args, **kwargs)

    monkeypatch.setattr(chunked, "loss_on_logits", spy)
    return found


def trainer(
    folder: Path,
    student: PreTrainedModel,
    teacher: nn.Module | None,
    method: Any = "kd",
    *,
    memory: heads.Memory = "chunked",
    chunk: int = 5,
    kind: type[Trainer] = Trainer,
    data: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> tuple[Trainer, GradientKeeper, DistillCallback]:
    keeper = GradientKeeper()
    ours = DistillCallback(teacher, method, memory=memory, chunk=chunk)
    passed = {
        name: settings.pop(name)
        for name in ("compute_loss_func", "eval_dataset", "processing_class")
        if name in settings
    }
    defaults: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    made = kind(
        model=student,
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=data or rows(kind_of(student) == "tokens"),  # type: ignore[arg-type]  # map-style
        data_collator=testing.collate,
        callbacks=[ours, keeper],
        **passed,
    )
    return made, keeper, ours


def compared(folder: Path, name: str, taken: list[int], **settings: Any) -> None:
    """Chunked and dense give one gradient and one log."""
    results = []
    for memory in ("dense", "chunked"):
        taken.clear()
        student, teacher = (model(*MODELS[name], seed=seed) for seed in (0, 1))
        made, keeper, _ = trainer(folder, student, teacher, memory=memory, **settings)  # type: ignore[arg-type]
        made.train()
        assert bool(taken) == (memory == "chunked")
        results.append((keeper.gradients[0], made.state.log_history[0]))
        assert not [m for other in (student, teacher) for m in other.modules() if "forward" in vars(m)]
    (whole, log), (gradients, log_) = results
    assert gradients.keys() == whole.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[parameter], rtol=1e-5, atol=1e-6, msg=parameter)
    assert log_ == pytest.approx(log, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_what_whole_logits_give(name: str, taken: list[int], tmp_path: Path) -> None:
    compared(tmp_path, name, taken)


class Averaged(toys.Toy):
    """Its values are averaged in each example first."""

    def needs(self, student: Any, teacher: Any) -> Needs:
        return Needs(mean_over="examples")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": Averaged()},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"method": ["kd", "features"]},
        {"method": ["kd", "kd"]},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "chunk": 1},
        {"chunk": 1000},
    ],
    ids=[
        "over examples",
        "checkpointing",
        "reentrant checkpointing",
        "with states",
        "twice",
        "one by one",
        "one chunk",
    ],
)
def test_whatever_is_beside_it(settings: dict[str, Any], taken: list[int], tmp_path: Path) -> None:
    compared(tmp_path, "llama", taken, **settings)


def test_adapters_on_the_head_are_trained(tmp_path: Path) -> None:
    results = []
    for memory in ("dense", "chunked"):
        student, teacher = (model(*MODELS["llama"], seed=seed) for seed in (0, 1))
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        torch.manual_seed(2)
        adapted = peft.get_peft_model(student, lora).double()
        made, keeper, _ = trainer(tmp_path, adapted, teacher, memory=memory)  # type: ignore[arg-type]
        made.train()
        results.append(keeper.gradients[0])
    assert any("lm_head.lora_A" in name for name in results[1])
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[1].items():
        torch.testing.assert_close(gradient, results[0][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore")  # of torch's quantisation, on its way out
def test_an_int8_teacher_is_called_through_its_module(tmp_path: Path) -> None:
    student = model(*MODELS["llama"]).float()
    teacher = torch.ao.quantization.quantize_dynamic(model(*MODELS["llama"], seed=1).float(), {nn.Linear})
    losses = []
    for memory in ("dense", "chunked"):
        made, _, ours = trainer(tmp_path, student, teacher, memory=memory, learning_rate=0.0)  # type: ignore[arg-type]
        made.train()
        losses.append(made.state.log_history[0]["distill_loss"])
        assert ours.run.teacher is not None
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # int8 takes its scale from the rows of a call


def test_a_head_alone_is_trained_over_a_frozen_body(tmp_path: Path) -> None:
    results = []
    for memory in ("dense", "chunked"):
        student, teacher = (model(*MODELS["llama"], seed=seed) for seed in (0, 1))
        student.requires_grad_(False)
        student.get_output_embeddings().requires_grad_(True)
        made, keeper, _ = trainer(tmp_path, student, teacher, memory=memory)  # type: ignore[arg-type]
        made.train()
        results.append(keeper.gradients[0])
    assert list(results[1]) == ["lm_head.weight"]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


class Watched(toys.Toy):
    """Tells the largest probability, which is not to be learned, beside its value."""

    logged = frozenset({"sureness"})

    def per_position(self, rows: Rows, step: Step) -> dict[str, Tensor]:  # type: ignore[override]
        return {"toy": super().per_position(rows, step), "sureness": rows.student_logits.softmax(-1).amax(-1)}


def test_a_term_that_is_logged_alone_is_no_part_of_the_loss(taken: list[int], tmp_path: Path) -> None:
    """Whole and in chunks: the plain method's gradients and loss, and the term in the log."""
    compared(tmp_path, "llama", taken, method=Watched())
    results = []
    for method in (toys.Toy(), Watched()):
        student, teacher = (model(*MODELS["llama"], seed=seed) for seed in (0, 1))
        made, keeper, _ = trainer(tmp_path, student, teacher, method)
        made.train()
        results.append((keeper.gradients[0], made.state.log_history[0]))
    (plain, log), (watched, log_) = results
    assert 1 / 61 < log_["distill/toy.sureness"] < 1
    for name in ("loss", "distill_loss", "distill/toy"):
        assert log_[name] == pytest.approx(log[name], rel=1e-6)
    for parameter, gradient in watched.items():
        torch.testing.assert_close(gradient, plain[parameter], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("method", "differentiated"), [("kd", True), ("gkd", False)])
def test_a_task_without_weight_is_logged_and_not_differentiated(
    method: str, differentiated: bool, taken: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[bool] = []
    cross_entropy = nn.functional.cross_entropy

    def seen(*args: Any, **settings: Any) -> Tensor:
        value: Tensor = cross_entropy(*args, **settings)
        if settings.get("reduction") == "sum" and len(args[0]) == 5:
            found.append(value.requires_grad)
        return value

    monkeypatch.setattr(chunked.F, "cross_entropy", seen)
    compared(tmp_path, "llama", taken, method=method)
    assert set(found) == {differentiated}


class TwoLearned(toys.Toy):
    """Two learned parts, to which autograd hands one gradient tensor."""

    def build(self, student: Any, teacher: Any) -> None:
        self.left, self.right = (nn.Parameter(torch.ones(61)) for _ in range(2))

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None
        return ((rows.student_logits - rows.teacher_logits).square() * (self.left + self.right)).mean(-1)


class Expanded(toys.Toy):
    """A learned part whose gradient is one number seen many times."""

    def build(self, student: Any, teacher: Any) -> None:
        self.shift = nn.Parameter(torch.ones(3))

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        return super().per_position(rows, step) + self.shift.sum()


@pytest.mark.parametrize("method", [TwoLearned(), Expanded()])
def test_what_objectives_learn_gets_its_gradient_once(method: Any, taken: list[int], tmp_path: Path) -> None:
    compared(tmp_path, "llama", taken, method=method)


@pytest.mark.parametrize("masked", [0, 1, 2])
def test_a_micro_batch_without_scored_positions_counts_nothing_and_logs_the_same(
    masked: int, taken: list[int], tmp_path: Path
) -> None:
    """In two processes other names on one of them would wait for ever."""
    data = rows(False)[:2]
    for row in data[:masked]:
        row["labels"] = [-100] * len(row["labels"])
    compared(
        tmp_path, "llama", taken, data=data, per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=2
    )


def test_the_task_s_own_loss_alone_is_taken_in_chunks_too(taken: list[int], tmp_path: Path) -> None:
    compared(tmp_path, "llama", taken, method="features")


def test_shifted_labels_alone_give_no_task_loss_as_in_the_model(tmp_path: Path) -> None:
    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = testing.collate(batch)
        shifted = nn.functional.pad(found.pop("labels"), (0, 1), value=-100)[..., 1:]
        return found | {"shift_labels": shifted.contiguous()}

    losses = []
    for memory in ("dense", "chunked"):
        student, teacher = (model(*MODELS["llama"], seed=seed) for seed in (0, 1))
        made, _, _ = trainer(tmp_path, student, teacher, memory=memory, remove_unused_columns=False)  # type: ignore[arg-type]
        made.data_collator = collate
        made.train()
        losses.append(made.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_small_gradients_in_float16_survive_with_the_scaler_s_factor() -> None:
    """512 positions, 4,096 classes, a loss divided by 64: without the factor a twentieth of the gradient is lost."""
    torch.manual_seed(0)
    weight, states = nn.Parameter(torch.randn(4096, 8)), torch.randn(512, 8)
    labels = torch.randint(0, 4096, (512,))

    def chunk(part: Tensor, place: slice) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            logits = nn.functional.linear(part, weight)
        return nn.functional.cross_entropy(logits.float(), labels[place], reduction="sum") / 512 / 64

    exact = torch.autograd.grad(nn.functional.cross_entropy(states @ weight.T, labels) / 64, weight)[0]
    errors = []
    for scale in (1.0, 65536.0):
        weight.grad = None
        chunked._Fused.apply(chunk, 64, scale, states, weight).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        errors.append(float((weight.grad - exact).norm() / exact.norm()))
    assert errors[1] < 2e-3
    assert errors[0] > 5 * errors[1]


# ---------------------------------------------------------------------- when, and why not


def test_small_logits_stay_whole_and_large_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, taken: list[int], tmp_path: Path
) -> None:
    for limit, expected in ((3 * 12 * 61 * 4, False), (3 * 12 * 61 * 4 - 1, True)):
        monkeypatch.setattr(chunked, "LIMITS", {"cpu": limit})
        made, _, _ = trainer(tmp_path, model(*MODELS["llama"]), model(*MODELS["llama"], seed=1), memory="auto",
                                data=rows(False)[:3], gradient_accumulation_steps=1)  # fmt: skip
        made.train()
        assert bool(taken) == expected


class _Whole(toys.Toy):
    """Relates logits of different positions."""

    def forward(self, signals: Any, step: Any) -> Tensor:
        return signals.student["logits"].mean((1, 2)).mean(0) * torch.ones(len(signals.positions.index))


class _TeacherWhole(_Whole):
    """Relates the teacher's."""

    def needs(self, student: Any, teacher: Any) -> Needs:
        return Needs(student=frozenset({"logits", "hidden:-1"}))

    def forward(self, signals: Any, step: Any) -> Tensor:
        weight = signals.teacher["logits"].softmax(-1).mean()
        return signals.student["hidden:-1"].mean() * weight * torch.ones(len(signals.positions.index))


class _Embedding(_TeacherWhole):
    """Taps the output embedding by its name."""

    def needs(self, student: Any, teacher: Any) -> Needs:
        return Needs(student=frozenset({"output:lm_head"}), teacher=frozenset())

    per_position = Objective.per_position

    def forward(self, signals: Any, step: Any) -> Tensor:
        return signals.student["output:lm_head"].mean() * torch.ones(len(signals.positions.index))


class _Own(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


def _summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    logits: Tensor = outputs.logits
    return logits.sum() * 0.0


@pytest.mark.parametrize(
    ("names", "settings", "why"),
    [
        ("llama", {"method": _Whole()}, "toy relates logits of different positions"),
        ("llama", {"method": ["kd", _TeacherWhole()]}, "toy relates logits of different positions"),
        ("llama", {"method": ["kd", _Embedding()]}, "toy taps the output embedding itself"),
        ("llama", {"kind": _Own}, r"_Own.compute_loss may read them"),
        ("bart", {}, "the model needs its logits"),
        ("mobilebert", {}, "is not called in the forward"),
    ],
)
def test_what_needs_whole_logits_has_them_and_says_why(
    names: str, settings: dict[str, Any], why: str, taken: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    families = {
        "llama": MODELS["llama"],
        "bart": ("Bart", "ForConditionalGeneration", BART),
        "mobilebert": ("MobileBert", "ForMaskedLM", {"vocab_size": 61, "num_hidden_layers": 1}),
    }
    made, _, _ = trainer(tmp_path, model(*families[names]), model(*families[names], seed=1), **settings)
    with pytest.raises(ConfigurationError, match=rf'memory="chunked" cannot be had: .*{why}'):
        made.train()
    monkeypatch.setattr(chunked, "LIMITS", {"cpu": 1})
    made, _, _ = trainer(
        tmp_path, model(*families[names]), model(*families[names], seed=1), memory="auto", max_steps=2, **settings
    )
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        made.train()
    assert not taken
    assert (
        sum("kept whole" in record.message and why.strip("r") in record.getMessage() for record in caplog.records) == 1
    )


def test_the_output_embedding_is_known_by_its_name_inside_adapters(tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model(*MODELS["llama"]), peft.LoraConfig(r=2, target_modules=["q_proj"])).double()
    methods = ["kd", _Embedding()]
    made, _, _ = trainer(tmp_path, adapted, model(*MODELS["llama"], seed=1), method=methods)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="toy taps the output embedding itself"):
        made.train()


def test_a_loss_function_of_the_user_s_reads_whole_logits(
    tmp_path: Path, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "LIMITS", {"cpu": 1})
    student, teacher = model(*MODELS["llama"]), model(*MODELS["llama"], seed=1)
    ours = DistillCallback(teacher, "kd")
    made = Trainer(
        model=student,
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
        train_dataset=rows(False),  # type: ignore[arg-type]  # map-style
        data_collator=testing.collate,
        compute_loss_func=ours.loss(_summed),
        callbacks=[ours],
    )
    made.train()
    assert not taken


def test_a_teacher_that_cannot_keeps_its_logits_beside_a_student_that_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class ReaderForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]  # transformers is not typed
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 3 * output.logits[..., :1]
            return output

    results = []
    for memory in ("dense", "chunked"):
        torch.manual_seed(1)
        teacher = ReaderForCausalLM(transformers.LlamaConfig(**GROUPED)).double()
        made, keeper, _ = trainer(tmp_path, model(*MODELS["llama"]), teacher, memory=memory)  # type: ignore[arg-type]
        with caplog.at_level(logging.WARNING, logger="hf_compress"):
            made.train()
        results.append(keeper.gradients[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert sum("the teacher's logits are kept whole" in record.getMessage() for record in caplog.records) == 1


def test_a_model_whose_loss_is_another_is_not_taken_apart() -> None:
    class Smooth(transformers.LlamaForCausalLM):  # type: ignore[misc]  # transformers is not typed
        def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            output = super().forward(*args, labels=labels, **kwargs)
            if labels is not None:
                output.loss = output.loss + 0.01 * output.logits.square().mean()
            return output

    ids = torch.ones(2, 8, dtype=torch.long)
    made = Smooth(transformers.LlamaConfig(**GROUPED)).eval()
    with pytest.raises(UnprovenError, match="is not the cross-entropy of its logits"):
        heads.prove(made, "causal", {"input_ids": ids}, task=True)
    assert "forward" not in vars(made.lm_head)
    assert heads.prove(made, "causal", {"input_ids": ids}, task=False).head.after is heads._same


# ---------------------------------------------------------------------- nothing is left behind


def test_a_forward_that_fails_leaves_the_logits_on(tmp_path: Path) -> None:
    student, teacher = model(*MODELS["llama"]), model(*MODELS["llama"], seed=1)
    made, _, ours = trainer(tmp_path, student, teacher, max_steps=2)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(student.training)
        if student.training and len(calls) == 6:  # dry, proofs, and then the run
            raise RuntimeError("out of memory, say")

    handle = student.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.train()
    handle.remove()
    ids = torch.ones(1, 3, dtype=torch.long)
    assert student.eval()(input_ids=ids).logits.shape == (1, 3, 61)
    ours.detach()
    assert "forward" not in vars(student.lm_head)
    assert "forward" not in vars(teacher.lm_head)


def test_an_interrupted_forward_leaves_evaluation_as_it_was(tmp_path: Path) -> None:
    """Hooks that run after any exception do not run after Ctrl-C."""
    student, teacher = model(*MODELS["llama"]), model(*MODELS["llama"], seed=1)
    made, _, ours = trainer(tmp_path, student, teacher, eval_dataset=rows(False))
    before = made.evaluate()["eval_distill_loss"]

    def stop(*_: Any) -> None:
        if student.training and ours.run.chunking.on:
            raise KeyboardInterrupt

    handle = student.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    handle.remove()
    assert student.eval()(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 61)
    assert made.evaluate()["eval_distill_loss"] == pytest.approx(before)


def test_one_model_in_two_roles_is_given_back_whole(tmp_path: Path) -> None:
    class Both(toys.Toy):
        def needs(self, student: Any, teacher: Any) -> Needs:
            return Needs(frozen=("reference",))

        def per_position(self, rows: Rows, step: Step) -> Tensor:
            torch.testing.assert_close(rows.frozen["reference"], rows.teacher_logits)
            return super().per_position(rows, step)

    student, teacher = model(*MODELS["llama"]), model(*MODELS["llama"], seed=1)
    made = Trainer(
        model=student,
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
        train_dataset=rows(False),  # type: ignore[arg-type]  # map-style
        data_collator=testing.collate,
        callbacks=[DistillCallback(teacher, Both(), memory="chunked", frozen={"reference": teacher})],
    )
    made.train()
    assert not [module for one in (student, teacher) for module in one.modules() if "forward" in vars(module)]


def test_evaluation_in_between_sees_logits(tmp_path: Path) -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    student, teacher = model(*MODELS["llama"]), model(*MODELS["llama"], seed=1)
    made, _, _ = trainer(
        tmp_path, student, teacher, max_steps=2, eval_strategy="steps", eval_steps=1, eval_dataset=rows(False)
    )
    made.compute_metrics = metrics
    made.train()
    assert [shape[-1] for shape in seen] == [61, 61]
    assert all("eval_distill_loss" in entry for entry in made.state.log_history if "eval_loss" in entry)


def test_a_nan_is_told_with_step_and_term(tmp_path: Path) -> None:
    class Broken(toys.Toy):
        def per_position(self, rows: Rows, step: Step) -> Tensor:
            value = super().per_position(rows, step)
            return value * (float("nan") if step.global_step == 1 else 1.0)

    student = model(*MODELS["llama"])
    made, _, _ = trainer(tmp_path, student, model(*MODELS["llama"], seed=1), Broken(), max_steps=3)
    with pytest.raises(NumericalError, match=r"step 1: term 'toy' of toy is nan in micro-batch 0"):
        made.train()
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_half_precision_of_the_trainer_is_that_of_whole_logits(tmp_path: Path) -> None:
    logs = []
    for memory in ("dense", "chunked"):
        student, teacher = (model(*MODELS["llama"], seed=seed).float() for seed in (0, 1))
        made, keeper, _ = trainer(tmp_path, student, teacher, memory=memory, bf16=True)  # type: ignore[arg-type]
        made.train()
        logs.append((made.state.log_history[0], keeper.gradients[0]))
    assert logs[1][0]["distill_loss"] == pytest.approx(logs[0][0]["distill_loss"], rel=2e-3)
    assert logs[1][0]["task_loss"] == pytest.approx(logs[0][0]["task_loss"], rel=2e-3)
    difference = torch.stack([(logs[1][1][n] - g).norm() / g.norm() for n, g in logs[0][1].items() if g.norm() > 0])
    assert difference.max() < 2e-2


def test_weight_gradients_add_up_in_float32() -> None:
    """A thousand chunks in bfloat16: their sum is that of float32, rounded once."""
    torch.manual_seed(0)
    head = nn.Linear(8, 32, bias=False).to(torch.bfloat16)
    states = torch.randn(1000, 8).to(torch.bfloat16).requires_grad_()

    def chunk(part: Tensor, place: slice) -> Tensor:
        return head(part).float().square().sum()

    loss = chunked._Fused.apply(chunk, 1, 1.0, states, head.weight)  # type: ignore[no-untyped-call]
    loss.backward()
    whole = torch.autograd.grad(
        nn.functional.linear(states.detach().double(), weight := head.weight.detach().double().requires_grad_())
        .square()
        .sum(),
        weight,
    )[0]
    assert head.weight.grad is not None
    error = (head.weight.grad.double() - whole).norm() / whole.norm()
    assert error < 4e-3
    assert head.weight.grad.dtype == torch.bfloat16


def test_no_tensor_of_all_positions_and_the_vocabulary_is_made(tmp_path: Path) -> None:
    """By the sizes of what autograd saves and the head gives in a step."""
    student, teacher = model(*MODELS["llama"]), model(*MODELS["llama"], seed=1)
    made, _, _ = trainer(tmp_path, student, teacher, chunk=5)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x):
        made.train()
    wide = {tuple(shape) for shape in kept if shape and shape[-1] == 61}
    assert (5, 61) in wide
    assert max(math.prod(shape) for shape in wide - {(61,), (16, 61)}) <= 5 * 61


def test_a_head_is_found_and_given_back() -> None:
    made = model(*MODELS["gemma2, soft cap"]).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    whole = made(input_ids=ids).logits
    head = heads.prove(made, "causal", {"input_ids": ids}, task=False).head
    head.skip()
    assert made(input_ids=ids).logits.shape == (2, 3, 0)
    lazy = Lazy(head.take(), head)
    head.stop()
    assert lazy.count == 6
    torch.testing.assert_close(lazy.rows(torch.tensor([4, 1]), whole), whole.flatten(0, 1)[[4, 1]])
    head.remove()
    torch.testing.assert_close(made(input_ids=ids).logits, whole)
    with pytest.raises(UnprovenError, match="has no output embedding"):
        Head(made.model.layers[0])


# ---------------------------------------------------------------------- vocabularies padded otherwise


def tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    words = {"[UNK]": 0} | {f"w{place}": place for place in range(1, size)}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]")


@pytest.mark.parametrize("memory", ["dense", "chunked"])
@pytest.mark.parametrize("teacher_size", [67, 60])
def test_vocabularies_padded_otherwise_are_compared_where_both_are_real(
    memory: Any, teacher_size: int, tmp_path: Path
) -> None:
    """As if both models had 60 classes, in the divergence; the task's own loss sees all of the student's."""
    settings = GROUPED | {"vocab_size": teacher_size}
    teacher, words = model("Llama", "ForCausalLM", settings, seed=1), tokenizer(60)
    teacher.save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    named = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "teacher").double()
    made, keeper, _ = trainer(tmp_path, model(*MODELS["llama"]), named, memory=memory, processing_class=words)
    made.train()

    student = model(*MODELS["llama"])
    batches = [testing.collate(rows(False)[:3]), testing.collate(rows(False)[3:])]
    scored = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        where = batch["labels"][:, 1:] != -100
        own = student(**batch).logits[:, :-1][where]
        with torch.no_grad():
            theirs = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][where]
        divergence = 4 * nn.functional.kl_div(
            (own[:, :60] / 2).log_softmax(-1), (theirs[:, :60] / 2).log_softmax(-1), log_target=True, reduction="sum"
        )
        entropy = nn.functional.cross_entropy(own, batch["labels"][:, 1:][where], reduction="sum")
        ((divergence + entropy) / scored).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(keeper.gradients[0][name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_without_a_tokenizer_other_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"61 classes or vocabulary entries, the teacher 67.*processing_class"):
        trainer(tmp_path, model(*MODELS["llama"]), model("Llama", "ForCausalLM", GROUPED | {"vocab_size": 67}, seed=1))
