"""dParallel: two views of a block, its own model class and its own decoding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from alone import output_of
from hf_compress_plugins.decoding import dparallel as module
from hf_compress_plugins.decoding._modeling_masked_diffusion import MaskedDiffusionConfig, MaskedDiffusionForMaskedLM
from hf_compress_plugins.decoding.dparallel import (
    DParallel,
    ParallelDecoding,
    certainty_losses,
    corrupt,
    segment,
    unmask,
)
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError

VOCAB, MASK, LENGTH = 12, 1, 20


def model(seed: int = 0) -> MaskedDiffusionForMaskedLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = MaskedDiffusionConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
            max_position_embeddings=LENGTH, mask_token_id=MASK,
        )  # fmt: skip
        return MaskedDiffusionForMaskedLM(config)


def rows() -> list[dict[str, Any]]:
    """Prompts of two or three tokens and answers that repeat them."""
    found = []
    for place in range(12):
        prompt = [2 + place % 5, 3 + place % 7, *([4] if place % 2 else [])]
        found.append({"input_ids": (prompt * LENGTH)[:LENGTH], "prompt_length": len(prompt)})
    return found


def run(folder: Path, method: Any = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 6, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 5e-3,
    }  # fmt: skip
    resume = settings.pop("resume", None)
    made = Trainer(
        model=model(),
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=rows(),
        callbacks=[DistillCallback(method=method or DParallel(block=8))],
    )
    made.train(resume_from_checkpoint=resume)
    return made


def test_every_block_is_drawn_and_the_last_may_be_shorter() -> None:
    draw = torch.Generator().manual_seed(0)
    seen = {segment(3, 20, block=8, draw=draw) for _ in range(60)}
    assert seen == {(3, 11), (11, 19), (19, 20)}
    with pytest.raises(MismatchError, match="no answer"):
        segment(20, 20, block=8, draw=draw)


def test_what_is_behind_the_segment_is_hidden() -> None:
    chosen = torch.tensor([False, True, False, False, False])
    noisy, same = corrupt(torch.tensor([5, 6, 7, 8, 9]), chosen, 3, mask=MASK)
    assert noisy.tolist() == [5, MASK, 7, MASK, MASK]
    assert torch.equal(same, chosen)


def test_losses_by_hand() -> None:
    """Two masked tokens: one right with probability 3/4, one wrong: its entropy does not count."""
    logits = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0], [0.0, 0.0]]])
    labels, masked = torch.tensor([[0, 1, 0]]), torch.tensor([[True, True, False]])
    plain, entropy = certainty_losses(logits, labels, masked)
    assert plain.item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert entropy.item() == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), rel=1e-5)
    nothing = certainty_losses(logits, labels, torch.zeros_like(masked))
    assert [value.item() for value in nothing] == [0.0, 0.0]


def test_the_surest_token_is_taken_whatever_the_threshold() -> None:
    logits = torch.tensor([[[5.0, 0.0], [1.0, 0.0], [9.0, 0.0]]])
    masked = torch.tensor([[True, True, False]])
    best, taken = unmask(logits, torch.tensor([[1, 1, 0]]), masked, threshold=-1.0)
    assert best.tolist() == [[0, 0, 0]]
    assert taken.tolist() == [[True, False, False]]
    assert unmask(logits, torch.tensor([[1, 1, 0]]), masked, threshold=1.0)[1].tolist() == [[True, True, False]]


def test_both_views_cover_the_segment_of_each_row_once(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []

    class Kept(DParallel):
        __module__ = DParallel.__module__

        def forward(self, signals: Any, step: Any) -> Any:
            seen.append((signals.inputs["input_ids"], signals.inputs))
            return super().forward(signals, step)

    run(tmp_path, Kept(block=8), max_steps=1)
    ids, views = seen[0]
    assert not (views["masked"] & views["other_masked"]).any()
    both = views["masked"] | views["other_masked"]
    for row in range(len(ids)):
        places = both[row].nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert (ids[row][places[-1] + 1 :] == MASK).all()
        assert torch.equal(ids[row][: places[0]], views["clean_ids"][row][: places[0]])
    assert len({int(both[row].nonzero().min()) for row in range(len(ids))}) > 1


def test_a_step_runs_the_student_twice_and_differs_by_the_certainty(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=1)
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    plain = run(tmp_path, DParallel(block=8, beta=0.0), max_steps=1).state.log_history[0]
    assert log["distill/dparallel.cross_entropy"] == pytest.approx(plain["distill/dparallel.cross_entropy"], rel=1e-5)
    assert log["loss"] == pytest.approx(plain["loss"] + log["distill/dparallel.certainty"], rel=1e-5)
    student = model()
    with mock.patch.object(
        MaskedDiffusionForMaskedLM, "forward", autospec=True, side_effect=MaskedDiffusionForMaskedLM.forward
    ) as called:
        run(tmp_path, max_steps=1)
    assert called.call_count == 2
    assert student.config.mask_token_id == MASK


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = run(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    again = run(tmp_path, max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert testing.weights_hash(again.model) == testing.weights_hash(whole.model)


def test_decoding_fills_in_everything_in_as_few_steps_as_it_is_sure(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=150)
    student, prompt = made.model.eval(), torch.tensor([[2, 3]])
    slow, fast = ParallelDecoding(threshold=-1.0, block=8), ParallelDecoding(threshold=2.0, block=8)
    one, other = (decode(student, prompt, max_new_tokens=16) for decode in (slow, fast))
    assert slow.steps == 16
    assert fast.steps < 16
    assert one.shape == (1, 18)
    assert not (other == MASK).any()
    assert torch.equal(other[:, :2], prompt)


def test_it_loads_where_this_package_cannot_be_imported(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1).save_model(str(tmp_path / "student"))
    call = "model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits"
    assert output_of(tmp_path / "student", "AutoModelForMaskedLM", call).shape == (1, 3, VOCAB)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="dparallel"):
        DParallel(block=0)
    with pytest.raises(ConfigurationError, match="dparallel"):
        DParallel(beta=-1.0)
    student = model()
    student.config.mask_token_id = None
    made = run(tmp_path, max_steps=1)
    other = Trainer(
        model=student, args=made.args, train_dataset=rows(), callbacks=[DistillCallback(method="dparallel")]
    )
    with pytest.raises(ConfigurationError, match="mask_token_id"):
        other.train()


@pytest.mark.parametrize("name", ["segment", "corrupt", "certainty_losses"])
def test_each_function_of_the_step_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run(tmp_path)


def test_unmask_is_reached_by_decoding() -> None:
    with mock.patch.object(module, "unmask", side_effect=KeyError), pytest.raises(KeyError):
        ParallelDecoding()(model(), torch.tensor([[2]]), max_new_tokens=2)
