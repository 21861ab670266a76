"""The callback in TRL's SFTTrainer, against the same rows in a plain Trainer.

SFTTrainer asks the model for log-probabilities and makes its own loss of them; while the callback is attached it takes
the model's loss, as `Trainer` does. `ci/trainers` makes an environment with TRL and runs this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.encoders.minilm import MiniLM
from hf_compress_plugins.general.gkd import GKD
from hf_compress_plugins.general.kd import KD
from peft import LoraConfig
from safetensors.torch import load_file
from stub import GradientKeeper, arguments
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_compress import DistillCallback
from hf_compress.errors import ConfigurationError, MismatchError, UnusedLossError
from hf_compress.testing import collate, models, weights_hash

trl = pytest.importorskip("trl")

TASK = "text-generation"
SPECIAL = ["<pad>", "<unk>", "<end>"]
WORDS = ["user:", "assistant:", "the", "a", "film", "story", "actor", "end", "was", "is", "not", "very", "good"]
WORDS += ["bad", "dull", "quick", "love"]
TEXTS = ["the film was good", "a very dull story is not a good story at the end", "the actor is quick", "love the end"]
SPLIT = [("the film was", "good"), ("a very dull story", "is not a good story"), ("the actor", "is bad"), ("love", "a")]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }} <end> {% endgeneration %}"
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One id for each word; an end after an answer."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    names = dict(zip(("pad_token", "unk_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)


def texts() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


def completions() -> Dataset:
    return Dataset.from_dict({"prompt": [a for a, _ in SPLIT], "completion": [f" {b}" for _, b in SPLIT]})


def chats() -> Dataset:
    return Dataset.from_dict(
        {"messages": [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in SPLIT]}
    )


def rows(parts: list[tuple[str, str]]) -> list[dict[str, list[int]]]:
    """Ids of each prompt and answer with its end, the answer alone labelled."""
    made = tokenizer()
    found = []
    for prompt, answer in parts:
        before, after = made(prompt)["input_ids"], [*made(answer)["input_ids"], made.eos_token_id]
        found.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    return found


class Run:
    """A trainer on the suite's tiny Llama pair, with the gradients of its steps.

    `settings` go to the arguments; `method=False` leaves the callback out.
    """

    def __init__(
        self,
        trainer_class: type[Trainer],
        folder: Path,
        data: Dataset,
        method: Any = "kd",
        *,
        dtype: torch.dtype = torch.float64,
        distill: dict[str, Any] | None = None,
        given: dict[str, Any] | None = None,
        standard: bool = False,
        **settings: Any,
    ) -> None:
        self.student, self.teacher = models(TASK, dtype)
        self.kept = GradientKeeper()
        self.callback = DistillCallback(self.teacher, method or "kd", **(distill or {}))
        made = given or {}
        if standard:
            made = made | {"compute_loss_func": self.callback.loss(standard_loss)}
        if trainer_class is Trainer:
            made = made | {"args": arguments(folder, **settings), "data_collator": collate}
        else:
            made = made | {"args": sft_arguments(folder, **settings)}
        self.trainer = trainer_class(
            model=self.student,
            train_dataset=data,
            processing_class=tokenizer(),
            callbacks=[*([] if method is False else [self.callback]), self.kept],
            **made,
        )

    def train(self, **settings: Any) -> Run:
        self.trainer.train(**settings)
        return self

    @property
    def gradients(self) -> dict[str, Tensor]:
        return {name: g for name, g in self.kept.gradients[0].items() if not name.startswith("distiller.")}

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]


def sft_arguments(folder: Path, **settings: Any) -> Any:
    """`stub.arguments` as an SFTConfig; its bfloat16 and gradient checkpointing are asked for where they are wanted."""
    plain = arguments(folder)
    names = ("max_steps", "per_device_train_batch_size", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm")
    names += ("logging_steps", "save_strategy", "report_to", "disable_tqdm", "use_cpu", "train_sampling_strategy")
    same = {name: getattr(plain, name) for name in names}
    return trl.SFTConfig(str(folder), **(same | {"bf16": False, "gradient_checkpointing": False} | settings))


def standard_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    size = outputs.logits.shape[-1]
    return ForCausalLMLoss(outputs.logits, labels, vocab_size=size, num_items_in_batch=num_items_in_batch)


def plain(folder: Path, parts: list[tuple[str, str]], method: Any = "kd", **settings: Any) -> Run:
    """The rows in a plain Trainer with the callback."""
    return Run(Trainer, folder, Dataset.from_list(rows(parts)), method, **settings).train()


def assert_one_run(found: Run, expected: Run) -> None:
    """The same gradients and the same logged terms; models sum the task's own loss in float32."""
    assert found.gradients.keys() == expected.gradients.keys()
    difference = sum(float((g - expected.gradients[name]).square().sum()) for name, g in found.gradients.items())
    size = sum(float(g.square().sum()) for g in expected.gradients.values())
    assert size > 0
    assert (difference / size) ** 0.5 < 1e-6
    for name in ("loss", "task_loss", "distill_loss"):
        assert found.logged(name) == pytest.approx(expected.logged(name), rel=1e-5)


