"""DM-Codec's claim: with the teachers the first tokens say more of what was said, and the sound is no worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from statistics import mean
from typing import Any

import torch
from hf_compress_plugins.speech._modeling_codec import SpeechCodec, SpeechCodecConfig
from hf_compress_plugins.speech.dm_codec import SCALES, DMCodec, mel_loss
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from hf_compress import DistillCallback
from hf_compress.teachers.table import TableTeacher

from . import Claim, _training
from . import _speech as speech
from .llmlingua2 import encoder

STEPS, BATCH, CODES, PARTS = 400, 16, 64, 5
"""PARTS: into which a clip is cut, in time, for reading its codes."""


@cache
def heard() -> Tensor:
    """(clip, frame, 384) the speech model's features."""
    return speech.encoded(speech.numbers()[0])


@cache
def written(aligned: bool) -> Tensor:
    """(clip, frame, 384) the language model's: of the word padded to the frames; aligned: at each frame with sound."""
    model, tokenizer = encoder()
    given = tokenizer(list(speech.NUMBERS), padding="max_length", max_length=speech.FRAMES, return_tensors="pt")
    with torch.no_grad():
        states: Tensor = torch.stack(model(**given, output_hidden_states=True).hidden_states).mean(0)
    clips, labels, _ = speech.numbers()
    if not aligned:
        return states[labels]
    loud = clips.reshape(len(clips), speech.FRAMES, -1).square().mean(2) > 1e-3
    word = states[:, 1]
    return word[labels][:, None] * loud[..., None]


def decoded(model: SpeechCodec, clips: Tensor) -> Iterator[tuple[Tensor, float]]:
    """(clip, frame) codes of the first layer and the weighed mean distance of log-mel spectra, 40 clips at a time."""
    for place in range(0, len(clips), 40):
        part = clips[place : place + 40]
        with torch.no_grad():
            output = model(part)
            distance = mel_loss(part, output.waveform, sampling_rate=speech.RATE)
        yield output.codes[0], float(distance) / sum(weight for _, weight in SCALES)


def said(codes: Tensor) -> Tensor:
    """(clip, feature) how often each code stands in each part of a clip, from (clip, frame) codes."""
    hot = torch.nn.functional.one_hot(codes, CODES).float()
    return hot.reshape(len(codes), PARTS, -1, CODES).mean(2).flatten(1)


def run(variant: str, seed: int) -> Mapping[str, float]:
    """What the first layer's codes tell of the word in unheard voices, and the errors of decoded sounds."""
    clips, labels, cut = speech.numbers()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SpeechCodec(
            SpeechCodecConfig(channels=8, hidden_size=64, codebooks=3, codebook_size=CODES, feature_size=384)
        )
    taught = {"sm": heard(), "lm": written(variant == "both, text aligned in time")}
    method = DMCodec(
        distill_weight=0.0 if variant == "none" else 120.0,
        language_weight=0.0 if variant == "speech alone" else 0.5,
        speech_weight=1.0 if variant == "speech alone" else 0.5,
        adversarial=False,
    )
    rows = [{"input_values": clip, "id": place} for place, clip in enumerate(clips[:cut])]

    def collate(batch: Any) -> dict[str, Tensor]:
        return {
            "input_values": torch.stack([row["input_values"] for row in batch]),
            "id": torch.tensor([row["id"] for row in batch]),
        }

    callback = DistillCallback(TableTeacher(taught, column="id", kind="none"), method)
    _training.train(
        model, data=rows, data_collator=collate, steps=STEPS, seed=seed, batch=BATCH, learning_rate=1e-3,
        callbacks=[callback],
    )  # fmt: skip
    model.eval()
    first = said(torch.cat([codes for codes, _ in decoded(model, clips)])).numpy()
    probe = LogisticRegression(max_iter=2000).fit(first[:cut], labels[:cut].numpy())
    return {
        "word from the first layer": float(probe.score(first[cut:], labels[cut:].numpy())),
        "distance of log-mels": mean(error for _, error in decoded(model, clips[cut:])),
        "of natural prompts": mean(error for _, error in decoded(model, speech.prompts())),
    }


CLAIM = Claim(
    published="LibriSpeech: word error rate 13.46 % and word information lost 9.82 % lower than the best baseline, "
    "speech quality 5.84 % higher.",
    check=f"Twenty numbers spoken by {len(speech.VOICES)} synthetic voices in two manners, a second each; the last "
    f"{speech.TEST_VOICES} voices and natural prompts are for the test. Codec of 50 frames a second and three layers "
    f"of {CODES} codes. Teachers: Whisper tiny.en's encoder, and MiniLM on the word, padded as published. {STEPS} "
    f"steps of {BATCH} without discriminators; logistic regression from the first layer's codes in {PARTS} parts of "
    "time.",
    expected="The word is read better with the teachers, at nearly the same error; text that is aligned helps more.",
    variants=("none", "speech alone", "both", "both, text aligned in time"),
    run=run,
)
