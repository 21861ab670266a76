"""Progress bars of long work, on stderr, which go when they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def bars(visible: bool) -> Progress:
    """Progress bars on stderr, which go when they are done; several tasks may share one display."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not visible,
    )


Bars = bool | Progress
"""Whether bars are shown, or the display of `bars` that a task is added to."""


def visible(progress: Bars) -> bool:
    """Whether a measurement may show a bar of its own, which a display that is shown already does not allow."""
    return progress is True


@contextmanager
def shown(name: str, total: int, *, bar: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; gives what to call after each of `total` steps."""
    with bars(bar) as progress:
        task = progress.add_task(name, total=total, loss="")
        yield lambda: progress.advance(task)
