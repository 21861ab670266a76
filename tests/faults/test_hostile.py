"""Files of strangers through the public entry points: each ends in bounded time and memory, with an error of ours that
names the file, the problem and the remedy; nothing was written, and no foreign code has run.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from datasets import Dataset
from hf_compress_evaluation import examples, table
from hf_compress_evaluation import folder as evaluation
from hostile import CANARY, FAULTS, HARMLESS, Outcome, Payload, change, header_of, write_header
from onnx import TensorProto, helper
from recipes import write_inputs
from rich.console import Console
from tiny import tiny_bert_classifier, tiny_tokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hf_compress import DistillCallback, chat, cli, facts, files, loops, networks, resume
from hf_compress.onnx import export as exporting
from hf_compress.onnx import graph as onnx_graph
from hf_compress.onnx.loading import load_onnx
from hf_compress.teachers.cache import CacheTeacher
from hf_compress.teachers.model import load_teacher

HEAVY = (exporting, load_onnx, evaluation)
"""Imported here once, and not in every child."""

Child = Callable[..., Outcome]
Tree = dict[str, tuple[int, int, int]]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that are as they should be: a teacher with code beside it, rows, a task and a recipe."""
    folder = tmp_path_factory.mktemp("valid")
    recipe = write_inputs(folder)
    (folder / "big").rename(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"teacher": "model"}))
    (folder / "model" / "evil.py").write_text(CANARY + "\n")
    (folder / "task.yaml").write_text("task: text-classification\ndata: test.csv\nrows: 8\n")
    return folder


@pytest.fixture
def place(valid: Path, tmp_path: Path) -> Path:
    """A copy of `valid`, to spoil."""
    shutil.copytree(valid, tmp_path / "here")
    return tmp_path / "here"


