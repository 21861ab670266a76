"""The command: quick to start, plain when something is wrong, and only its result on standard output."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import transformers
import yaml
from hf_compress_evaluation import table
from hf_compress_evaluation.bench import _together
from hub.server import Hub, running_hub
from huggingface_hub import HfApi, ModelCard, constants
from recipes import ROWS, write_inputs
from rich.console import Console
from typer.main import get_command

from hf_compress import cli, facts, fitting, registry

COMMANDS = (
    "methods", "plan", "shrink", "export", "evaluate", "verify", "card", "report", "doctor", "push", "pull", "compress",
    "sweep",
    "distill", "cache", "demo",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of an error of ours, which is one line."""
        *_, last = self.err.rstrip("\n").split("\n")
        assert self.code == 1, self.err
        assert last.startswith("error: "), self.err
        assert "Traceback" not in self.err
        return last


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """Runs the command in this process, as its entry point does."""
    root, own = logging.getLogger(), logging.getLogger("hf_compress")
    handlers, level, verbosity = list(root.handlers), own.level, transformers.utils.logging.get_verbosity()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hf-compress", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        finally:  # what a command sets for its process
            root.handlers[:] = handlers
            own.setLevel(level)
            transformers.utils.logging.set_verbosity(verbosity)
            transformers.utils.logging.enable_progress_bar()
            datasets.enable_progress_bars()
            huggingface_hub.utils.enable_progress_bars()
    out, err = capsys.readouterr()
    return Said(code, out, err)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    return lambda *arguments: call(capsys, *arguments)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "fit", lambda *args, **kwargs: pytest.fail("trained first"))


