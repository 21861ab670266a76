"""The code that a reader copies; it is run by a test against a real folder."""

from __future__ import annotations

import re

from hf_compress.facts import Record

from .text import literal

_TAGS = (
    ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
    ("Speech2TextForConditionalGeneration", "automatic-speech-recognition"),
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
    ("MarianMTModel", "text2text-generation"),
    ("Model", "feature-extraction"),
)
_INPUTS = {
    "text-classification": '"a text to classify"',
    "token-classification": '"a text with names in it"',
    "text-generation": '"the beginning of a text"',
    "feature-extraction": '"a text"',
    "fill-mask": 'f"a text with a {pipe.tokenizer.mask_token}"',
    "automatic-speech-recognition": '"speech.wav"',
}
_ORT = {
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "fill-mask": "MaskedLM",
    "feature-extraction": "FeatureExtraction",
    "image-classification": "ImageClassification",
    "text-generation": "CausalLM",
    "text2text-generation": "Seq2SeqLM",
    "automatic-speech-recognition": "SpeechSeq2Seq",
}
_WHISPER = "WhisperForConditionalGeneration"
"""The one speech model of encoder and decoder that transformers' pipeline knows behind another class."""
_SPEECH, _TEXT_TO_TEXT = "automatic-speech-recognition", "text2text-generation"
_GENERATE = (
    'inputs = tokenizer("a text to rewrite", return_tensors="pt")\n'
    "outputs = model.generate(**inputs, max_new_tokens=100)\n"
    "print(tokenizer.batch_decode(outputs, skip_special_tokens=True))\n"
)
"""transformers 5 has no pipeline from text to text."""


def pipeline_tag(record: Record, architecture: str | None) -> str | None:
    """The hub's name of the task: as the training recorded it, else by the model's head."""
    task = record.training.task if record.training else None
    if task in {tag for _, tag in _TAGS}:
        return task
    return next((tag for ending, tag in _TAGS if architecture and architecture.endswith(ending)), None)


def onnx_variants(record: Record) -> list[str]:
    """Folders with recorded ONNX graphs, one or several each, `onnx` first."""
    found = [re.fullmatch(r"(onnx(?:_[\w.-]+)?)/[\w.-]+\.onnx", entry.file) for entry in record.evidence]
    return sorted({match[1] for match in found if match})


def torch_code(model: str, tag: str | None, architecture: str | None) -> str:
    """How the student is used with transformers alone."""
    name = literal(model)
    if tag in _INPUTS:
        return (
            "from transformers import pipeline\n\n"
            f'pipe = pipeline("{tag}", model={name})\nprint(pipe({_INPUTS[tag]}))\n'
        )
    if tag == _TEXT_TO_TEXT:
        return (
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
            f"model = AutoModelForSeq2SeqLM.from_pretrained({name})\n{_GENERATE}"
        )
    head = architecture if architecture and re.fullmatch(r"[A-Za-z]\w*", architecture) else "AutoModel"
    return f"from transformers import {head}\n\nmodel = {head}.from_pretrained({name})\n"


def onnx_code(model: str, tag: str | None, variant: str, architecture: str | None = None) -> str:
    """How an exported graph is used on ONNX Runtime, from a local copy of the repository."""
    folder, name = literal(f"{model.rsplit('/', 1)[-1]}/{variant}"), literal(model.rsplit("/", 1)[-1])
    if tag == _TEXT_TO_TEXT:
        return (
            "from hf_compress import load_onnx\nfrom transformers import AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\nmodel = load_onnx({folder})\n{_GENERATE}"
        )
    if tag == _SPEECH and architecture == _WHISPER:
        return (
            "from hf_compress import load_onnx\nfrom transformers import AutoProcessor, pipeline\n\n"
            f"processor = AutoProcessor.from_pretrained({name})\n"
            f'pipe = pipeline(\n    "{tag}",\n    model=load_onnx({folder}),\n    tokenizer=processor.tokenizer,\n'
            "    feature_extractor=processor.feature_extractor,\n)\n"
            f"print(pipe({_INPUTS[tag]}))\n"
        )
    if tag in _INPUTS and tag != _SPEECH:
        return (
            "from hf_compress import load_onnx\nfrom transformers import AutoTokenizer, pipeline\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
            f'pipe = pipeline("{tag}", model=load_onnx({folder}), tokenizer=tokenizer)\n'
            f"print(pipe({_INPUTS[tag]}))\n"
        )
    return f"from hf_compress import load_onnx\n\nmodel = load_onnx({folder})\n"


def optimum_code(model: str, tag: str | None, variant: str, architecture: str | None = None) -> str | None:
    """The same graph in Optimum, where Optimum has a class for the task."""
    if tag not in _ORT or (architecture or "").endswith("ForCTC"):
        return None
    head = f"ORTModelFor{_ORT[tag]}"
    return (
        f"from optimum.onnxruntime import {head}\n\n"
        f'model = {head}.from_pretrained({literal(model)}, subfolder="{variant}")\n'
    )
