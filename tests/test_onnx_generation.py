"""Language models and encoder-decoders as ONNX: one cache, every weight once, and `generate` gives torch's tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from tiny import tiny_bert_classifier, tiny_tokenizer
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    WhisperConfig,
    WhisperForConditionalGeneration,
    pipeline,
)

from hf_compress import facts
from hf_compress.errors import ConfigurationError, GateError, ParityError, UnknownNameError
from hf_compress.onnx import Gate, blocks, export_model, export_onnx, load_onnx, precision, quantize_onnx
from hf_compress.onnx import graph as graphs
from hf_compress.onnx.models import OnnxCausalLM, OnnxSeq2SeqLM, OnnxWhisper
from hf_compress.outgoing import ALLOWED

TEXTS = ["the film was very good", "a dull story", "i love the music but not the end", "slow"] * 4
PROMPT = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
}
SOURCE = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 1], [9, 10, 1, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 10},
    "constrained": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}
NONE: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
        initializer_range=0.3, **NONE,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        initializer_factor=1.0, eos_token_id=None,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():  # else every next token is the one before
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    return model


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50,
        max_target_positions=40, num_mel_bins=16, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None, init_std=0.3,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("causal") / "student"
    llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    export_onnx(folder)
    return folder


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("seq2seq") / "student"
    t5().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    export_onnx(folder)
    return folder


def same_tokens(ours: Any, theirs: Any, inputs: Mapping[str, Tensor], **settings: Any) -> Tensor:
    made = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        made.append(model.generate(**inputs, max_new_tokens=12, pad_token_id=0, **settings))
    assert made[0].tolist() == made[1].tolist()
    assert len(made[0].unique()) > 3, "tokens that never change would prove nothing"
    return made[0]


# Decoder-only


def test_one_graph_serves_prompt_and_continuation(causal: Path) -> None:
    assert {path.name for path in (causal / "onnx").glob("*.onnx")} == {"model.onnx"}
    graph = onnx.load(causal / "onnx" / "model.onnx").graph
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    past = ["batch_size", 2, "past_sequence_length", 8]
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert [shapes[f"past_key_values.{layer}.{kind}"] for layer in (0, 1) for kind in ("key", "value")] == [past] * 4
    assert shapes["logits"] == ["batch_size", "sequence_length", 64]
    assert set(shapes) - {name for name in shapes if name.startswith(("past", "present"))} == {
        "input_ids", "attention_mask", "position_ids", "logits",
    }  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_language_model_generates_torchs_tokens(causal: Path, way: str) -> None:
    same_tokens(load_onnx(causal), LlamaForCausalLM.from_pretrained(causal).eval(), PROMPT, **WAYS[way])


def test_a_cache_goes_on_where_it_stopped_and_without_use_cache_there_is_none(causal: Path) -> None:
    model = load_onnx(causal)
    assert isinstance(model, OnnxCausalLM)
    whole = model(PROMPT["input_ids"][:1]).logits
    first = model(PROMPT["input_ids"][:1, :2])
    then = model(PROMPT["input_ids"][:1, 2:], cache=first.cache)
    torch.testing.assert_close(torch.cat([first.logits, then.logits], 1), whole)
    assert then.cache.get_seq_length() == 4
    assert model(PROMPT["input_ids"], use_cache=False).cache is None


def test_a_crop_of_the_cache_is_followed(causal: Path) -> None:
    """As assisted decoding does after tokens that were not accepted."""
    model, cache = load_onnx(causal), DynamicCache()
    whole = model(PROMPT["input_ids"][:1], cache=cache).logits
    cache.crop(-2)
    torch.testing.assert_close(model(PROMPT["input_ids"][:1, 2:], cache=cache).logits, whole[:, 2:])


def test_what_the_graph_cannot_take_is_refused(causal: Path) -> None:
    model = load_onnx(causal)
    with pytest.raises(ConfigurationError, match="labels: the graph takes input_ids, attention_mask, position_ids"):
        model(PROMPT["input_ids"], labels=PROMPT["input_ids"])
    with pytest.raises(ConfigurationError, match=r"attention_mask of shape \(2, 3\).* here \(2, 4\)"):
        model(PROMPT["input_ids"], attention_mask=PROMPT["attention_mask"][:, 1:])


def test_text_streams_and_the_pipeline_answers_like_torch(causal: Path) -> None:
    tokenizer, model = tiny_tokenizer(), load_onnx(causal)
    settings = {"max_new_tokens": 8, "do_sample": False}
    ours, theirs = (
        pipeline("text-generation", model=each, tokenizer=tokenizer)(TEXTS[:3], batch_size=2, **settings)
        for each in (model, LlamaForCausalLM.from_pretrained(causal).eval())
    )
    assert ours == theirs
    streamer = TextIteratorStreamer(tokenizer, timeout=30)
    prompt = tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    model.generate(**prompt, streamer=streamer, **settings)
    pieces = list(streamer)
    assert len(pieces) > 3
    assert "".join(pieces).split() == tokenizer.decode(model.generate(**prompt, **settings)[0]).split()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "sliding window"])
def test_other_decoders_generate_torchs_tokens(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3, **NONE)
        )
    else:  # generated beyond the window
        config = MistralConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=64, sliding_window=6, initializer_range=0.3, **NONE,
        )  # fmt: skip
        model = MistralForCausalLM(config)
    export_model(model.eval(), None, tmp_path / "onnx")
    same_tokens(load_onnx(tmp_path), model, PROMPT, do_sample=False)


# Encoder-decoders


@pytest.mark.parametrize("way", WAYS)
def test_an_encoder_decoder_generates_torchs_tokens(seq2seq: Path, way: str) -> None:
    model = load_onnx(seq2seq)
    assert isinstance(model, OnnxSeq2SeqLM)
    same_tokens(model, T5ForConditionalGeneration.from_pretrained(seq2seq).eval(), SOURCE, **WAYS[way])


def test_the_decoders_weights_lie_outside_of_its_branches_once(seq2seq: Path) -> None:
    program = onnx_ir.load(seq2seq / "onnx" / "decoder_model_merged.onnx")
    (branch,) = [node for node in program.graph if node.op_type == "If"]
    inner = [attribute.as_graph() for attribute in branch.attributes.values()]
    assert not any(graph.initializers for graph in inner)
    assert "MatMul" in {node.op_type for node in branch.attributes["else_branch"].as_graph()}
    assert {node.op_type for node in branch.attributes["then_branch"].as_graph()} == {"Identity"}
    weights = sum(parameter.numel() for parameter in t5().decoder.parameters()) + t5().lm_head.weight.numel()
    held = sum(value.const_value.size for value in program.graph.initializers.values() if value.const_value is not None)
    assert held == pytest.approx(weights, rel=0.02)


@pytest.mark.parametrize("length", [0, 1])
def test_the_first_call_looks_at_no_past_whatever_a_runtime_feeds(seq2seq: Path, length: int) -> None:
    """Optimum feeds a past of no positions beside `use_cache_branch` = False, other runtimes one of zeros."""
    model = load_onnx(seq2seq)
    assert isinstance(model, OnnxSeq2SeqLM)
    expected = model(**SOURCE, decoder_input_ids=torch.tensor([[0, 7], [0, 9]]))
    session = model.session
    feed: dict[str, Any] = {
        "input_ids": np.array([[0, 7], [0, 9]]),
        "encoder_hidden_states": expected.encoder_last_hidden_state.numpy(),
        "encoder_attention_mask": SOURCE["attention_mask"].numpy(),
        "use_cache_branch": np.array([False]),
    }
    for spec in session.get_inputs():
        if spec.name.startswith("past_key_values."):
            feed[spec.name] = np.zeros((2, spec.shape[1], length, spec.shape[3]), np.float32)
    names = [spec.name for spec in session.get_outputs()]
    found = dict(zip(names, session.run(None, feed), strict=True))
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=1e-5)
    assert found["present.0.decoder.key"].shape[2] == 2


def test_every_file_of_an_export_is_pushed_and_none_names_this_machine(seq2seq: Path) -> None:
    private = (str(Path.cwd()).encode(), b"site-packages", b"stack_trace")
    for path in (seq2seq / "onnx").iterdir():
        assert ALLOWED.fullmatch(f"onnx/{path.name}"), path.name
        assert not any(word in path.read_bytes() for word in private)
    recorded = {entry.file for entry in facts.load(seq2seq).evidence if entry.file.startswith("onnx/")}
    assert recorded == {f"onnx/{path.name}" for path in (seq2seq / "onnx").iterdir()}


def test_past_and_present_stand_in_one_order(seq2seq: Path) -> None:
    """Optimum pairs them by place."""
    session = load_onnx(seq2seq).session
    past = [spec.name.removeprefix("past_key_values") for spec in session.get_inputs() if "past" in spec.name]
    present = [spec.name.removeprefix("present") for spec in session.get_outputs() if "present" in spec.name]
    assert past == present
    assert past[:4] == [".0.decoder.key", ".0.decoder.value", ".0.encoder.key", ".0.encoder.value"]


def test_a_padded_target_is_refused(seq2seq: Path) -> None:
    ids = torch.tensor([[0, 7], [0, 9]])
    with pytest.raises(ConfigurationError, match="decoder_attention_mask holds zeros"):
        load_onnx(seq2seq)(**SOURCE, decoder_input_ids=ids, decoder_attention_mask=torch.tensor([[1, 1], [0, 1]]))
    with pytest.raises(ConfigurationError, match="decoder_input_ids: missing"):
        load_onnx(seq2seq)(**SOURCE)


def test_whisper_generates_torchs_tokens(tmp_path: Path) -> None:
    model = whisper()
    export_model(model, None, tmp_path / "onnx")
    ours = load_onnx(tmp_path)
    assert isinstance(ours, OnnxWhisper)
    spectra = {"input_features": torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0))}
    for way in ("greedy", "beams"):
        same_tokens(ours, model, spectra, **WAYS[way])


def test_a_corrupted_decoder_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity is checked with the cache: here the past alone is wrong."""
    real = graphs.save

    def spoil(program: onnx_ir.Model, path: Path) -> None:
        past = next(value for value in program.graph.inputs if value.name == "past_key_values.0.key")
        twice = onnx_ir.node("Add", [past, past])
        past.replace_all_uses_with(twice.outputs[0])
        twice.replace_input_with(0, past)
        twice.replace_input_with(1, past)
        program.graph.insert_before(program.graph[0], twice)
        real(program, path)

    monkeypatch.setattr(graphs, "save", spoil)
    with pytest.raises(ParityError, match=r"logits, batch of shape \(3, 11\): the graph differs"):
        export_model(llama(), None, tmp_path / "onnx")
    assert not any(tmp_path.iterdir())


