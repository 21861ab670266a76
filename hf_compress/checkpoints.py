"""Which of a run's checkpoints are whole: a manifest with sizes and hashes is written last and read on resuming."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import files
from .errors import ForeignFileError, ResumeError

logger = logging.getLogger(__name__)

MANIFEST = "hf_compress-manifest.json"
STATE = ("optimizer.pt", "scheduler.pt")
"""What training goes on without, with other numbers."""
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "*/adapter_model.safetensors")
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Writes the manifest of a checkpoint, once all else of it is on the disk."""
    inner = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = sorted(path for path in inner if path.name != MANIFEST)
    files.sync(folder)
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in names
    }
    files.write_text(folder / MANIFEST, json.dumps({"files": listed}, indent=1) + "\n")


def fault(folder: Path, processes: int | None = 1, beside: Sequence[str] = ()) -> str | None:
    """What is wrong with a checkpoint; None: it is whole.

    Args:
        folder: of the checkpoint.
        processes: of the run that is to go on from it; None: it is FSDP's or DeepSpeed's, which name files otherwise,
            so that the manifest alone decides.
        beside: files of ours that the run needs too.
    """
    try:
        if processes and (missing := _missing(folder, processes, beside)):
            return f"has no {missing}"
        if (folder / MANIFEST).exists():
            return _differs(folder)
        return _unreadable(folder) if processes else None
    except ForeignFileError as error:
        return f"holds a {Path(error.path).name} that {error.problem.rstrip('.')}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _missing(folder: Path, processes: int, beside: Sequence[str]) -> str | None:
    """A file without which a run cannot go on as it was."""
    if not any(any(folder.glob(name)) for name in WEIGHTS):
        return "weights in safetensors"
    shards = {name for index in folder.glob("*.safetensors.index.json") for name in files.shards(index).values()}
    random = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    wanted = (*sorted(shards), *beside, *STATE, "trainer_state.json", *random)
    missing = next((name for name in wanted if not files.is_file(folder / name)), None)
    if missing in random and any(folder.glob("rng_state*.pth")):
        return f"{missing}: it was written by another number of processes"
    return missing


def _differs(folder: Path) -> str | None:
    listed = files.read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict) or not listed:
        return f"has a {MANIFEST} that lists no files"
    for name, entry in listed.items():
        path = files.inside(folder, name)
        if not path.is_file():
            return f"has no {name}"
        size = path.stat().st_size
        if not isinstance(entry, dict) or entry.get("bytes") != size or entry.get("sha256") != files.sha256(path):
            return f"holds another {name} ({size} bytes) than was written"
    return None


def _unreadable(folder: Path) -> str | None:
    """Of a checkpoint that was written without us, or before we came to its manifest.

    Raises:
        ForeignFileError: for weights that are cut off.
    """
    try:  # our own run's, as long as its log and with what was not finite in it
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return "holds a trainer_state.json that is cut off"
    for path in folder.glob("*.safetensors"):
        with files.safetensors(path):
            pass
    for path in (*(folder / name for name in STATE), *folder.glob("rng_state*.pth")):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):  # damaged names, methods, lengths
            broken = path.name
        if broken:
            return f"holds a {path.name} that cannot be read"
    return None


def found(output: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    numbered = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True) if path.is_dir()]


def sealed(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next((folder for folder in found(output) if (folder / MANIFEST).exists()), None)


def newest_whole(output: Path, processes: int | None = 1, beside: Sequence[str] = ()) -> Path | None:
    """The newest checkpoint that is whole, with a word on those passed over; None: there is no checkpoint at all.

    Raises:
        ResumeError: if there are checkpoints and none is whole.
    """
    passed: list[str] = []
    for folder in found(output):
        said = fault(folder, processes, beside)
        if said is None:
            for line in passed:
                logger.warning("hf_compress: %s is passed over, and the run goes on from %s", line, folder.name)
            return folder
        passed.append(f"{folder.name}, which {said},")
    if passed:
        raise ResumeError(f"no checkpoint is whole: {' '.join(passed).rstrip(',')}. Start afresh, or restore one.")
    return None


def chosen(output: Path, resume: Any, processes: int | None = 1, beside: Sequence[str] = ()) -> Any:
    """What `Trainer.train` is to resume from, in the place of what it was asked to.

    Raises:
        ResumeError: if the checkpoint that was named is not whole, or none is.
    """
    if resume is True:
        folder = newest_whole(output, processes, beside)
        return True if folder is None else str(folder)  # the Trainer says that there is none
    named = Path(resume) if isinstance(resume, str | os.PathLike) and str(resume) else None
    if named is not None and named.is_dir() and (said := fault(named, processes, beside)):
        raise ResumeError(
            f"{named.name} {said}; going on from it would give other numbers. Resume from another "
            "(resume_from_checkpoint=True takes the newest that is whole), or load its weights and begin afresh."
        )
    return resume
