"""`python -m hf_compress_evaluation.speculative TARGET DRAFT --data texts.jsonl`"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hf_compress_evaluation.intervals import Estimate

    from .measuring import Found


def main(
    target: Annotated[str, typer.Argument(help="Hub id or folder of the large model.")],
    draft: Annotated[str, typer.Argument(help="Hub id or folder of the draft; a folder's record takes the figures.")],
    data: Annotated[Path, typer.Option(help="Texts: csv, jsonl or parquet.")],
    text: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    rows: Annotated[int, typer.Option(min=1, help="Texts, the first that are long enough.")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a text that are its prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each continuation, at most.")] = 64,
    gamma: Annotated[int, typer.Option(min=1, help="Tokens drafted for each forward of the target.")] = 5,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the decoding; 0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of the decoding; 0 leaves all tokens in.")] = 0,
    top_p: Annotated[float, typer.Option(help="Of the decoding; 1 leaves all tokens in.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """How many of a draft's tokens its target accepts, in closed form and counted in decodes with it."""
    from hf_compress import facts, files, foreign
    from hf_compress.cli import shared
    from hf_compress.errors import HfCompressError
    from hf_compress.teachers.model import load_teacher
    from hf_compress_evaluation.examples import read_texts

    from . import Decoding
    from .measuring import Asked, measure

    shared.quiet()
    try:
        decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p)
        asked = Asked(decoding=decoding, gamma=gamma, prompt=prompt, new_tokens=new_tokens, seed=seed)
        tokenizer = foreign.tokenizer(target)
        used, ids = chosen(tokenizer, read_texts(data, text), prompt, rows)
        large, small = load_teacher(target), load_teacher(draft)
        foreign.check_ids(ids, large, tokenizer)
        found = measure(large, small, ids, asked, bar=sys.stderr.isatty())
        about = facts.Data(name=data.name, rows=len(used), fingerprint=facts.fingerprint(used))
        if Path(draft).is_dir():
            facts.append(Path(draft), *found.measurements(about))
        if output is not None:
            files.write_text(output, json.dumps(found.as_json(), indent=1) + "\n")
    except HfCompressError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        shared.print_table(("figure", "where", "value"), table(found), below(found))


def chosen(tokenizer: Any, texts: Sequence[str], prompt: int, rows: int) -> tuple[list[str], list[list[int]]]:
    """The first texts that are as long as a prompt, and their ids.

    Raises:
        MismatchError: if there is none.
    """
    from hf_compress import foreign
    from hf_compress.errors import MismatchError

    used, found = list[str](), list[list[int]]()
    with foreign.encoding(tokenizer):
        for text in texts:
            ids = list(tokenizer(text)["input_ids"])
            if len(ids) >= prompt:
                used.append(text)
                found.append(ids)
            if len(used) == rows:
                break
    if not used:
        raise MismatchError(
            f"speculative: none of the {len(texts)} texts has {prompt} tokens. Take longer texts or a shorter prompt."
        )
    return used, found


def table(found: Found) -> list[tuple[str, ...]]:
    """A line for each figure."""
    written, decoded = "texts that the target writes", "decodes with the draft"
    lines: list[tuple[str, ...]] = [
        ("acceptance, closed form", "the texts", _share(found.on_texts)),
        ("acceptance, closed form", written, _share(found.on_continuations)),
        ("acceptance, counted", decoded, _share(found.acceptance)),
        ("tokens a target call, from the closed form", written, f"{found.tau_of_alpha:.2f}"),
        ("tokens a target call, counted", decoded, _number(found.block_efficiency)),
        ("speed-up, estimated", decoded, f"{found.estimated_speed_up:.2f}"),
        ("speed-up, timed", decoded, f"{found.timed_speed_up:.2f}"),
    ]
    if not (found.asked.decoding.greedy or found.asked.decoding.whole):
        lines.insert(2, ("the same, drafted as transformers does", written, _share(found.drafted)))
    if not found.asked.decoding.greedy:
        lines.insert(2, ("acceptance if greedy, closed form", written, _share(found.greedy)))
    return lines


def below(found: Found) -> list[str]:
    """The conditions."""
    asked = found.asked
    twice = "transformers gives the draft temperature, top-k and top-p twice: the decodes are of that"
    return [
        *([] if asked.decoding.greedy or asked.decoding.whole else [twice]),
        f"{asked.decoding}, {asked.gamma} tokens drafted a call; {found.texts} prompts of {asked.prompt} tokens, "
        f"continued by at most {asked.new_tokens}; in brackets 95 % intervals over prompts",
        f"a token takes {1000 * found.target_seconds:.1f} ms of the target alone and {1000 * found.draft_seconds:.1f} "
        f"of the draft, c = {found.cost:.2f}; estimated: tokens a call / (c · {asked.gamma} + 1)",
    ]


def _share(found: Estimate) -> str:
    return _ranged(found, "{:.1%}")


def _number(found: Estimate) -> str:
    return _ranged(found, "{:.2f}")


def _ranged(found: Estimate, form: str) -> str:
    if found.value is None:
        return f"– ({found.note})"
    said: Any = form.format(found.value)
    return said if found.interval is None else f"{said} ({' to '.join(form.format(each) for each in found.interval)})"


if __name__ == "__main__":
    typer.run(main)
