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
    tokens_each_step,
    unmask,
    unmask_some,
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
    assert {segment(3, 20, block=None, draw=draw) for _ in range(5)} == {(3, 20)}
    assert {segment(3, 19, block=8, draw=draw) for _ in range(60)} == {(3, 11), (11, 19)}  # none is empty


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


def test_by_probability_a_token_is_taken_at_or_above_the_threshold() -> None:
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0], [math.log(9.0), 0.0]]], dtype=torch.float64)
    ids, masked = torch.tensor([[1, 1, 1]]), torch.tensor([[True, True, True]])
    for threshold, taken in ((0.74, [True, False, True]), (0.8, [False, False, True]), (0.99, [False, False, True])):
        assert unmask(logits, ids, masked, threshold=threshold, by="confidence")[1].tolist() == [taken]


def test_a_strict_threshold_leaves_out_what_is_at_it() -> None:
    logits, ids = torch.zeros(1, 3, 2, dtype=torch.float64), torch.tensor([[1, 1, 1]])
    masked = torch.tensor([[True, True, False]])
    loose = unmask(logits, ids, masked, threshold=0.5, by="confidence")[1]
    strict = unmask(logits, ids, masked, threshold=0.5, by="confidence", strict=True)[1]
    assert (loose.tolist(), strict.tolist()) == ([[True, True, False]], [[True, False, False]])


def test_a_given_number_of_tokens_is_taken_the_most_probable_first() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [9.0, 0.0]]])
    ids, masked = torch.tensor([[7, 7, 7, 5]]), torch.tensor([[True, True, True, False]])
    best, taken = unmask_some(logits, ids, masked, counts=torch.tensor([2]))
    assert best.tolist() == [[0, 1, 0, 5]]
    assert taken.tolist() == [[False, True, True, False]]
    assert tokens_each_step(torch.tensor([7, 2, 0]), 3).tolist() == [[3, 2, 2], [1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(("steps", "forwards"), [(1, 2), (5, 10), (8, 16), (20, 16)])
def test_decoding_takes_the_given_number_of_steps_a_block(steps: int, forwards: int) -> None:
    decode = ParallelDecoding(steps=steps, block=8)
    found = decode(model(), torch.tensor([[2, 3]]), max_new_tokens=16)
    assert decode.steps_taken == forwards
    assert not (found == MASK).any()


class Next(MaskedDiffusionForMaskedLM):
    """Its logits at a place are of the token behind it: one above what stands at the place, or a mask's own."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        known = torch.where(input_ids == MASK, 2, input_ids + 1) % VOCAB
        sure = torch.where(input_ids == MASK, 0.1, 20.0)
        return mock.Mock(logits=torch.nn.functional.one_hot(known, VOCAB) * sure[..., None])


def test_a_shifted_model_is_read_one_place_to_the_left() -> None:
    """Only the token behind a known one is sure, so a chain is filled in one by one, in one block."""
    decode = ParallelDecoding(shifted=True, block=None)
    found = decode(Next(model().config), torch.tensor([[2, 3]]), max_new_tokens=6)
    assert found.tolist() == [[2, 3, 4, 5, 6, 7, 8, 9]]
    assert decode.steps_taken == 6


def test_the_loss_of_a_shifted_model_by_hand(tmp_path: Path) -> None:
    """Token 1 is scored by the logits of place 0: probability 3/4, and right."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [9.0, 0.0]]])
    labels, masked = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    plain, entropy = certainty_losses(*DParallel(shifted=True)._placed(logits, labels, masked))
    assert plain.item() == pytest.approx(-math.log(0.75))
    assert entropy.item() == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), rel=1e-5)
    (log,) = [
        entry
        for entry in run(tmp_path, DParallel(shifted=True, block=None), max_steps=1).state.log_history
        if "loss" in entry
    ]
    plain_log = run(tmp_path, DParallel(block=None), max_steps=1).state.log_history[0]
    assert math.isfinite(log["loss"])
    assert log["distill/dparallel.cross_entropy"] != plain_log["distill/dparallel.cross_entropy"]


def test_without_blocks_the_whole_answer_is_hidden_in_two_parts(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Kept(DParallel):
        __module__ = DParallel.__module__

        def forward(self, signals: Any, step: Any) -> Any:
            seen.append(signals.inputs)
            return super().forward(signals, step)

    run(tmp_path, Kept(block=None), max_steps=1)
    both = seen[0]["masked"] | seen[0]["other_masked"]
    place = torch.arange(LENGTH).expand_as(both)
    assert torch.equal(both, place >= seen[0]["prompt_length"][:, None])


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
    assert slow.steps_taken == 16
    assert fast.steps_taken < 16
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
    for settings in ({"by": "margin"}, {"block": 0}, {"steps": 0}):
        with pytest.raises(ConfigurationError, match="dparallel"):
            ParallelDecoding(**settings)
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


@pytest.mark.parametrize(
    ("name", "steps"), [("unmask", None), ("sureness", None), ("unmask_some", 2), ("tokens_each_step", 2)]
)
def test_each_function_of_decoding_is_reached(name: str, steps: int | None) -> None:
    with mock.patch.object(module, name, side_effect=KeyError), pytest.raises(KeyError):
        ParallelDecoding(steps=steps)(model(), torch.tensor([[2]]), max_new_tokens=2)
