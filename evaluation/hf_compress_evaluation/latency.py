"""How long a call takes: several candidates in turn, so that a drift of the machine hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from hf_compress.errors import ConfigurationError
from hf_compress.facts import Measurement, Setting

Call = Callable[[], object]
"""Everything that is timed: the inputs are prepared when it is made, not when it is called."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds of one call on a batch of equally long rows."""

    mean: float
    """Of all runs together; its inverse is the throughput of calls that follow each other."""
    median: float
    p90: float
    p99: float
    """Of fewer than a hundred runs it is nearly the longest."""
    runs: int
    warmup: int
    batch: int
    length: int
    """Tokens of each row, padding included."""
    threads: int

    def measurements(self, subject: str, variant: str, *, provider: str) -> tuple[Measurement, Measurement]:
        """As facts: `latency_median` and `latency_p90` in seconds, with the conditions in `how`."""
        how: dict[str, Setting] = {
            "threads": self.threads,
            "batch": self.batch,
            "length": self.length,
            "runs": self.runs,
            "warmup": self.warmup,
            "provider": provider,
        }
        return (
            Measurement(
                subject=subject, variant=variant, metric="latency_median", value=self.median, unit="seconds", how=how
            ),
            Measurement(
                subject=subject, variant=variant, metric="latency_p90", value=self.p90, unit="seconds", how=how
            ),
        )


def measure_all(
    candidates: Mapping[str, Call],
    *,
    batch: int,
    length: int,
    runs: int,
    warmup: int,
    threads: int,
    progress: bool = False,
) -> dict[str, Latency]:
    """Times several calls in turn: each round runs every candidate once.

    Args:
        candidates: by name; each runs one forward pass on inputs of `batch` rows of `length` tokens.
        batch: rows; recorded, the calls hold the inputs.
        length: padded length in tokens; recorded likewise.
        runs: timed rounds.
        warmup: rounds before them that are not counted.
        threads: of torch inside an operator, restored afterwards. Other runtimes fix theirs when a model is loaded:
            load it with the same number.
        progress: show a bar.

    Returns:
        by candidate; on a CUDA machine the device is synchronised before and after each call.

    Raises:
        ConfigurationError: if there is no candidate, or a count is below 1 (`warmup`: below 0).
    """
    counts = {"batch": batch, "length": length, "runs": runs, "threads": threads}
    if not candidates or min(counts.values()) < 1 or warmup < 0:
        raise ConfigurationError(
            f"latency: needs at least one candidate, counts from 1 and a warm-up from 0; got candidates "
            f"{sorted(candidates)}, {counts}, warmup {warmup}."
        )
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    rounds = track(
        range(warmup + runs),
        description=f"  latency, {batch} x {length} tokens",
        disable=not progress,
        transient=True,
        console=Console(stderr=True),
    )
    with torch_threads(threads), torch.inference_mode():
        for turn in rounds:
            for name, call in candidates.items():
                taken = _time(call)
                if turn >= warmup:
                    seconds[name].append(taken)
    return {
        name: Latency(
            mean=float(np.mean(taken)),
            median=float(np.median(taken)),
            p90=float(np.quantile(taken, 0.9)),
            p99=float(np.quantile(taken, 0.99)),
            runs=runs,
            warmup=warmup,
            batch=batch,
            length=length,
            threads=threads,
        )
        for name, taken in seconds.items()
    }


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch computes with that many threads inside; the former number returns, also after an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(call: Call) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