def tree(folder: Path) -> Tree:
    """What lies below a folder: size, time and inode of each file."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        if path.is_dir() and not path.is_symlink():
            continue
        found[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def command(*arguments: object) -> Callable[[], int]:
    """The command `hf-compress`; returns its exit code."""

    def run() -> int:
        sys.argv = ["hf-compress", *map(str, arguments)]
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


def train(teacher: Path, output: Path) -> None:
    """A Trainer with a callback that loads its teacher from a folder."""
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_list([dict(tokenizer("the film was good")) | {"labels": 1}])
    arguments = TrainingArguments(str(output), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    Trainer(
        model=tiny_bert_classifier(num_labels=2),
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[DistillCallback(str(teacher), "kd")],
    )


ENTRIES: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "callback": lambda place: lambda: train(place / "model", place.parent / "run"),
    "load_teacher": lambda place: lambda: load_teacher(str(place / "model")) and None,
    "export": lambda place: command("export", place / "model"),
    "evaluate": lambda place: command("evaluate", place / "model", "--task", place / "task.yaml"),
    "cache": lambda place: command("cache", place / "model", "--data", place / "test.csv", "--output", place / "kept"),
    "compress": lambda place: command("compress", place / "recipe.yaml"),
    "push": lambda place: command("push", place / "model", "me/model"),
}
"""Public entry points that read a model folder."""


def assert_refused(outcome: Outcome, *named: str) -> None:
    """It ended by itself, with one of our errors, which says where and what to do; no foreign code has run."""
    assert not outcome.died, outcome
    assert not outcome.sung, outcome
    if isinstance(outcome.value, int):  # a command
        assert outcome.value == 1, (outcome, outcome.out[-2000:])
        message = outcome.out.rstrip("\n").split("\n")[-1]
        assert message.startswith("error: "), outcome.out[-2000:]
        assert "Traceback" not in outcome.out
    else:
        assert outcome.is_ours, outcome
        message = outcome.message
    assert message.isprintable() or not isinstance(outcome.value, int)
    assert len(message) < 10_000
    assert any(name in message for name in named), (named, message)
    assert message.rstrip().endswith((".", "?", ")")), message


MODEL_CASES = [
    *((name, "load_teacher") for name in FAULTS if not name.startswith("tokenizer")),
    *((name, "cache" if name in HARMLESS else "evaluate") for name in FAULTS if name.startswith("tokenizer")),
    *(
        (name, entry)
        for name in (
            "weights_with_a_key_twice",
            "weights_pickled",
            "index_that_climbs",
            "config_of_ten_million_layers",
            "config_of_a_trillion_tokens",
            "config_of_code_of_its_own",
        )
        for entry in ("callback", "export", "evaluate", "cache", "compress")
    ),
    *(
        (name, entry)
        for name in ("tokenizer_that_panics", "tokenizer_that_panics_over_a_text")
        for entry in ("cache", "compress")
    ),
    *((name, "push") for name in FAULTS if name.startswith(("weights_with_a_key", "weights_p", "weights_t", "index"))),
]


@pytest.mark.parametrize(("name", "entry"), MODEL_CASES)
def test_a_spoilt_model_folder_is_refused(
    name: str, entry: str, place: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    FAULTS[name](place / "model")
    before = tree(place)

    outcome = limited_child(ENTRIES[entry](place))

    fault("hostile files", note=name.split("_")[0])
    if name in HARMLESS:
        assert not outcome.died
        assert not outcome.sung
        assert outcome.value in (0, None), (outcome, outcome.out[-2000:])
        assert not outcome.kinds, outcome
        return
    assert_refused(outcome, "here/model", "here")
    written = {path: entry for path, entry in tree(place).items() if before.get(path) != entry}
    written = {path for path in written if not path.startswith("made") or path.endswith((".safetensors", ".onnx"))}
    assert written <= {"model/README.md"} if entry == "push" else not written


def test_the_faults_are_what_is_refused(valid: Path, tmp_path: Path, limited_child: Child) -> None:
    """The folder that they spoil passes."""
    shutil.copytree(valid, tmp_path / "here")
    for entry in ("callback", "evaluate", "cache", "load_teacher"):
        outcome = limited_child(ENTRIES[entry](tmp_path / "here"))
        assert (outcome.kinds, outcome.died, outcome.sung) == ((), "", False), outcome
        assert outcome.value in (0, None), outcome.out
    assert HARMLESS.keys() <= FAULTS.keys()


# ---------------------------------------------------------------------- the child itself


def test_the_child_is_stopped_and_its_canary_is_heard(limited_child: Child) -> None:
    def hang() -> None:
        while True:
            pass

    assert limited_child(hang, seconds=1).died
    assert "MemoryError" in str(limited_child(lambda: bytearray(2**42)).kinds)
    assert limited_child(lambda: os._exit(3)).died == "exit code 3"
    assert limited_child(lambda: pickle.loads(pickle.dumps(Payload()))).sung
    assert not limited_child(lambda: None).sung


# ---------------------------------------------------------------------- graphs


def graph(location: dict[str, str] | None = None, *, dims: tuple[int, ...] = (4,), nodes: int = 1) -> onnx.ModelProto:
    """x + w, its four numbers inside or in a file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
    if location is None:
        weight.raw_data = np.ones(4, np.float32).tobytes()
    else:
        weight.data_location = TensorProto.EXTERNAL
        for key, value in location.items():
            weight.external_data.add(key=key.strip(), value=value)
    chain = [helper.make_node("Add", ["x", "w"], ["y0"])]
    chain += [helper.make_node("Relu", [f"y{place}"], [f"y{place + 1}"]) for place in range(nodes - 1)]
    ends = [helper.make_tensor_value_info(name, 1, [None]) for name in ("x", f"y{nodes - 1}")]
    made = helper.make_graph(chain, "g", ends[:1], ends[1:], [weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def nested(depth: int) -> onnx.ModelProto:
    """Branches in branches."""
    body = onnx.GraphProto(name="b")
    for _ in range(depth):
        node = onnx.NodeProto(op_type="If", input=["c"], output=["y"])
        node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)
        body = onnx.GraphProto(name="b")
        body.node.append(node)
    model = onnx.ModelProto(ir_version=10, opset_import=[helper.make_opsetid("", 18)])
    model.graph.CopyFrom(body)
    return model


GRAPHS: dict[str, Callable[[Path], bytes | onnx.ModelProto]] = {
    "climbs": lambda outside: graph({"location": "../outside"}),
    "absolute": lambda outside: graph({"location": str(outside)}),
    "device": lambda outside: graph({"location": "/dev/zero"}),
    "symlink": lambda outside: graph({"location": "symlink"}),
    "hard link": lambda outside: graph({"location": "hard link"}),
    "zero byte": lambda outside: graph({"location": "a\0b"}),
    "no file": lambda outside: graph({"location": ""}),
    "folder": lambda outside: graph({"location": "."}),
    "second location": lambda outside: graph({"location": "data", "location ": "../outside"}),
    "long": lambda outside: graph({"location": "data", "offset": "10", "length": "99999999999"}),
    "negative": lambda outside: graph({"location": "data", "offset": "-5"}),
    "huge": lambda outside: graph(dims=(2**40, 2**20)),
    "negative size": lambda outside: graph(dims=(-4,)),
    "truncated": lambda outside: graph().SerializeToString()[:40],
    "html": lambda outside: b"<html>404</html>",
    "empty": lambda outside: b"",
    "pickle": lambda outside: pickle.dumps(Payload()),
    "nested": lambda outside: nested(28),
    "nested beyond protobuf": lambda outside: nested(32),
    "many nodes": lambda outside: graph(nodes=onnx_graph.MAX_NODES + 1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_hostile_graph_is_refused(
    name: str, tmp_path: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    folder, outside = tmp_path / "onnx", tmp_path / "outside"
    folder.mkdir()
    outside.write_bytes(b"\1" * 64)
    (folder / "data").write_bytes(b"\0" * 16)
    (folder / "symlink").symlink_to(outside)
    os.link(outside, folder / "hard link")
    made = GRAPHS[name](outside)
    (folder / "model.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    before = tree(tmp_path)

    outcome = limited_child(lambda: load_onnx(folder) and None)

    fault("hostile files", note="graph")
    assert_refused(outcome, str(folder), str(outside), "/dev/zero")
    assert "hf_compress.errors.ForeignFileError" in outcome.kinds
    assert tree(tmp_path) == before


def test_a_graph_with_its_data_beside_it_opens(tmp_path: Path, limited_child: Child) -> None:
    (tmp_path / "data").write_bytes(b"\0" * 16)
    (tmp_path / "model.onnx").write_bytes(graph({"location": "data"}).SerializeToString())

    assert limited_child(lambda: load_onnx(tmp_path).input_names).value == ("x",)


# ---------------------------------------------------------------------- records

MEASURED = {"subject": "student", "metric": "accuracy", "value": 0.5, "unit": "fraction"}


def record(**values: Any) -> str:
    return json.dumps({"version": 1} | values)


RECORDS = {
    "list": "[]",
    "another version": '{"version": 2}',
    "infinite": '{"version": 1e400}',
    "key twice": '{"version": 1, "version": 1}',
    "unknown key": record(evil=1),
    "deep": '{"version": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "number beyond floats": record(measurements=[MEASURED | {"value": 10**400}]),
    "many digits": '{"version": 1, "a": ' + "9" * 10_000 + "}",
    "text as number": record(measurements=[MEASURED | {"value": "x"}]),
    "surrogate": record(measurements=[MEASURED | {"subject": "\ud800"}]),
    "path": record(measurements=[MEASURED | {"subject": "/home/somebody/model"}]),
    "17 megabytes": record(a="x" * (17 << 20)),
    "binary": b"\x80\x04" + b"\xff" * 100,
}


@pytest.mark.parametrize(
    ("name", "entry"), [*((name, "card") for name in RECORDS), ("deep", "push"), ("surrogate", "push")]
)
def test_a_hostile_record_is_refused(
    name: str, entry: str, place: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    raw = RECORDS[name]
    (place / "model" / facts.FILE).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    before = tree(place)
    arguments = [place / "model", *(["me/model"] if entry == "push" else [])]

    outcome = limited_child(command(entry, *arguments))

    fault("hostile files", note="record")
    assert_refused(outcome, str(place / "model" / facts.FILE))
    assert tree(place) == before


@pytest.mark.parametrize("file", ["../../secret", "..", ".", "a\0b", "x" * 5000, "\u202egnp.png"])
def test_evidence_outside_the_folder_is_refused(
    file: str, place: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    evidence = [{"file": file, "bytes": 1, "sha256": "0" * 64}]
    (place / "model" / facts.FILE).write_text(record(evidence=evidence))

    outcome = limited_child(command("push", place / "model", "me/model"))

    fault("hostile files", note="record")
    assert_refused(outcome, "here")
    assert "Nothing was sent" in outcome.out


TEXTS = [
    "[/red]",
    "[link=https://x]a",
    "\x1b]0;title\x07",
    "\n---\nlicense: mit\n---\n",
    "<script>",
    "\u202etxet",
    "|a|",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_a_record_steer_neither_terminal_nor_card(
    text: str, place: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    (place / "model" / facts.FILE).write_text(record(measurements=[MEASURED | {"subject": text}]))

    def show() -> str:
        console = Console(width=200, force_terminal=True)
        with console.capture() as shown:
            console.print(table.table(facts.load(place / "model"), width=200))
        table.as_json(facts.load(place / "model"))
        return shown.get()

    outcome = limited_child(show)
    fault("hostile files", note="record")
    assert not outcome.kinds, outcome
    assert "\x07" not in outcome.value
    assert "\u202e" not in outcome.value
    assert "\x1b]" not in outcome.value
    assert text.split("\n")[0].strip("\x1b\x07\u202e") in outcome.value
    assert limited_child(command("card", place / "model")).value == 0
    lines = (place / "model" / "README.md").read_text().splitlines()
    assert lines.count("---") == 2, "one front matter"
    assert "<script>" not in "\n".join(lines)


# ---------------------------------------------------------------------- recipes and tasks


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    return "\n".join(lines) + "\n"


YAML = {
    "aliases": _bomb(),
    "alias of itself": "a: &a [*a]\n",
    "object": f'task: !!python/object/apply:eval ["{CANARY}"]\n',
    "object by new": "task: !!python/object/new:os.system [echo]\n",
    "deep": "[" * 100_000,
    "deep mapping": "{a: " * 20_000,
    "key twice": "task: a\ntask: b\n",
    "list": "- 1\n",
    "300 kilobytes": "a: " + "x" * 300_000,
    "control character": "a: \0",
    "another encoding": "a: 1".encode("utf-16"),
    "surrogate": 'task: "\\ud800"\n',
    "date": "task: 2020-99-99\n",
    "many digits": "a: " + "9" * 5000 + "\n",
    "key that is a list": "? [1, 2]\n: 3\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "binary": "task: !!binary x\n",
    "set": "? a\n? b\n",
    "terminal": 'task: text-classification\n"\\e]0;title\\a": 1\n',
    "pickle": pickle.dumps(Payload()),
}


@pytest.mark.parametrize(
    ("name", "entry"), [*((name, "compress") for name in YAML), ("aliases", "evaluate"), ("object", "evaluate")]
)
def test_a_hostile_recipe_or_task_is_refused(
    name: str, entry: str, place: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    raw, path = YAML[name], place / ("recipe.yaml" if entry == "compress" else "task.yaml")
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    before = tree(place)

    outcome = limited_child(ENTRIES[entry](place), seconds=5)

    fault("hostile files", note="recipe")
    assert_refused(outcome, path.name)
    assert tree(place) == before


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("batch_size: 12", "batch_size: 1000000000000000000000000"),
        ("epochs: 2", "epochs: .inf"),
        ("epochs: 2", "epochs: 1e300"),
        ("max_length: 16", "max_length: 99999999999999999999"),
        ("runs: 2", "runs: 99999999999999999999"),
        ("layers: 2", "layers: 99999999999999999999"),
        ("layers: 2", "layers: [0, -1]"),
        ("output: made", 'output: "a\\0b"'),
        ("train: train.csv", 'train: "a\\0b"'),
        ("train: train.csv", "train: /dev/zero"),
        ("train: train.csv", "train: " + "x" * 5000 + ".csv"),
        ("teacher: model", 'teacher: "a\\0b"'),
        ("teacher: model", "teacher: https://example.invalid/model"),
        ("teacher: model", "teacher: ../../../../etc"),
        ("output: made", "output: made\nseed: 99999999999999999999"),
        ("output: made", "output: made\npush: 'http://[::1'"),
        ("output: made", "output: made\nmethods: [../../evil]"),
        ("output: made", "output: made\nmethods: [{name: kd, __class__: evil}]"),
        ("output: made", "output: made\nmethods: [{name: kd, temperature: [1]}]"),
        ("output: made", "output: made\nmethods: [{name: kd, temperature: x}]"),
        ("output: made", "output: made\nmethods: [{1: 2}]"),
        ("name: sentences", "name: /home/somebody/rows"),
    ],
)
def test_a_hostile_value_of_a_recipe_is_refused(
    line: str, value: str, place: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    path = place / "recipe.yaml"
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, value))
    before = tree(place)

    outcome = limited_child(ENTRIES["compress"](place))

    fault("hostile files", note="recipe")
    assert_refused(
        outcome,
        "recipe",
        "teacher",
        "a\N{REPLACEMENT CHARACTER}b",
        "example.invalid",
        "/dev/zero",
        "here",
        "etc",
        "::1",
        "method",
        "kd",
    )
    made = {path for path in tree(place) if path not in before and path.endswith((".safetensors", ".onnx"))}
    assert not made


# ---------------------------------------------------------------------- rows

GOOD = {"text": "the film", "label": "positive"}


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS_REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "None": ("a.jsonl", jsonl(GOOD, GOOD | {"text": None}), "row 1"),
    "no text": ("a.jsonl", jsonl(GOOD, {"label": "positive"}), "row 1"),
    "no label": ("a.jsonl", jsonl(GOOD, GOOD | {"label": None}), "row 1"),
    "number": ("a.jsonl", jsonl(GOOD, GOOD | {"text": 5}), "row 1"),
    "list": ("a.jsonl", jsonl({"text": ["a"], "label": "positive"}), "row 0"),
    "lone surrogate": ("a.jsonl", jsonl(GOOD, GOOD | {"text": "\ud800"}), "row 1"),
    "surrogate in bytes": (
        "a.jsonl",
        jsonl(GOOD).encode() + b'{"text": "\xed\xa0\x80", "label": "positive"}',
        "index 1",
    ),
    "no UTF-8": ("a.csv", b"text,label\n\xff\xff,positive\n", "utf-8"),
    "deep": ("a.jsonl", '{"text": ' + "[" * 1500 + "]" * 1500 + "}", "recursion"),
    "unknown label": ("a.jsonl", jsonl(GOOD, GOOD | {"label": "evil"}), "row 1"),
    "label out of range": ("a.jsonl", jsonl(GOOD | {"label": 0}, GOOD | {"label": 7}), "row 1"),
    "huge label": ("a.jsonl", jsonl(GOOD | {"label": 10**30}), "row 0"),
    "label NaN": ("a.jsonl", '{"text": "a", "label": NaN}', "row 0"),
    "key twice": ("a.jsonl", '{"text": "a", "text": "b", "label": "positive"}', "twice"),
    "not rows": ("a.jsonl", "1\n2\n", "row 0"),
    "pickle": ("a.jsonl", pickle.dumps(Payload()), "row 0"),
    "binary": ("a.csv", b"\x00\xff\xfe\x00" * 100, "cannot be read"),
    "empty": ("a.csv", "", "a.csv"),
    "no row": ("a.csv", "text,label\n", "no row"),
    "torn parquet": ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "a.parquet"),
    "torn gzip": ("a.jsonl.gz", b"\x1f\x8b" + b"\0" * 50, "a.jsonl.gz"),
    "many columns": ("a.csv", ",".join(f"c{place}" for place in range(200_000)) + "\n", "columns"),
    "many keys": ("a.jsonl", jsonl({f"c{place}": 1 for place in range(200_000)}), "columns"),
    "another format": ("a.pkl", pickle.dumps(Payload()), ".pkl"),
}


def read(path: Path) -> tuple[str, ...]:
    """Texts of a file as `evaluate` reads them."""
    labels = {"negative": 0, "positive": 1}
    return examples.examples(
        examples.read_rows(path), name=path.name, text="text", label="label", label2id=labels
    ).texts


@pytest.mark.parametrize("name", ROWS_REFUSED)
def test_hostile_rows_are_refused_with_their_place(
    name: str, tmp_path: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    file, raw, said = ROWS_REFUSED[name]
    (tmp_path / file).write_bytes(raw if isinstance(raw, bytes) else raw.encode())

    outcome = limited_child(lambda: read(tmp_path / file))

    fault("hostile files", note="rows")
    assert_refused(outcome, file, "'.pkl'")
    assert said in outcome.message, outcome


@pytest.mark.parametrize(
    "text", ["x" * 10_000_000, "\u202eabc\u200b\u200d", "a\0b", "\ufeff", "\r", "<s>", "👩‍👩‍👧", ""]
)
def test_odd_rows_come_as_they_are(text: str, tmp_path: Path, limited_child: Child) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(GOOD, GOOD | {"text": text}, GOOD))

    assert limited_child(lambda: read(tmp_path / "a.jsonl")).value == ("the film", text, "the film")


def test_a_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, limited_child: Child, fault: Callable[..., None]
) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=9) as file:
        for _ in range(20):
            file.write(b'{"text": "' + b"x" * 5_000_000 + b'", "label": "positive"}\n')

    outcome = limited_child(lambda: read(tmp_path / "a.jsonl.gz"))

    fault("hostile files", note="rows")
    assert_refused(outcome, "a.jsonl.gz")
    assert "unpacks" in outcome.message


# ---------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A cache of two examples, and their batch."""
    folder = tmp_path_factory.mktemp("cache")
    batch = dict(tiny_tokenizer()(["the film was good", "a book"], padding=True, return_tensors="pt"))
    cache = CacheTeacher(folder, tiny_bert_classifier())
    cache.fill([batch])
    cache.close()
    return folder, batch


def _examples(edit: Callable[[list[int]], list[Any]]) -> Callable[[Path, Path], None]:
    def spoil(shard: Path, manifest: Path) -> None:
        found = json.loads(manifest.read_text())["examples"]
        change(manifest, examples={key: edit(values) for key, values in found.items()})

    return spoil


def _shard(edit: Callable[[str], str]) -> Callable[[Path, Path], None]:
    def spoil(shard: Path, manifest: Path) -> None:
        header, data = header_of(shard)
        write_header(shard, edit(json.dumps(header)), data)

    return spoil


def _header(**values: Any) -> Callable[[Path, Path], None]:
    return lambda shard, manifest: change(shard.with_name("cache.json"), **values)


def _linked(shard: Path) -> None:
    shard.unlink()
    shard.symlink_to("/etc/passwd")


CACHES: dict[str, Callable[[Path, Path], None]] = {
    "example beyond the end": _examples(lambda places: [10**6, *places[1:]]),
    "example beyond 64 bits": _examples(lambda places: [2**70, *places[1:]]),
    "negative example": _examples(lambda places: [-1, *places[1:]]),
    "half an example": _examples(lambda places: [0.5, *places[1:]]),
    "rows as positions": lambda shard, manifest: change(manifest, single=[]),
    "no examples": lambda shard, manifest: change(manifest, examples={}),
    "torn": lambda shard, manifest: shard.write_bytes(shard.read_bytes()[:50]) and None,
    "deep manifest": lambda shard, manifest: manifest.write_text("[" * 100_000) and None,
    "another manifest": lambda shard, manifest: (manifest.parent / "x.json").write_text("{}") and None,
    "key twice": _shard(lambda text: text[:-1] + ", " + text[1:]),
    "another tensor": _shard(lambda text: text.replace("logits", "evil")),
    "another type": _shard(lambda text: text.replace('"F16"', '"I16"')),
    "another width": _shard(lambda text: text.replace("[2, 3]", "[3, 2]")),
    "pickle": lambda shard, manifest: shard.write_bytes(pickle.dumps(Payload())) and None,
    "link": lambda shard, manifest: _linked(shard),
    "unknown kind": _header(kind="evil"),
    "another kind": _header(kind="causal"),
    "huge vocabulary": _header(vocab=10**12),
    "vocabulary beyond 64 bits": _header(vocab=10**30),
    "huge top_k": _header(top_k=10**30),
    "top_k without ids": _header(top_k=2, kind="causal"),
    "numbers as names": _header(names={"x": "y"}),
    "another tap": _header(taps=["logits", "../x"]),
    "object": _header(dtype="object"),
    "another column": _header(key="evil"),
    "no column": _header(reads=[]),
    "path in its teacher": _header(about={"architecture": "/home/somebody"}),
    "another version": _header(version=2),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_hostile_cache_is_refused(
    name: str,
    cached: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    limited_child: Child,
    fault: Callable[..., None],
) -> None:
    """Also where its checksums were made to fit."""
    source, batch = cached
    folder = tmp_path / "cache"
    shutil.copytree(source, folder)
    shard = next(folder.glob("*.safetensors"))
    manifest = shard.with_suffix(".json")
    CACHES[name](shard, manifest)
    if name != "deep manifest":
        change(manifest, sha256=files.sha256(shard), bytes=shard.stat().st_size)
    before = tree(folder)

    def teach() -> None:
        cache = CacheTeacher(folder)
        cache.prepare(frozenset({"logits"}), torch.device("cpu"))
        cache(batch)
        _, logits = cache.apart(batch)
        assert logits is not None
        logits.rows(torch.arange(logits.count), torch.zeros(logits.count, cache.sizes.vocab))
        cache.close()

    outcome = limited_child(teach)

    fault("hostile files", note="cache")
    assert_refused(outcome, "cache")
    assert tree(folder) == before


# ---------------------------------------------------------------------- checkpoints


def test_hostile_checkpoints_are_refused(tmp_path: Path, limited_child: Child, fault: Callable[..., None]) -> None:
    """What a run of ours reads beside the Trainer's own files: pickles that run code, torn files, keys twice."""
    network = torch.nn.Linear(2, 2)
    own = networks.Networks({"critic": (network, torch.optim.SGD(network.parameters(), 0.1))})
    own.save(tmp_path)
    student = tiny_bert_classifier(num_labels=2)
    student.save_pretrained(tmp_path)
    weights, side = tmp_path / "model.safetensors", tmp_path / resume.SIDE_FILE
    loop = tmp_path / "loop"

    def go_on() -> None:
        loops.run(lambda number, state: {}, {}, steps=1, settings={}, resume_from=loop)

    def written(state: bytes, done: Any = 0) -> Callable[[], None]:
        loop.mkdir(exist_ok=True)
        (loop / loops.STATE).write_bytes(state)
        key = files.hashlib.sha256(b"{}").hexdigest()
        about = {"done": done, "settings": key, "state": files.sha256(loop / loops.STATE)}
        (loop / loops.ABOUT).write_text(json.dumps(about))
        return go_on

    def spoilt(path: Path, raw: bytes, then: Callable[[], Any]) -> Callable[[], Any]:
        path.write_bytes(raw)
        return then

    write_header(
        tmp_path / "twice", '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}', b"\0" * 4
    )
    evil, torn = pickle.dumps(Payload()), weights.read_bytes()[:100]
    cases = [
        lambda: spoilt(tmp_path / networks.OPTIMIZERS, evil, lambda: own.load(tmp_path)),
        lambda: spoilt(tmp_path / networks.OPTIMIZERS, b"", lambda: own.load(tmp_path)),
        lambda: spoilt(tmp_path / networks.WEIGHTS, evil, lambda: own.load(tmp_path)),
        lambda: spoilt(tmp_path / networks.WEIGHTS, torn, lambda: own.load(tmp_path)),
        lambda: written(evil),
        lambda: written(b"PK\x03\x04"),
        lambda: written(b"", "x"),
        lambda: spoilt(side, evil, lambda: resume.read_checkpoint(tmp_path)),
        lambda: spoilt(side, (tmp_path / "twice").read_bytes(), lambda: resume.read_checkpoint(tmp_path)),
        lambda: spoilt(weights, torn, lambda: resume.reload_renamed(student, tmp_path)),
        lambda: spoilt(weights, evil, lambda: resume.reload_renamed(student, tmp_path)),
    ]
    for case in cases:
        outcome = limited_child(case())
        fault("hostile files", note="checkpoint")
        assert_refused(outcome, str(tmp_path), tmp_path.name, "loop")


# ---------------------------------------------------------------------- chat templates

TEMPLATES = {
    "loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "growth": "{% set n = namespace(a='xxxx') %}{% for a in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "memory": "{{ 'x' * 10 ** 12 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{{ cycler.__init__.__globals__.os.system('echo') }}",
    "syntax": "{% for",
    "refusal": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_is_refused(
    name: str, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    messages = [{"role": "user", "content": "hello"}]

    with pytest.raises(files.ForeignFileError, match="its chat template") as error:
        chat.render(tokenizer, messages)

    fault("hostile files", note="template")
    assert "Give the tokenizer a chat_template that you trust" in str(error.value)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert chat.render(tokenizer, messages) == "<user>hello"