# Fewer bits


def test_a_tied_language_model_in_8_bits_holds_its_table_once(causal: Path) -> None:
    exported = quantize_onnx(causal, gate=Gate(features=TEXTS, max_rise=1, min_agreement=0.5))
    program = onnx_ir.load(exported.folder / "model.onnx")
    kinds = [node.op_type for node in program.graph]
    assert "MatMul" in kinds  # of attention: two activations
    assert kinds.count("MatMulNBits") == 7 * 2 + 1
    assert kinds.count("GatherBlockQuantized") == 1
    tables = [value for value in program.graph.initializers.values() if value.shape == (64, 1, 32)]
    assert {use.node.op_type for use in tables[-1].uses()} >= {"MatMulNBits"}
    assert sum("Reshape" in {use.node.op_type for use in value.uses()} for value in tables) == 1
    assert exported.value("perplexity_rise") < 0.05
    record = facts.load(causal).find("agreement_with_fp32", variant="onnx_int8")
    assert record is not None
    assert record.how["way"] == "8 bit blocks, tables 8 bit"
    ours, full = load_onnx(exported.folder), load_onnx(causal)
    assert 0 < (ours(**PROMPT).logits - full(**PROMPT).logits).abs().max() < 0.5
    ours.generate(**PROMPT, max_new_tokens=4, pad_token_id=0)


