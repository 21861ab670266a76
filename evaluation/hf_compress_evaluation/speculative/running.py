"""Acceptance on texts, in closed form, and counted in decodes by transformers' own `generate(assistant_model=…)`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.streamers import BaseStreamer

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED
from hf_compress.on_policy import written
from hf_compress.taps import evaluating
from hf_compress_evaluation import latency

from . import Decoding, acceptance

BATCH = 8
"""Texts of a forward."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Token ids of which the first are a prompt, whose own acceptance does not count."""

    ids: tuple[int, ...]
    prompt: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompt < len(self.ids):
            raise MismatchError(
                f"speculative: a text of {len(self.ids)} tokens has no prompt of {self.prompt}. Leave short texts out."
            )


def check_pair(target: Any, draft: Any) -> None:
    """Raises unless the draft can serve the target.

    Raises:
        ConfigurationError: for an encoder-decoder.
        MismatchError: for two vocabularies.
    """
    if target.config.is_encoder_decoder or draft.config.is_encoder_decoder:
        raise ConfigurationError("speculative: both models must be causal language models, one is an encoder-decoder.")
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if sizes[0] != sizes[1]:
        raise MismatchError(
            f"speculative: the target knows {sizes[0]} tokens, the draft {sizes[1]}. A draft needs the target's "
            "tokenizer: cut the target's vocabulary first (shrink_vocabulary), or make the draft from the target."
        )


