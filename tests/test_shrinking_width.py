"""Narrower students: what is cut goes together everywhere, what is kept is what was asked for, the rest is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers as hf
from tiny import tiny_bert_classifier, tiny_tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_compress import DistillCallback, export_onnx, shrink
from hf_compress.errors import ConfigurationError
from hf_compress.shrinking import cut, mapping, report, scores, width
from hf_compress.shrinking.proof import sample
from hf_compress.shrinking.width import Width

HIDDEN, HEADS, SIZE, NEURONS, DEPTH = 32, 4, 8, 128, 2
NEURON_NAMES = {"intermediate_size", "n_inner", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"}
HEAD_NAMES = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
Names = tuple[str, str, str]
"""Patterns of the weights that write heads, that read heads, and that read neurons."""
BERT: Names = (
    r"\.(query|key|value|query_proj|key_proj|value_proj)\.",
    r"attention\.output\.dense",
    r"\d\.output\.dense",
)
LLAMA: Names = (r"\.[qkv]_proj\.", r"\.o_proj\.", r"\.down_proj\b")
BART: Names = (r"\.[qkv]_proj\.", r"\.out_proj\.", r"\.fc2\.")
PATTERNS: dict[str, Names] = {
    "BERT": BERT,
    "RoBERTa": BERT,
    "DeBERTa-v2": BERT,
    "ModernBERT": (r"\.Wqkv\.", r"attn\.Wo\.", r"mlp\.Wo\."),
    "DistilBERT": (r"\.[qkv]_lin\.", r"\.out_lin\.", r"\.lin2\."),
    "GPT-2": (r"\.c_attn\.", r"attn\.c_proj\.", r"mlp\.c_proj\."),
    "Llama": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": LLAMA,
    "Mixtral": LLAMA,
    "T5": (r"Attention\.[qkv]\.", r"Attention\.o\.", r"\.wo\."),
    "BART": BART,
    "Whisper": BART,
    "ViT": (
        r"\.[qkv]_proj\.|\.(query|key|value)\.",
        r"\.o_proj\.|attention\.output\.dense",
        r"\.fc2\.|\d\.output\.dense",
    ),
    "wav2vec2": (r"\.[qkv]_proj\.", r"\.out_proj\.", r"\.output_dense\."),
    "DINOv2": (r"\.(query|key|value)\.", r"attention\.output\.dense", r"\.fc2\."),
}
every = pytest.mark.parametrize("family", PATTERNS)


def made(family: str, task: str = "embeddings", **settings: Any) -> Any:
    """In float64 and eval mode, with four heads; two share keys and values where heads do."""
    config = families.config(family, task, width=HIDDEN, layers=DEPTH)
    held = config.to_dict()
    sizes = dict.fromkeys(HEAD_NAMES, HEADS) | dict.fromkeys(NEURON_NAMES, NEURONS) | {"mlp_ratio": NEURONS // HIDDEN}
    for name in sizes.keys() & held.keys():
        setattr(config, name, sizes[name])
    if "num_key_value_heads" in held:
        config.num_key_value_heads = 2
    for name, value in settings.items():
        setattr(config, name, value)
    auto = getattr(hf, families.TASKS[task][families.FAMILIES[family].reads])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def reading(model: nn.Module, name: str) -> int | None:
    """The axis of a weight along which it reads its input."""
    module = model.get_submodule(name.rpartition(".")[0])
    if name.endswith("weight.original1"):
        return 1
    if name.rpartition(".")[2] == "bias" or isinstance(module, nn.Embedding):
        return None
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return 1
    if isinstance(module, Conv1D):
        return 0
    return {"experts": 2, "gate": 1}.get(f".{name}".split(".")[-2])  # Mixtral's


def prepared(model: nn.Module, family: str) -> None:
    """Makes half of all units useless: the weights of half of the heads and neurons are zero; hidden dimensions are
    written twice and the second copy is not read, so that a norm over both is one over the first."""
    writes, reads, down = (re.compile(pattern) for pattern in PATTERNS[family])
    shared, parts = family == "T5", 2 if family == "wav2vec2" else 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            layer = re.search(r"\.(\d+)\.", f".{name}")
            useless = 1 if shared or layer is None else int(layer[1]) % 2
            for axis, size in enumerate(weight.shape):
                read = axis == reading(model, name)
                along = weight.movedim(axis, 0)
                fused = size // (HEADS * SIZE) if writes.search(name) else size // NEURONS
                through = reads.search(name) or down.search(name) if read else writes.search(name)
                if through or size in (NEURONS, 2 * NEURONS):
                    for part in along.chunk(max(fused, 1)):
                        part.chunk(2)[useless].zero_()
                elif size == HIDDEN or (read and name.endswith("original1")):  # a convolution in two groups
                    for part in along.chunk(parts * size // HIDDEN):
                        first, second = part.chunk(2)
                        second.copy_(torch.zeros_like(first) if read else first)


@every
def test_a_student_without_what_nobody_reads_computes_what_its_teacher_computes(family: str) -> None:
    teacher = made(family)
    prepared(teacher, family)

    student = shrink(teacher, hidden=HIDDEN // 2, heads=HEADS // 2, intermediate=NEURONS // 2)

    inputs = sample(teacher)
    expected = output(teacher, inputs)
    found = output(student, inputs)
    kept = [*range(8), *range(16, 24)] if family == "wav2vec2" else list(range(HIDDEN // 2))
    torch.testing.assert_close(found, expected[..., kept], rtol=1e-4, atol=1e-5)
    assert expected[..., kept].std() > 0.1


@every
def test_nothing_asked_is_a_copy_bit_by_bit(family: str) -> None:
    teacher = made(family)

    student = shrink(teacher)

    assert student.config.compression_start == "all of the teacher"
    assert student.state_dict().keys() == teacher.state_dict().keys()
    for name, weight in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], weight), name
    assert all(torch.equal(one, other) for one, other in zip(student.buffers(), teacher.buffers(), strict=True))


TASK = {
    "T5": "encoder-decoder LM",
    "wav2vec2": "speech to text",
    "BART": "encoder-decoder LM",
    "Whisper": "speech to text",
}


@every
def test_a_narrow_student_loads_with_its_auto_class(family: str, tmp_path: Path) -> None:
    task = TASK.get(family, "single-label")
    student = shrink(
        made(family, task).float(), layers=[0], hidden=HIDDEN // 2, heads=HEADS // 2, intermediate=NEURONS // 2
    )

    student.save_pretrained(tmp_path)
    auto = getattr(hf, families.TASKS[task][families.FAMILIES[family].reads])
    loaded, found = auto.from_pretrained(tmp_path, output_loading_info=True)

    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert "hidden 16 of 32, heads 2 of 4, neurons 64 of 128 of the teacher, chosen by norms" in (
        loaded.config.compression_start
    )
    inputs = sample(student)
    torch.testing.assert_close(output(loaded.eval(), inputs), output(student, inputs))


@pytest.mark.parametrize(("family", "task"), [("BERT", "masked LM"), ("GPT-2", "causal LM"), ("Llama", "causal LM")])
def test_tied_weights_are_tied_in_a_narrow_student(family: str, task: str) -> None:
    student = shrink(made(family, task, tie_word_embeddings=True), hidden=HIDDEN // 2, heads=HEADS // 2)

    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("family", "task", "unseen"),
    [
        ("BERT", "masked LM", r"attention\.self\.key\.bias"),  # adds the same to all scores of a query
        ("GPT-2", "causal LM", "^$"),
        ("ModernBERT", "token classification", "^$"),
        ("Qwen3", "causal LM", "^$"),
        ("T5", "encoder-decoder LM", "^$"),
        ("DINOv2", "single-label", r"\.k_proj\.bias|mask_token"),
    ],
)
def test_a_map_without_any_one_of_its_axes_is_found_out(family: str, task: str, unseen: str) -> None:
    found = mapping._Finder(made(family, task))
    whole = found.find({"hidden", "heads", "intermediate"})

    where = {name: weight.data_ptr() for name, weight in found.probe.model.state_dict().items()}  # one of tied weights
    for dimensions in (("hidden",), ("heads", "key_value_heads"), ("intermediate",)):
        own = [replace(axis, width=min(axis.width, mapping._HEAD)) for axis in whole.of(*dimensions)]
        own = [replace(axis, width=mapping._HEAD) if axis.width > 1 and whole.coupled else axis for axis in own]
        orders = found._orders(own)
        assert found.probe.holds(own, orders)
        for at in {(where[axis.weight], axis.axis) for axis in own if not re.search(unseen, axis.weight)}:
            rest = [axis for axis in own if (where[axis.weight], axis.axis) != at]
            assert not found.probe.holds(rest, orders), [axis for axis in own if axis not in rest]


def test_heads_of_largest_norm_are_kept_in_each_layer_for_itself() -> None:
    teacher = made("Qwen3", num_key_value_heads=HEADS)
    with torch.no_grad():
        for layer, kept in zip(teacher.layers, ([1, 2], [0, 3]), strict=True):
            for head in kept:
                layer.self_attn.v_proj.weight[head * SIZE : (head + 1) * SIZE] *= 10

    student = shrink(teacher, heads=2)

    for before, after, kept in zip(teacher.layers, student.layers, ([1, 2], [0, 3]), strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(before.self_attn, name).weight.view(HEADS, SIZE, -1)
            assert torch.equal(getattr(after.self_attn, name).weight, weight[kept].flatten(0, 1))
        weight = before.self_attn.o_proj.weight.view(-1, HEADS, SIZE)
        assert torch.equal(after.self_attn.o_proj.weight, weight[:, kept].flatten(1))
    assert (student.config.num_attention_heads, student.config.head_dim) == (2, SIZE)


@pytest.mark.parametrize(
    ("heads", "keys", "expected", "groups"),
    [
        (4, 2, [2, 3, 4, 5], [1, 2]),  # groups of two: the third has the heaviest keys, the second the heaviest queries
        (3, 3, [1, 2, 4], [0, 1, 2]),  # one of each group, of equal ones the first
        (2, 1, [4, 5], [2]),
        (1, 1, [4], [2]),
    ],
)
def test_heads_that_share_keys_go_with_them(heads: int, keys: int, expected: list[int], groups: list[int]) -> None:
    queries = torch.tensor([0.0, 3.0, 9.0, 8.0, 5.0, 5.0])

    found, chosen = width._heads(queries, torch.tensor([0.0, 0.0, 20.0]), heads, keys)

    assert (found.tolist(), chosen.tolist()) == (expected, groups)


@pytest.mark.parametrize(("data", "kept"), [(False, [0, 1]), (True, [2, 3])], ids=["norms", "activations"])
def test_norms_and_activations_may_choose_different_neurons(data: bool, kept: list[int]) -> None:
    """Neurons 0 and 1 have large weights and never fire; 2 and 3 have small ones and always do."""
    teacher = made("BERT", task="single-label")
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            up, down = layer.intermediate.dense, layer.output.dense
            for part in (up.weight, up.bias, down.weight.T):
                part[:] *= 0.01
            down.weight[:, :2] = 9.0
            up.bias[:2], up.bias[2:4] = -9.0, 5.0
    batches = [sample(teacher), sample(teacher)] if data else None

    student = shrink(teacher, intermediate=2, data=batches)

    for before, after in zip(teacher.bert.encoder.layer, student.bert.encoder.layer, strict=True):
        assert torch.equal(after.intermediate.dense.weight, before.intermediate.dense.weight[kept])
        assert torch.equal(after.output.dense.weight, before.output.dense.weight[:, kept])
    assert f"chosen by {'activations' if data else 'norms'}" in student.config.compression_start


def test_activations_are_means_over_real_tokens() -> None:
    """By hand: the input of the down projection, without what the mask leaves out; two batches count alike."""
    teacher = made("BERT", task="single-label")
    found = mapping.find(teacher, {"heads", "intermediate"})
    row = sample(teacher)["input_ids"]
    padded = {"input_ids": torch.cat([row, row[:, :3]], 1), "attention_mask": torch.tensor([[1] * 7 + [0] * 3])}
    seen: list[Tensor] = []
    down = teacher.bert.encoder.layer[0].output.dense
    handle = down.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    output(teacher, {"input_ids": row})
    handle.remove()

    values = scores.activations(teacher, found, [padded])

    expected = seen[0].abs().sum((0, 1))
    torch.testing.assert_close(values["intermediate", "bert.encoder.layer.0"], expected)
    assert values["heads", "bert.encoder.layer.0.attention"].shape == (HEADS,)
    assert not down._forward_pre_hooks


def test_every_family_can_be_watched() -> None:
    for family in PATTERNS.keys() - {"Mixtral"}:  # whose experts are no linear layers
        teacher = made(family)
        asked = {"hidden": 16, "heads": 2, "intermediate": 64}

        student = shrink(teacher, **asked, data=[sample(teacher)])

        assert "chosen by activations" in student.config.compression_start


@pytest.mark.parametrize(
    ("family", "task", "asked", "message"),
    [
        ("BERT", "single-label", {"hidden": 16}, "hidden=16: in a BertConfig hidden is heads x 8.* Give heads=2 too"),
        ("BERT", "single-label", {"heads": 3}, "heads=3: in a BertConfig .* Give hidden=24 too"),
        ("BERT", "single-label", {"hidden": 20}, "hidden=20 .* Give hidden=16 with heads=2 or hidden=24 with heads=3"),
        ("GPT-2", "single-label", {"hidden": 16, "heads": 3}, "Give hidden=16 with heads=2 or hidden=24 with heads=3"),
        (
            "BERT",
            "single-label",
            {"intermediate": 129},
            "intermediate must lie in 1 … 128, the teacher's number, got 129",
        ),
        ("BERT", "single-label", {"hidden": 0, "heads": 1}, "hidden must lie in 1 … 32, the teacher's number, got 0"),
        ("BERT", "single-label", {"key_value_heads": 1}, "key_value_heads: a BertConfig has no such size"),
        ("Llama", "causal LM", {"hidden": 18}, "LlamaConfig cannot express it.* Give hidden=16 or hidden=20"),
        ("Llama", "causal LM", {"hidden": 31}, "Give hidden=28 or hidden=32"),
        ("Llama", "causal LM", {"heads": 3}, "heads can be 1, 2, 4"),
        ("Llama", "causal LM", {"heads": 2, "key_value_heads": 1, "hidden": 33}, "hidden must lie in 1 … 32"),
        ("wav2vec2", "single-label", {"hidden": 15, "heads": 1}, "hidden=15 with heads=1"),
        ("DINOv2", "single-label", {"hidden": 24}, "a Dinov2Config has a whole mlp_ratio .* Give intermediate=120"),
        ("Llama", "causal LM", {"heads": 4, "key_value_heads": 1}, "at most 2. Give heads=4, key_value_heads=2"),
        ("Mixtral", "causal LM", {"intermediate": 64, "data": [{}]}, "no linear layer reads them. Leave data out"),
        ("BERT", "single-label", {"intermediate": 64, "data": []}, "data has no batch"),
        (
            "BERT",
            "single-label",
            {"layers": 1, "data": []},
            "data chooses hidden dimensions, heads and neurons, and none",
        ),
        ("ResNet", "single-label", {"hidden": 16}, "ResNetForImageClassification is made of several or of none"),
    ],
)
def test_what_a_config_cannot_express_is_refused_with_what_it_can(
    family: str, task: str, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        shrink(made(family, task), **asked)


TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIDES = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 64))}
SIDES |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)), "q, k and v of each head together"),
        (lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)), "one choice of heads for all layers"),
        (
            lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT, pad_token_id=0)),
            r"qkv_proj.weight, which holds heads and key",
        ),
        (
            lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=4)),
            "outputs change",
        ),
        (
            lambda: hf.MarianMTModel(
                hf.MarianConfig(vocab_size=60, d_model=32, **SIDES, pad_token_id=0, decoder_start_token_id=0)
            ),
            "embed_positions.weight: MarianMTModel does not save it",
        ),
    ],
)
def test_other_layouts_are_found_or_refused(build: Callable[[], Any], found: str) -> None:
    """Bloom's heads have slopes by their number; the others need a layout that no family above has."""
    teacher = build().eval()
    if " together" not in found and " for all" not in found:
        with pytest.raises(ConfigurationError, match=found):
            shrink(teacher, hidden=16, heads=2)
        return
    axes = mapping.find(teacher, {"heads"})

    assert any(axis.interleaved for axis in axes.axes) == found.endswith("together")
    assert (len(axes.groups("heads")) == 1) == found.endswith("layers")


