"""Students cut from a teacher: which layers, that they compute the same, what is kept, and what is refused."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from hf_compress.errors import ConfigurationError
from hf_compress.shrinking import shrink, spread
from hf_compress.shrinking.depth import stack as _stack

DEPTH, CHOSEN = 4, [1, 3]
WORDS = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
TEXT = WORDS | {"num_hidden_layers": DEPTH, "max_position_embeddings": 32}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
PATCHES = {"hidden_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
SIDES = {"vocab_size": 50, "d_model": 16, "encoder_layers": DEPTH, "decoder_layers": 3, **SPECIAL} | {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("attention_heads", 4), ("ffn_dim", 32))
}
LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}


def gpt2(**settings: Any) -> hf.GPT2LMHeadModel:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=DEPTH, n_head=4, n_positions=32, **SPECIAL, **settings)
    )


def llama(**settings: Any) -> hf.LlamaForCausalLM:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **(SPECIAL | settings)))


MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **LABELS)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT, **SPECIAL)),
    "distilbert": lambda: hf.DistilBertForTokenClassification(
        hf.DistilBertConfig(vocab_size=50, dim=16, n_heads=4, hidden_dim=32, n_layers=DEPTH, max_position_embeddings=32)
    ),
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(
            **TEXT, **SPECIAL, num_key_value_heads=2, use_sliding_window=True, sliding_window=3, max_window_layers=2
        )
    ),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(
        hf.SmolLM3Config(**TEXT, **SPECIAL, num_key_value_heads=2, no_rope_layer_interval=2)
    ),
    "longformer": lambda: hf.LongformerForMaskedLM(
        hf.LongformerConfig(**TEXT, **SPECIAL, attention_window=[4, 8, 16, 4])
    ),
    "big_bird": lambda: hf.BigBirdForMaskedLM(hf.BigBirdConfig(**TEXT, **SPECIAL, block_size=1, num_random_blocks=1)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**PATCHES, intermediate_size=32, **LABELS)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**PATCHES)),
}
every = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> Any:
    """In eval mode, every weight at random, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def output(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=torch.randn(2, 3, 8, 8, generator=draw)).logits
        return model(input_ids=torch.randint(5, 50, (2, 9), generator=draw)).logits


def pruned(model: Any, chosen: list[int]) -> Any:
    """The reference: the same model with blocks taken out of its list."""
    model = copy.deepcopy(model)
    parent, _, name = _stack(model).rpartition(".")
    blocks = model.get_submodule(_stack(model))
    setattr(model.get_submodule(parent), name, nn.ModuleList([blocks[layer] for layer in chosen]))
    config = model.config
    config.num_hidden_layers, config.use_cache = len(chosen), False
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == DEPTH:
            setattr(config, key, [value[layer] for layer in chosen])
    return model


@every
def test_it_computes_what_the_teacher_without_the_other_layers_computes(name: str) -> None:
    teacher = made(name)

    student = shrink(teacher, layers=CHOSEN)

    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == 2
    torch.testing.assert_close(output(student), output(pruned(teacher, CHOSEN)))
    assert not torch.allclose(output(student), output(pruned(teacher, [0, 2])))


@every
def test_the_saved_student_loads_with_the_same_output_and_its_record(name: str, tmp_path: Path) -> None:
    student = shrink(made(name), layers=CHOSEN)

    student.save_pretrained(tmp_path)
    loaded, report = type(student).from_pretrained(tmp_path, output_loading_info=True)

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.compression_start == f"layers 1, 3 of {DEPTH} of the teacher"
    torch.testing.assert_close(output(loaded.eval()), output(student))


@every
def test_no_storage_is_shared_with_the_teacher_which_stays_as_it_was(name: str) -> None:
    teacher = made(name)
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()

    student = shrink(teacher, layers=CHOSEN)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()

    theirs = {tensor.untyped_storage().data_ptr() for tensor in teacher.state_dict().values()}
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in student.state_dict().values()}
    assert teacher.config.to_dict() == config
    for key, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", ["roberta", "llama_tied", "gpt2"])
def test_tied_weights_are_tied_again_and_saved_once(name: str, tmp_path: Path) -> None:
    teacher = made(name)
    student = shrink(teacher, layers=DEPTH)

    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    for model, folder in ((teacher, "teacher"), (student, "student")):
        model.save_pretrained(tmp_path / folder)
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("teacher", "student")]
    assert sizes[0] == sizes[1]


def test_untied_weights_stay_two() -> None:
    student = shrink(made("llama"), layers=2)

    assert not torch.equal(student.get_output_embeddings().weight, student.get_input_embeddings().weight)