def test_a_way_that_misses_the_gate_is_undone_and_said(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruined(program: onnx_ir.Model, *, tied_only: bool = False) -> None:
        value = next(value for value in program.graph.initializers.values() if value.shape == (64, 32))
        assert value.const_value is not None
        value.const_value = onnx_ir.tensor(-value.const_value.numpy(), name=value.name)

    monkeypatch.setattr(blocks, "quantize_tables", ruined)
    said: list[str] = []
    gate = Gate(features=TEXTS, max_rise=0.5, min_agreement=0.5)
    exported = quantize_onnx(causal, gate=gate, output="onnx_other", progress=said.append)
    stages = [line.split(":")[0] for line in said]
    assert stages == ["quantise", "gate", "undone, the next way follows", "quantise", "gate"]
    assert "raises perplexity by" in said[2]
    way = {one.how["way"] for one in exported.measurements if one.metric == "perplexity_rise"}
    assert way == {"8 bit blocks, tables float32"}


def test_perplexity_alone_can_miss_the_gate(causal: Path) -> None:
    with pytest.raises(GateError, match=r"raises perplexity by -?\d\.\d{4} of it \(at most 0\)"):
        quantize_onnx(causal, gate=Gate(features=TEXTS, max_rise=0, min_agreement=0), precision="int4")


def test_an_encoder_decoder_in_fewer_bits_decides_like_float32(seq2seq: Path) -> None:
    for bits, least in (("int8", 0.6), ("fp16", 0.95)):
        exported = quantize_onnx(
            seq2seq, precision=bits, gate=Gate(features=TEXTS, min_agreement=least, new_tokens=6, batch_size=8)
        )
        assert exported.folder.name == f"onnx_{bits}"
        assert least <= exported.value("agreement_with_fp32")
        assert exported.bytes < 0.75 * sum(path.stat().st_size for path in (seq2seq / "onnx").iterdir())
        load_onnx(exported.folder).generate(**SOURCE, max_new_tokens=4)


def test_without_a_gate_an_encoder_decoder_goes_the_same_way(seq2seq: Path) -> None:
    exported = quantize_onnx(seq2seq, gate=None, output="onnx_other")
    kinds = {node.op_type for path in exported.folder.glob("*.onnx") for node in onnx.load(path).graph.node}
    assert "MatMulNBits" in kinds
    assert "MatMulInteger" not in kinds


def test_half_precision_keeps_its_cache_in_half_and_its_logits_in_float32(causal: Path) -> None:
    exported = quantize_onnx(causal, precision="fp16", gate=Gate(features=TEXTS, min_agreement=0.95))
    types = {spec.name: spec.type for spec in load_onnx(exported.folder).session.get_inputs()}
    assert types["past_key_values.0.key"] == "tensor(float16)"
    model = load_onnx(exported.folder)
    assert model(**PROMPT).logits.dtype == torch.float32
    same_tokens(model, LlamaForCausalLM.from_pretrained(causal).eval(), PROMPT, do_sample=False)


def test_an_unknown_precision_is_refused(causal: Path) -> None:
    with pytest.raises(UnknownNameError, match="There is no precision 'int2'"):
        quantize_onnx(causal, gate=None, precision="int2")


def test_a_way_that_changes_nothing_is_an_error(causal: Path, tmp_path: Path) -> None:
    same = precision.Way(said="", make=lambda program: program)
    with pytest.raises(ConfigurationError, match="holds no products or tables of constants: nothing to quantise"):
        precision._write(causal / "onnx", tmp_path, same)


# Named graphs, evaluator


@pytest.mark.slow
def test_a_class_names_its_graphs(tmp_path: Path) -> None:
    model = tiny_bert_classifier()
    full = model.bert
    model.export_parts = lambda: {"backbone": full, "whole": model}  # type: ignore[assignment]
    export_model(model, None, tmp_path / "onnx")
    assert {path.stem for path in (tmp_path / "onnx").glob("*.onnx")} == {"backbone", "whole"}
    ids = torch.tensor([[2, 8, 9, 3]])
    ours = load_onnx(tmp_path, graph="backbone")(input_ids=ids).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(ours, full(ids).last_hidden_state)
    with pytest.raises(ConfigurationError, match="holds the graphs backbone, whole: name one"):
        load_onnx(tmp_path)
    with pytest.raises(UnknownNameError, match=r"There is no graph 'hole'\. Did you mean 'whole'"):
        load_onnx(tmp_path, graph="hole")


class Accuracy(evaluate.Metric):
    """Works without a hub."""

    def _info(self) -> Any:
        from datasets import Features, Value

        columns = {"predictions": Value("int32"), "references": Value("int32")}
        return evaluate.MetricInfo(description="", citation="", features=Features(columns))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.array(predictions) == np.array(references)))}


