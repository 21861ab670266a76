"""What the documentation says runs, and what is generated is what would be generated."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest
import tiny
import yaml
from datasets import Dataset
from hf_compress_evaluation.task import Task

from hf_compress.recipe import Recipe, read_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the README's names exist: a teacher of four layers and a training file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny.tiny_bert_classifier(num_labels=2, num_hidden_layers=4).save_pretrained("my-big-model")
    tiny.tiny_tokenizer().save_pretrained("my-big-model")
    texts = ["the film was good", "a bad book", "not very bright", "enjoy the music"] * 8
    Dataset.from_dict({"text": texts, "label": [1, 0, 0, 1] * 8}).to_csv("train.csv")
    return tmp_path


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)

    assert (folder / "student" / "model.safetensors").exists()


def test_the_recipe_of_the_readme_is_one(folder: Path) -> None:
    (text,) = blocks("yaml")
    (folder / "recipe.yaml").write_text(text)

    recipe = read_recipe(folder / "recipe.yaml")

    assert isinstance(recipe, Recipe)
    assert recipe.teacher == str(folder / "my-big-model")


def test_the_commands_of_the_readme_exist() -> None:
    from typer.main import get_command

    from hf_compress.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]  # a group of commands
    used = re.findall(r"^hf-compress (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert used
    assert set(used) <= set(known)


def test_the_task_file_of_the_docstring_is_one() -> None:
    from hf_compress_evaluation import task

    text = (task.__doc__ or "").partition("\n\n")[2]
    Task.model_validate(yaml.safe_load(text))


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in pages.pages(ROOT)))
def test_generated_pages_are_current(page: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == pages.pages(ROOT)[ROOT / page], "run ci/docs"
