"""Export, int8 and loading of ONNX: what is promised of a variant folder, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import logging
import shutil
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_bert_classifier, tiny_bert_config, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from transformers.exporters import ExportedModel
from transformers.modeling_outputs import ModelOutput

from hf_compress import facts
from hf_compress.errors import ConfigurationError, ForeignFileError, GateError, ParityError, ProviderError
from hf_compress.onnx import (
    Exported,
    Gate,
    blocks,
    check_parity,
    export_model,
    export_onnx,
    load_onnx,
    parity_batches,
    precision,
    quantize_onnx,
    tracing,
)
from hf_compress.onnx import graph as onnx_graph
from hf_compress.onnx.folder import _portable
from hf_compress.onnx.gate import _decisions
from hf_compress.onnx.parity import with_other_rounding
from hf_compress.onnx.runtime import _engines

TEXTS = ["the film was very good", "a dull story", "i love the music but not the end", "slow"] * 4
LABELS = [0, 1, 2, 0] * 4


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student folder with `onnx/` and `onnx_int8/`, never changed."""
    folder: Path = tmp_path_factory.mktemp("built") / "student"
    tiny_bert_classifier().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    export_onnx(folder)
    quantize_onnx(folder, gate=Gate(features=TEXTS, labels=LABELS, max_drop=1, min_agreement=0.5))
    return folder


@pytest.fixture
def student(built: Path, tmp_path: Path) -> Path:
    """A copy of it for tests that change files."""
    return Path(shutil.copytree(built, tmp_path / "student"))