def continuations(
    target: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    new_tokens: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> list[Text]:
    """Texts that the target writes: the contexts that a draft meets.

    Args:
        target: a causal language model.
        prompts: token ids, at least one each.
        decoding: how it chooses.
        new_tokens: at most so many; fewer where it ends.
        seed: of the draws.
        tick: called after each prompt.
    """
    found = []
    with evaluating(target), torch.no_grad(), drawing(seed):
        for start in range(0, len(prompts), BATCH):
            part = [torch.tensor(prompt) for prompt in prompts[start : start + BATCH]]
            labels = [torch.cat([torch.full_like(ids, IGNORED), ids[-1:]]) for ids in part]  # where the answer begins
            ids = [torch.cat([ids, ids[-1:]]) for ids in part]
            inputs = {
                "input_ids": pad_sequence(ids, batch_first=True),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
                "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            }
            placed = {name: values.to(target.device) for name, values in inputs.items()}
            made = written(placed, target, target.generate, max_new_tokens=new_tokens, **decoding.settings())
            for row, prompt in enumerate(part):
                whole = made["input_ids"][row][made["attention_mask"][row].bool()].tolist()
                found.append(Text(ids=tuple(whole), prompt=len(prompt)))
                tick()
    return found


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is expected of one text's tokens behind the prompt; sums over them."""

    accepted: float
    drafted: float
    """The same where the draft's tokens are drawn as `Decoding.drafted` says, which is what a decode counts."""
    greedy: int
    """Of them, where both models find the same token the likeliest."""
    tokens: int


def expected(
    target: Any,
    draft: Any,
    texts: Sequence[Text],
    decoding: Decoding,
    *,
    tick: Callable[[], None] = lambda: None,
) -> list[Expected]:
    """The closed form of acceptance at every place of texts behind their prompts.

    Args:
        target, draft: causal language models of one vocabulary.
        texts: e.g. of `continuations`.
        decoding: how tokens would be chosen.
        tick: called after each text.

    Raises:
        MismatchError: for two vocabularies.
    """
    check_pair(target, draft)
    found = []
    with evaluating(target), evaluating(draft), torch.no_grad():
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            ids = pad_sequence([torch.tensor(text.ids) for text in part], batch_first=True)
            mask = pad_sequence([torch.ones(len(text.ids), dtype=torch.long) for text in part], batch_first=True)
            logits = [
                model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.cpu()
                for model in (target, draft)
            ]
            for row, text in enumerate(part):
                where = slice(text.prompt - 1, len(text.ids) - 1)  # what is seen there predicts the tokens behind
                own = [values[row, where] for values in logits]
                found.append(_expected(own[0], own[1], decoding))
                tick()
    return found


def _expected(target: Tensor, draft: Tensor, decoding: Decoding) -> Expected:
    """Of one text, from both models' logits (position, vocab)."""
    p, q, greedy = decoding.probabilities(target), decoding.probabilities(draft), Decoding(temperature=0.0)
    return Expected(
        accepted=float(acceptance(p, q).sum()),
        drafted=float(acceptance(p, q if decoding.whole else decoding.drafted(draft)).sum()),
        greedy=int(acceptance(greedy.probabilities(target), greedy.probabilities(draft)).sum()),
        tokens=len(p),
    )


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Of a decode with a draft, or of several together."""

    tokens: int = 0
    """Generated."""
    target_calls: int = 0
    """Forwards; the one that reads the prompt verifies drafted tokens too."""
    draft_calls: int = 0
    """Forwards, one for each drafted token."""
    tried: int = 0
    """Drafted tokens that the target decided on: of each block those up to the first that it rejected."""
    accepted: int = 0
    seconds: float = 0.0

    def __add__(self, other: Counted) -> Counted:
        return Counted(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def acceptance(self) -> float:
        """Part of the decided tokens that was accepted; an estimate of α where the decode went."""
        return self.accepted / max(self.tried, 1)

    @property
    def block_efficiency(self) -> float:
        """Generated tokens for each forward of the target."""
        return self.tokens / max(self.target_calls, 1)


class _Watch(BaseStreamer):  # type: ignore[misc]  # transformers is not typed for mypy
    """Sees each forward of both models, and each block of tokens that is kept."""

    def __init__(self) -> None:
        self.target_calls = self.draft_calls = self.tokens = self.tried = self.accepted = 0
        self._waiting = 0
        self._drafted: list[int] = []

    def of_target(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a forward of the target: the last ids that it reads are what was drafted since its last one."""
        ids = kwargs["input_ids"][0]
        self.target_calls += 1
        self._drafted = ids[len(ids) - self._waiting :].tolist()
        self._waiting = 0

    def of_draft(self, module: Any, args: Any, output: Any) -> None:
        """After a forward of the draft."""
        self.draft_calls += 1
        self._waiting += 1

    def put(self, value: Tensor) -> None:
        """The prompt first, then the tokens of each block that stay."""
        if not self.target_calls:
            return
        kept = value.flatten().tolist()
        same = 0
        while same < min(len(kept), len(self._drafted)) and kept[same] == self._drafted[same]:
            same += 1
        self.tokens += len(kept)
        self.tried += same + (same < len(self._drafted))  # the next was rejected: a draft stops at its end
        self.accepted += same

    def end(self) -> None:
        """Nothing is left to do."""


def counted(
    target: Any,
    draft: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    gamma: int,
    new_tokens: int,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> list[Counted]:
    """Continues prompts one by one with the draft's help, and counts.

    Args:
        target, draft: causal language models of one vocabulary.
        prompts: token ids, at least one each.
        decoding: how tokens are chosen.
        gamma: γ, tokens drafted for each forward of the target; fewer where the draft ends a text.
        new_tokens: of each prompt; fewer where the target ends it.
        seed: of the draws.
        tick: called after each prompt.

    Returns:
        of each prompt.

    Raises:
        MismatchError: for two vocabularies.
    """
    found = []
    with assisted(target, draft, gamma) as generate, drawing(seed):
        for prompt in prompts:
            watch, started = _Watch(), time.perf_counter()
            handles = [
                target.register_forward_pre_hook(watch.of_target, with_kwargs=True),
                draft.register_forward_hook(watch.of_draft),
            ]
            try:
                generate(prompt, max_new_tokens=new_tokens, streamer=watch, **decoding.settings())
            finally:
                for handle in handles:
                    handle.remove()
            seconds = time.perf_counter() - started
            counts = {name: value for name, value in vars(watch).items() if not name.startswith("_")}
            found.append(Counted(seconds=seconds, **counts))
            tick()
    return found


@contextmanager
def assisted(target: Any, draft: Any, gamma: int) -> Iterator[Callable[..., Tensor]]:
    """Gives the target's `generate` with that draft: (prompt, **settings) -> (1, time) ids.

    γ tokens are drafted each time, whatever the draft's own confidence; its settings are as they were afterwards.

    Raises:
        ConfigurationError: for γ below 1.
        MismatchError: for two vocabularies.
    """
    check_pair(target, draft)
    if gamma < 1:
        raise ConfigurationError(f"speculative: gamma must be at least 1, got {gamma}.")
    before = draft.generation_config
    draft.generation_config = copy.deepcopy(before)
    draft.generation_config.num_assistant_tokens = gamma
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0

    def generate(prompt: Sequence[int], **settings: Any) -> Tensor:
        ids = torch.tensor([list(prompt)], device=target.device)
        found: Tensor = target.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), assistant_model=draft, **_padding(target), **settings
        )
        return found

    try:
        with evaluating(target), evaluating(draft), torch.no_grad():
            yield generate
    finally:
        draft.generation_config = before


def cost(target: Any, draft: Any, prompt: Sequence[int], *, new_tokens: int, runs: int = 3) -> tuple[float, float]:
    """Seconds that a token takes when the target and when the draft decode alone, with their caches.

    Args:
        target, draft: causal language models.
        prompt: token ids.
        new_tokens: decoded in each run, at least 1.
        runs: of each, in turn; the median counts.
    """

    def call(model: Any) -> latency.Call:
        ids = torch.tensor([list(prompt)], device=model.device)
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False} | _padding(model)
        return lambda: model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **settings)

    with evaluating(target), evaluating(draft):
        calls = {"target": call(target), "draft": call(draft)}
        length, threads = len(prompt) + new_tokens, torch.get_num_threads()
        found = latency.measure_all(calls, batch=1, length=length, runs=runs, warmup=1, threads=threads)
    return found["target"].median / new_tokens, found["draft"].median / new_tokens


def _padding(model: Any) -> dict[str, int]:
    """A padding token, without which `generate` warns."""
    pad, ends = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {"pad_token_id": next((one for one in (pad, *ends) if one is not None), 0)}


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Draws from a seed; the global generators are as they were afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