def test_labels_special_tokens_and_generation_settings_are_kept() -> None:
    teacher = llama(eos_token_id=[2, 4, 5, 6])  # as many as layers: not one a layer
    teacher.generation_config.max_new_tokens = 7
    classifier = shrink(made("bert"), layers=2)

    student = shrink(teacher, layers=2)

    assert student.config.eos_token_id == [2, 4, 5, 6]
    assert (student.config.bos_token_id, student.config.pad_token_id) == (1, 3)
    assert student.generation_config.max_new_tokens == 7
    assert student.generation_config is not teacher.generation_config
    assert (classifier.config.id2label, classifier.config.label2id) == (LABELS["id2label"], LABELS["label2id"])


def test_layer_types_follow_their_layers() -> None:
    teacher = made("qwen2")
    assert len(set(teacher.config.layer_types)) == 2

    student = shrink(teacher, layers=[0, 3])

    assert student.config.layer_types == [teacher.config.layer_types[0], teacher.config.layer_types[3]]


def test_attention_windows_follow_their_layers() -> None:
    assert shrink(made("longformer"), layers=[0, 2]).config.attention_window == [4, 16]


def test_the_record_of_the_teacher_is_not_taken_over() -> None:
    teacher = made("bert")
    teacher.config.compression = {"task": "text-classification"}
    teacher.config._name_or_path = "/somewhere/private"

    student = shrink(teacher, layers=2)

    assert not hasattr(student.config, "compression")
    assert "private" not in str(student.config.to_dict())
    assert teacher.config.compression == {"task": "text-classification"}


@pytest.mark.parametrize(
    ("layers", "keep", "expected"),
    [
        (2, "even", "0, 3"),
        (3, "even", "0, 1, 3"),
        (1, "even", "3"),
        (4, "even", "0, 1, 2, 3"),
        (2, "first", "0, 1"),
        (2, "last", "2, 3"),
        ((0, 2), "even", "0, 2"),
        (range(1, 4), "even", "1, 2, 3"),
    ],
)
def test_which_layers_are_kept(layers: Any, keep: Any, expected: str) -> None:
    student = shrink(made("bert"), layers=layers, keep=keep)

    assert student.config.compression_start == f"layers {expected} of 4 of the teacher"


@pytest.mark.parametrize(("depth", "number"), [(12, 6), (12, 5), (24, 7), (3, 3), (2, 2)])
def test_an_even_spread_rises_from_the_first_to_the_last_in_like_steps(depth: int, number: int) -> None:
    found = spread(depth, number)

    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert (found[0], found[-1], len(found)) == (0, depth - 1, number)
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, r"layers must lie in 1 … 4, the teacher's number, got 0"),
        (-1, r"layers must lie in 1 … 4, the teacher's number, got -1"),
        (5, r"layers must lie in 1 … 4, the teacher's number, got 5"),
        ([], r"layers must rise within 0 … 3 without repetition, got \[\]"),
        ([2, 1], r"layers must rise .* got \[2, 1\]"),
        ([1, 1], r"layers must rise .* got \[1, 1\]"),
        ([-1, 2], r"layers must rise .* got \[-1, 2\]"),
        ([0, 4], r"layers must rise .* got \[0, 4\]"),
        (["0"], r"layers must rise .* got \['0'\]"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        shrink(made("bert"), layers=layers)


def test_an_unknown_way_to_choose_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="keep must be 'even', 'first' or 'last', got 'middle'"):
        shrink(made("bert"), layers=2, keep="middle")  # type: ignore[arg-type]  # on purpose


def clip(depth: int) -> hf.CLIPModel:
    vision = PATCHES | {"num_hidden_layers": depth, "intermediate_size": 32}
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT | SPECIAL, vision_config=vision, projection_dim=8))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: clip(DEPTH), r"in CLIPModel and found \['text_model.encoder.layers', 'vision_model.encoder.layers'\]"),
        (
            lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**TEXT, embedding_size=8)),
            "one list of 4 layers in AlbertForMaskedLM and found none",
        ),
        (
            lambda: hf.ModernBertForMaskedLM(
                hf.ModernBertConfig(**TEXT, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=2)
            ),
            r"cannot map \['model.layers.0.attn_norm.weight'\] of ModernBertForMaskedLM",
        ),
        (
            lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
            r"layer 1 of GPT2LMHeadModel .* in place 0 it has another attn.scaling \(0.25 before, 0.5 there\)",
        ),
        (
            lambda: hf.BeitForImageClassification(
                hf.BeitConfig(**PATCHES, intermediate_size=32, out_indices=[1, 2, 3, 4])
            ),
            "cannot express 2 layers in a BeitConfig: out_features must be a subset",
        ),
    ],
    ids=["two stacks", "no stack", "missing weight", "depends on place", "not loadable"],
)
def test_what_cannot_be_mapped_is_named_with_the_remedy(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        shrink(build(), layers=CHOSEN)

    assert "Build the student from a config" in str(error.value)


TWO: dict[str, Callable[[], Any]] = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=DEPTH, num_decoder_layers=3, num_heads=4)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SIDES)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**SIDES, num_mel_bins=4, max_source_positions=6, max_target_positions=16)
    ),
}
TOKENS = torch.tensor([[6, 7, 8, 9, 2]])


