"""What a bench runs on: threads or a GPU, the float type of its steps, its clock and its memory.

A process that needs no torch does not load it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hf_compress.errors import ConfigurationError
from hf_compress_evaluation.serving_process import resident

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Raises ConfigurationError for a device or a float type that is not one of these, or is not here."""

    threads: int = 1
    """Of torch and of ONNX Runtime on a CPU."""
    device: Device = "cpu"
    precision: Precision = "float32"
    """Of a step's forward: the other two are mixed precision, as the Trainer has it."""

    def __post_init__(self) -> None:
        for name, kinds in (("device", get_args(Device)), ("precision", get_args(Precision))):
            if getattr(self, name) not in kinds:
                raise ConfigurationError(f"{name} must be one of {', '.join(kinds)}, got {getattr(self, name)!r}.")
        if self.device == "cpu":
            return
        import torch

        if not torch.cuda.is_available():
            raise ConfigurationError("there is no CUDA GPU that torch sees. Leave --device out to measure on the CPU.")

    @property
    def name(self) -> str:
        """Of a row's measurements that are not on a CPU in float32: "cuda, bfloat16"; empty for those."""
        told = [self.device] if self.device != "cpu" else []
        return ", ".join([*told, *([self.precision] if self.precision != "float32" else [])])

    @property
    def options(self) -> str:
        """Of the command, where they are not the defaults."""
        told = f" --device {self.device}" if self.device != "cpu" else ""
        return told + (f" --precision {self.precision}" if self.precision != "float32" else "")

    def begin(self) -> None:
        """Sets torch's threads."""
        import torch

        torch.set_num_threads(self.threads)

    def arguments(self) -> dict[str, Any]:
        """Of the Trainer."""
        return {
            "use_cpu": self.device == "cpu",
            "bf16": self.precision == "bfloat16",
            "fp16": self.precision == "float16",
        }

    def wait(self) -> None:
        """Until what was asked of a GPU is done."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    @contextmanager
    def highest(self) -> Iterator[list[int]]:
        """The most bytes that what is inside takes, over what there were before: of the GPU, or of the process."""
        if self.device == "cpu":
            with _resident() as found:
                yield found
            return
        import torch

        torch.cuda.reset_peak_memory_stats()
        found, before = [0], torch.cuda.memory_allocated()
        yield found
        found[0] = torch.cuda.max_memory_allocated() - before


@contextmanager
def _resident() -> Iterator[list[int]]:
    """By Linux's high-water mark, which begins anew here; a mark that cannot be reset tells nothing, and is 0."""
    found = [0]
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        yield found
        return
    before = resident() or 0
    yield found
    found[0] = max((resident() or 0) - before, 0)  # the mark begins anew some pages off