@dataclass(frozen=True)
class Distilled:
    inputs: Path
    output: Path
    arguments: tuple[object, ...]
    said: Said


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    """`hf-compress distill … --json`, in a process of its own."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    arguments = (
        "distill", inputs / "big", "--task", "text-classification", "--data", inputs / "train.csv", "--layers", 2,
        "--output", inputs / "made", "--unlabelled", inputs / "unlabelled.csv", "--test", inputs / "test.csv",
        "--method", "kd", "--epochs", 1,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from hf_compress.cli import main; main()", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    return Distilled(inputs, inputs / "made", arguments, Said(done.returncode, done.stdout, done.stderr))


@pytest.fixture
def student(distilled: Distilled, tmp_path: Path) -> Path:
    return Path(shutil.copytree(distilled.output / "student", tmp_path / "student"))


@pytest.fixture
def task(distilled: Distilled, tmp_path: Path) -> Path:
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump({"task": "text-classification", "data": str(distilled.inputs / "test.csv")}))
    return path


# ---------------------------------------------------------------------- help and listing


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "--task", "text-classification", "--json"]])
def test_help_and_listing_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from hf_compress import cli\n"
        f"sys.argv = ['hf-compress', *{arguments}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'onnx', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"
    assert "kd" in done.stdout or "methods" in done.stdout


def test_every_command_and_every_option_has_its_help() -> None:
    group: Any = get_command(cli.app)
    assert tuple(group.commands) == COMMANDS
    for name, one in group.commands.items():
        assert one.help, name
        for parameter in one.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_the_help_of_a_command_is_shown(command: Callable[..., Said]) -> None:
    said = command("distill", "--help")
    assert said.code == 0
    assert "--layers" in said.out


def test_methods_in_a_pipe_shows_every_name_whole(command: Callable[..., Said]) -> None:
    said = command("methods")
    assert said.code == 0
    assert said.err == ""
    for name, entry in registry.catalogue().methods.items():
        line = next(line for line in said.out.splitlines() if line.lstrip("│ ").startswith(f"{name} "))
        assert entry.declared["paper"] in line
    assert "…" not in said.out


def test_methods_of_a_task_begins_with_its_default(command: Callable[..., Said]) -> None:
    rows = json.loads(command("methods", "--task", "text-classification", "--json").out)
    defaults = [row["method"] for row in rows if row["default"]]
    assert sorted(defaults) == sorted(entry.name for entry in registry.default_for("text-classification"))
    assert [row["method"] for row in rows][: len(defaults)] == defaults
    assert all("text-classification" in row["tasks"] for row in rows)


@pytest.mark.parametrize("taxonomy", registry.CLASSES)
def test_methods_by_class_show_what_is_empty_too(command: Callable[..., Said], taxonomy: str) -> None:
    found = json.loads(command("methods", "--by", taxonomy, "--json").out)
    assert {name: tuple(own) for name, own in found.items()} == registry.by_class(taxonomy)
    text = command("methods", "--by", taxonomy).out
    assert all(name in text for name in registry.CLASSES[taxonomy])
    assert "none yet" in text or all(found.values())
    assert "leave --family and --task out" in command("methods", "--by", taxonomy, "--family", "general").error


def test_methods_of_a_family_are_its_own(command: Callable[..., Said]) -> None:
    rows = json.loads(command("methods", "--family", "general", "--json").out)
    assert rows
    assert {row["family"] for row in rows} == {"general"}


# ---------------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("methods", "--task", "text-clasification"), "There is no task 'text-clasification'. Did you mean 'text-cl"),
        (("methods", "--family", "genral"), "There is no family 'genral'. Did you mean 'general'"),
        (("compress", "nowhere.yaml"), "nowhere.yaml: does not exist."),
    ],
)
def test_a_name_that_is_not_there_is_one_line(
    command: Callable[..., Said], arguments: tuple[str, ...], said: str
) -> None:
    found = command(*arguments)
    assert found.error.startswith(f"error: {said}")
    assert found.out == ""
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [("bogus",), ("methods", "--bogus"), ("demo", "--seeds", "0"), ("distill", "big"), ("card", "nowhere")],
)
def test_a_wrong_use_is_exit_code_2_and_names_it(command: Callable[..., Said], arguments: tuple[str, ...]) -> None:
    found = command(*arguments)
    assert found.code == 2
    assert "Traceback" not in found.err
    assert any(word in found.err for word in ("No such", "Missing option", "Invalid value"))
    assert found.out == ""


def test_debugging_shows_the_traceback(command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_COMPRESS_DEBUG", "1")
    with pytest.raises(KeyError):
        command("methods", "--task", "text-clasification")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--quantize", "int2"), "There is no precision 'int2'. Did you mean 'int8'"),
        (("--quantize", "float64"), "Known: fp16, int4, int8."),
        (("--quantize", "int8"), "Give --data task.yaml"),
        (("--data", "task.yaml"), "give --quantize int8 too"),
    ],
)
def test_export_says_what_it_lacks_before_it_writes(
    command: Callable[..., Said], tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert said in command("export", tmp_path, *options).error
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("arguments", [("export",), ("card",), ("push",)])
def test_a_folder_without_a_model_is_refused_and_left_alone(
    command: Callable[..., Said], tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    more = ("http://127.0.0.1:9/me/small",) if arguments == ("push",) else ()
    assert "holds no config.json." in command(*arguments, tmp_path, *more).error
    assert not list(tmp_path.iterdir())


def test_export_reads_the_data_of_its_gate_before_it_writes(
    command: Callable[..., Said], student: Path, task: Path
) -> None:
    shutil.rmtree(student / "onnx")
    task.write_text("task: text-classification\ndata: nowhere.csv\n")
    assert "nowhere.csv: does not exist" in command("export", student, "--quantize", "int8", "--data", task).error
    assert not (student / "onnx").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--method", "kdd"), "Did you mean 'kd'"),
        (("--text", "sentence"), "'sentence'"),
        (("--task", "summarization"), "the options: task"),
        (("--layers", "9"), "student.layers is 9, and the teacher has 3 layers"),
        (("--push", "https://me:secret@hub.example/me/small"), "holds a user or a password"),
    ],
)
def test_distill_refuses_before_it_trains(
    command: Callable[..., Said],
    distilled: Distilled,
    tmp_path: Path,
    untrained: None,
    changed: tuple[str, str],
    said: str,
) -> None:
    assert said in command(*distilled.arguments, *changed, "--output", tmp_path / "made").error
    assert not (tmp_path / "made").exists()


# ---------------------------------------------------------------------- what is printed


def test_json_is_all_that_distill_prints(distilled: Distilled) -> None:
    said = distilled.said
    assert said.code == 0, said.err
    rows = json.loads(said.out)
    assert [(row["subject"], row["variant"]) for row in rows] == [
        ("teacher", "torch"), ("student", "torch"), ("student", "onnx"), ("student", "onnx_int8"),
    ]  # fmt: skip
    assert all(row["scores"]["accuracy"]["value"] is not None for row in rows)


def test_progress_and_the_destination_are_told_on_stderr(distilled: Distilled) -> None:
    lines = distilled.said.err.splitlines()
    for start in ("teacher: ", "student: ", "export: ", "evaluate: ", "card: ", "push: ", "No repository was named"):
        assert any(line.startswith(start) for line in lines), start
    assert "Please consider" not in distilled.said.err
    assert "Traceback" not in distilled.said.err
    assert "\r" not in distilled.said.err


def test_a_repeated_distill_is_done_already_and_shows_the_table(
    command: Callable[..., Said], distilled: Distilled, untrained: None
) -> None:
    said = command(*distilled.arguments)
    assert said.code == 0
    assert "student: done already" in said.err
    for name in ("teacher", "student", "onnx_int8", "label loyalty"):
        assert name in said.out
    assert f"scored on train, test, {ROWS['test']} rows" in said.out
    assert "…" not in said.out


def test_evaluate_prints_json_alone_and_appends_to_the_record(
    command: Callable[..., Said], student: Path, task: Path, distilled: Distilled
) -> None:
    before = len(facts.load(student).measurements)
    said = command("evaluate", student, "--task", task, "--teacher", distilled.inputs / "big", "--json")
    assert said.code == 0, said.err
    assert {row["subject"] for row in json.loads(said.out)} == {"teacher", "student"}
    assert len(facts.load(student).measurements) > before


def test_export_measures_int8_and_says_what_it_found(command: Callable[..., Said], student: Path, task: Path) -> None:
    for name in ("onnx", "onnx_int8"):
        shutil.rmtree(student / name)
    options = ("--max-drop", 1, "--min-agreement", 0)
    said = command("export", student, "--quantize", "int8", "--data", task, *options)
    assert said.code == 0, said.err
    assert said.out == ""
    assert "agreement_with_fp32 1.0000" in said.err
    assert "Please consider" not in said.err
    assert (student / "onnx" / "model.onnx").exists()
    assert (student / "onnx_int8" / "model.onnx").exists()


def test_card_writes_the_readme(command: Callable[..., Said], student: Path) -> None:
    (student / "README.md").unlink()
    said = command("card", student)
    assert (said.code, said.out, said.err) == (0, "", "wrote README.md\n")
    assert (student / "README.md").read_text().startswith("---\n")


# ---------------------------------------------------------------------- push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    with running_hub() as hub:
        yield hub


def test_push_names_the_repository_in_a_card_that_nobody_edited(
    command: Callable[..., Said], student: Path, hub: Hub
) -> None:
    said = command("push", student, f"{hub.url}/me/small", "--license", "MIT", "--tag", "v1")
    assert said.code == 0, said.err
    assert said.err.startswith("One commit with ")
    assert b'model="me/small"' in hub.files("me/small")["README.md"]
    assert ModelCard(hub.files("me/small")["README.md"].decode()).data.license == "mit"
    refs = HfApi(endpoint=hub.url, token=Hub.token).list_repo_refs("me/small")
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", refs.branches[0].target_commit)]


def test_push_keeps_a_card_that_was_edited(command: Callable[..., Said], student: Path, hub: Hub) -> None:
    readme = student / "README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: cc-by-4.0\n", 1) + "\nMine.\n")
    assert command("push", student, f"{hub.url}/me/small").code == 0
    assert hub.files("me/small")["README.md"].endswith(b"\nMine.\n")
    assert ModelCard(hub.files("me/small")["README.md"].decode()).data.license == "cc-by-4.0"


def test_a_card_of_the_maker_gets_the_licence_that_the_push_is_given(
    command: Callable[..., Said], student: Path, hub: Hub
) -> None:
    (student / "README.md").write_text("# All mine\n")
    said = command("push", student, f"{hub.url}/me/small", "--license", "mit")
    assert said.code == 0, said.err
    assert hub.files("me/small")["README.md"] == b"---\nlicense: mit\n---\n\n# All mine\n"


def test_a_card_that_is_no_text_is_one_line(command: Callable[..., Said], student: Path, hub: Hub) -> None:
    (student / "README.md").write_bytes(b"# \xff\n")
    assert "README.md: is not UTF-8" in command("push", student, f"{hub.url}/me/small").error
    assert not hub.repos


def test_a_push_without_a_licence_says_how_to_give_one(command: Callable[..., Said], student: Path, hub: Hub) -> None:
    error = command("push", student, f"{hub.url}/me/small").error
    assert "names no licence" in error
    assert "--license" in error
    assert not hub.repos


def test_a_refused_push_is_one_line_without_the_token(
    command: Callable[..., Said], student: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", Hub.reader)
    error = command("push", student, f"{hub.url}/me/small").error
    assert "may only read" in error
    assert Hub.reader not in error
    assert not hub.repos


# ---------------------------------------------------------------------- the table


def measured(subject: str, variant: str, metric: str, value: float, unit: str = "fraction") -> facts.Measurement:
    return facts.Measurement(
        subject=subject, variant=variant, metric=metric, value=value, unit=unit, interval=(value - 0.01, value + 0.01)
    )


@pytest.fixture
def record() -> facts.Record:
    """Every subject and variant that a recipe may measure, the numbers as wide as they get."""
    pairs = [
        (subject, variant)
        for subject in ("teacher", "alone", "student-labelled", "student")
        for variant in (("torch", "onnx", "onnx_int8") if subject == "student" else ("torch",))
    ]
    found = []
    for pair in pairs:
        for metric in ("accuracy", "f1_macro", "label_loyalty", "probability_loyalty"):
            found.append(measured(*pair, metric, 0.876))
        found.append(measured(*pair, "parameters", 334_123_456, "count"))
        found.append(measured(*pair, "bytes", 1_334_123_456, "bytes"))
        for batch in (1, 32):
            for metric in ("latency_median", "latency_p90"):
                how: dict[str, facts.Setting] = {"batch": batch, "length": 64, "threads": 1, "provider": "torch-cpu"}
                found.append(measured(*pair, metric, 0.0123, "seconds").model_copy(update={"how": how}))
        if pair[0].startswith("student"):
            found += [measured(*pair, "retention", 0.98, "ratio"), measured(*pair, "gain", 0.031)]
    found += [
        measured("student", "onnx_int8", "accuracy_drop", 0.004),
        measured("student", "onnx_int8", "agreement_with_fp32", 0.991),
    ]
    return facts.Record(measurements=tuple(found))


@pytest.mark.parametrize("width", [80, 100, 120, 150])
def test_the_table_cuts_no_word_at_any_usual_width(record: facts.Record, width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table.table(record, width=width))
    text = console.export_text()
    assert "…" not in text
    for word in ("student-labelled", "onnx_int8", "accuracy", "loyalty", "params", "0.876 ±"):
        assert word in text
    assert ("macro-F1" in text.split("alone:")[0]) == (width >= table.NARROW)


def test_below_the_table_each_subject_has_one_line_and_alone_is_explained(record: facts.Record) -> None:
    lines = str(table.table(record).caption).splitlines()
    said = "0.980 (0.970 to 0.990) of the teacher's accuracy kept; 0.031 (0.021 to 0.041) accuracy more than alone"
    assert lines[0].startswith("alone: the student's start, trained on the labels without the teacher;")
    assert [line for line in lines if line.startswith("student")] == [f"student-labelled: {said}", f"student: {said}"]
    assert [line for line in lines if line.startswith("int8")] == [
        "int8: accuracy -0.004; decides like float32 in 0.991 of the rows, on the rows that decided to keep it"
    ]
    assert len([line for line in lines if line.startswith("latency")]) == 1


# ---------------------------------------------------------------------- cache


def test_a_cache_is_filled_once_and_says_its_size(command: Callable[..., Said], tmp_path: Path) -> None:
    write_inputs(tmp_path)
    arguments = ("cache", tmp_path / "big", "--data", tmp_path / "train.csv", "--output", tmp_path / "cache")
    first = command(*arguments, "--batch-size", 5, "--json")
    again = command(*arguments, "--json")
    found = json.loads(first.out)
    assert found["examples"] == ROWS["train"]
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert json.loads(again.out) == found
    error = command(*arguments, "--text", "txet").error
    assert error.startswith("error: There is no column in train.csv (which has text, label) 'txet'. Did you")
    assert "other targets" in command(*arguments, "--top-k", 3).error
    assert "asked for is" in command(*arguments, "--top-k", 3).error


@pytest.mark.slow
def test_two_processes_share_the_rows_of_a_cache(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    texts = [f"the film was {'very ' * place}good" for place in range(24)]
    (tmp_path / "train.csv").write_text("\n".join(["text", *texts]))
    arguments = ("cache", tmp_path / "big", "--data", tmp_path / "train.csv", "--output", tmp_path / "cache", "--json")
    _together.run(("-m", "hf_compress.cli", *arguments))
    shards = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*.json") if path.name != "cache.json"]
    keys = [set(shard["examples"]) for shard in shards]
    assert list(map(len, keys)) == [12, 12]
    assert len(keys[0] | keys[1]) == 24
