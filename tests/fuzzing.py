"""Every parser of ours as a function of bytes: it returns, or raises an error of ours; anything else is a finding.

`fuzz/test_parsers.py` drives them with hypothesis, `fuzz/fuzz_parsers.py` with atheris.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import onnx
from hf_compress_cards import card
from hf_compress_evaluation import examples, table, task
from onnx import helper

from hf_compress import facts, files, foreign, outgoing, recipe, registry
from hf_compress.errors import HfCompressError
from hf_compress.onnx import graph as onnx_graph
from hf_compress.teachers import cache

Target = Callable[[Path], None]
TARGETS: dict[str, tuple[str, Target, tuple[bytes, ...]]] = {}
"""By name: the file's name, the parser, and files to begin with."""


def target(file: str, *seeds: str | bytes) -> Callable[[Target], Target]:
    def add(function: Target) -> Target:
        raw = tuple(seed if isinstance(seed, bytes) else seed.encode() for seed in seeds)
        TARGETS[function.__name__] = file, function, raw
        return function

    return add


def run(name: str, raw: bytes) -> str | None:
    """Gives a parser a file of these bytes; the message of its error, if that is one of ours."""
    file, function, _ = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_bytes(raw)
        try:
            function(path)
        except HfCompressError as error:
            return str(error)
    return None


RECIPE = """task: text-classification
teacher: me/my-model
data: {train: train.csv, test: test.csv, labels: [a, b], name: rows}
student: {layers: [0, 2], keep: even}
methods: [kd, {name: features, weight: 0.5}]
training: {epochs: 1e0, batch_size: 8}
alone: {learning_rates: [2e-5]}
seed: 3
"""
RECORD = {
    "version": 1,
    "measurements": [
        {"subject": "student", "metric": "accuracy", "value": 0.5, "unit": "fraction", "interval": [0.25, 0.75]},
        {
            "subject": "teacher",
            "metric": "latency_median",
            "value": 1,
            "unit": "seconds",
            "how": {"batch": 1, "a": [{}]},
        },
    ],
    "evidence": [{"file": "evidence/a.png", "bytes": 3, "sha256": "0" * 64}],
}
HEADER = {
    "version": 1,
    "teacher": "00",
    "taps": ["logits"],
    "kind": "rows",
    "seq2seq": False,
    "vocab": 3,
    "embedded": 9,
    "layers": 2,
    "names": {"0": "a"},
    "reads": ["input_ids"],
    "about": {"architecture": "Bert"},
    "top_k": None,
    "key": None,
    "dtype": "float16",
}
MANIFEST = {"sha256": "0" * 64, "bytes": 8, "single": ["logits"], "examples": {"ab": [0, 0, 0], "cd": [1, 0, 5]}}
CARD = """---
license: mit
tags: [a, b]
datasets: [me/rows]
model-index:
- name: a
  results:
  - task: {type: text-classification}
    dataset: {name: a, type: b}
    metrics: [{type: accuracy, value: 0.5}]
---
# A model
"""
METHOD = '''"""A method."""
METHOD = Method(
    title="A", paper="arXiv:1", authors="B", year=2020, summary="C.", bibtex="@misc{a}",
    tasks=("text-classification",), objective=Objective,
)
'''
CONFIG = {"model_type": "bert", "num_hidden_layers": 3, "id2label": {"0": "a"}, "limits": [0.0, 1.5], "torch": None}


def tensors(header: str) -> bytes:
    """A safetensors file of eight bytes of numbers."""
    return len(header).to_bytes(8, "little") + header.encode() + b"\0" * 8


@target("recipe.yaml", RECIPE)
def read_recipe(path: Path) -> None:
    found = recipe.read_recipe(path)
    recipe.objectives(found)


@target("task.yaml", "task: text-classification\ndata: a.csv\nmetrics: [accuracy]\nsplit: train[:5]\n")
def read_task(path: Path) -> None:
    task.read_task(path)


@target("compression.json", json.dumps(RECORD))
def read_record(path: Path) -> None:
    found = facts.load(path.parent)
    table.table(found)
    table.as_json(found)
    text = found.model_dump_json()
    assert facts.Record.model_validate_json(text) == found


@target("compression.json", json.dumps(RECORD))
def render_card(path: Path) -> None:
    text = card.render(path.parent)
    assert text.splitlines().count("---") == 2, "one front matter"


@target("config.json", json.dumps(CONFIG))
def read_config(path: Path) -> None:
    foreign.check_config(path)
    facts.load(path.parent)


@target("tokenizer_config.json", json.dumps({"model_max_length": 512, "added_tokens_decoder": {"0": {}}}))
def read_tokenizer_config(path: Path) -> None:
    foreign.check_tokenizer(path.parent, local_files_only=True)


@target("method.py", METHOD)
def read_method(path: Path) -> None:
    found = registry._read(path, EntryPoint(name="family", value="package", group=registry.GROUP), "distribution")
    assert found.tasks
    assert found.parts


@target("cache.json", json.dumps(HEADER))
def read_cache_header(path: Path) -> None:
    cache.CacheTeacher(path.parent)


@target("a.json", json.dumps(MANIFEST))
def read_manifest(path: Path) -> None:
    found = cache._read_part(cache._Manifest, path)
    assert cache._Manifest.model_validate_json(found.model_dump_json()) == found


@target("model.safetensors.index.json", json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "x/y"}}))
def read_index(path: Path) -> None:
    for name in files.shards(path).values():
        assert files.inside(path.parent, name).is_relative_to(path.parent.resolve())


@target(
    "model.safetensors",
    tensors('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
    tensors('{"__metadata__": {"format": "pt"}, "a": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}'),
)
def read_safetensors(path: Path) -> None:
    header = files.check_safetensors(path)
    with files.safetensors(path, "numpy") as weights:
        assert set(weights.keys()) == set(header)


@target("README.md", CARD)
def read_card(path: Path) -> None:
    outgoing._check_card(path)


@target("rows.csv", 'text,label\na,x\n"b, c",y\n')
def read_csv(path: Path) -> None:
    _read_rows(path)


@target("rows.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": 1}\n', '{"text": "a", "label": 0}\n')
def read_jsonl(path: Path) -> None:
    _read_rows(path)


def _read_rows(path: Path) -> None:
    found = examples.read_rows(path)
    read = examples.examples(found, name="rows", text="text", label="label", label2id={"x": 0, "y": 1})
    assert len(read.texts) == len(found)
    assert read.labels is not None
    assert all(0 <= each < 2 for each in read.labels)


def _graph() -> bytes:
    weight = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="data")
    made = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [], [], [weight])
    return bytes(helper.make_model(made).SerializeToString())


@target("model.onnx", _graph())
def read_graph(path: Path) -> None:
    (path.parent / "data").write_bytes(b"\0" * 8)
    onnx_graph.check_external(path)
