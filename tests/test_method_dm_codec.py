"""DM-Codec: two cached teachers on a middle tensor, discriminators of their own, a codec that loads anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from alone import output_of
from hf_compress_plugins.speech import dm_codec as module
from hf_compress_plugins.speech._modeling_codec import SpeechCodec, SpeechCodecConfig
from hf_compress_plugins.speech.dm_codec import DMCodec, d_axis, mel_loss, t_axis
from transformers import Trainer, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError, ResumeError
from hf_compress.teachers.table import TableTeacher

COUNT, SAMPLES, WIDTH, TIME = 6, 320, 5, 11


def codec() -> SpeechCodec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SpeechCodecConfig(
            strides=(4, 4), channels=4, hidden_size=8, codebooks=3, codebook_size=8, feature_size=WIDTH
        )
        return SpeechCodec(config)


def rows() -> list[dict[str, Any]]:
    draw, time = torch.Generator().manual_seed(0), torch.arange(SAMPLES)
    return [
        {
            "input_values": (
                torch.sin(time * (0.05 + 0.03 * place)) + 0.1 * torch.randn(SAMPLES, generator=draw)
            ).tolist(),
            "id": place,
        }
        for place in range(COUNT)
    ]


def teachers(**changed: torch.Tensor) -> TableTeacher:
    draw = torch.Generator().manual_seed(1)
    given = {name: torch.randn(COUNT, TIME, WIDTH, generator=draw) for name in ("lm", "sm")}
    return TableTeacher(given | changed, column="id", kind="none")


def run(folder: Path, method: Any = None, teacher: Any = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3,
    }  # fmt: skip
    resume = settings.pop("resume", None)
    callback = DistillCallback(teacher or teachers(), method or DMCodec())
    made = Trainer(
        model=codec(),
        args=TrainingArguments(str(folder), **(defaults | settings)),
        train_dataset=rows(),
        data_collator=lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]},
        callbacks=[callback],
    )
    made.callback = callback
    made.train(resume_from_checkpoint=resume)
    return made


def test_both_axes_by_hand() -> None:
    """A feature that runs as the teacher's has - log σ(1); one that runs against it - log σ(-1)."""
    feature = torch.tensor([[[1.0, 1.0], [2.0, -2.0]]])
    target = torch.tensor([[[2.0, -1.0], [4.0, 2.0]]])
    low, high = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert d_axis(feature, target).tolist() == pytest.approx([(low + high) / 2])
    assert t_axis(feature, feature).tolist() == pytest.approx([low])
    torch.testing.assert_close(d_axis(feature, torch.cat([feature, 9 * feature], 1)), torch.tensor([low]))


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (1, 3, 4), (2, 3, 5)])
def test_features_of_other_examples_or_widths_are_refused(shape: tuple[int, ...]) -> None:
    """The released data path hands over the first shape, and compares across the batch."""
    with pytest.raises(MismatchError, match="same examples and width"):
        d_axis(torch.zeros(2, 3, 4), torch.zeros(shape))


def test_mel_spectra_of_one_sound_are_equal_and_short_ones_are_left_out() -> None:
    sound = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    assert mel_loss(sound, sound, sampling_rate=16000) == 0
    assert mel_loss(sound, 2 * sound, sampling_rate=16000) > 1
    assert mel_loss(sound[:, :50], sound[:, :50] * 2, sampling_rate=16000) == 0


def test_every_term_has_its_weight(tmp_path: Path) -> None:
    (first, *_) = [entry for entry in run(tmp_path, max_steps=1).state.log_history if "loss" in entry]
    names = ("distill", "reconstruction", "commitment", "mel", "adversarial", "feature")
    assert first["loss"] == pytest.approx(sum(first[f"distill/dm_codec.{name}"] for name in names), rel=1e-4)
    assert first["network/judges"] > 0
    half = run(tmp_path, DMCodec(distill_weight=60.0), max_steps=1).state.log_history[0]
    assert half["distill/dm_codec.distill"] == pytest.approx(first["distill/dm_codec.distill"] / 2, rel=1e-5)