@pytest.fixture(scope="module")
def traced() -> ExportedModel:
    clean = tracing.clean(tiny_bert_classifier())
    (part,) = tracing.parts(clean, None)
    return tracing.trace(part).exported


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, traced: ExportedModel) -> ExportedModel:
    """Spares the seconds of tracing where a test is about what comes after."""
    mine = copy.copy(traced)
    monkeypatch.setattr(tracing, "trace", lambda part: tracing.Traced(name="model", exported=mine))
    return mine


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("masked") / "student"
    BertForMaskedLM(tiny_bert_config(vocab_size=2000)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    export_onnx(folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith((".part", ".old"))]


def corrupt(model: onnx_ir.Model, by: float) -> None:
    value = model.graph.initializers["classifier.weight"]
    assert value.const_value is not None
    value.const_value = onnx_ir.tensor(value.const_value.numpy() + np.float32(by), name=value.name)


# Export


def test_the_graph_gives_the_models_numbers_with_padding_on_either_side(built: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(built)
    batches = list(parity_batches(model, tiny_tokenizer()))

    parity = check_parity(load_onnx(built), model, batches)

    assert parity.max_abs_diff < 1e-5
    assert parity.output == "logits"
    masks = [batch["attention_mask"] for batch in batches]
    assert [tuple(mask.shape) for mask in masks] == [(1, 1), (1, 1), (3, 11), (3, 11), (5, 64), (5, 64)]
    left, right = masks[2:4]
    assert left[-1].tolist() == right[-1].flip(0).tolist() == [0] * 3 + [1] * 8
    assert all(batch["token_type_ids"].max() == 1 for batch in batches[2:])


def test_what_was_measured_and_every_hash_stand_in_the_students_record(built: Path) -> None:
    record = facts.load(built)
    parity = record.find("parity_max_abs_diff", variant="onnx")
    assert parity is not None
    assert 0 < parity.value < 1e-5
    assert parity.how["shapes"] == ["1x1", "3x11", "5x64"]
    for variant in ("onnx", "onnx_int8"):
        size = record.find("bytes", variant=variant)
        assert size is not None
        assert size.value == sum(path.stat().st_size for path in (built / variant).iterdir())
    agreement = record.find("agreement_with_fp32", variant="onnx_int8", rows=16)
    assert agreement is not None
    assert record.find("accuracy_drop", variant="onnx_int8", rows=16) is not None
    names = {entry.file for entry in record.evidence}
    assert names == {f"{v}/{name}" for v in ("onnx", "onnx_int8") for name in hashes(built / v)}
    facts.check(built)


def test_a_corrupted_weight_fails_the_export_and_the_earlier_one_is_kept(
    student: Path, quick: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(student)
    real = onnx_graph.save
    program = onnx_ir.from_proto(onnx_ir.to_proto(quick.program))
    corrupt(program, 0.5)
    monkeypatch.setattr(onnx_graph, "save", lambda _, path: real(program, path))

    with pytest.raises(ParityError, match=r"logits, batch of shape \(1, 1\).*differs .* by up to \d.*was kept"):
        export_onnx(student)

    assert hashes(student) == before
    assert not leftovers(student)


def test_a_write_that_fails_keeps_the_earlier_export_and_leaves_nothing(
    student: Path, quick: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(student)

    def full(model: onnx_ir.Model, path: str, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(student)
    assert hashes(student) == before
    assert not leftovers(student)


@pytest.mark.parametrize("variant", ["onnx", "onnx_int8"])
def test_no_file_names_this_machine_or_shows_source(built: Path, variant: str) -> None:
    for path in (built / variant).iterdir():
        content = path.read_bytes()
        for needle in (str(Path.cwd()), str(built), tempfile.gettempdir(), "/site-packages", "stack_trace", "def "):
            assert needle.encode() not in content, (path.name, needle)
    proto = onnx.load(built / variant / "model.onnx")
    assert not any(len(node.metadata_props) or node.doc_string for node in proto.graph.node)
    assert not len(proto.metadata_props)
    assert not len(proto.graph.metadata_props)


def test_a_graph_with_a_path_or_metadata_in_it_is_not_saved(traced: ExportedModel, tmp_path: Path) -> None:
    long = "/home/someone/" + "x" * 60  # 74 characters: the byte before it in the file is the letter J
    for spoil in ("metadata", "doc", "long"):
        program = onnx_ir.from_proto(onnx_ir.to_proto(traced.program))
        node = next(iter(program.graph))
        if spoil == "metadata":
            node.metadata_props["pkg.torch.onnx.stack_trace"] = "x"
        else:
            node.doc_string = long if spoil == "long" else 'File "train.py"'
        with pytest.raises(ConfigurationError, match="this machine"):
            onnx_graph.save(program, tmp_path / "model.onnx")


def test_axes_are_symbolic_and_named(built: Path) -> None:
    graph = onnx.load(built / "onnx" / "model.onnx").graph
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    text = ["batch_size", "sequence_length"]
    assert axes == {
        "input_ids": text,
        "attention_mask": text,
        "token_type_ids": text,
        "logits": ["batch_size", 3],
    }


def test_a_frozen_axis_is_refused(traced: ExportedModel) -> None:
    program = onnx_ir.from_proto(onnx_ir.to_proto(traced.program))
    program.graph.inputs[0].shape = onnx_ir.Shape([1, "sequence_length"])
    with pytest.raises(ConfigurationError, match="input_ids: axis 0 should vary"):
        onnx_graph.name_axes(program, {"input_ids": {0: "batch_size", 1: "sequence_length"}})


def test_hooks_are_refused_on_the_model_and_on_any_part(tmp_path: Path) -> None:
    model = tiny_bert_classifier()
    handle = model.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigurationError, match="BertForSequenceClassification carries forward hooks"):
        export_model(model, None, tmp_path / "onnx")
    handle.remove()
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ConfigurationError, match=r"bert\.encoder\.layer\.1 carries forward hooks"):
        export_model(model, None, tmp_path / "onnx")
    assert not any(tmp_path.iterdir())


def test_a_forward_set_on_the_instance_is_refused_and_accelerates_wrapper_left_out() -> None:
    model = tiny_bert_classifier()
    batch = next(iter(parity_batches(model, None)))
    expected = model(**batch).logits
    own = model.forward
    model.forward = lambda **inputs: own(**inputs) * 2  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="a forward of its own"):
        tracing.clean(model)
    model._original_forward = own  # as accelerate leaves it around bf16 autocast
    assert torch.equal(tracing.clean(model)(**batch).logits, expected)
    model.forward = own  # type: ignore[method-assign]  # as the exporter leaves it
    del model._original_forward
    assert torch.equal(tracing.clean(model)(**batch).logits, expected)


def test_the_model_in_memory_is_left_as_it_was(tmp_path: Path, quick: ExportedModel) -> None:
    """In train mode, with a distiller that cannot be copied; no record, because there is no student folder."""

    class Distiller(nn.Module):
        def __deepcopy__(self, memo: dict[int, Any]) -> Distiller:
            raise AssertionError("the teacher would be copied")

    model = tiny_bert_classifier().train()
    model.distiller = Distiller()
    model.distiller.weight = nn.Parameter(torch.zeros(1))
    attention, members = model.config._attn_implementation, set(vars(model))

    exported = export_model(model, tiny_tokenizer(), tmp_path / "onnx")

    assert isinstance(exported, Exported)
    assert not hasattr(tracing.clean(model), "distiller")
    assert model.training
    assert model.bert.training
    assert model.config._attn_implementation == attention
    assert set(vars(model)) == members
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert not any("distiller" in name for name in quick.program.graph.initializers)


def test_the_distillers_weights_in_a_checkpoint_are_left_out(built: Path, tmp_path: Path, quick: ExportedModel) -> None:
    student = Path(shutil.copytree(built, tmp_path / "s", ignore=shutil.ignore_patterns("onnx*", "compression.json")))
    weights = load_file(student / "model.safetensors")
    save_file(
        weights | {"distiller.projection.weight": torch.ones(3, 3)}, student / "model.safetensors", {"format": "pt"}
    )
    export_onnx(student)
    assert b"distiller" not in (student / "onnx" / "model.onnx").read_bytes()


def test_missing_weights_are_refused(student: Path) -> None:
    weights = load_file(student / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(ForeignFileError, match=r"lacks 1 weights .* classifier\.weight"):
        export_onnx(student)


def test_pickled_weights_are_not_loaded(student: Path) -> None:
    torch.save(load_file(student / "model.safetensors"), student / "pytorch_model.bin")
    (student / "model.safetensors").unlink()
    with pytest.raises(ForeignFileError, match=r"no file named model\.safetensors"):
        export_onnx(student)


def test_an_unknown_architecture_is_refused(student: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"architectures": ["MyBert"]}))
    with pytest.raises(ConfigurationError, match="MyBert"):
        export_onnx(student)


def test_a_folder_that_is_no_export_is_not_replaced(student: Path) -> None:
    before = hashes(student)
    with pytest.raises(ConfigurationError, match="no earlier export"):
        export_onnx(student, output=student)
    assert hashes(student) == before


def test_outside_the_student_folder_nothing_is_recorded(student: Path, tmp_path: Path, quick: ExportedModel) -> None:
    before = (student / "compression.json").read_bytes()
    stages: list[str] = []
    export_onnx(student, output=tmp_path / "elsewhere", progress=stages.append)
    assert (student / "compression.json").read_bytes() == before
    assert (tmp_path / "elsewhere" / "model.onnx").is_file()
    assert stages == ["load", "trace", "write", "parity"]


def test_what_does_not_fit_one_graph_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    with pytest.raises(ConfigurationError, match="an encoder-decoder that does not generate"):
        export_model(T5Model(config), None, tmp_path / "onnx")
    with pytest.raises(ConfigurationError, match="multiple choice does not fit"):
        export_model(BertForMultipleChoice(tiny_bert_config()), None, tmp_path / "onnx")


def test_large_weights_lie_beside_the_graph_and_load_from_there(
    student: Path, quick: ExportedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "INLINE_BYTES", 10_000)
    inline = sum(path.stat().st_size for path in (student / "onnx").iterdir())
    exported = export_onnx(student)
    assert {path.name for path in exported.files} >= {"model.onnx", "model.onnx_data", "model.onnx.data"}
    assert (student / "onnx" / "model.onnx.data").stat().st_size == 0
    assert exported.bytes == pytest.approx(inline, rel=0.05)
    check_parity(load_onnx(student), tiny_bert_classifier(), parity_batches(tiny_bert_classifier(), None))
    small = quantize_onnx(student, gate=Gate(features=TEXTS, min_agreement=0.5))
    assert small.bytes < exported.bytes
    load_onnx(small.folder)


def test_transformers_own_loader_reads_the_folder(built: Path) -> None:
    for variant in ("onnx", "onnx_int8"):
        inputs = tiny_tokenizer()(TEXTS[:3], padding=True, return_tensors="pt")
        exported = ExportedModel.from_pretrained(built / variant, device="cpu")
        torch.testing.assert_close(exported(**inputs).logits, load_onnx(built / variant)(**inputs).logits)


def test_companions_load_elsewhere(built: Path, tmp_path: Path, quick: ExportedModel) -> None:
    """No path in config.json, rope_theta for readers of transformers 4, a tokenizer class that they know."""
    model = tiny_bert_classifier(rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    model.config._name_or_path = str(tmp_path)
    tokenizer = tiny_tokenizer()
    export_model(model, tokenizer, tmp_path / "onnx")
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert config["rope_theta"] == 100000.0
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert str(tmp_path) not in json.dumps(config)
    settings = {"tokenizer_class": "TokenizersBackend", "name_or_path": "/data/x"}
    _portable(settings)
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_a_path_in_the_config_is_refused(tmp_path: Path, quick: ExportedModel) -> None:
    model = tiny_bert_classifier(teacher_folder="/data/models/teacher")
    with pytest.raises(ConfigurationError, match=r"config\.json: teacher_folder is an absolute path"):
        export_model(model, None, tmp_path / "onnx")
    assert not any(tmp_path.iterdir())


# Other models


@pytest.mark.slow
def test_a_tied_masked_lm_stores_its_table_once_in_float32_and_in_int8(masked_lm: Path) -> None:
    """The head's vocabulary of 2000 is most of the model."""
    weights = (masked_lm / "model.safetensors").stat().st_size
    assert (masked_lm / "onnx" / "model.onnx").stat().st_size == pytest.approx(weights, rel=0.2)
    assert has_tied_head(onnx_ir.load(masked_lm / "onnx" / "model.onnx"))

    quantize_onnx(masked_lm, gate=Gate(features=TEXTS, min_agreement=0.5))

    int8 = onnx_ir.load(masked_lm / "onnx_int8" / "model.onnx")
    operators = {node.op_type for node in int8.graph}
    assert {"GatherBlockQuantized", "MatMulNBits", "MatMulInteger"} <= operators
    tables = [value for value in int8.graph.initializers.values() if value.shape == (2000, 1, 32)]
    assert len(tables) == 1
    assert {use.node.op_type for use in tables[0].uses()} == {"Reshape", "MatMulNBits"}
    assert (masked_lm / "onnx_int8" / "model.onnx").stat().st_size < 0.45 * weights


def has_tied_head(model: onnx_ir.Model) -> bool:
    """Whether one weight serves both as an embedding (Gather) and, transposed, as a head (MatMul)."""
    return any(
        {"Gather", "Transpose"} <= {use.node.op_type for use in value.uses()}
        for value in model.graph.initializers.values()
    )


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForQuestionAnswering, BertModel, "roberta"])
def test_other_plain_models_come_out_exact(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "roberta":  # positions start after the padding id: two fewer than the table has
        config = RobertaConfig(vocab_size=50, max_position_embeddings=40, **shape)
        model: Any = RobertaForSequenceClassification(config)
    else:
        model = kind(tiny_bert_config(num_hidden_layers=1))
    exported = export_model(model, None, tmp_path / "onnx")
    outputs = set(load_onnx(exported.folder)(**next(iter(parity_batches(model, None)))))
    assert exported.value("parity_max_abs_diff") < 1e-4
    expected = {
        BertForQuestionAnswering: {"start_logits", "end_logits"},
        BertModel: {"last_hidden_state", "pooler_output"},
    }
    assert outputs == expected.get(kind, {"logits"})


# Int8 and its gate


class Wrong:
    """Stands in for a quantiser that ruins the model."""

    def __call__(self, program: onnx_ir.Model, *args: object, **settings: object) -> onnx_ir.Model:
        bias = program.graph.initializers["classifier.weight"]
        assert bias.const_value is not None
        bias.const_value = onnx_ir.tensor(-bias.const_value.numpy(), name=bias.name)
        return blocks.quantize_products(program, 8)


def test_int8_is_small_and_close(built: Path) -> None:
    inputs = tiny_tokenizer()(TEXTS[:3], padding=True, return_tensors="pt")
    full, small = load_onnx(built)(**inputs).logits, load_onnx(built / "onnx_int8")(**inputs).logits
    assert 0 < (full - small).abs().max() < 0.5
    graph = onnx_ir.load(built / "onnx_int8" / "model.onnx").graph
    assert "MatMulInteger" in {node.op_type for node in graph}
    scales = {
        value.shape.numpy() for name, value in graph.initializers.items() if name.endswith("_scale") and value.shape
    }
    assert (32,) in scales  # one per channel of a 32 x 32 projection


@pytest.mark.parametrize("labelled", [True, False])
def test_a_missed_gate_keeps_the_earlier_int8(student: Path, monkeypatch: pytest.MonkeyPatch, labelled: bool) -> None:
    before = hashes(student)
    model = load_onnx(student)
    right = model(**tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
    monkeypatch.setattr(precision, "_dynamic", Wrong())
    monkeypatch.setattr(precision, "_weights", Wrong())
    gate = Gate(features=TEXTS, labels=right if labelled else None, min_agreement=0.0 if labelled else 0.9)
    figure = r"loses \d\.\d{4} of accuracy \(at most 0\.01\)" if labelled else "loses an unmeasured part"
    with pytest.raises(GateError, match=rf"in \d\.\d{{4}} of 16 cases .* and {figure}.* was kept"):
        quantize_onnx(student, gate=gate)
    assert hashes(student) == before
    assert not leftovers(student)


def test_a_nan_never_agrees(built: Path) -> None:
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
    ours, theirs = (_decisions({"logits": logits}, {}, Fake(), broken) for broken in (-1, -2))
    assert (ours == theirs).tolist() == [True, False]


def test_padding_decides_nothing_in_a_tagging_gate() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert _decisions({"logits": torch.zeros(2, 3, 4)}, {"attention_mask": mask}, Fake(), -1).shape == (3,)
    spans = {"start_logits": torch.tensor([[0.0, 1.0, 9.0], [1.0, 9.0, 9.0]])}
    assert _decisions(spans, {"attention_mask": mask}, Fake(), -1).tolist() == [1, 0]


def test_without_a_gate_a_warning_says_so(student: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert inspect.signature(quantize_onnx).parameters["gate"].default is inspect.Parameter.empty
    with caplog.at_level(logging.WARNING, "hf_compress.onnx.precision"):
        exported = quantize_onnx(student, gate=None, output="onnx_ungated")
    assert "without a gate" in caplog.text
    assert [measurement.metric for measurement in exported.measurements] == ["bytes"]


def test_rows_of_input_ids_pass_the_gate_like_their_texts(student: Path) -> None:
    rows = [dict(tiny_tokenizer()(text)) for text in TEXTS]
    values = [
        quantize_onnx(student, gate=Gate(features=features, labels=LABELS, max_drop=1, min_agreement=0.5, batch_size=5))
        for features in (TEXTS, rows)
    ]
    assert values[0].value("agreement_with_fp32") == values[1].value("agreement_with_fp32")
    assert values[0].value("accuracy_drop") == values[1].value("accuracy_drop")


@pytest.mark.parametrize(
    "settings",
    [
        {"features": []},
        {"features": TEXTS, "labels": [1]},
        {"features": TEXTS, "max_drop": 1.5},
        {"features": TEXTS, "batch_size": 0},
    ],
)
def test_a_gate_that_measures_nothing_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Gate: "):
        Gate(**settings)


def test_numbers_are_gated_on_how_like_they_are(tmp_path: Path) -> None:
    """A regression on its correlation over the rows, hidden states on their cosine at real tokens."""
    torch.manual_seed(0)
    for model in (tiny_bert_classifier(num_labels=1, problem_type="regression"), BertModel(tiny_bert_config())):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        export_onnx(folder)
        exported = quantize_onnx(folder, gate=Gate(features=TEXTS, min_similarity=0.5))
        similarity = exported.value("similarity_to_fp32")
        assert 0.5 < similarity < 1
        with pytest.raises(GateError, match=rf"is like float32 to {similarity:.4f} \(at least 1\) on 16 rows"):
            quantize_onnx(folder, gate=Gate(features=TEXTS, min_similarity=1), output="onnx_other")
        with pytest.raises(ConfigurationError, match="labels are classes, and the graph gives numbers"):
            quantize_onnx(folder, gate=Gate(features=TEXTS, labels=LABELS), output="onnx_other")


def test_several_labels_a_row_are_compared_one_by_one() -> None:
    model = Fake()
    model.config = PretrainedConfig(problem_type="multi_label_classification")
    logits = torch.tensor([[0.5, -0.5], [-1.0, torch.nan]])
    assert _decisions({"logits": logits}, {}, model, -1).tolist() == [1, 0, 0, -1]


# Loading


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
def test_a_flipped_byte_is_refused(student: Path, name: str) -> None:
    path = student / "onnx" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for folder in (student, student / "onnx"):
        with pytest.raises(ForeignFileError, match="has changed since it was recorded"):
            load_onnx(folder)
    load_onnx(student / "onnx_int8")


def test_a_graph_that_is_none_and_a_folder_without_one_are_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="Export the student first"):
        load_onnx(tmp_path)
    (student / "compression.json").unlink()
    model = student / "onnx" / "model.onnx"
    model.write_bytes(model.read_bytes()[:5000])
    with pytest.raises(ForeignFileError, match="ONNX"):
        load_onnx(student)


def test_weights_outside_the_folder_are_refused(student: Path, traced: ExportedModel) -> None:
    (student / "compression.json").unlink()
    (student / "secret").write_bytes(b"\0" * 400_000)
    proto = onnx.load(student / "onnx" / "model.onnx")
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (student / "onnx" / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ForeignFileError, match="leads out of its folder"):
        load_onnx(student)


def test_a_provider_that_cannot_run_is_an_error(built: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ProviderError, match=r"CUDAExecutionProvider was asked for, and onnxruntime has .*CPUExec"):
            load_onnx(built, provider="cuda")
    with pytest.raises(ProviderError, match="NoSuchExecutionProvider"):
        load_onnx(built, provider="NoSuchExecutionProvider")


def test_a_provider_that_falls_back_in_silence_is_an_error(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a GPU build whose CUDA libraries are missing: listed as available, not active."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: real(path, options, providers=providers[1:])
    )
    with pytest.raises(ProviderError, match="CUDAExecutionProvider was asked for and CPUExecutionProvider runs"):
        load_onnx(built, provider="cuda")


def test_two_builds_of_onnxruntime_are_refused(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu", "onnxruntime"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: both)
    with pytest.raises(ProviderError, match="onnxruntime and onnxruntime-gpu are installed together"):
        load_onnx(built)


def test_without_onnxruntime_the_error_says_what_to_install(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r'pip install "hf-compress\[cpu\]"'):
        load_onnx(built)


def test_threads_are_set_and_the_slow_fusion_is_off(built: Path) -> None:
    options = load_onnx(built, threads=1).session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert load_onnx(built).session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    entry = "optimization.disable_specified_optimizers"
    assert options.get_session_config_entry(entry) == "SkipLayerNormFusion"


# Calling


def test_left_out_inputs_mean_what_they_mean_in_torch(built: Path) -> None:
    model, ours = AutoModelForSequenceClassification.from_pretrained(built).eval(), load_onnx(built)
    ids = torch.tensor([[2, 8, 9, 3]], dtype=torch.int32)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(ours(input_ids=ids, labels=None, return_dict=True, use_cache=False).logits, expected)
    torch.testing.assert_close(ours.forward(ids)[0], expected)
    mask = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(ours(input_ids=ids, attention_mask=mask)["logits"], expected)


def test_unknown_and_missing_inputs_are_refused(built: Path) -> None:
    model = load_onnx(built)
    ids = torch.tensor([[2, 8, 3]])
    with pytest.raises(ConfigurationError, match="labels: the graph takes input_ids"):
        model(input_ids=ids, labels=torch.tensor([1]))
    with pytest.raises(ConfigurationError, match=r"input_ids.*: missing; the graph takes input_ids"):
        model(attention_mask=torch.ones_like(ids))


def test_the_wrapper_is_a_model_for_pipelines(built: Path) -> None:
    model = load_onnx(built)
    assert model.to("cpu") is model.eval() is model
    assert not model.can_generate()
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.config is not None
    assert model.config.num_labels == 3


def test_pipelines_answer_like_torch(built: Path, masked_lm: Path) -> None:
    tokenizer = tiny_tokenizer()
    torch_model = AutoModelForSequenceClassification.from_pretrained(built).eval()
    for task in ("text-classification", "zero-shot-classification", "feature-extraction"):
        extra: dict[str, Any] = {"candidate_labels": ["good", "bad"]} if task.startswith("zero") else {}
        ours, theirs = (
            pipeline(task, model=model, tokenizer=tokenizer)(TEXTS[:3], **extra)
            for model in (load_onnx(built), torch_model)
        )
        assert_same(ours, theirs)
    mask = "the film was [MASK]"
    theirs = pipeline("fill-mask", model=BertForMaskedLM.from_pretrained(masked_lm).eval(), tokenizer=tokenizer)
    ours = pipeline("fill-mask", model=load_onnx(masked_lm), tokenizer=tokenizer)
    assert_same(ours(mask, top_k=3), theirs(mask, top_k=3))


def test_the_tagging_pipeline_answers_like_torch(tmp_path: Path) -> None:
    model = BertForTokenClassification(tiny_bert_config(num_labels=3)).eval()
    export_model(model, tiny_tokenizer(), tmp_path / "onnx")
    ours, theirs = (
        pipeline("token-classification", model=each, tokenizer=tiny_tokenizer(), aggregation_strategy="simple")(
            TEXTS[2]
        )
        for each in (load_onnx(tmp_path), model)
    )
    assert ours
    for one, other in zip(ours, theirs, strict=True):
        assert float(one.pop("score")) == pytest.approx(float(other.pop("score")), abs=1e-5)
        assert one == other


def test_the_image_pipeline_answers_like_torch(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=3, **shape)).eval()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    exported = export_model(model, processor, tmp_path / "onnx")
    image = Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3))
    ours, theirs = (
        pipeline("image-classification", model=each, image_processor=processor)(image)
        for each in (load_onnx(tmp_path), model)
    )
    assert_same(ours, theirs)
    assert "preprocessor_config.json" in {path.name for path in exported.files}


