"""The parts that a method may have: what each is called with, and the types that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIGNATURES: Mapping[str, tuple[str, ...]] = {
    "preparation": ("dataset",),
    "generation": ("model", "input_ids"),
    "synthesis": ("dataset", "teacher", "progress", "resume_from"),
    "search": ("teacher", "data", "budget"),
    "student": ("teacher", "config"),
    "tokenizer": ("model", "tokenizer", "new_tokenizer", "texts"),
}
"""Parameters that a callable part must take, by part; it may have further ones with defaults, or keyword-only.

preparation: (dataset, …) -> a data set, a collator or a Mixture, called by the user or a recipe.
generation: what `generate(custom_generate=…)` calls: (model, input_ids, logits_processor, stopping_criteria,
generation_config, …) -> ids; the class of such an object where it keeps state.
synthesis: (dataset, *, teacher, progress, resume_from) -> datasets.Dataset.
search: (teacher, *, data, budget: Budget) -> Ranking; data: batches.
student: (teacher, *, config) -> PreTrainedModel.
tokenizer: (model, tokenizer, new_tokenizer, *, texts) -> PreTrainedModel.
"""
PARTS = ("objective", *SIGNATURES, "recipe")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may cost, and how large what it finds may be."""

    parameters: int
    """Most parameters of a student."""
    evaluations: int = 512
    """Most candidates that are looked at."""

    def __post_init__(self) -> None:
        if self.parameters < 1 or self.evaluations < 1:
            raise ConfigurationError(
                f"a Budget needs parameters and evaluations above 0, got {self.parameters} and {self.evaluations}."
            )


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a search found: configurations, best first."""

    configs: tuple[Mapping[str, Any], ...]
    """Keywords of a student's config, or settings of what trains it; the search says which."""
    scores: tuple[float, ...]
    """Higher is better; of each configuration."""
    build: Callable[[int], PreTrainedModel]
    """Makes the student of a place in the ranking, untrained."""

    def __post_init__(self) -> None:
        if not self.configs or len(self.configs) != len(self.scores):
            raise ConfigurationError(
                f"a Ranking needs one score for each of its configurations, got {len(self.scores)} for "
                f"{len(self.configs)}."
            )
        if any(later > earlier for earlier, later in zip(self.scores, self.scores[1:], strict=False)):
            raise ConfigurationError("a Ranking lists the best configuration first: sort by score, highest first.")
