"""Teacher outputs by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from transformers import Trainer

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Sizes
from hf_compress.teachers.table import TableTeacher

TASK = "text-classification"


class ById(toys.Toy):
    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(columns=frozenset({"id"}))


def collate(batch: list[dict[str, Any]]) -> Inputs:
    return testing.collate(batch) | {"id": torch.tensor([row["id"] for row in batch])}


def train(folder: Path, teacher: TableTeacher, ids: list[int]) -> Trainer:
    plain, _ = toys.run(folder, toys.Toy(), TASK)
    rows = [row | {"id": number} for row, number in zip(testing.rows(TASK), ids, strict=True)]
    made = Trainer(
        model=testing.models(TASK)[0],
        args=plain.args,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[DistillCallback(teacher, ById())],
    )
    made.train()
    return made


def test_a_table_of_a_model_s_outputs_teaches_as_the_model_does(tmp_path: Path) -> None:
    plain, teacher = toys.run(tmp_path, toys.Toy(), TASK)
    plain.train()
    batch = {name: value for name, value in testing.collate(testing.rows(TASK)).items() if name != "labels"}
    with torch.no_grad():
        logits = teacher.eval()(**batch).logits
    ids = [3, 0, 2, 1]
    table = torch.zeros_like(logits)
    table[ids] = logits
    made = train(tmp_path, TableTeacher({"logits": table}, column="id"), ids)
    assert toys.logged(made, "distill_loss") == pytest.approx(toys.logged(plain, "distill_loss"), rel=1e-5)
    assert made.model.config.compression["teacher"]["architecture"] == "table"


def test_ids_that_are_not_there_are_refused(tmp_path: Path) -> None:
    table = TableTeacher({"logits": torch.zeros(4, testing.CLASSES)}, column="id")
    with pytest.raises(MismatchError, match=r"id 4 of 'id'; there are 0 … 3"):
        train(tmp_path, table, [0, 1, 2, 4])
    with pytest.raises(MismatchError, match="no column 'id'"):
        table({"input_ids": torch.zeros(1, 1)})


def test_taps_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ask for \['logits'\]"):
        train(tmp_path, TableTeacher({"hidden:-1": torch.zeros(4, 3)}, column="id"), [0, 1, 2, 3])
    with pytest.raises(ConfigurationError, match="one row an id"):
        TableTeacher({"logits": torch.zeros(2, 3), "hidden:-1": torch.zeros(3, 3)}, column="id")
    with pytest.raises(ConfigurationError, match="no model to run"):
        TableTeacher({"logits": torch.zeros(2, 3)}, column="id").run()