def both(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TWO[name]().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def answer(model: Any) -> torch.Tensor:
    heard = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0))
    given = {"input_features": heard} if model.main_input_name == "input_features" else {"input_ids": TOKENS}
    with torch.no_grad():
        return model(**given, decoder_input_ids=TOKENS, use_cache=False).logits


def without(half: nn.Module, chosen: list[int]) -> None:
    """The reference: takes blocks out of an encoder or a decoder; T5's first one computes the bias of all."""
    name = "block" if hasattr(half, "block") else "layers"
    blocks = getattr(half, name)
    setattr(half, name, nn.ModuleList([blocks[layer] for layer in chosen]))
    if name == "block":
        first, taken = blocks[0].layer[0].SelfAttention, blocks[chosen[0]].layer[0].SelfAttention
        taken.relative_attention_bias, taken.has_relative_attention_bias = first.relative_attention_bias, True


@pytest.mark.parametrize(
    ("layers", "decoder_layers", "said"),
    [
        ([1, 3], None, "encoder layers 1, 3 of 4 of the teacher"),
        (None, [1, 2], "decoder layers 1, 2 of 3 of the teacher"),
        ([0, 2, 3], 1, "encoder layers 0, 2, 3 of 4, decoder layers 2 of 3 of the teacher"),
    ],
)
@pytest.mark.parametrize("name", TWO)
def test_encoder_and_decoder_are_cut_apart(
    name: str, layers: Any, decoder_layers: Any, said: str, tmp_path: Path
) -> None:
    teacher = both(name)
    expected = copy.deepcopy(teacher)
    if layers is not None:
        without(expected.get_encoder(), layers)
    if decoder_layers is not None:
        without(expected.get_decoder(), [2] if decoder_layers == 1 else decoder_layers)

    student = shrink(teacher, layers=layers, decoder_layers=decoder_layers)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()

    assert student.config.compression_start == said
    torch.testing.assert_close(answer(student), answer(expected))
    torch.testing.assert_close(answer(loaded), answer(expected))
    assert not torch.allclose(answer(student), answer(teacher))


def test_a_decoder_where_there_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="BertForSequenceClassification is none"):
        shrink(made("bert"), decoder_layers=2)


def test_decoder_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"decoder_layers must lie in 1 … 3, the teacher's number, got 4"):
        shrink(both("t5"), decoder_layers=4)


def test_a_checkpointing_teacher_in_training_mode_can_be_cut() -> None:
    teacher = made("llama").train()
    teacher.gradient_checkpointing_enable()

    assert shrink(teacher, layers=CHOSEN).training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    student = shrink(made("bert").train(training), layers=2)

    assert all(module.training == training for module in student.modules())


def test_a_frozen_teacher_gives_a_student_that_can_learn() -> None:
    teacher = made("bert").requires_grad_(False)

    assert all(parameter.requires_grad for parameter in shrink(teacher, layers=2).parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_kept_without_rounding(dtype: torch.dtype) -> None:
    teacher = made("bert").to(dtype)

    student = shrink(teacher, layers=CHOSEN)

    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    taken = teacher.bert.encoder.layer[3].output.dense.weight
    assert torch.equal(student.bert.encoder.layer[1].output.dense.weight, taken)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_backend_stays_the_users(attention: str) -> None:
    teacher = made("bert")
    teacher.set_attn_implementation(attention)

    assert shrink(teacher, layers=2).config._attn_implementation == attention


def test_the_global_random_state_is_not_touched() -> None:
    teacher = made("bert")
    before = torch.get_rng_state()

    shrink(teacher, layers=2)

    assert torch.equal(torch.get_rng_state(), before)


def test_a_student_can_be_cut_again() -> None:
    once = shrink(made("bert"), layers=3)

    twice = shrink(once, layers=[1])

    assert twice.config.compression_start == "layers 1 of 3 of the teacher"
    assert torch.equal(twice.bert.encoder.layer[0].output.dense.weight, once.bert.encoder.layer[1].output.dense.weight)


def test_the_function_is_importable_from_the_package_whatever_was_imported_before() -> None:
    code = "import hf_compress.shrinking; from hf_compress import shrink; assert callable(shrink), shrink"

    subprocess.run([sys.executable, "-c", code], check=True)
