"""What is carried to Optimum, and what loads it there. Read in both environments, so nothing is imported here."""

from __future__ import annotations

VARIANTS = ("onnx", "onnx_int8")
LOADERS = {
    "bert-classifier": "ORTModelForSequenceClassification",
    "bert-tagger": "ORTModelForTokenClassification",
    "bert-spans": "ORTModelForQuestionAnswering",
    "bert-masked": "ORTModelForMaskedLM",
    "bert-states": "ORTModelForFeatureExtraction",
    "llama-tied": "ORTModelForCausalLM",
    "gpt2": "ORTModelForCausalLM",
    "t5": "ORTModelForSeq2SeqLM",
    "bart": "ORTModelForSeq2SeqLM",
    "vit": "ORTModelForImageClassification",
    "whisper": "ORTModelForSpeechSeq2Seq",
}
"""Optimum's class by the name of a student's folder."""
GENERATING = tuple(
    name for name, loader in LOADERS.items() if loader.endswith(("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq"))
)
NEW_TOKENS = 8
NOT_PROMPT = ("decoder_input_ids", "position_ids")
"""Inputs of a call that `generate` makes itself."""
ROPE_THETA = 100_000.0
"""Of the Llama; transformers 4 assumes 10000 where it finds none."""
BEAMS = {"tokens": 1, "beams": 3}
"""How many, by the name under which the generated tokens are kept."""
INLINE, EXTERNAL, BOTH = "me/inline", "me/external", "me/both"
"""The classifier on the hub: float32 with its weights inside of the graph, with them beside it; float32 and int8."""
FOLDER = "HF_COMPRESS_STUDENTS"
"""Environment variable: where the students lie."""
