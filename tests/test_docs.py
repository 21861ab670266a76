"""What the documentation says runs, and what is generated is what would be generated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
import tiny
import yaml
from datasets import Dataset
from hf_compress_evaluation import task
from hf_compress_evaluation.task import Task
from hub.server import Hub, running_hub
from huggingface_hub import constants

from hf_compress.recipe import Recipe, read_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TASK = (task.__doc__ or "").partition("\n\n")[2]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the README's names exist: a teacher of four layers, its data and a task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny.tiny_bert_classifier(num_labels=2, num_hidden_layers=4).save_pretrained("my-big-model")
    tiny.tiny_tokenizer().save_pretrained("my-big-model")
    texts = ["the film was good", "a bad book", "not very bright", "enjoy the music"]
    for name, times in (("train", 8), ("dev", 1), ("test", 1)):
        Dataset.from_dict({"text": texts * times, "label": [1, 0, 0, 1] * times}).to_csv(f"{name}.csv")
    Path("task.yaml").write_text(TASK)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A loopback hub that is taken for the public one."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", Hub.token)
        yield hub


def test_the_python_of_the_readme_runs(folder: Path, hub: Hub) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)

    assert hub.files("me/my-small-model").keys() >= {"README.md", "model.safetensors", "onnx/model.onnx"}
    assert len(hub.history("me/my-small-model")) == 2  # the hub's own first commit, and ours


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
    Task.model_validate(yaml.safe_load(TASK))


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in pages.pages(ROOT)))
def test_generated_pages_are_current(page: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == pages.pages(ROOT)[ROOT / page], "run ci/docs"