def test_each_size_says_what_it_gave_up() -> None:
    teacher = made("BERT", "single-label")
    prepared(teacher, "BERT")
    count = sum(weight.numel() for weight in teacher.parameters())

    found = cut(teacher, layers=[1], width=Width(hidden=16, heads=2, intermediate=64))

    assert [(change.size, change.before, change.after) for change in found.changes] == [
        ("hidden", 32, 16), ("heads", 4, 2), ("neurons", 128, 64), ("layers", 2, 1),
    ]  # fmt: skip
    for one, other in zip(found.changes, found.changes[1:], strict=False):
        assert one.parameters_after == other.parameters_before
    assert found.changes[0].parameters_before == count
    assert found.changes[-1].parameters_after == sum(weight.numel() for weight in found.student.parameters())
    neurons = found.changes[2]
    assert neurons.parameters_before - neurons.parameters_after == 2 * 64 * (16 + 1 + 16)
    assert [change.kept for change in found.changes[1:3]] == [1.0, 1.0]  # what went was zero
    assert all(0 < found.changes[place].kept < 1 for place in (0, 3))
    assert [row[0] for row in report.rows(found.changes)] == ["hidden", "heads", "neurons", "layers"]


@pytest.mark.parametrize(
    ("family", "task", "named"),
    [("BERT", "single-label", "agreement"), ("GPT-2", "causal LM", "kl"), ("BERT", "extractive QA", "kl"),
     ("BERT", "multi-label", "agreement"), ("BERT", "embeddings", "cosine")],
)  # fmt: skip
def test_outputs_are_compared_with_the_teacher(family: str, task: str, named: str) -> None:
    teacher = made(family, task)
    inputs = sample(teacher)
    same = report.compared(teacher, shrink(teacher), [(inputs, inputs)])
    less = report.compared(teacher, shrink(teacher, layers=1), [(inputs, inputs)])

    assert getattr(same, named) == pytest.approx(0.0 if named == "kl" else 1.0)
    assert getattr(less, named) != pytest.approx(getattr(same, named)) or named == "agreement"
    assert same.positions == {"causal LM": 6, "embeddings": 7, "extractive QA": 2}.get(task, 1)
    assert report.below(same)


