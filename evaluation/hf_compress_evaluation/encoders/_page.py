"""The tables as Markdown; every number is one of the results files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_compress_cards import text

from hf_compress import files
from hf_compress_evaluation.sweep import tables

TITLES = {
    "sentiment": "Sentiment, 3 of 6 layers",
    "two-layers": "Sentiment, 2 of 6 layers",
    "sarcasm": "Sarcasm in headlines, 3 of 6 layers",
    "entities": "Entities in contracts, 3 of 6 layers",
    "pages": "Entities in pages of 512 tokens, 3 of 6 layers as a Longformer of window 64",
    "embeddings": "Embeddings, 3 of 6 layers",
}
NAMES = {"seqeval_f1": "entity F1 (%)", "teacher_cosine": "cosine to the teacher (%)"}
Found = Mapping[str, Any]


def markdown(results: Path) -> str:
    """Sizes, and a section for each table that is there."""
    parts = [_sizes(files.read_json(path))] if (path := results / "sizes.json").exists() else []
    for name, title in TITLES.items():
        if (path := results / f"{name}.json").exists():
            found = files.read_json(path)
            made = _by_hand(found) if "main" in found else tables.markdown(found).rstrip()
            parts.append(f"### {title}\n\n{made}")
    return "\n\n".join(parts)


def _sizes(found: Found) -> str:
    columns = ("layers", "parameters", "bytes, float32 ONNX", "ms for 1", "ms for 32")
    rows = [
        (
            one["layers"],
            f"{one['parameters'] / 1e6:.1f} M",
            f"{one['bytes'] / 1e6:.1f} MB",
            *(f"{1000 * one['latency'][batch]['median']:.2f}" for batch in ("1", "32")),
        )
        for one in found["models"]
    ]
    said = (
        f"The methods of a table train the same model. Medians of rows of {found['length']} tokens on one thread of "
        f"ONNX Runtime. {found['command']}, {found['date']}, {found['machine']}."
    )
    return f"{text.table(columns, rows)}\n\n{text.escape(said)}"


def _by_hand(found: Found) -> str:
    figures = list(found["methods"][0]["figures"])
    gap = any("gap_closed" in one for one in found["methods"])
    columns = ["method", "learning rate", *(NAMES.get(name, f"{name} (%)") for name in figures)]
    columns += ["gap closed (%)"] if gap else []
    rows = []
    for one in found["methods"]:
        rate = f"{one['learning_rate']:g}" if "learning_rate" in one else tables.MISSING
        cells = [one["method"], rate, *(_figure(one["figures"][name]) for name in figures)]
        rows.append([*cells, *([_gap(one.get("gap_closed"))] if gap else [])])
    budget = found["budget"]
    counts = ", ".join(f"{count:,} {part}" for part, count in budget["rows"].items())
    said = (
        f"Rows: {counts}; {budget['epochs']:g} epochs. Rates were chosen on the choice part with the first seed. ± is "
        "the standard deviation over seeds, ranges are 95 % intervals over the rows of the mean over seeds. "
        f"{found['command']}, {found['date']}, {found['machine']}."
    )
    return f"{text.table(columns, rows)}\n\n{text.escape(said)}"


def _figure(one: Found) -> str:
    spread = "" if one["sd"] is None else f" ± {100 * one['sd']:.1f}"
    return f"{100 * one['mean']:.1f}{spread}{_range(one['interval'])}"


def _gap(one: Found | None) -> str:
    if one is None or one["value"] is None:
        return tables.MISSING
    return f"{100 * one['value']:.0f}{_range(one['interval'], 0)}"


def _range(interval: tuple[float, float] | None, digits: int = 1) -> str:
    return "" if interval is None else f" ({100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f})"