class OwnConfig(PretrainedConfig):
    model_type = "own-model"
    vocab_size = 20
    pad_token_id = 0


class OwnModel(PreTrainedModel):
    """A third party's model: no attention, no position limit, an output of its own name."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(20, 4)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ModelOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return ModelOutput(means=(self.table(input_ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_a_model_of_ones_own_exports(tmp_path: Path) -> None:
    model = OwnModel(OwnConfig()).eval()
    exported = export_model(model, None, tmp_path / "onnx")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(
        load_onnx(exported.folder)(input_ids=ids)["means"], model(input_ids=ids)["means"].detach()
    )


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal up to rounding, at any depth."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == pytest.approx(theirs, abs=1e-5) if isinstance(theirs, float) else ours == theirs


# Parity by itself


class Fake:
    """A model of fixed outputs."""

    def __init__(self, **outputs: Tensor) -> None:
        self.outputs = outputs
        self.config: PretrainedConfig | None = None

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.outputs


def test_parity_scales_with_the_output_and_counts_infinities_as_equal() -> None:
    batch = [{"input_ids": torch.zeros(2, 3)}]
    expected = torch.tensor([0.0, 1000.0, -torch.inf])
    found = expected + torch.tensor([0.5e-4, 0.05, 0.0])
    parity = check_parity(Fake(logits=found), Fake(logits=expected), batch)
    assert parity.max_abs_diff == pytest.approx(0.05, rel=1e-2)
    assert parity.shape == (2, 3)
    for wrong in (expected + torch.tensor([2e-4, 0, 0]), torch.tensor([torch.nan, 1000.0, -torch.inf]), expected[:2]):
        with pytest.raises(ParityError, match=r"logits, batch of shape \(2, 3\)"):
            check_parity(Fake(logits=wrong), Fake(logits=expected), batch)
    with pytest.raises(ParityError, match="gives shape None"):
        check_parity(Fake(), Fake(logits=expected), batch)


def test_what_float32_leaves_open_is_allowed_tenfold_row_by_row_and_recorded() -> None:
    batch = [{"input_ids": torch.zeros(2, 1)}]
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    open_row = expected + torch.tensor([[0.0, 0.001], [0.0, 0.0]])  # the last bit of the weights moves the first row
    asked = []

    def rounded() -> Fake:
        asked.append(1)
        return Fake(logits=open_row)

    near = expected + torch.tensor([[0.0099, 0.0], [0.0, 0.0]])
    parity = check_parity(Fake(logits=near), Fake(logits=expected), batch, rounded=rounded)
    assert parity.rounding == pytest.approx(0.01, rel=1e-3)
    assert parity.max_abs_diff == pytest.approx(0.0099)
    for wrong in (near * torch.tensor([[1.1], [1.0]]), near.flip(0)):  # too far, or in the row that is determined
        with pytest.raises(ParityError, match=r"and 0\.01 for rounding"):
            check_parity(Fake(logits=wrong), Fake(logits=expected), batch, rounded=rounded)
    asked.clear()
    assert check_parity(Fake(logits=expected), Fake(logits=expected), batch, rounded=rounded).rounding == 0
    assert not asked  # the second model is made where it is needed
    with pytest.raises(ParityError, match=r"\(1 \+ \|output\|\)\.$"):
        check_parity(Fake(logits=near), Fake(logits=expected), batch)


def test_other_rounding_changes_weights_by_their_last_bit() -> None:
    model = nn.Linear(50, 50)
    other = with_other_rounding(model)
    apart = ((other.weight - model.weight) / model.weight).abs()
    assert 0 < apart.max() < 2.5e-7
    assert 0.4 < (apart > 0).double().mean() < 0.9


def test_the_vocabulary_of_the_helpers_fits() -> None:
    assert tiny_tokenizer().vocab_size == len(VOCAB) == tiny_bert_config().vocab_size


def test_tensorrt_is_asked_for_with_profiles_and_a_kept_engine(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime is asked for; the provider itself needs a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[Any] = []
    known = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options, providers: asked.append(providers))
    sizes = {"batch_size": (1, 8, 32), "sequence_length": (1, 16, 64)}
    with contextlib.suppress(AttributeError):
        load_onnx(built, provider="tensorrt", shapes=sizes, options={"trt_fp16_enable": True})
    (name, given), *others = asked[0]
    assert [name, *others] == known
    assert given["trt_profile_opt_shapes"] == "input_ids:8x16,attention_mask:8x16,token_type_ids:8x16"
    assert given["trt_profile_max_shapes"].startswith("input_ids:32x64,")
    assert given["trt_fp16_enable"]
    assert given["trt_engine_cache_enable"]
    assert Path(given["trt_engine_cache_path"]).parent == tmp_path / "hf_compress" / "tensorrt"
    beside = Path(shutil.copytree(built / "onnx", tmp_path / "onnx"))
    places = []
    for weights in (b"one", b"other"):
        (beside / "model.onnx_data").write_bytes(weights)
        places.append(_engines(beside / "model.onnx")["trt_engine_cache_path"])
    assert len({*places, given["trt_engine_cache_path"]}) == 3, "an engine holds weights that lie beside the graph"
    with pytest.raises(
        ConfigurationError, match=r"input_ids has the axes batch_size, sequence_length, and sequence_len"
    ):
        load_onnx(built, provider="tensorrt", shapes={"batch_size": (1, 8, 32)})


@pytest.fixture
def cuda() -> None:
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a CUDA device and onnxruntime-gpu")


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_cuda_runs_and_gives_the_models_numbers(built: Path) -> None:
    model = load_onnx(built)
    assert model.provider == "CUDAExecutionProvider"
    assert model.device.type == "cuda"
    reference = AutoModelForSequenceClassification.from_pretrained(built).eval()
    check_parity(model, reference, parity_batches(reference, None), tolerance=2e-3)  # TF32 products
    inputs = {name: value.cuda() for name, value in next(iter(parity_batches(reference, None))).items()}
    assert model(**inputs).logits.is_cuda
    assert load_onnx(built, provider="cpu").device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_half_precision_runs_on_the_gpu_like_float32(student: Path, provider: str) -> None:
    if provider == "tensorrt" and "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs TensorRT")
    quantize_onnx(student, precision="fp16", gate=Gate(features=TEXTS, min_agreement=0.9))
    sizes = {"batch_size": (1, 3, 8), "sequence_length": (1, 16, 64)}
    shapes = sizes if provider == "tensorrt" else None
    model = load_onnx(student / "onnx_fp16", provider=provider, shapes=shapes)
    reference = AutoModelForSequenceClassification.from_pretrained(student).eval()
    check_parity(model, reference, parity_batches(reference, None), tolerance=2e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_cuda_graph_replays_one_shape(built: Path) -> None:
    model = load_onnx(built, provider="cuda", options={"enable_cuda_graph": "1"})
    ids = {"input_ids": torch.full((2, 8), 8).cuda(), "attention_mask": torch.ones(2, 8, dtype=torch.long).cuda()}
    first, second = model(**ids).logits, model(**ids).logits
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.cpu(), load_onnx(built, provider="cpu")(**ids).logits, atol=2e-3, rtol=2e-3)
