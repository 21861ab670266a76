"""transformers' own example scripts with the one line added: equivalents of ours, run with it and without."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "scripts"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem[0] != "_")
LINE = "callbacks=[DistillCallback(teacher)]"
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_line_is_all_that_a_script_needs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    path = FOLDER / f"{name}.py"
    assert path.read_text().count(LINE) == 1
    main = runpy.run_path(str(path))["main"]
    plain, ours = (main(str(tmp_path / str(distil)), distil=distil) for distil in (False, True))

    logs = [{key for entry in run.state.log_history for key in entry} for run in (plain, ours)]
    assert logs[0] < logs[1]
    assert {"distill_loss", "task_loss", "eval_distill_loss"} <= logs[1] - logs[0]
    assert all(entry["distill_loss"] > 0 for entry in ours.state.log_history if "distill_loss" in entry)
    ours.save_model(str(tmp_path / "student"))
    loaded, report = type(ours.model).from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.compression["teacher"]["architecture"] == type(loaded).__name__


def test_the_readme_names_each_script() -> None:
    for name in SCRIPTS:
        assert f"[{name}](tests/scripts/{name}.py)" in README, name
