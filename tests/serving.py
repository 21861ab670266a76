"""Students whose cards say how they are served without torch, and what `load_onnx` and transformers give for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import card_blocks
import numpy as np
import torch
from hf_compress_cards import render
from hf_compress_cards.serving import kind
from PIL import Image
from tiny import VOCAB, tiny_bert_classifier, tiny_bert_config, tiny_plain_tokenizer, tiny_tokenizer
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    CLIPImageProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_compress.onnx import export_onnx, load_onnx, quantize_onnx

PAD, START = VOCAB.index("[PAD]"), VOCAB.index("[CLS]")
ENDS = [*range(20, 30)]
"""Enough to be met in a few tokens."""
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TEXTS = ["a text to classify", "another one"]
Expected = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A form of the code: a student, and the variables that its program must find."""

    model: Callable[[], PreTrainedModel]
    expected: Callable[[Path, Path], Expected]
    """Of the student's and the variant's folder."""
    processor: Callable[[], Any] = tiny_tokenizer
    int8: bool = False


def prepare(name: str, folder: Path) -> None:
    """Writes a case's folder for `bare.py`: the student with its graphs, the card's program and what it must find."""
    case, student = CASES[name], folder / "student"
    torch.manual_seed(0)
    case.model().eval().save_pretrained(student)
    case.processor().save_pretrained(student)
    export_onnx(student)
    if case.int8:
        quantize_onnx(student, gate=None)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "image.png")
    code = program(render(student))
    found = re.search(r'folder = Path\("student/([\w-]+)"\)', code)
    assert found, code
    (folder / "program.py").write_text(code, encoding="utf-8")
    np.savez(folder / "expected.npz", **case.expected(student, student / found[1]))


def kind_of(name: str) -> str:
    """What the case's model reads."""
    return kind(name.partition(",")[0])


def program(card: str) -> str:
    """The code of a card that needs no torch."""
    (code,) = (code for code, _ in card_blocks.python(card) if "InferenceSession" in code)
    return code


def by_label(student: Path, found: list[dict[str, Any]]) -> list[float]:
    """A pipeline's scores in the order of the labels."""
    return [float(each["score"]) for each in sorted(found, key=lambda each: str(each["label"]))]


def classified(student: Path, variant: Path) -> Expected:
    pipe = pipeline("text-classification", model=load_onnx(variant), tokenizer=AutoTokenizer.from_pretrained(student))
    return {"scores": [by_label(student, found) for found in pipe(TEXTS, top_k=None, batch_size=2)]}


def tagged(student: Path, variant: Path) -> Expected:
    pipe = pipeline("token-classification", model=load_onnx(variant), tokenizer=AutoTokenizer.from_pretrained(student))
    text = "a text with names in it"
    found = pipe(text, ignore_labels=[])
    begun = [each for each in found if not each["word"].startswith("##")]
    assert len(begun) == 6 < len(found)  # words, some of several tokens
    return {"words": [(word, each["entity"]) for word, each in zip(text.split(), begun, strict=True)]}


def answered(student: Path, variant: Path) -> Expected:
    question, context = "what was good?", "the book was dull, but the film was very good."
    inputs = AutoTokenizer.from_pretrained(student)(question, context, return_tensors="pt", return_offsets_mapping=True)
    kinds, offsets = inputs.sequence_ids(), inputs.pop("offset_mapping")[0].tolist()
    output = load_onnx(variant)(**inputs)
    own = [place for place, kind in enumerate(kinds) if kind == 1]
    spans = {
        (first, last): float(output.start_logits[0, first] + output.end_logits[0, last])
        for first in own
        for last in own
        if first <= last
    }
    first, last = max(spans, key=lambda span: spans[span])
    return {"answer": context[offsets[first][0] : offsets[last][1]], "best": spans[first, last]}


def filled(student: Path, variant: Path) -> Expected:
    pipe = pipeline("fill-mask", model=load_onnx(variant), tokenizer=AutoTokenizer.from_pretrained(student))
    found = pipe("a text with a [MASK]", top_k=len(VOCAB))
    return {"scores": [each["score"] for each in sorted(found, key=lambda each: int(each["token"]))]}


def embedded(student: Path, variant: Path) -> Expected:
    tokenizer, rows = AutoTokenizer.from_pretrained(student), []
    for text in ("a text", "another, longer text"):
        states = load_onnx(variant)(**tokenizer(text, return_tensors="pt")).last_hidden_state
        rows.append(torch.nn.functional.normalize(states[0].mean(0), dim=0).numpy())
    return {"embeddings": rows}


def continued(student: Path, variant: Path) -> Expected:
    inputs = AutoTokenizer.from_pretrained(student)("the beginning of a text", return_tensors="pt")
    found = load_onnx(variant).generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40, do_sample=False
    )
    return {"ids": found[0].numpy()}


def seen(student: Path, variant: Path) -> Expected:
    processor = AutoImageProcessor.from_pretrained(student)
    pipe = pipeline("image-classification", model=load_onnx(variant), image_processor=processor)
    found = pipe(str(student.parent / "image.png"), top_k=3)
    return {"scores": [by_label(student, found)]}


def bert(kind: Any, **settings: Any) -> Callable[[], PreTrainedModel]:
    return lambda: kind(tiny_bert_config(num_hidden_layers=1, **settings))


def classifier(**settings: Any) -> Callable[[], PreTrainedModel]:
    return lambda: tiny_bert_classifier(num_hidden_layers=1, **settings)


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=16, num_labels=3, initializer_range=0.3, **SHAPE)
    )


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(VOCAB), num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5,
        bos_token_id=START, eos_token_id=ENDS, **SHAPE,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=len(VOCAB), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5,
        bos_token_id=START, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def roberta() -> PreTrainedModel:
    config = RobertaConfig(
        vocab_size=len(VOCAB), max_position_embeddings=66, type_vocab_size=1, initializer_range=0.3, pad_token_id=PAD,
        **SHAPE,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


CASES = {
    "text-classification": Case(classifier(), classified),
    "text-classification, int8": Case(classifier(), classified, int8=True),
    "text-classification, several labels": Case(classifier(problem_type="multi_label_classification"), classified),
    "text-classification, a number": Case(classifier(num_labels=1, problem_type="regression"), classified),
    "text-classification, without token types": Case(roberta, classified, tiny_plain_tokenizer),
    "token-classification": Case(bert(BertForTokenClassification, num_labels=5), tagged),
    "question-answering": Case(bert(BertForQuestionAnswering), answered),
    "fill-mask": Case(bert(BertForMaskedLM), filled),
    "feature-extraction": Case(bert(BertModel), embedded),
    "text-generation": Case(llama, continued),
    "text-generation, learnt positions": Case(gpt2, continued),
    "image-classification": Case(vit, seen, lambda: ViTImageProcessor(size={"height": 32, "width": 32})),
    "image-classification, cropped": Case(
        vit, seen, lambda: CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    ),
}
"""By task, and what is particular."""
