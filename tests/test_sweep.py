"""Methods side by side: one budget for all, finished runs kept, exact tests, tables that say what the record says."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hf_compress_evaluation import intervals
from hf_compress_evaluation.sweep import paired, tables
from hf_compress_evaluation.sweep.summary import Row, choose, summarise
from recipes import ROWS, write_inputs
from scipy.stats import ttest_rel
from transformers import TrainerState
from typer.testing import CliRunner

from hf_compress import DistillCallback, bars, cli, entries, facts, fitting, sweeping
from hf_compress.errors import ConfigurationError, ForeignFileError, HfCompressError, UnknownNameError
from hf_compress.recipe import Recipe, read_recipe
from hf_compress.teachers.cache import CacheTeacher

METHODS = "kd:temperature=4,minilm:relation_heads=4"
NAMES = ("alone", *METHODS.split(","))
FAILING = "minilm"
"""Its 48 heads of relation do not divide the tiny models' width."""
STEPS = 2 * math.ceil((ROWS["train"] + ROWS["unlabelled"]) / 12)
HEADING = {"accuracy": "accuracy (%)", "label_loyalty": "label loyalty (%)"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains its teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    values = write_inputs(folder)
    values["teacher_training"] = {"learning_rate": 1e-3, "epochs": 2, "batch_size": 12}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def run(recipe: Path | Recipe, methods: str, output: Path, **settings: Any) -> sweeping.Swept:
    given = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    quiet = {"tell": lambda line: None, "progress": False}
    return sweeping.run(given, entries.read(methods), output=output, **(quiet | settings))


@pytest.fixture(scope="module")
def swept(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> sweeping.Swept:
    """Two methods and the baseline with two seeds, in one go: what the tests below look at."""
    return run(recipe, METHODS, tmp_path_factory.mktemp("swept") / "made", seeds=2)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training anything fails the test."""
    monkeypatch.setattr(fitting, "fit", lambda *args, **kwargs: pytest.fail("trained first"))


def rows_of(folder: Path) -> dict[str, Row]:
    return {path.stem: Row.model_validate_json(path.read_text()) for path in (folder / "rows").iterdir()}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "rows").iterdir()}


def of(found: dict[str, Any], method: str) -> dict[str, Any]:
    (one,) = [each for each in found["methods"] if each["method"] == method]
    return one  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- what is run


def test_every_method_has_the_same_steps_rates_and_seeds(swept: sweeping.Swept) -> None:
    runs = [one for one in swept.found["runs"] if one["method"] != "teacher"]
    assert [(one["method"], one["seed"]) for one in runs] == [(name, seed) for seed in (0, 1) for name in NAMES]
    assert {one["steps"] for one in runs} == {STEPS} == {swept.found["budget"]["steps"]}
    assert {one["learning_rate"] for one in runs} == {1e-3}
    assert swept.found["budget"] | {"seconds_per_run": 0} == {
        "steps": STEPS, "epochs": 2.0, "batch_size": 12, "rows": ROWS["train"] + ROWS["unlabelled"],
        "labelled_rows": ROWS["train"], "choice_rows": ROWS["choice"], "test_rows": ROWS["test"],
        "learning_rates": [1e-3], "seeds": [0, 1], "runs_per_method": 2, "seconds_per_run": 0,
        "chosen_with_first_seed": False,
    }  # fmt: skip


def test_every_training_gets_the_same_start_rows_batches_and_seed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Trainer is given; the baseline cannot learn from rows without labels, and repeats the others."""
    seen: dict[str, tuple[Any, ...]] = {}

    def fit(model: Any, tokenizer: Any, rows: Any, how: Any, target: Path, **settings: Any) -> None:
        start = facts.fingerprint(model.state_dict().values())
        taught = any(isinstance(each, DistillCallback) for each in settings["callbacks"])
        seen[f"{target.name}, {settings['seed']}"] = (start, len(rows), how, settings["steps"], taught)
        raise HfCompressError("far enough")

    given = read_recipe(recipe).model_copy(update={"teacher_training": None, "seed": 7})
    monkeypatch.setattr(fitting, "fit", fit)
    run(given, METHODS, tmp_path / "made", learning_rates=[1e-3, 2e-3], seeds=2)

    assert len(seen) == 12
    assert {name.rpartition(" ")[2] for name in seen} == {"7", "8"}
    assert len({found[0] for found in seen.values()}) == 1
    assert {name: found[1] for name, found in seen.items()} == {
        name: ROWS["train"] + (0 if name.startswith("alone") else ROWS["unlabelled"]) for name in seen
    }
    for rate in (1e-3, 2e-3):
        assert sum(found[2].learning_rate == rate for found in seen.values()) == 6
    assert {found[2].batch_size for found in seen.values()} == {12}
    assert {found[3] for found in seen.values()} == {STEPS}
    assert {name: found[4] for name, found in seen.items()} == {name: not name.startswith("alone") for name in seen}
    (teacher,) = [row for row in rows_of(tmp_path / "made").values() if row.method == "teacher"]
    assert teacher.seed == 7  # it is trained by nobody here, and has no spread over seeds


def test_rates_are_tried_with_the_first_seed_alone_where_asked(recipe: Path, tmp_path: Path) -> None:
    given = read_recipe(recipe).model_copy(update={"teacher_training": None})
    settings: dict[str, Any] = {"learning_rates": [1e-3, 1e-6], "seeds": 2, "choose_once": True}
    found = run(given, "kd", tmp_path / "made", **settings).found
    again = run(given, "kd", tmp_path / "made", **settings).found
    assert found["runs"] == again["runs"]
    assert (found["budget"]["runs_per_method"], found["budget"]["chosen_with_first_seed"]) == (3, True)
    for name in ("alone", "kd"):
        runs = [(one["seed"], one["learning_rate"]) for one in found["runs"] if one["method"] == name]
        assert runs == [(0, 1e-3), (0, 1e-6), (1, of(found, name)["learning_rate"])]
        assert of(found, name)["seeds"] == 2
    assert "choice rows with the first seed is shown" in (tmp_path / "made" / "sweep.md").read_text()


@pytest.mark.slow
def test_a_teacher_that_is_run_once_teaches_the_same(
    recipe: Path, swept: sweeping.Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[tuple[str, Path]] = []
    add = CacheTeacher._add

    def counted(self: CacheTeacher, key: str, kept: Any) -> None:
        filled.append((key, self.folder))
        add(self, key, kept)

    monkeypatch.setattr(CacheTeacher, "_add", counted)
    cached = run(recipe, METHODS, tmp_path / "made", seeds=2, learning_rates=[1e-3, 2e-3], cache=True)
    assert [one["error"] for one in cached.found["methods"]] == [None] * 4
    for name in NAMES:
        one, two = (
            {run["seed"]: run for run in found["runs"] if (run["method"], run["learning_rate"]) == (name, 1e-3)}
            for found in (swept.found, cached.found)
        )
        assert [run["accuracy"] for run in one.values()] == [run["accuracy"] for run in two.values()]
    assert len(filled) == len(set(filled)) > 0
    assert len({folder for _, folder in filled}) == 4  # two methods, two teachers
    assert {path.name for path in (tmp_path / "made").iterdir() if path.is_dir()} == {"rows", "seed-0", "seed-1"}


def test_a_seed_has_one_teacher_and_only_it_and_the_rows_are_kept(swept: sweeping.Swept) -> None:
    for seed in (0, 1):
        kept = {path.name for path in (swept.folder / f"seed-{seed}").iterdir()}
        assert kept == {"teacher", "stages.json"}
    teachers = [one for one in swept.found["runs"] if one["method"] == "teacher"]
    assert [one["seed"] for one in teachers] == [0, 1]
    assert len(list((swept.folder / "rows").iterdir())) == 2 * (1 + len(NAMES))


def test_a_run_says_the_settings_that_it_was_trained_with(swept: sweeping.Swept) -> None:
    used = {one["method"]: one["objectives"] for one in swept.found["runs"]}
    assert used["alone"] == used["teacher"] == []
    (kd,), (minilm,) = used[NAMES[1]], used[NAMES[2]]
    assert (kd["name"], kd["settings"]["temperature"]) == ("kd", 4)
    assert (minilm["name"], minilm["settings"]["relation_heads"]) == ("minilm", 4)


def test_a_killed_sweep_goes_on_in_its_run_and_ends_with_the_same_rows(
    recipe: Path,
    swept: sweeping.Swept,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once before a row, once in the middle of a training."""

    def stop(line: str) -> None:
        if line.startswith("row 3 of 6"):
            raise KeyboardInterrupt

    made = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        run(recipe, METHODS, made, seeds=2, tell=stop)
    first = contents(made)
    assert len(first) == 3  # the teacher, and two rows
    assert not (made / "sweep.json").exists()

    def kill(shown: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS - 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting._Shown, "on_step_end", kill)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, METHODS, made, seeds=2)
    assert contents(made) == first
    with caplog.at_level("INFO", "hf_compress"):
        found = run(recipe, METHODS, made, seeds=2).found
    assert f"continues from checkpoint-{STEPS // 2}" in caplog.text
    assert {name: contents(made)[name] for name in first} == first

    def lasting(row: Row) -> dict[str, Any]:
        return row.model_dump(exclude={"seconds", "date"})

    assert {name: lasting(row) for name, row in rows_of(made).items()} == {
        name: lasting(row) for name, row in rows_of(swept.folder).items()
    }
    assert {**of(found, NAMES[1]), "seconds": None} == {**of(swept.found, NAMES[1]), "seconds": None}


def test_a_finished_sweep_trains_nothing_and_changes_no_row(
    recipe: Path, swept: sweeping.Swept, untrained: None
) -> None:
    before, told = contents(swept.folder), list[str]()
    record = (swept.folder / "sweep.json").read_bytes()
    again = run(recipe, METHODS, swept.folder, seeds=2, tell=told.append)
    assert contents(swept.folder) == before
    assert (swept.folder / "sweep.json").read_bytes() == record
    assert again.found == swept.found
    assert told == []


def test_another_budget_is_refused_and_named(recipe: Path, swept: sweeping.Swept, untrained: None) -> None:
    before, given = contents(swept.folder), read_recipe(recipe)
    for changes, said in [
        ({"training": given.training.model_copy(update={"epochs": 3})}, "steps, training changed"),
        ({"data": given.data.model_copy(update={"max_length": 8})}, "data changed"),
        ({"student": given.student.model_copy(update={"keep": "last"})}, "student changed"),
        ({"alpha": 0.5}, "alpha changed"),
    ]:
        with pytest.raises(ConfigurationError, match=rf"another budget: {said}.*--output"):
            run(given.model_copy(update=changes), METHODS, swept.folder, seeds=2)
    assert contents(swept.folder) == before


def test_a_row_that_is_not_one_is_refused(recipe: Path, swept: sweeping.Swept, untrained: None) -> None:
    path = swept.folder / "rows" / "alone-0.001-seed-0.json"
    whole = path.read_text()
    try:
        for text in ("{}", whole.replace(swept.found["fingerprint"], "0" * 16)):
            path.write_text(text)
            with pytest.raises(ForeignFileError, match="Remove it, and it is run again"):
                run(recipe, METHODS, swept.folder, seeds=2)
    finally:
        path.write_text(whole)


def test_a_method_that_fails_is_a_row_with_its_error_and_the_others_go_on(recipe: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    arguments = ["sweep", recipe, "--methods", f"{FAILING},kd", "--output", made, "--format", "markdown"]
    said = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert said.exit_code == 1
    assert said.stdout == (made / "sweep.md").read_text()
    assert f"failed: {FAILING}\n" in said.stderr
    found = json.loads((made / "sweep.json").read_text())
    failed = of(found, FAILING)
    assert failed["error"].startswith("MismatchError: minilm: relation_heads=48")
    assert (failed["failed"], failed["accuracy"], failed["against"]) == (1, None, {})
    assert set(of(found, "kd")["against"]) == {"alone"}  # the first method has no rows to compare with
    (row,) = [row for row in tables.rows(found) if row["method"] == FAILING]
    assert row["accuracy (%)"] == "failed"
    assert set(row.values()) == {FAILING, "failed", tables.MISSING}
    for _, render in tables.FORMATS.values():
        assert "48 does not divide the width 32" in render(found)

    before = contents(made)
    told: list[str] = []
    run(recipe, f"{FAILING},kd", made, tell=told.append)  # only what failed is tried again
    changed = {name for name, what in contents(made).items() if before[name] != what}
    assert changed == {f"{FAILING}-0.001-seed-0.json"}
    assert [line for line in told if line.startswith("row")] == [f"row 2 of 3: {FAILING}, learning rate 0.001, seed 0"]


def test_a_training_takes_its_bar_from_a_display_that_it_shares() -> None:
    display = bars.bars(False)
    outer = display.add_task("sweep", total=2, loss="")
    with fitting._Shown("one", display) as shown:
        shown.on_train_begin(None, TrainerState(max_steps=4), None)
        assert [task.description for task in display.tasks] == ["sweep", "one"]
    assert [task.id for task in display.tasks] == [outer]


def test_no_file_names_a_folder_of_this_machine(recipe: Path, swept: sweeping.Swept) -> None:
    for path in [*(swept.folder / "rows").iterdir(), *swept.folder.glob("*.*")]:
        text = path.read_text()
        assert str(swept.folder.parent) not in text, path.name
        assert str(recipe.parent) not in text, path.name


def test_the_message_of_an_error_keeps_no_folder() -> None:
    said = sweeping._said(ForeignFileError(Path("/home/me/data/rows.csv"), "does not\nexist.", "See https://a.b/c/d."))
    assert said == "ForeignFileError: …/rows.csv: does not exist. See https://a.b/c/d."


# ---------------------------------------------------------------------- found before anything trains


@pytest.mark.parametrize(
    ("methods", "settings", "kind", "said"),
    [
        ("kdd", {}, UnknownNameError, "no method 'kdd'. Did you mean 'kd'"),
        ("kd:temprature=4", {}, ConfigurationError, "has no setting"),
        ("kd:temperature=hot", {}, ConfigurationError, "kd"),
        ("kd:temperature", {}, ConfigurationError, "cannot be read"),
        ("kd:temperature=1:temperature=2", {}, ConfigurationError, "each once"),
        ("kd:name=features", {}, ConfigurationError, "each once"),
        ("kd:temperature=[1", {}, ConfigurationError, "is no YAML"),
        ("kd:temperature=2024-13-45", {}, ConfigurationError, "is no YAML"),
        (f"kd:temperature={'[' * 3000}", {}, ConfigurationError, "is no YAML"),
        ("kd,diswot", {}, ConfigurationError, "'diswot' has no objective to train with, it is a search"),
        ("gkd", {}, ConfigurationError, "'gkd' is for text-generation.* not for text-classification"),
        ("kd,kd", {}, ConfigurationError, "there twice"),
        ("kd,", {}, ConfigurationError, "empty"),
        ("alone", {}, ConfigurationError, "no method to compare"),
        ("kd,alone", {"alone": False}, ConfigurationError, "--no-alone leaves it out"),
        ("kd", {"learning_rates": [1e-3, 1e-3]}, ConfigurationError, "different numbers above 0"),
        ("kd", {"learning_rates": [-1.0]}, ConfigurationError, "different numbers above 0"),
        ("kd", {"data": {"test": None}}, ConfigurationError, "data.test"),
        ("kd", {"data": {"choice": None}, "learning_rates": [1e-3, 2e-3]}, ConfigurationError, "data.choice"),
    ],
)
def test_what_cannot_work_is_found_before_training(
    recipe: Path,
    tmp_path: Path,
    untrained: None,
    methods: str,
    settings: dict[str, Any],
    kind: type[Exception],
    said: str,
) -> None:
    given = read_recipe(recipe)
    changes = {key: value for key, value in settings.items() if key != "data"}
    given = given.model_copy(update={"data": given.data.model_copy(update=settings.get("data", {}))})
    with pytest.raises(kind, match=said):
        run(given, methods, tmp_path / "made", **changes)
    assert not (tmp_path / "made").exists()


def test_a_folder_of_somebody_else_is_left_alone(recipe: Path, tmp_path: Path, untrained: None) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="no sweep made it"):
        run(recipe, "kd", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_refuses_a_format_and_rates_that_it_does_not_know(recipe: Path, untrained: None) -> None:
    for options, kind in [
        (["--format", "word"], UnknownNameError),
        (["--learning-rates", "1e-3,fast"], ConfigurationError),
    ]:
        said = CliRunner().invoke(cli.app, ["sweep", str(recipe), "--methods", "kd", *options])
        assert isinstance(said.exception, kind)


def test_methods_are_read_with_their_settings() -> None:
    one, two, three = entries.read("kd:temperature=4:weight=0.5+features:layers=[0, 1], default,alone")
    assert [(use.name, use.weight, use.settings) for use in one.uses] == [
        ("kd", 0.5, {"temperature": 4}),
        ("features", 1.0, {"layers": [0, 1]}),
    ]
    assert (two.uses, two.taught, three.taught) == ((), True, False)
    assert [use.settings for use in entries.read("kd:temperature=1.0e+1")[0].uses] == [{"temperature": 10.0}]


# ---------------------------------------------------------------------- the tests


def scores(*seeds: str) -> list[list[int]]:
    """`"110"`: right, right, wrong; a text for each seed."""
    return [[int(each) for each in text] for text in seeds]


def test_identical_predictions_give_a_p_of_one() -> None:
    same = scores("1100", "0110")
    assert paired.sign_flip(same, same) == 1
    assert paired.over_seeds(same, same) == 1


def test_a_method_that_is_right_in_every_row_where_the_other_is_wrong_has_two_signs_of_all() -> None:
    """Ten rows, all for one side: 2 of 2¹⁰ sign patterns are as extreme."""
    assert paired.sign_flip(scores("1" * 10), scores("0" * 10)) == pytest.approx(2 / 2**10)
    assert paired.sign_flip(scores("1" * 12), scores("0" * 10 + "11")) == pytest.approx(2 / 2**10)


@pytest.mark.parametrize(("one", "two"), [("1101100", "0101011"), ("1111110", "0000001"), ("10", "01")])
def test_one_seed_is_mcnemars_exact_test(one: str, two: str) -> None:
    a, b = scores(one), scores(two)
    assert paired.sign_flip(a, b) == pytest.approx(intervals.mcnemar(a[0], b[0]))
    assert paired.sign_flip(a, b) == pytest.approx(paired.sign_flip(b, a))


def test_several_seeds_flip_whole_rows() -> None:
    """Against all 2⁶ patterns, one by one."""
    a, b = scores("110110", "111100", "101110"), scores("001011", "010100", "000110")
    difference = (np.array(a) - np.array(b)).sum(0)
    patterns = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean(np.array(patterns) >= abs(difference.sum()))
    assert 0.05 < expected < 0.9
    assert paired.sign_flip(a, b) == pytest.approx(expected)


def test_the_t_test_over_seeds_by_hand() -> None:
    """Differences 1, 2, 3 of 4 rows: t = 2 / (1 / √3) with 2 degrees of freedom, for which p = 1 - t / √(2 + t²)."""
    a, b = scores("1000", "1100", "1110"), scores("0000", "0000", "0000")
    t = 2 * math.sqrt(3)
    assert paired.over_seeds(a, b) == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert paired.over_seeds(a[:1], b[:1]) is None
    assert paired.over_seeds(a[:1] * 2, b[:2]) is None  # the same difference twice has no spread


def test_holm_by_hand() -> None:
    assert paired.holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert paired.holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert paired.holm({}) == {}


def made(method: str, predictions: str, *, seed: int = 0, rate: float | None = 1e-3, **changes: Any) -> Row:
    """A run on test rows that are all of class 1; without predictions it failed."""
    given = tuple(map(int, predictions))
    about = {"fingerprint": "0", "date": "2026-01-01", "machine": "m", "versions": {}}
    figures = {"accuracy": sum(given) / 8, "label_loyalty": 0.5, "parameters": 10, "steps": 4, "seconds": 2.0}
    values = about | ({"choice_accuracy": 0.5, "predictions": given} | figures if given else {}) | changes
    return Row(method=method, seed=seed, learning_rate=rate, **values)


def test_the_learning_rate_is_chosen_on_the_choice_rows_and_not_on_the_test_rows() -> None:
    rows = [
        made("a", "1111", rate=1e-3, choice_accuracy=0.4),
        made("a", "0000", rate=2e-3, choice_accuracy=0.6),
        made("a", "1111", rate=1e-3, choice_accuracy=0.5, seed=1),
        made("a", "0001", rate=2e-3, choice_accuracy=0.6, seed=1),
    ]
    assert choose(rows) == (2e-3, {"0.001": pytest.approx(0.45), "0.002": pytest.approx(0.6)})
    failed = made("a", "", rate=2e-3, seed=1, error="E")
    assert choose([*rows[:3], failed])[0] == 1e-3  # the seeds that are left are not those of the others
    teachers = [made("teacher", "1111", seed=seed, rate=None) for seed in (0, 1)]
    _, one = summarise([*teachers, *rows[:3], failed], [1] * 4)
    assert (one.learning_rate, one.error, one.failed, one.seeds) == (1e-3, "E", 1, 2)
    assert choose([failed]) == (None, {})
    assert choose([made("a", "11", rate=2e-3, choice_accuracy=None), failed]) == (None, {})


def test_rates_that_one_seed_tried_are_compared_by_it_alone() -> None:
    """The second seed ran at the rate that the first one chose, and did worse there than the first at the other."""
    rows = [
        made("a", "1111", rate=1e-3, choice_accuracy=0.5),
        made("a", "0111", rate=2e-3, choice_accuracy=0.6),
        made("a", "0011", rate=2e-3, choice_accuracy=0.2, seed=1),
    ]
    assert choose(rows) == (2e-3, {"0.001": pytest.approx(0.5), "0.002": pytest.approx(0.6)})
    _, one = summarise([made("teacher", "1111", rate=None), *rows], [1] * 4)
    assert (one.learning_rate, one.seeds, one.accuracy.mean if one.accuracy else 0) == (2e-3, 2, 5 / 16)
    failed = made("a", "", rate=2e-3, seed=1, error="E")
    assert choose([*rows[:2], failed]) == (None, {})  # the other rate has not the seeds of the other methods


def example(*seeds: int) -> dict[str, Any]:
    """A teacher right in 8 of 8 rows, a baseline in 4, methods in 6 and 8."""
    rows = [
        row
        for seed in seeds
        for row in (
            made("teacher", "1" * 8, seed=seed, rate=None, seconds=None, steps=None),
            made("alone", "1" * 4 + "0" * 4, seed=seed),
            made("a_b|c:x=%&", "1" * (6 - seed) + "0" * (2 + seed), seed=seed),
            made("best", "1" * 8, seed=seed),
            made("broken", "", seed=seed, error="E: 50 % of a_b | c\\d"),
        )
    ]
    budget = {
        "steps": 4, "epochs": 2.0, "batch_size": 2, "rows": 4, "labelled_rows": 2, "choice_rows": 2, "test_rows": 8,
        "learning_rates": [1e-3], "seeds": list(seeds), "runs_per_method": len(seeds), "seconds_per_run": 2.0,
        "chosen_with_first_seed": False,
    }  # fmt: skip
    found = {"methods": [asdict(one) for one in summarise(rows, [1] * 8)], "budget": budget, "machines": ["m"]}
    return json.loads(json.dumps(found | {"command": "hf-compress sweep", "date": "2026-01-01"}))  # type: ignore[no-any-return]


def test_a_summary_by_hand() -> None:
    found = example(0, 1)
    one, best = of(found, "a_b|c:x=%&"), of(found, "best")
    assert one["accuracy"] == {"mean": pytest.approx((6 + 5) / 16), "sd": pytest.approx(stdev([6 / 8, 5 / 8]))}
    assert one["gap_closed"]["value"] == pytest.approx((11 / 16 - 1 / 2) / (1 - 1 / 2))
    assert one["retention"]["value"] == pytest.approx(11 / 16)
    assert best["against"]["alone"]["difference"] == pytest.approx(0.5)
    assert best["against"]["alone"]["p_rows"] == pytest.approx(2 / 2**4)
    # summed over the seeds, one row differs by 2 and one by 1, all for it: 2 of 2² patterns
    assert one["against"]["alone"]["p_rows"] == pytest.approx(1 / 2)
    assert best["against"]["alone"]["p_rows_holm"] == pytest.approx(2 * 2 / 2**4)
    assert best["against"]["alone"]["p_seeds"] is None
    assert set(one["against"]) == {"alone"}
    assert set(best["against"]) == {"alone", "a_b|c:x=%&"}
    assert of(found, "teacher")["against"] == of(found, "alone")["against"] == {}


def test_runs_are_paired_by_seed_in_whatever_order_they_come() -> None:
    given = {("alone", 0): "0011", ("alone", 1): "0111", ("a", 0): "0111", ("a", 1): "1111", ("a", 2): "0000"}
    given |= {("alone", 2): "0000"}  # that of "a" stands before it
    rows = [made(name, said, seed=seed) for (name, seed), said in given.items()]
    expected = ttest_rel([0.75, 1.0, 0.0], [0.5, 0.75, 0.0]).pvalue
    for order in (rows, [rows[1], rows[0], *rows[2:]], rows[::-1]):
        found = {one.method: one for one in summarise([made("teacher", "1111", rate=None), *order], [1] * 4)}
        assert found["a"].against["alone"].p_seeds == pytest.approx(expected)


def test_one_seed_claims_no_spread() -> None:
    found = example(0)
    assert {one["accuracy"]["sd"] for one in found["methods"] if one["accuracy"]} == {None}
    assert {each["p_seeds"] for one in found["methods"] for each in one["against"].values()} == {None}
    for name in ("markdown", "latex"):
        text = tables.FORMATS[name][1](found)
        assert "±" not in text
        assert "One seed" in text


# ---------------------------------------------------------------------- the tables


def test_the_files_hold_what_the_record_says(swept: sweeping.Swept) -> None:
    stored = json.loads((swept.folder / "sweep.json").read_text())
    assert stored == swept.found
    for name, render in tables.FORMATS.values():
        assert (swept.folder / name).read_text() == render(stored)
    assert ElementTree.parse(swept.folder / "sweep.svg").getroot().tag.endswith("svg")
    assert stored["machines"] == [facts.hardware()]
    assert stored["versions"] == [facts.versions()]


def test_the_record_follows_from_the_rows(swept: sweeping.Swept) -> None:
    rows = rows_of(swept.folder).values()
    for name in NAMES:
        own = sorted((row for row in rows if row.method == name), key=lambda row: row.seed)
        one = of(swept.found, name)
        for figure in ("accuracy", "label_loyalty", "seconds"):
            values = [getattr(row, figure) for row in own]
            assert one[figure] == {"mean": pytest.approx(mean(values)), "sd": pytest.approx(stdev(values))}
        teachers = {row.seed: row for row in rows if row.method == "teacher"}
        for row in own:
            assert row.label_loyalty == pytest.approx(
                np.mean(np.equal(row.predictions, teachers[row.seed].predictions))
            )
    alone, kd = of(swept.found, "alone"), of(swept.found, NAMES[1])
    expected = kd["accuracy"]["mean"] - alone["accuracy"]["mean"]
    assert kd["against"]["alone"]["difference"] == pytest.approx(expected)


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?", text)]


def cells(line: str, mark: str) -> list[str]:
    return [
        cell.strip() for cell in re.split(rf"(?<!\\){re.escape(mark)}", line.strip().strip(mark).removesuffix(r"\\"))
    ]


@pytest.mark.parametrize(("form", "mark", "rule"), [("markdown", "|", "|---|"), ("latex", "&", r"\midrule")])
def test_the_numbers_of_a_table_are_the_records(form: str, mark: str, rule: str) -> None:
    found = example(0, 1)
    lines = tables.FORMATS[form][1](found).split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith(rule))
    for one, line in zip(found["methods"], lines[start + 1 :], strict=False):
        _, rate, accuracy, closed, loyalty, kept, parameters, seconds, *beside = cells(line, mark)
        if one["accuracy"] is None:
            assert accuracy == "failed"
            continue
        spread = one["accuracy"]
        assert numbers(accuracy) == pytest.approx([100 * spread["mean"], 100 * spread["sd"]], abs=0.0501)
        assert numbers(rate) == ([] if one["learning_rate"] is None else [one["learning_rate"]])
        assert numbers(loyalty) == pytest.approx([50, 0])
        assert numbers(parameters) == pytest.approx([one["parameters"] / 1e6], abs=0.005)
        assert numbers(seconds) == ([] if one["seconds"] is None else [2, 0])
        for cell, figure in ((closed, one["gap_closed"]), (kept, one["retention"])):
            held = [] if figure is None else [figure["value"], *(figure["interval"] or ())]
            assert numbers(cell) == pytest.approx([100 * value for value in held], abs=0.0501)
        others = ["alone", "a_b|c:x=%&"]
        for other, gained, chance in zip(others, beside[::2], beside[1::2], strict=True):
            against = one["against"].get(other)
            held = [] if against is None else [against["difference"], *(against["interval"] or ())]
            assert numbers(gained) == pytest.approx([100 * value for value in held], abs=0.0501)
            p = (
                []
                if against is None
                else [p for p in (against["p_rows_holm"], against["p_seeds_holm"]) if p is not None]
            )
            assert numbers(chance) == pytest.approx(p, rel=0.05)


def test_the_csv_holds_the_figures_unrounded() -> None:
    found = example(0, 1)
    for row, one in zip(csv.DictReader(tables.csv(found).splitlines()), found["methods"], strict=True):
        assert row["method"] == one["method"]
        expected = {f"over_{other}_p_rows": each["p_rows"] for other, each in one["against"].items()}
        expected |= {f"over_{other}_difference": each["difference"] for other, each in one["against"].items()}
        if one["accuracy"] is not None:
            expected |= {"accuracy_mean": one["accuracy"]["mean"], "accuracy_sd": one["accuracy"]["sd"]}
            expected |= dict(zip(("accuracy_low", "accuracy_high"), one["accuracy_interval"], strict=True))
        assert {name: float(row[name]) for name in expected} == expected
        assert row["error"] == (one["error"] or "")


def test_names_and_errors_stay_literal_text() -> None:
    found = example(0)
    markdown, latex = tables.markdown(found), tables.latex(found)
    rows = [line for line in markdown.split("\n") if line.startswith("|")]
    assert len({len(cells(line, "|")) for line in rows}) == 1
    assert r"a\_b\|c:x=%&amp;" in rows[4]
    assert r"E: 50 % of a\_b \| c\\d" in markdown
    body = [line for line in latex.split("\n") if not line.startswith("%")]
    (row,) = [line for line in body if line.startswith("a") and "b/c" in line]
    assert row.startswith(r"a\_b/c:x=\%\& & ")
    assert len({len(cells(line, "&")) for line in body if line.endswith(r"\\")}) == 1
    for bare in ("_", "%", "&", "#"):
        assert not re.search(rf"[^\\ ]{bare}", "\n".join(line for line in body if "\\begin" not in line))


def test_the_shape_of_scores_is_checked() -> None:
    bad: Sequence[tuple[Any, Any]] = [([[1]], [[1, 0]]), ([1, 0], [1, 0]), ([[]], [[]])]
    tested: Sequence[Callable[..., Any]] = (paired.sign_flip, paired.over_seeds)
    for one, two in bad:
        for test in tested:
            with pytest.raises(HfCompressError, match=r"\(seed, row\)"):
                test(one, two)