def test_one_teacher_can_be_left_out(tmp_path: Path) -> None:
    alone = TableTeacher({"sm": torch.randn(COUNT, TIME, WIDTH)}, column="id", kind="none")
    made = run(tmp_path, DMCodec(language_weight=0.0, speech_weight=1.0, adversarial=False, mel=False), alone)
    assert set(made.state.log_history[0]) >= {"distill/dm_codec.distill"}
    assert "distill/dm_codec.adversarial" not in made.state.log_history[0]
    with pytest.raises(ConfigurationError, match=r"ask for \['lm'\]"):
        run(tmp_path, DMCodec(), alone)


def test_distillation_reaches_the_encoder_and_not_the_decoder(tmp_path: Path) -> None:
    method = DMCodec(reconstruction_weight=0.0, commitment_weight=0.0, adversarial=False, mel=False)
    made, start = run(tmp_path, method, max_steps=1, weight_decay=0.0), codec()
    changed = {
        n
        for (n, a), (_, b) in zip(made.model.named_parameters(), start.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert any(name.startswith("encoder") for name in changed)
    assert any(name.startswith("transform") for name in changed)
    assert not any(name.startswith("decoder") for name in changed)


def test_codebooks_follow_once_a_step(tmp_path: Path) -> None:
    """The discriminators' look at the decoded sound moves no codebook."""
    plain = run(tmp_path, DMCodec(adversarial=False), max_steps=1)
    judged = run(tmp_path, DMCodec(), max_steps=1)
    for one, other in zip(plain.model.quantiser.layers, judged.model.quantiser.layers, strict=True):
        torch.testing.assert_close(one.counts, other.counts)
        assert one.begun == 1


def test_resumed_equals_uninterrupted_with_codebooks_and_discriminators(tmp_path: Path) -> None:
    whole = run(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    again = run(tmp_path, max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert testing.weights_hash(again.model) == testing.weights_hash(whole.model)
    judges = [made.callback.run.networks.modules["judges"] for made in (whole, again)]
    assert testing.weights_hash(judges[0]) == testing.weights_hash(judges[1])
    (tmp_path / "checkpoint-2/networks-optimizers.pt").unlink()
    with pytest.raises(ResumeError):
        run(tmp_path, max_steps=4, resume=str(tmp_path / "checkpoint-2"))


def test_it_learns_to_decode_what_it_encodes(tmp_path: Path) -> None:
    made = run(tmp_path, DMCodec(adversarial=False, mel=False), max_steps=150, learning_rate=1e-2)
    logs = [entry["distill/dm_codec.reconstruction"] for entry in made.state.log_history if "loss" in entry]
    assert sum(logs[-10:]) < 0.8 * sum(logs[:10])
    model, sound = made.model.eval(), torch.tensor([row["input_values"] for row in rows()])
    with torch.no_grad():
        codes = model.encode(sound)
        assert codes.shape == (3, COUNT, SAMPLES // 16 + codes.shape[2] - SAMPLES // 16)
        torch.testing.assert_close(model.decode(codes, SAMPLES), model(sound).waveform, rtol=1e-4, atol=1e-5)


def test_it_loads_where_this_package_cannot_be_imported(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.save_model(str(tmp_path / "student"))
    alone = output_of(tmp_path / "student", "AutoModel", "model(torch.ones(1, 320)).waveform")
    with torch.no_grad():
        own = made.model.eval()(torch.ones(1, SAMPLES)).waveform
    torch.testing.assert_close(alone, own)


@pytest.mark.parametrize(
    "settings", [{"axis": "x"}, {"distill_weight": -1.0}, {"language_weight": 0.0, "speech_weight": 0.0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="dm_codec"):
        DMCodec(**settings)


@pytest.mark.parametrize(
    "name", ["d_axis", "reconstruction", "discriminator_loss", "adversarial_loss", "feature_loss", "mel_loss"]
)
def test_each_function_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run(tmp_path)


def test_the_other_axis_is_reached(tmp_path: Path) -> None:
    with mock.patch.object(module, "t_axis", side_effect=KeyError), pytest.raises(KeyError):
        run(tmp_path, DMCodec(axis="t"))
