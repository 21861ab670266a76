"""All figures of a draft beside its target, on some texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.bars import shown
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.facts import Data, Measurement, Setting
from hf_compress_evaluation import intervals
from hf_compress_evaluation.intervals import Estimate

from . import Decoding, block_efficiency, speed_up
from .running import Counted, Expected, Text, check_pair, continuations, cost, counted, expected

TIMED = 32
"""Most tokens that are decoded to time each model alone."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured, and how."""

    decoding: Decoding
    gamma: int = 5
    """γ, drafted tokens for each forward of the target."""
    prompt: int = 32
    """Tokens of a text that are its prompt."""
    new_tokens: int = 64
    """Of each continuation, at most."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.gamma, self.prompt, self.new_tokens) < 1:
            raise ConfigurationError(
                "speculative: gamma, prompt and new_tokens must be at least 1, got "
                f"{self.gamma}, {self.prompt} and {self.new_tokens}."
            )

    def how(self) -> dict[str, Setting]:
        """For the record."""
        settings: dict[str, Setting] = {"temperature": self.decoding.temperature, "top_k": self.decoding.top_k}
        settings |= {"top_p": self.decoding.top_p, "gamma": self.gamma}
        return settings | {"prompt_tokens": self.prompt, "new_tokens": self.new_tokens}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Figures of one draft."""

    asked: Asked
    texts: int
    on_texts: Estimate
    """α in closed form on the texts themselves; no value where none is longer than its prompt."""
    on_continuations: Estimate
    """α in closed form on what the target writes."""
    drafted: Estimate
    """The same with the draft's tokens drawn as transformers draws them, see `Decoding.drafted`."""
    greedy: Estimate
    """The first for greedy decoding in these contexts."""
    acceptance: Estimate
    """Counted in a decode."""
    block_efficiency: Estimate
    """τ, counted: tokens a forward of the target."""
    total: Counted
    target_seconds: float
    """A token without a draft."""
    draft_seconds: float
    """A token of the draft alone."""

    @property
    def cost(self) -> float:
        """c: time of a draft's token over a target's."""
        return self.draft_seconds / self.target_seconds

    @property
    def tau_of_alpha(self) -> float:
        """τ from α in closed form, as if every position had the mean."""
        return block_efficiency(self.on_continuations.value or 0.0, self.asked.gamma)

    @property
    def estimated_speed_up(self) -> float:
        """τ / (c γ + 1) of the counted τ."""
        return speed_up(self.total.block_efficiency, gamma=self.asked.gamma, cost=self.cost)

    @property
    def timed_speed_up(self) -> float:
        """Seconds a token without a draft over those with it, as this machine and `generate` took them."""
        return self.target_seconds * self.total.tokens / self.total.seconds

    def measurements(self, data: Data) -> tuple[Measurement, ...]:
        """As facts about the draft."""
        how = self.asked.how()
        figures = {
            "expected_acceptance_rate_on_texts": (self.on_texts, "fraction", how),
            "expected_acceptance_rate": (self.on_continuations, "fraction", how),
            "acceptance_rate": (self.acceptance, "fraction", how),
            "block_efficiency": (self.block_efficiency, "tokens a target call", how),
            "estimated_speed_up": (
                Estimate(value=self.estimated_speed_up, interval=None),
                "times",
                how | {"cost": self.cost},
            ),
        }
        return tuple(
            Measurement(
                subject="student",
                metric=metric,
                value=estimate.value,
                unit=unit,
                interval=estimate.interval,
                data=data,
                seed=self.asked.seed,
                how=settings,
            )
            for metric, (estimate, unit, settings) in figures.items()
            if estimate.value is not None
        )

    def as_json(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        names = ("on_texts", "on_continuations", "drafted", "greedy", "acceptance", "block_efficiency")
        estimates = {name: vars(getattr(self, name)) for name in names}
        derived = ("cost", "tau_of_alpha", "estimated_speed_up", "timed_speed_up", "target_seconds", "draft_seconds")
        figures = {name: getattr(self, name) for name in derived}
        return {"settings": self.asked.how(), "texts": self.texts} | estimates | figures | {"counts": vars(self.total)}


def measure(target: Any, draft: Any, rows: Sequence[Sequence[int]], asked: Asked, *, bar: bool = False) -> Found:
    """Measures a draft on the beginnings of texts.

    Args:
        target, draft: causal language models of one vocabulary.
        rows: token ids of texts; those shorter than a prompt are left out.
        asked: what.
        bar: show one.

    Raises:
        MismatchError: if no text is as long as a prompt, or the vocabularies differ.
        ConfigurationError: if a model has fewer positions than prompt and continuation.
    """
    check_pair(target, draft)
    end = asked.prompt + asked.new_tokens
    for who, model in (("target", target), ("draft", draft)):
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or end
        if most < end:
            raise ConfigurationError(
                f"speculative: the {who} has {most} positions, prompt and continuation take {end}. Ask for "
                "fewer tokens."
            )
    prompts = [list(row[: asked.prompt]) for row in rows if len(row) >= asked.prompt]
    if not prompts:
        raise MismatchError(
            f"speculative: none of the {len(rows)} texts has {asked.prompt} tokens. Take longer texts or a "
            "shorter prompt."
        )
    texts = [Text(ids=tuple(row[:end]), prompt=asked.prompt) for row in rows if len(row) > asked.prompt]
    given: dict[str, Any] = {"new_tokens": asked.new_tokens, "seed": asked.seed}
    with shown("speculative", len(texts) + 3 * len(prompts), bar=bar) as tick:
        on_texts = expected(target, draft, texts, asked.decoding, tick=tick)
        written = continuations(target, prompts, asked.decoding, tick=tick, **given)
        on_written = expected(target, draft, written, asked.decoding, tick=tick)
        counts = counted(target, draft, prompts, asked.decoding, gamma=asked.gamma, tick=tick, **given)
        target_seconds, draft_seconds = cost(target, draft, prompts[0], new_tokens=min(asked.new_tokens, TIMED))
    return Found(
        asked=asked,
        texts=len(prompts),
        on_texts=_rate(on_texts),
        on_continuations=_rate(on_written),
        drafted=intervals.estimate(intervals.share([one.drafted for one in on_written], _tokens(on_written))),
        greedy=intervals.estimate(intervals.share([one.greedy for one in on_written], _tokens(on_written))),
        acceptance=intervals.estimate(
            intervals.share([one.accepted for one in counts], [one.tried for one in counts]), seed=asked.seed
        ),
        block_efficiency=intervals.estimate(
            intervals.share([one.tokens for one in counts], [one.target_calls for one in counts]), seed=asked.seed
        ),
        total=sum(counts, Counted()),
        target_seconds=target_seconds,
        draft_seconds=draft_seconds,
    )


def _tokens(found: Sequence[Expected]) -> list[int]:
    return [one.tokens for one in found]


def _rate(found: Sequence[Expected]) -> Estimate:
    if not found:
        return Estimate(value=None, interval=None, note="no text is longer than its prompt")
    return intervals.estimate(intervals.share([one.accepted for one in found], _tokens(found)))