# ---------------------------------------------------------------------- one line more


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 40},
        {"packing": True, "max_length": 20, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
    ],
    ids=["whole", "four of one", "padding-free", "packed", "packed, two of one", "checkpointed"],
)
@pytest.mark.parametrize("method", ["kd", "taid", "features"])
def test_a_batch_in_any_layout_gives_a_plain_trainers_gradient(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = plain(tmp_path, [("", text) for text in TEXTS], method)
    assert_one_run(Run(trl.SFTTrainer, tmp_path, texts(), method, **settings).train(), expected)


def test_logits_in_chunks_give_the_same_gradient(tmp_path: Path) -> None:
    expected = plain(tmp_path, [("", text) for text in TEXTS])
    for settings in ({}, {"packing": True, "max_length": 40}):
        run = Run(trl.SFTTrainer, tmp_path, texts(), distill={"memory": "chunked", "chunk": 8}, **settings)
        assert_one_run(run.train(), expected)


@pytest.mark.parametrize("steps", [1, 4])
def test_completions_alone_are_scored(steps: int, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
    assert_one_run(Run(trl.SFTTrainer, tmp_path, completions(), **settings).train(), plain(tmp_path, SPLIT))


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 40}], ids=["padded", "packed"])
def test_the_assistants_words_alone_are_scored(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = plain(tmp_path, [(f"user: {a} assistant:", b) for a, b in SPLIT])
    assert_one_run(Run(trl.SFTTrainer, tmp_path, chats(), assistant_only_loss=True, **settings).train(), expected)


def test_the_tasks_loss_is_the_sft_trainers_own(tmp_path: Path) -> None:
    own = Run(trl.SFTTrainer, tmp_path, completions(), False).train()
    found = Run(trl.SFTTrainer, tmp_path, completions(), KD(weight=0)).train()
    assert found.logged("task_loss") == pytest.approx(own.logged("loss"), rel=1e-6)
    for name, gradient in own.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_evaluation_has_the_sft_trainers_loss_and_the_terms_of_training(tmp_path: Path) -> None:
    own = Run(trl.SFTTrainer, tmp_path, completions(), False).trainer.evaluate(completions())
    run = Run(trl.SFTTrainer, tmp_path, completions(), given={"eval_dataset": completions()}, eval_strategy="steps")
    before = run.trainer.evaluate()
    run.train()
    assert before["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-6)
    assert before["eval_distill_loss"] == pytest.approx(run.logged("distill_loss")[0], rel=1e-6)
    assert run.logged("eval_loss")[-1] < before["eval_loss"]
    assert run.logged("eval_distill_loss")[-1] != before["eval_distill_loss"]


def test_the_saved_student_is_a_plain_model(tmp_path: Path) -> None:
    run = Run(
        trl.SFTTrainer, tmp_path, texts(), "features", dtype=torch.float32, bf16=True, gradient_checkpointing=True
    )
    teacher = weights_hash(run.teacher)
    run.train().trainer.save_model(str(tmp_path / "student"))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert weights_hash(loaded) == weights_hash(run.student)
    assert loaded.config.compression["methods"][0]["name"] == "features"
    assert weights_hash(run.teacher) == teacher


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dtype": torch.float32}
    whole = Run(trl.SFTTrainer, tmp_path / "whole", texts(), "taid", **settings).train()
    rest = Run(trl.SFTTrainer, tmp_path / "rest", texts(), "taid", **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(rest.kept.gradients) == 2
    assert weights_hash(rest.student) == weights_hash(whole.student)


def test_adapters_alone_are_distilled(tmp_path: Path) -> None:
    """SFTTrainer makes the PEFT model itself, before the callback sees it."""
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    run = Run(
        trl.SFTTrainer, tmp_path, texts(), "features", given={"peft_config": adapters}, dtype=torch.float32
    ).train()
    assert run.logged("distill_loss")[0] > 0
    assert run.gradients
    assert all("lora_" in name and gradient.any() for name, gradient in run.gradients.items())
    run.trainer.save_model(str(tmp_path / "adapters"))
    assert all("lora_" in name for name in load_file(tmp_path / "adapters" / "adapter_model.safetensors"))


# ---------------------------------------------------------------------- its own loss


class Overrides(trl.SFTTrainer):  # type: ignore[misc,name-defined]  # TRL may be missing
    """Builds on SFTTrainer's loss."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("method", ["kd", "features"])
def test_a_subclass_with_its_loss_is_refused_with_the_way_out(method: str, steps: int, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
    run = Run(Overrides, tmp_path, texts(), method, **settings)
    before = weights_hash(models(TASK, torch.float64)[0])
    with pytest.raises(UnusedLossError, match=r"compute_loss = Trainer\.compute_loss"):
        run.train()
    run.callback.detach()
    assert weights_hash(run.student) == before


def test_its_evaluation_goes_on_without_the_terms(tmp_path: Path) -> None:
    own = Run(trl.SFTTrainer, tmp_path, texts(), False).trainer.evaluate(completions())
    found = Run(Overrides, tmp_path, texts()).trainer.evaluate(completions())
    assert found["eval_loss"] == own["eval_loss"]
    assert "eval_distill_loss" not in found


def test_after_training_it_has_its_own_loss_and_metrics_again(tmp_path: Path) -> None:
    run = Run(trl.SFTTrainer, tmp_path, texts()).train()
    assert "eval_mean_token_accuracy" in run.trainer.evaluate(texts())


def test_a_loss_that_is_no_likelihood_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="loss_type='nll'"):
        Run(trl.SFTTrainer, tmp_path, texts(), loss_type="dft")


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_a_loss_function_keeps_its_metrics(tmp_path: Path) -> None:
    """The other way, at a second forward a step: SFTTrainer(compute_loss_func=callback.loss(f)), until TRL 2."""
    expected = plain(tmp_path, SPLIT)
    for steps in (1, 4):
        settings = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        run = Run(trl.SFTTrainer, tmp_path, completions(), standard=True, **settings).train()
        assert_one_run(run, expected)
        assert run.logged("mean_token_accuracy")


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_evaluation_with_a_loss_function_measures_each_batch_once(tmp_path: Path) -> None:
    """SFTTrainer runs the model again for its metrics, with labels and without logits."""
    expected = Run(trl.SFTTrainer, tmp_path, texts()).trainer.evaluate(completions())
    found = Run(trl.SFTTrainer, tmp_path, texts(), standard=True).trainer.evaluate(completions())
    for name in ("eval_loss", "eval_distill_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert "eval_mean_token_accuracy" in found


# ---------------------------------------------------------------------- several documents in a row


@pytest.mark.parametrize("method", [MiniLM(relation_heads=4), GKD(lmbda=1.0, max_new_tokens=4)], ids=["minilm", "gkd"])
@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 40}, {"padding_free": True, "max_length": None}])
def test_methods_that_take_a_row_for_one_document_refuse_packed_ones(
    settings: dict[str, Any], method: Any, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=r"packing=False"):
        Run(trl.SFTTrainer, tmp_path, completions(), method, **settings).train()
    Run(trl.SFTTrainer, tmp_path, completions(), method).train()
