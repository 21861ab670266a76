"""Batches that the student writes itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import toys
from stub import GradientKeeper
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Inputs, Needs, Rows, Signals, Sizes, Step
from hf_compress.on_policy import ends_of, on_policy, prompts, rebuild, written

END, PAD = 2, 0


def test_prompts_end_at_the_first_label_and_are_padded_on_the_left() -> None:
    inputs = {
        "input_ids": torch.tensor([[5, 0, 7, 8, PAD], [9, 6, 5, 4, 3]]),  # id 0 is also a word
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 7, -100, -100], [-100, -100, -100, 4, 3]]),
    }
    ids, mask = prompts(inputs, PAD)
    assert ids.tolist() == [[PAD, 5, 0], [9, 6, 5]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_prompts_of_a_batch_that_is_padded_on_the_left() -> None:
    inputs = {
        "input_ids": torch.tensor([[PAD, 5, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 7]]),
    }
    assert [found.tolist() for found in prompts(inputs, PAD)] == [[[5]], [[1]]]


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, "need labels"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([[-100, 1, 1], [1, 1, 1]])}, "row 1"),
    ],
)
def test_rows_without_a_prompt_are_refused(inputs: Inputs, told: str) -> None:
    with pytest.raises(MismatchError, match=told):
        prompts(inputs, PAD)


def test_labels_end_with_the_first_end_and_the_prompt_is_not_scored() -> None:
    generated = torch.tensor([[END, 5, 6, END, PAD], [7, END, 9, 8, 8], [7, 7, END, END, END]])
    found = rebuild(generated, torch.tensor([[0, 1], [1, 1], [1, 1]]), [END])
    assert found["labels"].tolist() == [
        [-100, -100, 6, END, -100],
        [-100, -100, 9, 8, 8],
        [-100, -100, END, -100, -100],
    ]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert torch.equal(found["input_ids"], generated)
    assert rebuild(generated, torch.ones(3, 2, dtype=torch.long), [])["labels"][:, 2:].eq(generated[:, 2:]).all()


def test_a_model_has_no_end_one_or_several() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    for named, found in ((None, []), (2, [2]), ([2, 5], [2, 5])):
        model.generation_config.eos_token_id = named
        assert ends_of(model) == found


def test_samples_are_of_the_model_s_own_distribution_whatever_it_generates_with_otherwise() -> None:
    """Beams, bans and penalties that come with a model would write other answers than it gives."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, eos_token_id=8))
    model.generation_config.update(num_beams=4, no_repeat_ngram_size=2, repetition_penalty=9.0, min_length=6)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[IGNORED, IGNORED, 3]])}
    expected = torch.tensor([[1, 2]])
    with torch.no_grad():
        for _ in range(4):
            following = model.eval()(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], 1)
    found = written(inputs, model, model.generate, do_sample=False, max_new_tokens=4)["input_ids"]
    assert torch.equal(found, expected[:, : found.shape[1]])
    plain = model.generate(inputs["input_ids"][:, :2], do_sample=False, max_new_tokens=4)
    assert not torch.equal(plain, found)


class Writing(toys.Toy):
    """The toy on batches that the student writes."""

    seen: list[Inputs]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        type(self).seen = []

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(mean_over="examples", rescored=True)

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        self.seen.append(on_policy(inputs, step, do_sample=True, max_new_tokens=6))
        return self.seen[-1]


def answered(task: str = "text-generation") -> list[dict[str, Any]]:
    """The suite's rows with prompts of one to four tokens."""
    rows = testing.rows(task)
    for place, row in enumerate(rows):
        length = min(place + 1, len(row["input_ids"]) - 1)
        row["labels"] = [IGNORED] * length + row["input_ids"][length:]
    return rows


def test_the_student_learns_from_what_it_wrote(tmp_path: Path) -> None:
    trainer, _ = toys.run(tmp_path, Writing(), data=answered(), max_steps=2)
    trainer.train()
    for batch in Writing.seen:
        assert batch["input_ids"].shape == (4, 4 + 6)
        assert (batch["labels"] != IGNORED).sum(1).max() <= 6
        assert (batch["position_ids"][:, 4] == torch.arange(1, 5)).all()
    assert not torch.equal(Writing.seen[0]["input_ids"], Writing.seen[1]["input_ids"])
    assert len(toys.logged(trainer, "distill_loss")) == 2


