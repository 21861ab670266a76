"""Pulls a model folder from the hub: whole and compared with its record, or not at all.

    pull("me/my-small-model", Path("student"))

What `push` sends is what comes: weights as safetensors, ONNX, configuration, tokenizer, card, record and evidence.
Pickles stay there. Files arrive in a hidden folder beside the target, so a pull that was cut off goes on where it
was; each is compared with the hub's own hash and with the record before the folder gets its name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.hf_api import RepoFile

from . import facts, files, verifying
from .errors import ConfigurationError, ForeignFileError, HubError
from .outgoing import ALLOWED, PICKLES, WEIGHTS
from .remote import Remote, file_hashes, remote_hash

_OF_THE_CLIENT = ".cache"
"""What huggingface_hub keeps beside the files to go on after an interruption."""


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A folder that is here, and where it came from."""

    folder: Path
    repository: str
    oid: str
    """Of the commit."""
    files: tuple[str, ...]
    left: tuple[str, ...]
    """Files of the repository that are no part of a model folder, such as pickled weights."""
    recorded: int
    """Files whose hashes the record names; 0: there is no record, or it names none."""
    new: bool = True
    """False: the folder held exactly these files."""

    def describe(self) -> str:
        """What was done, in sentences for a terminal."""
        what = f"{len(self.files)} files of {self.repository} at {self.oid[:7]}"
        lines = [f"{what} are in {self.folder}." if self.new else f"{self.folder} holds these {what} already."]
        if self.recorded:
            lines.append(f"{self.recorded} of them have the hashes that {facts.FILE} records.")
        else:
            lines.append(f"No {facts.FILE} records their hashes: they were compared with the hub's own alone.")
        if self.left:
            lines.append(f"Left there: {', '.join(self.left)}.")
        return " ".join(lines)


def pull(
    repo_id: str,
    folder: Path | None = None,
    *,
    revision: str = "main",
    token: str | None = None,
    endpoint: str | None = None,
) -> Pulled:
    """Brings a repository's model folder here.

    Args:
        folder: to make; None: named like the repository, in the working folder. One that holds other files is refused.
        revision: branch, tag or commit.
        token: None: that of the login or of `HF_TOKEN`, if there is one.
        endpoint: None: the public hub or `HF_ENDPOINT`.

    Raises:
        HubError: if the hub cannot be asked, the repository holds no weights that are pulled, or files differ from its
            record, all of them named. There is then no folder. After an interruption the same command goes on.
        ConfigurationError: if the folder is there and holds something else.
    """
    remote = Remote.of(repo_id, token=token, endpoint=endpoint)
    with remote.asking(f"for {revision} of {repo_id}", "Nothing was pulled. Check repository, revision and token."):
        oid = str(remote.api.model_info(repo_id, revision=revision).sha)
    listed = remote.files(oid, "Nothing was pulled.")
    wanted = {name: file for name, file in listed.items() if ALLOWED.fullmatch(name)}
    _check_names(repo_id, wanted)
    target = (Path(repo_id.rpartition("/")[2]) if folder is None else Path(folder)).absolute()
    new = not _there(target, wanted)
    if new:
        stage = target.with_name(f".{target.name}.pulling")
        _fetch(remote, oid, wanted, stage)
        _check(repo_id, stage, wanted)
        stage.replace(target)
    return Pulled(
        folder=target,
        repository=repo_id,
        oid=oid,
        files=tuple(sorted(wanted)),
        left=tuple(sorted(name for name in listed if name not in wanted and not name.startswith("."))),
        recorded=len(facts.load(target).evidence),
        new=new,
    )


def _check_names(repo_id: str, names: Iterable[str]) -> None:
    if not any(re.fullmatch(rf"{WEIGHTS}|onnx.*\.onnx", name) for name in names):
        raise HubError(
            f"{repo_id} holds no weights as safetensors or ONNX, and pickled ones are not pulled. Nothing was pulled."
        )


def _there(target: Path, wanted: dict[str, RepoFile]) -> bool:
    """Whether the folder holds these files already.

    Raises:
        ConfigurationError: if it holds others.
    """
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"{target} is a file, and a folder is to take its place. Choose another.")
    if not target.exists() or not any(target.iterdir()):
        return False
    if other := next((name for name, file in sorted(wanted.items()) if not _same(target / name, file)), None):
        raise ConfigurationError(
            f"{target} is there, and its {other} is missing or not what the hub holds. Choose another folder, or move "
            "it away. Nothing was pulled."
        )
    return True


def _same(path: Path, file: RepoFile) -> bool:
    return files.is_file(path) and remote_hash(file) in file_hashes(path)


def _fetch(remote: Remote, oid: str, wanted: dict[str, RepoFile], stage: Path) -> None:
    """Fills the hidden folder with exactly these files, as the hub has them; what has arrived before is kept."""
    stage.mkdir(parents=True, exist_ok=True)
    with remote.asking(
        f"for the files of {remote.repo_id}", f"What has arrived is kept in {stage.name}: pull again to go on."
    ):
        # all names are of letters, digits, `.`, `-`, `_` and `/`, so that each is a pattern of itself
        remote.api.snapshot_download(remote.repo_id, revision=oid, local_dir=stage, allow_patterns=sorted(wanted))
    shutil.rmtree(stage / _OF_THE_CLIENT, ignore_errors=True)
    for path in sorted(stage.rglob("*"), reverse=True):  # left by a pull of an earlier commit; files before folders
        if not path.is_dir() and path.relative_to(stage).as_posix() not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _check(repo_id: str, stage: Path, wanted: dict[str, RepoFile]) -> None:
    """Compares the files with the hub and the record; a folder that is not right is removed.

    Raises:
        HubError: naming every file that is not right.
    """
    faults: list[str] = []
    try:
        torn = [name for name, file in wanted.items() if not _same(stage / name, file)]
        faults += [f"{name} did not arrive as the hub has it" for name in torn]
        faults += [f"{each.what}: {each.note}" for each in verifying.failing(verifying.hashes(stage))]
        for name in wanted:
            _check_kind(stage / name)
        files.sync(stage)
    except ForeignFileError as error:
        faults.append(f"{Path(error.path).name} {error.problem.rstrip('.')}")
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    if faults:
        shutil.rmtree(stage, ignore_errors=True)
        raise HubError(
            f"{repo_id} was not pulled: {'; '.join(faults)}, as {facts.FILE} and the hub's own hashes show. Ask its "
            "owner, or pull an earlier revision."
        )


def _check_kind(path: Path) -> None:
    """A file that is called weights or vocabulary and is a pickle, or no safetensors at all."""
    if path.suffix == ".safetensors":
        files.check_safetensors(path)
    if path.suffix == ".model":
        with path.open("rb") as file:
            if file.read(4).startswith(PICKLES):
                raise ForeignFileError(path, "is a pickle, which runs code when loaded.", "Do not load it.")
