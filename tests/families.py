"""Tiny models of every family that the callback is tried on, and the rows of every task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB, CLASSES, PAD, START, END = 40, 3, 0, 1, 2
LENGTHS, ANSWERS = (3, 8, 5, 6), (4, 2, 6, 3)
"""Tokens of the four rows, and of what an encoder-decoder answers: unequal, so that a mean of means shows."""
IMAGE, SOUND, BINS, FRAMES = 8, 160, 8, 32
"""Pixels a side; samples of a waveform; mel bins and frames of a spectrogram."""
IGNORED = -100

CLASSIFICATION = {
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
    "waveform": "AutoModelForAudioClassification",
    "spectrogram": "AutoModelForAudioClassification",
}
TASKS: Mapping[str, Mapping[str, str]] = {
    "single-label": CLASSIFICATION,
    "multi-label": CLASSIFICATION,
    "regression": CLASSIFICATION,
    "token classification": {"text": "AutoModelForTokenClassification"},
    "extractive QA": {"text": "AutoModelForQuestionAnswering"},
    "masked LM": {"text": "AutoModelForMaskedLM"},
    "causal LM": {"text": "AutoModelForCausalLM"},
    "encoder-decoder LM": {"text": "AutoModelForSeq2SeqLM"},
    "speech to text": {"waveform": "AutoModelForCTC", "spectrogram": "AutoModelForSpeechSeq2Seq"},
    "embeddings": dict.fromkeys(("text", "image", "waveform", "spectrogram"), "AutoModel"),
}
"""The Auto class of each task, by what a family reads."""
SAME = {("BART", "masked LM"): "encoder-decoder LM"}
"""Tasks for which a family has the class of another one."""
LEFT_OUT = {("ResNet", task): "features" for task in ("single-label", "multi-label")}
"""Of the task's default, what does not fit these models and is left out with a warning."""
NO_STATES = "features: both models must have hidden states: num_hidden_layers in their configs."
REFUSED = {("ResNet", task): NO_STATES for task in ("regression", "embeddings")}
"""What no method can serve, with the error's text."""
BROKEN = {
    (family, task): said
    for family in ("Whisper", "wav2vec2")
    for task, said in {
        "multi-label": "Expected input batch_size (4) to match target batch_size (12).",
        "regression": "expected target dtype to be Long or Byte, but got Double",
    }.items()
}
"""What transformers' own head cannot do, with the error's text."""
FAULTS = {
    ("BART", "causal LM"): "this head's own loss does not shift the labels, and the task's term counts shifted ones",
}
"""What trains, with a task's term that accumulation changes."""
NOT_TAUGHT = "do not teach the head. Add labels"
UNCHUNKED = {
    ("BART", "causal LM"): "is not the cross-entropy of its logits",
    ("BART", "encoder-decoder LM"): "The size of tensor a (0) must match the size of tensor b",
}
"""Language models whose logits cannot be had in chunks, with the error's text."""
TUPLES = ("BERT", "RoBERTa", "DistilBERT", "DeBERTa-v2", "ResNet")
"""Families that transformers itself can run with return_dict=False in the config, heads included."""


@dataclass(frozen=True)
class Family:
    """An architecture, small."""

    config: str
    """Class of its config."""
    reads: str = "text"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Beside those of `NAMES`."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Where its config calls a size otherwise than most."""


GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
DECODER = {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES: Mapping[str, Family] = {
    "BERT": Family("BertConfig"),
    "RoBERTa": Family("RobertaConfig"),
    "ModernBERT": Family("ModernBertConfig", settings={"cls_token_id": START, "sep_token_id": END}),
    "DistilBERT": Family(
        "DistilBertConfig",
        names={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
        },
    ),
    "DeBERTa-v2": Family(
        "DebertaV2Config",
        settings={"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "GPT-2": Family("GPT2Config", names=GPT2_NAMES | {"intermediate_size": "n_inner"}),
    "Llama": Family("LlamaConfig", settings=DECODER),
    "Qwen2": Family("Qwen2Config", settings=DECODER),
    "Qwen3": Family("Qwen3Config", settings=DECODER),
    "Gemma-2": Family("Gemma2Config", settings=DECODER | {"final_logit_softcapping": 2.0, "sliding_window": 6}),
    "Granite": Family("GraniteConfig", settings={"num_key_value_heads": 1, "logits_scaling": 0.25}),
    "Cohere": Family("CohereConfig", settings={"num_key_value_heads": 1, "logit_scale": 0.5}),
    "Mixtral": Family("MixtralConfig", settings=DECODER | {"num_local_experts": 4, "experts_implementation": "eager"}),
    "T5": Family(
        "T5Config",
        settings={"d_kv": 8},
        names={
            "hidden_size": "d_model",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "intermediate_size": "d_ff",
        },
    ),
    "BART": Family("BartConfig", names={"hidden_size": "d_model"}),
    "ViT": Family("ViTConfig", "image"),
    "DINOv2": Family("Dinov2Config", "image", {"mlp_ratio": 2}),
    "ResNet": Family("ResNetConfig", "image", {"embedding_size": 8, "depths": [1, 1], "layer_type": "basic"}),
    "Whisper": Family(
        "WhisperConfig",
        "spectrogram",
        {"num_mel_bins": BINS, "max_source_positions": FRAMES // 2, "max_target_positions": 16},
        {"hidden_size": "d_model"},
    ),
    "wav2vec2": Family(
        "Wav2Vec2Config",
        "waveform",
        {
            "conv_dim": [8, 8],
            "conv_stride": [4, 4],
            "conv_kernel": [8, 4],
            "num_feat_extract_layers": 2,
            "feat_extract_norm": "layer",
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "apply_spec_augment": False,
            "classifier_proj_size": 8,
            "ctc_loss_reduction": "mean",
        },
    ),
}


def config(family: str, task: str, *, width: int, layers: int) -> PreTrainedConfig:
    """Of a model of that size without dropout, with larger weights than usual: its outputs differ by row."""
    known = FAMILIES[family]
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "image_size": IMAGE,
        "patch_size": 4,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
        "decoder_start_token_id": START,
    }
    if known.reads != "image":
        sizes["vocab_size"] = VOCAB
    sizes |= {f"{side}_layers": layers for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 2 * width for side in ("encoder", "decoder")}
    sizes |= {"hidden_sizes": [width // 2, width], "max_position_embeddings": 32, "n_positions": 32}
    sizes["num_labels"] = {"regression": 1, "extractive QA": 2}.get(task, CLASSES)
    if task == "multi-label":
        sizes["problem_type"] = "multi_label_classification"
    cls = getattr(transformers, known.config)
    given = {known.names.get(name, name): value for name, value in sizes.items()} | dict(known.settings)
    names = set(cls().to_dict()) | {"problem_type", "num_labels"} | set(known.settings)
    found: PreTrainedConfig = cls(**{n: v for n, v in given.items() if n in names or n.endswith("token_id")})
    for name, value in found.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(found, name, 0.0)
        if name in ("initializer_range", "init_std"):
            setattr(found, name, 0.2)
    return found


@cache
def _model(family: str, task: str, width: int, layers: int, seed: int) -> PreTrainedModel:
    auto = getattr(transformers, TASKS[task][FAMILIES[family].reads])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config(family, task, width=width, layers=layers)).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # some heads have one that their config does not tell
            module.p = 0.0
    return model


def models(family: str, task: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student of width 16 with one layer and a teacher of width 32 with two, in float64."""
    return copy.deepcopy(_model(family, task, 16, 1, 0)), copy.deepcopy(_model(family, task, 32, 2, 1))


def headed(family: str, task: str) -> bool:
    """Whether transformers has a head for that task that is not another task's."""
    name = TASKS[task].get(FAMILIES[family].reads)
    if name is None or (family, task) in SAME:
        return False
    return getattr(transformers, FAMILIES[family].config) in getattr(transformers, name)._model_mapping


@cache
def cases() -> list[tuple[str, str]]:
    """Every (family, task) that can be trained."""
    found = [(family, task) for family in FAMILIES for task in TASKS if headed(family, task)]
    return [case for case in found if case not in REFUSED and case not in BROKEN]


def rows(family: str, task: str, *, labelled: bool = True) -> list[dict[str, Any]]:
    """Four rows, with labels where the task has some; without them an encoder-decoder's answers are its inputs."""
    found = _rows(family, task)
    if labelled:
        return found
    if task in ("encoder-decoder LM", "speech to text") and family != "wav2vec2":
        found = [row | {"decoder_input_ids": [START, *row["labels"][:-1]]} for row in found]
    return [{name: value for name, value in row.items() if name not in LABELS} for row in found]


def _rows(family: str, task: str) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    reads, found = FAMILIES[family].reads, []
    for place, (length, answer) in enumerate(zip(LENGTHS, ANSWERS, strict=True)):
        row = _read(reads, length, draw)
        ids = row.get("input_ids", [])
        answered = _ids(answer, draw)
        if task == "embeddings" and family in ("T5", "Whisper"):
            row["decoder_input_ids"] = answered
        row |= {
            "single-label": {"labels": place % CLASSES},
            "multi-label": {"labels": [float((place + label) % 2) for label in range(CLASSES)]},
            "regression": {"labels": place / 4},
            "token classification": {"labels": [token % CLASSES for token in ids]},
            "extractive QA": {"start_positions": 1, "end_positions": length - 1},
            "masked LM": {"labels": [IGNORED if spot % 2 else token for spot, token in enumerate(ids)]},
            "causal LM": {"labels": ids},
            "encoder-decoder LM": {"labels": answered},
            "speech to text": {"labels": answered},
            "embeddings": {},
        }[task]
        found.append(row)
    return found


def _read(reads: str, length: int, draw: torch.Generator) -> dict[str, Any]:
    """What a model of that kind is given of one example."""
    if reads == "text":
        return {"input_ids": _ids(length, draw)}
    name, shape = {
        "image": ("pixel_values", (3, IMAGE, IMAGE)),
        "waveform": ("input_values", (SOUND,)),
        "spectrogram": ("input_features", (BINS, FRAMES)),
    }[reads]
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64).tolist()}


def _ids(length: int, draw: torch.Generator) -> list[int]:
    """Ids that end with the only end token."""
    return [*torch.randint(END + 1, VOCAB, (length - 1,), generator=draw).tolist(), END]


LABELS = ("labels", "start_positions", "end_positions")
FILL = {"labels": IGNORED, "input_ids": PAD, "decoder_input_ids": PAD, "input_values": 0.0, "attention_mask": 0}
MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Lists padded on the right to the longest, all else stacked; a waveform's mask comes with its row.

    Rows with answer spans are padded to one length, as the head's own softmax runs over padding too.
    """
    found = {}
    for name in batch[0]:
        values = [row[name] for row in batch]
        if name in FILL and isinstance(values[0], list):
            longest = max(LENGTHS) if "start_positions" in batch[0] else max(map(len, values))
            values = [value + [FILL[name]] * (longest - len(value)) for value in values]
        dtype = torch.float64 if torch.tensor(values[0]).is_floating_point() else torch.long
        found[name] = torch.tensor(values, dtype=dtype)
    for name, mask in MASKS.items():
        if name in found:
            lengths = torch.tensor([[len(row[name])] for row in batch])
            found[mask] = (torch.arange(found[name].shape[1]) < lengths).long()
    return found


def markdown() -> str:
    """The table of families and tasks, and what is said of all of them."""
    lines = ["| family | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    lines += [f"| {family} | " + " | ".join(_cell(family, task) for task in TASKS) + " |" for family in FAMILIES]
    return "\n".join([*lines, "", *_notes()])


def _cell(family: str, task: str) -> str:
    case = (family, task)
    if not headed(*case):
        return f"is its {SAME[case]}" if case in SAME else "–"
    if case in REFUSED:
        return f"refused: {REFUSED[case]}"
    if case in BROKEN:
        return f"no, transformers' head raises: {BROKEN[case]}"
    if case in FAULTS:
        return f"in part: {FAULTS[case]}"
    return f"yes, {LEFT_OUT[case]} left out of the default: {NO_STATES}" if case in LEFT_OUT else "yes"


def _notes() -> list[str]:
    tuples = ", ".join(TUPLES)
    return [
        "`yes`: the task's default methods train three steps with finite gradients and a `distill_loss` above 0; one "
        "batch of four and four of one give one gradient and one `distill_loss` (float64); the saved student loads "
        "with its Auto class, no key missing and none left over; `evaluate()` measures the same `distill_loss`; the "
        "teacher is as it was. `–`: transformers has no such head for what the family reads.",
        "",
        "- Without labels all of them train too, but regression and wav2vec2's speech to text, whose heads no method "
        f"reaches; these are refused: “… {NOT_TAUGHT} …”. An encoder-decoder's rows then carry `decoder_input_ids`.",
        f"- `return_dict=False` in the config gives the same gradients in {tuples}; in the other families' heads "
        "transformers itself raises an `AttributeError`.",
        "- ResNet: BatchNorm relates the rows of a batch in training, so that accumulation changes its meaning; it is "
        "left out of that comparison.",
        "- Language models: the task's own loss stands beside the method's (`task_weight=1`), and the value is that of "
        "the models' own logits, caps and scales included, whole and with `memory='chunked'`; refused in chunks: "
        + "; ".join(f"{family} {task} (“… {said} …”)" for (family, task), said in UNCHUNKED.items())
        + ".",
        "- Extractive QA: the comparison pads all rows to one length, as the softmax over time, the model's own too, "
        "runs over padding.",
        "- Embeddings of T5, BART and Whisper: hidden states are the encoder's, so the decoder gets no gradient.",
        "- wav2vec2: an `attention_mask` over samples is brought to the frames, so that padding counts nowhere. Its "
        "CTC loss is a sum over examples, or a mean, as its config says, and is added up as such.",
    ]
