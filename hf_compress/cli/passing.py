"""Cards, and the way to the hub and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import shared

if TYPE_CHECKING:
    pass


def card(
    folder: shared.Folder,
    licence: Annotated[str | None, typer.Option("--license", help="Of the model, e.g. apache-2.0; recorded.")] = None,
) -> None:
    """Render README.md from what was measured; what you have added outside of its generated parts stays."""
    from hf_compress_cards import card as cards

    from hf_compress import licences

    shared.holds_a_model(folder)
    if licence is not None:
        licences.state(folder, licence)
    shared.tell(f"wrote {cards.write(folder).name}")


def push(
    folder: shared.Folder,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME, or the repository's URL.")],
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Propose the commit as a pull request.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    tag: Annotated[str | None, typer.Option(help="A name for the commit that stays, e.g. v1.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Of the model, where nothing says it.")] = None,
) -> None:
    """Push weights, ONNX, evidence and card in one commit."""
    from hf_compress import hub, licences

    shared.holds_a_model(folder)
    name, endpoint = hub.repository_of(repository)
    shared.quiet()
    if licence is None and sys.stdin.isatty() and licences.of(folder)[0] is None:
        licence = typer.prompt(f"License of the model ({licences.of(folder)[1]})", default="other", err=True)
    if licence is not None:
        licences.state(folder, licence)
    _name_in_card(folder, name)
    pushed = hub.push(
        folder, name, endpoint=endpoint, private=private, create_pr=pull_request, message=message, tag=tag
    )
    shared.tell(pushed.describe())


def pull(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME, or the repository's URL.")],
    folder: Annotated[Path | None, typer.Argument(help="To make; without it one of the repository's name.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
) -> None:
    """Bring a model folder here, compared with its record before it appears; no pickles."""
    from hf_compress import files, hub
    from hf_compress.pulling import pull as pull_folder

    name, endpoint = hub.repository_of(repository)
    shared.quiet()
    pulled = pull_folder(name, folder, revision=revision, endpoint=endpoint)
    shared.tell(files.printable(pulled.describe()))


def _name_in_card(folder: Path, repository: str) -> None:
    """Writes the card with the repository's name, unless the folder holds one that is all its maker's."""
    from hf_compress_cards import card as cards
    from hf_compress_cards import editing

    from hf_compress import files

    path = folder / cards.FILE
    if not path.exists() or editing.is_generated(files.read_text(path)):
        cards.write(folder, repo_id=repository)
