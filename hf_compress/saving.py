"""What a run adds to a Trainer's checkpoints, and what it asks of one before it goes on from it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn

from . import checkpoints, files
from .distiller import PREFIX
from .errors import ConfigurationError, ResumeError
from .networks import OPTIMIZERS, WEIGHTS
from .resume import SIDE_FILE, read_checkpoint, reload_renamed, resumed_folder

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger(__name__)


class Saving:
    """Wrappers of the Trainer's `train` and of the last that it writes, and what they are told of in between."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.forget()
        self.reset()

    def reset(self) -> None:
        """For a new `train()`."""
        self._saved: Path | None = None

    def forget(self) -> None:
        """What was loaded, and what was found whole, is of this `train()` alone."""
        self._loaded: list[str] | None = None
        self._whole: Path | None = None

    # ------------------------------------------------------------------ before a run goes on

    def train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`Trainer.train` that resumes from a checkpoint that is whole, or says what is wrong with it."""

        @functools.wraps(original)
        def train(*args: Any, **kwargs: Any) -> Any:
            if args:
                args = (self._chosen(args[0]), *args[1:])
            elif "resume_from_checkpoint" in kwargs:
                kwargs["resume_from_checkpoint"] = self._chosen(kwargs["resume_from_checkpoint"])
            begun = self.run.trainer.state.global_step
            try:
                return original(*args, **kwargs)
            except Exception as error:  # whatever ends a run: what is left of it is said beside
                reached = self.run.trainer.state.global_step
                if reached > begun and not isinstance(error, ResumeError | ConfigurationError):
                    self._note_whole(error)
                raise

        return train

    def _chosen(self, resume: Any) -> Any:
        found = checkpoints.chosen(self._output, resume, self._processes, self._beside)
        self._whole = Path(found) if found and found is not True else None
        return found

    def _note_whole(self, error: Exception) -> None:
        """Says in an error which checkpoint is left, if the newest that was sealed is whole."""
        with suppress(OSError):
            sealed = checkpoints.sealed(self._output)
            if sealed is not None and checkpoints.fault(sealed, self._processes, self._beside) is None:
                error.add_note(f"{sealed.name} is whole: train(resume_from_checkpoint=True) goes on from it.")

    @property
    def _output(self) -> Path:
        return Path(self.run.trainer.args.output_dir)

    @property
    def _processes(self) -> int | None:
        """Of the run; None under FSDP and DeepSpeed, whose checkpoints have other files."""
        trainer = self.run.trainer
        return None if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled else int(trainer.args.world_size)

    @property
    def _beside(self) -> tuple[str, ...]:
        """Files of ours without which a checkpoint of this run is not whole."""
        distiller = self.run.distiller
        adapters = hasattr(self.run.student, "peft_config") and distiller.state_dict()
        networks = (WEIGHTS, OPTIMIZERS) if any(one.overrides("networks") for one in distiller.objectives) else ()
        return (*networks, *((SIDE_FILE,) if adapters else ()))

    def note_loaded(self, _module: nn.Module, keys: Any) -> None:
        """Told by the distiller what a checkpoint of the model lacked of it."""
        self._loaded = [key for key in keys.missing_keys if PREFIX in key or key.split(".")[0] in self.run.distiller]

    def resume(self, step: int) -> None:
        """A resumed run has every entry of the distiller from the checkpoint, or from the side file, or stops."""
        run, folder = self.run, resumed_folder()
        if folder is not None and folder != self._whole:  # a second `train()` has not been asked before
            self._chosen(folder)
        if folder is not None and reload_renamed(run.student, folder):
            logger.info("hf_compress: %s names weights as older releases did; they were loaded anew", folder.name)
        if run.networks:
            if folder is None:
                raise ResumeError(f"step {step}: no checkpoint folder is known to load the networks from.")
            run.networks.load(folder)
        wanted = set(run.distiller.state_dict())
        if not wanted or self._loaded == []:
            return
        missing = wanted
        if folder is not None:
            found = read_checkpoint(folder)
            missing = wanted - set(found)
            if not missing:
                run.distiller.load_state_dict(found)
                return
        raise ResumeError(
            f"the checkpoint at step {step} has no state for {sorted(missing)[:3]}; resuming would restart it and give "
            "other numbers. Resume from a checkpoint of a run with this method, or start afresh."
        )

    # ------------------------------------------------------------------ in a checkpoint

    def save_rng_state(self, original: Callable[[str], None]) -> Callable[[str], None]:
        """The last that the Trainer writes before it deletes older checkpoints: ours is to be there by then."""

        def save(output_dir: str) -> None:
            original(output_dir)
            if self.run.trainer.args.should_save:
                self._save(Path(output_dir))

        return save

    def _save(self, folder: Path) -> None:
        """Writes what a checkpoint does not hold: networks, and our state beside adapters alone."""
        self._saved = folder
        if not folder.is_dir():
            return
        if self.run.networks:
            self.run.networks.save(folder)
        state = self.run.distiller.state_dict()
        if state and hasattr(self.run.student, "peft_config"):
            with files.atomic_file(folder / SIDE_FILE) as part:
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, part)

    def seal(self, folder: Path) -> None:
        """Closes a checkpoint with its manifest; `folder` is where it lies if the Trainer wrote no random state."""
        if self._saved is None:
            self._save(folder)
        assert self._saved is not None  # just set
        folder, self._saved = self._saved, None
        if folder.is_dir():
            checkpoints.seal(folder)