def test_outputs_of_models_without_a_head_and_of_other_widths_are_refused() -> None:
    teacher = made("BERT")
    inputs = sample(teacher)

    with pytest.raises(ConfigurationError, match="the teacher gives 32 numbers and the student 16"):
        report.compared(teacher, shrink(teacher, hidden=16, heads=2), [(inputs, inputs)])
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        report.compared(teacher, teacher, [])


@pytest.mark.slow
def test_a_narrow_bert_is_exported_with_parity(tmp_path: Path) -> None:
    student = shrink(tiny_bert_classifier(hidden_size=32, num_attention_heads=4), hidden=16, heads=2, intermediate=24)
    student.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    done = export_onnx(tmp_path)

    assert done.value("parity_max_abs_diff") < 1e-4


def test_a_narrow_student_learns_from_its_teacher_features_included(tmp_path: Path) -> None:
    teacher = tiny_bert_classifier(num_attention_heads=4)
    student = shrink(teacher, layers=1, hidden=16, heads=2, intermediate=24)
    before = student.bert.encoder.layer[0].output.dense.weight.clone()
    tokenizer = tiny_tokenizer()
    rows = [{**tokenizer(text), "labels": 1} for text in ("a good film", "the book was dull", "not bad", "slow music")]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Trainer(
        model=student,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[DistillCallback(teacher, method=["kd", "features"])],
    )

    trainer.train()

    assert not torch.equal(student.bert.encoder.layer[0].output.dense.weight, before)