@pytest.mark.slow
def test_the_evaluator_takes_an_exported_model(tmp_path: Path) -> None:
    from datasets import Dataset

    model = tiny_bert_classifier()
    export_model(model, tiny_tokenizer(), tmp_path / "onnx")
    rows = Dataset.from_dict({"text": TEXTS, "label": list(itertools.islice(itertools.cycle([0, 1, 2, 0]), 16))})
    found = [
        evaluate.evaluator("text-classification").compute(
            model_or_pipeline=each, tokenizer=tiny_tokenizer(), data=rows, metric=Accuracy(),
            label_mapping=model.config.label2id,
        )["accuracy"]
        for each in (load_onnx(tmp_path), model)
    ]  # fmt: skip
    assert found[0] == found[1] > 0


def test_quantising_leaves_the_root_logger_alone(causal: Path) -> None:
    root = logging.getLogger()
    before = root.level, [*root.handlers]
    quantize_onnx(causal, gate=None, output="onnx_logged")
    assert (root.level, [*root.handlers]) == before


@pytest.mark.slow
def test_a_table_of_encoder_and_decoder_is_written_once_in_float32_and_in_8_bits(tmp_path: Path) -> None:
    """T5's: both graphs read it from the decoder's external data, which Optimum fetches before it opens either."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=4000, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    export_onnx(tmp_path)
    quantize_onnx(tmp_path, gate=Gate(features=TEXTS, min_agreement=0, new_tokens=3))
    size = (tmp_path / "model.safetensors").stat().st_size
    for variant, most in (("onnx", 1.25), ("onnx_int8", 0.6)):
        folder = tmp_path / variant
        assert (folder / "decoder_model_merged.onnx_data").is_file()
        assert sum(path.stat().st_size for path in folder.glob("*.onnx*")) < most * size
        made = load_onnx(folder).generate(**SOURCE, max_new_tokens=4)
        assert made.shape[0] == 2
        for name in ("encoder_model", "decoder_model_merged"):
            held = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph.initializer
            assert "decoder_model_merged.onnx_data" in {e.value for tensor in held for e in tensor.external_data}
