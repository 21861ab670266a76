"""The code that a reader copies; it is run by a test against a real folder."""

from __future__ import annotations

import re

from hf_compress.facts import Record

from .text import literal

_TAGS = (
    ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMaskedLM", "fill-mask"),
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForImageClassification", "image-classification"),
    ("ForSemanticSegmentation", "image-segmentation"),
    ("ForAudioClassification", "audio-classification"),
    ("ForCTC", "automatic-speech-recognition"),
    ("ForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("ForConditionalGeneration", "text2text-generation"),
    ("ForSeq2SeqLM", "text2text-generation"),
    ("Model", "feature-extraction"),
)
_INPUTS = {
    "text-classification": '"a text to classify"',
    "token-classification": '"a text with names in it"',
    "text-generation": '"the beginning of a text"',
    "feature-extraction": '"a text"',
    "fill-mask": 'f"a text with a {pipe.tokenizer.mask_token}"',
}
_ORT = {
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "fill-mask": "MaskedLM",
    "feature-extraction": "FeatureExtraction",
    "image-classification": "ImageClassification",
    "text-generation": "CausalLM",
}


def pipeline_tag(record: Record, architecture: str | None) -> str | None:
    """The hub's name of the task: as the training recorded it, else by the model's head."""
    task = record.training.task if record.training else None
    if task in {tag for _, tag in _TAGS}:
        return task
    return next((tag for ending, tag in _TAGS if architecture and architecture.endswith(ending)), None)


def onnx_variants(record: Record) -> list[str]:
    """Folders with a recorded ONNX graph, `onnx` first."""
    found = [re.fullmatch(r"(onnx(?:-[\w.-]+)?)/[\w.-]+\.onnx", entry.file) for entry in record.evidence]
    return sorted({match[1] for match in found if match})


def torch_code(model: str, tag: str | None, architecture: str | None) -> str:
    """How the student is used with transformers alone."""
    name = literal(model)
    if tag in _INPUTS:
        return (
            "from transformers import pipeline\n\n"
            f'pipe = pipeline("{tag}", model={name})\nprint(pipe({_INPUTS[tag]}))\n'
        )
    head = architecture if architecture and re.fullmatch(r"[A-Za-z]\w*", architecture) else "AutoModel"
    return f"from transformers import {head}\n\nmodel = {head}.from_pretrained({name})\n"


def onnx_code(model: str, tag: str | None, variant: str) -> str:
    """How an exported graph is used on ONNX Runtime, from a local copy of the repository."""
    folder, name = literal(f"{model.rsplit('/', 1)[-1]}/{variant}"), literal(model.rsplit("/", 1)[-1])
    if tag in _INPUTS:
        return (
            "from hf_compress.onnx import load_onnx\nfrom transformers import AutoTokenizer, pipeline\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
            f'pipe = pipeline("{tag}", model=load_onnx({folder}), tokenizer=tokenizer)\n'
            f"print(pipe({_INPUTS[tag]}))\n"
        )
    return f"from hf_compress.onnx import load_onnx\n\nmodel = load_onnx({folder})\n"


def optimum_code(model: str, tag: str | None, variant: str) -> str | None:
    """The same graph in Optimum, where Optimum has a class for the task.

    From a local copy too: of a hub's files Optimum takes one whose path begins with the subfolder's name, and
    `onnx-int8` begins with `onnx`.
    """
    if tag not in _ORT:
        return None
    head, folder = f"ORTModelFor{_ORT[tag]}", literal(f"{model.rsplit('/', 1)[-1]}/{variant}")
    return f"from optimum.onnxruntime import {head}\n\nmodel = {head}.from_pretrained({folder})\n"