def test_a_resumed_run_writes_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "data": answered()}
    whole, _ = toys.run(tmp_path, Writing(), **settings)
    whole.train()
    written = Writing.seen
    again, _ = toys.run(tmp_path, Writing(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [b["input_ids"].tolist() for b in Writing.seen] == [b["input_ids"].tolist() for b in written[2:]]
    assert testing.weights_hash(again.model) == testing.weights_hash(whole.model)


def test_accumulation_gives_the_same_gradient_over_what_was_written(tmp_path: Path) -> None:
    """Answers that depend on the prompt alone: four rows at once, one by one, and two by two, beside another method."""

    def written(inputs: Inputs, step: Step, **_: Any) -> Inputs:
        ids, mask = prompts(inputs, PAD)
        answer = torch.stack([(torch.arange(6) * row.sum()) % 50 + 3 for row in ids])
        lengths = ids.sum(1) % 5 + 1
        answer[torch.arange(6) == lengths[:, None]] = END
        return rebuild(torch.cat([ids, answer], 1), mask, [END])

    class Beside(toys.Toy):
        """Another objective of the run, averaged over positions when alone."""

    found = []
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        keeper = GradientKeeper()
        settings: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        with mock.patch(f"{__name__}.on_policy", written):
            trainer, _ = toys.run(
                tmp_path, [Writing(), Beside()], data=answered(), dtype=torch.float64, callbacks=(keeper,), **settings
            )
            trainer.train()
        found.append(keeper.gradients[0])
    for other in found[1:]:
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-3, atol=1e-5)  # the norms compute in float32


def test_what_the_padding_holds_changes_no_logit() -> None:
    """Left padding with position ids: a model with absolute positions scores a row as it does alone."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    row = torch.tensor([[5, 6, 7, 8]])
    found = rebuild(torch.cat([torch.zeros(1, 2, dtype=torch.long), row], 1), torch.tensor([[0, 0, 1, 1]]), [END])
    positions = (found["attention_mask"].cumsum(1) - 1).clamp(min=0)
    padded = model(found["input_ids"], attention_mask=found["attention_mask"], position_ids=positions).logits
    torch.testing.assert_close(padded[:, 2:], model(row).logits)


def test_an_encoder_decoder_answers_its_encoder_s_inputs(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    student, teacher = T5ForConditionalGeneration(config), T5ForConditionalGeneration(config)
    trainer, _ = toys.run(tmp_path, toys.Toy())
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 1]}, {"input_ids": [9, 4], "labels": [3, 3, 1]}]
    made = type(trainer)(
        model=student,
        args=trainer.args,
        train_dataset=rows,
        data_collator=testing.collate,
        callbacks=[DistillCallback(teacher, Writing())],
    )
    made.train()
    (batch,) = Writing.seen
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].shape[1] <= 6
    assert (batch["labels"] != IGNORED).any(1).all()
    assert not torch.equal(batch["labels"], testing.collate(rows)["labels"])


def test_the_task_s_own_loss_must_not_learn_what_the_student_wrote(tmp_path: Path) -> None:
    class Opinionated(Writing):
        task_weight = 1.0

    with pytest.raises(ConfigurationError, match="own tokens"):
        toys.run(tmp_path, Opinionated())


def test_other_columns_are_kept_where_they_do_not_run_along_the_tokens(tmp_path: Path) -> None:
    class Keeping(Writing):
        def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
            return Needs(mean_over="examples", rescored=True, columns=frozenset({"domain"}))

        def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
            assert signals.inputs["domain"].tolist() == [0, 1, 2, 3]
            assert signals.inputs["labels"].shape == signals.inputs["input_ids"].shape
            return {}

        def per_position(self, rows: Rows, step: Step) -> Tensor:
            assert (rows.labels != IGNORED).all()
            return super().per_position(rows, step)

    def collate(batch: list[dict[str, Any]]) -> Inputs:
        return testing.collate(batch) | {"domain": torch.tensor([row["domain"] for row in batch])}

    rows = [row | {"domain": place} for place, row in enumerate(answered())]
    trainer, _ = toys.run(tmp_path, Keeping(), data=rows)
    trainer.data_collator = collate
    trainer.train()
