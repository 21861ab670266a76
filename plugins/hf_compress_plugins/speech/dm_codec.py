"""A speech codec whose first tokens carry what was said, taught by a language and a speech model that are then dropped.

Ahasan, Fahim, Mohiuddin, Rahman, Chadha, Iqbal, Amin, Islam, Ali: DM-Codec: Distilling Multimodal Representations for
Speech Tokenization, 2024, arXiv:2410.15017, section 3.

    L_d(f, h) = - mean over examples and features of log σ( cos over time( f[:, d], h[:, d] ) ),  cut to the shorter
    L_distill = w_lm · L_d(f, h_lm) + w_sm · L_d(f, h_sm)            f: projection of the quantiser's first layer
    L = L_feat + L_adv + L_mel + 10 · L_commit + 500 · mean |x - x̂| + 120 · L_distill
    L_adv = Σ_D mean (1 - D(x̂))²,  L_feat = 2 Σ mean | maps(x) - maps(x̂) |
    L_mel = Σ_k λ_k mean | mel_k(x) - mel_k(x̂) |
    discriminators: Σ_D mean (1 - D(x))² + mean D(x̂)²                stepped first, by an optimizer of their own

The teachers' features are computed beforehand and looked up by the example's id, each (time, feature). f passes
straight through the quantiser, so that L_distill reaches the encoder and the projection; the codebooks follow by moving
averages. The minimum of L_d is - log σ(1) = 0.3133. The alternative "t" compares along features at each time, with
mean | f - h | added.

Difference from the authors' code: features must be (example, time, feature) with one number of examples; the released
data path adds an axis, over which theirs broadcasts to a cosine across the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from transformers import AutoConfig, AutoModel
from transformers.audio_utils import mel_filter_bank

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step
from hf_compress.registry import Method
from hf_compress.taps import evaluating
from hf_compress_plugins.speech._modeling_codec import SpeechCodec, SpeechCodecConfig

LANGUAGE, SPEECH, ID = "lm", "sm", "id"
"""Taps of the teachers' table, and the batch column that looks them up."""
WAVEFORM, FEATURES, COMMITMENT = "output.waveform", "output.features", "output.commitment"
SCALES = ((1024, 45.0), (512, 1.0), (256, 1.0), (128, 1.0))
"""Samples of a spectrum and λ of its mel loss (authors' code)."""
MELS = 80


@dataclass(frozen=True, kw_only=True)
class DMCodecConfig:
    """Hyper-parameters of DM-Codec; the authors' defaults."""

    axis: Literal["d", "t"] = "d"
    """Cosines over time for each feature, or over features at each time."""
    language_weight: float = 0.5
    """w_lm ≥ 0; 0: the language teacher is not needed."""
    speech_weight: float = 0.5
    """w_sm ≥ 0; 0: the speech teacher is not needed."""
    distill_weight: float = 120.0
    """Of L_distill."""
    reconstruction_weight: float = 500.0
    """Of mean | x - x̂ |."""
    commitment_weight: float = 10.0
    """Of the quantiser's error."""
    mel: bool = True
    """L_mel."""
    adversarial: bool = True
    """L_adv, L_feat and the discriminators."""
    sampling_rate: int = 16000
    """Of the waveforms."""
    learning_rate: float = 1e-4
    """Of the discriminators (Adam, β = 0.9 and 0.99)."""

    def __post_init__(self) -> None:
        weights = (self.language_weight, self.speech_weight, self.distill_weight, self.reconstruction_weight)
        if self.axis not in ("d", "t") or not all(
            0 <= weight < math.inf for weight in (*weights, self.commitment_weight)
        ):
            raise ConfigurationError(f"dm_codec: axis must be d or t and weights at least 0, got {self}.")
        if self.language_weight + self.speech_weight == 0:
            raise ConfigurationError("dm_codec: both teachers have weight 0; nothing would be distilled.")


