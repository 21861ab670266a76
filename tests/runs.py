"""The authors' finished runs, as rows of their table."""

from __future__ import annotations

from typing import Any

import oracle


def published() -> list[dict[str, Any]]:
    """1,239 runs on eight tasks, by column."""
    data, names = oracle.load("distiller_pipeline_table"), oracle.metadata("distiller_pipeline_table")["categories"]
    columns = {
        "#example" if column == "n_example" else column: [
            names[column][int(value)] if column in names else float(value) for value in data[column]
        ]
        for column in data
        if column != "dataset_features"
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