def _cut(feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if feature.dim() != 3 or target.dim() != 3 or len(feature) != len(target) or feature.shape[2] != target.shape[2]:
        raise MismatchError(
            f"dm_codec: features {tuple(feature.shape)} and a teacher's {tuple(target.shape)} must be (example, time, "
            "feature) of the same examples and width."
        )
    length = min(feature.shape[1], target.shape[1])
    return feature[:, :length], target[:, :length].detach()


def d_axis(feature: Tensor, target: Tensor) -> Tensor:
    """- log σ of the cosines over time, mean over features.

    Args:
        feature: (example, time, feature) of the student.
        target: (example, time, feature) of a teacher, detached here; the longer one is cut.

    Returns:
        (example,) 0.3133 … 1.3133.

    Raises:
        MismatchError: if the two are not of the same examples and width.
    """
    own, theirs = _cut(feature, target)
    return -F.logsigmoid(F.cosine_similarity(own, theirs, dim=1)).mean(1)


def t_axis(feature: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference, and - log σ of the cosines over features, mean over time; arguments as `d_axis`.

    Returns:
        (example,) at least 0.3133.
    """
    own, theirs = _cut(feature, target)
    cosine = F.cosine_similarity(own, theirs, dim=2)
    return (own - theirs).abs().mean((1, 2)) - F.logsigmoid(cosine).mean(1)


def reconstruction(original: Tensor, decoded: Tensor) -> Tensor:
    """() mean absolute difference of waveforms (…, sample), cut to the shorter."""
    length = min(original.shape[-1], decoded.shape[-1])
    return (original[..., :length] - decoded[..., :length]).abs().mean()


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """() sum over discriminators of their squared errors: 1 for real, 0 for decoded."""
    return torch.stack([(1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True)]).sum()


def adversarial_loss(fake: Sequence[Tensor]) -> Tensor:
    """() sum over discriminators of how far they are from taking the decoded for real."""
    return torch.stack([(1 - f).square().mean() for f in fake]).sum()


def feature_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """() twice the sum over discriminators and maps of mean absolute differences; the real ones are detached."""
    pairs = [(r, f) for maps, others in zip(real, fake, strict=True) for r, f in zip(maps, others, strict=True)]
    return 2 * torch.stack([(r.detach() - f).abs().mean() for r, f in pairs]).sum()


def mel_loss(original: Tensor, decoded: Tensor, *, sampling_rate: int) -> Tensor:
    """() weighed differences of log mel spectra at several resolutions; waveforms (example, sample)."""
    total = torch.zeros((), device=decoded.device)
    for place, (size, weight) in enumerate(SCALES):
        if decoded.shape[-1] <= size // 2:
            continue  # shorter than half a window, which the transform cannot mirror
        bank = mel_filter_bank(
            size // 2 + 1, MELS, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney"
        )
        mels = torch.as_tensor(bank, dtype=torch.float32, device=decoded.device)
        spectra = [
            torch.stft(
                x.float(), size, 240 // 2**place, window=torch.hann_window(size, device=x.device), return_complex=True
            ).abs()
            for x in (original, decoded)
        ]
        logs = [(spectrum.transpose(1, 2) @ mels).clamp(min=1e-5).log() for spectrum in spectra]
        total = total + weight * (logs[0] - logs[1]).abs().mean()
    return total


class Discriminators(nn.Module):
    """Three families: over periods of the waveform, over its averages, and over short-time spectra.

    Args:
        width: channels.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.periods, self.pools, self.sizes = (2, 3, 5), (1, 2), (128, 64)
        plane = [_stack(nn.Conv2d, 1, width, (5, 1), (3, 1)) for _ in self.periods]
        line = [_stack(nn.Conv1d, 1, width, 15, 4) for _ in self.pools]
        spectra = [_stack(nn.Conv2d, 2, width, (3, 3), (1, 2)) for _ in self.sizes]
        self.stacks = nn.ModuleList([*plane, *line, *spectra])

    def forward(self, waveform: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Judgements, and the maps before them, of (example, sample)."""
        views = [self._folded(waveform, period) for period in self.periods]
        views += [F.avg_pool1d(waveform[:, None], pool) for pool in self.pools]
        views += [self._spectrum(waveform, size) for size in self.sizes]
        judgements, maps = [], []
        for stack, view in zip(self.stacks, views, strict=True):
            own = []
            for layer in stack.children():
                view = layer(view)
                own.append(view)
            judgements.append(own.pop())
            maps.append(own)
        return judgements, maps

    @staticmethod
    def _folded(waveform: Tensor, period: int) -> Tensor:
        length = waveform.shape[-1] // period * period
        return waveform[:, :length].reshape(len(waveform), 1, -1, period)

    @staticmethod
    def _spectrum(waveform: Tensor, size: int) -> Tensor:
        window = torch.hann_window(size, device=waveform.device, dtype=waveform.dtype)
        spectrum = torch.stft(waveform, size, size // 4, window=window, return_complex=True)
        return torch.stack([spectrum.real, spectrum.imag], 1)


def _stack(kind: Any, channels: int, width: int, kernel: Any, stride: Any) -> nn.Sequential:
    pad = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
    return nn.Sequential(
        nn.Sequential(kind(channels, width, kernel, stride, pad), nn.LeakyReLU(0.1)),
        nn.Sequential(kind(width, width, kernel, stride, pad), nn.LeakyReLU(0.1)),
        kind(width, 1, kernel, 1, pad),
    )


class DMCodec(Objective):
    """Reconstruction, discriminators and two teachers for a codec."""

    Config = DMCodecConfig
    config: DMCodecConfig
    task_weight: ClassVar[float | None] = 0.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        wanted = ((LANGUAGE, self.config.language_weight), (SPEECH, self.config.speech_weight))
        return Needs(
            student=frozenset({WAVEFORM, FEATURES, COMMITMENT}),
            teacher=frozenset(name for name, weight in wanted if weight),
            columns=frozenset({ID}),
            mean_over="batch",
        )

    def networks(self, teacher: nn.Module | None) -> Mapping[str, tuple[nn.Module, Optimizer]]:
        if not self.config.adversarial:
            return {}
        judges = Discriminators()
        return {"judges": (judges, Adam(judges.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.99)))}

    def network_losses(self, inputs: Inputs, step: Step) -> Mapping[str, Tensor]:
        if not self.config.adversarial:
            return {}
        real = inputs["input_values"]
        with torch.no_grad(), evaluating(step.student):  # its codebooks follow in the step's own forward alone
            decoded = step.run_student(input_values=real).waveform
        judges = step.networks["judges"]
        return {"judges": discriminator_loss(judges(real)[0], judges(decoded)[0])}

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        settings, original, decoded = self.config, signals.inputs["input_values"], signals.student[WAVEFORM]
        found = {
            "distill": settings.distill_weight * self._distilled(signals),
            "reconstruction": settings.reconstruction_weight * reconstruction(original, decoded),
            "commitment": settings.commitment_weight * signals.student[COMMITMENT],
        }
        if settings.mel:
            found["mel"] = mel_loss(original, decoded, sampling_rate=settings.sampling_rate)
        if settings.adversarial:
            judges = step.networks["judges"]
            judgements, maps = judges(decoded)
            with torch.no_grad():
                real_maps = judges(original)[1]
            found["adversarial"] = adversarial_loss(judgements)
            found["feature"] = feature_loss(real_maps, maps)
        return found

    def _distilled(self, signals: Signals) -> Tensor:
        function = d_axis if self.config.axis == "d" else t_axis
        feature = signals.student[FEATURES]
        weights = ((LANGUAGE, self.config.language_weight), (SPEECH, self.config.speech_weight))
        parts = [weight * function(feature, signals.teacher[name]).mean() for name, weight in weights if weight]
        return torch.stack(parts).sum()


AutoConfig.register("speech_codec", SpeechCodecConfig, exist_ok=True)
AutoModel.register(SpeechCodecConfig, SpeechCodec, exist_ok=True)

METHOD = Method(
    title="DM-Codec: Distilling Multimodal Representations for Speech Tokenization",
    paper="arXiv:2410.15017",
    authors="Md Mubtasim Ahasan, Md Fahim, Tasnim Mohiuddin, A K M Mahbubur Rahman, Aman Chadha, Tariq Iqbal, "
    "M Ashraful Amin, Md Mofijul Islam, Amin Ahsan Ali",
    year=2024,
    summary="A speech codec whose first tokens carry what was said, taught by a language and a speech model.",
    bibtex="""@misc{ahasan2024dmcodec,
  title = {{DM-Codec}: Distilling Multimodal Representations for Speech Tokenization},
  author = {Ahasan, Md Mubtasim and Fahim, Md and Mohiuddin, Tasnim and Rahman, A K M Mahbubur and Chadha, Aman and
            Iqbal, Tariq and Amin, M Ashraful and Islam, Md Mofijul and Ali, Amin Ahsan},
  year = {2024}, eprint = {2410.15017}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=("audio-to-audio",),
    objective=DMCodec,
)
