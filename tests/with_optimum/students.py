"""Tiny students with their graphs, what these give here, and a hub that serves one of them, for Optimum to load.

    python -m with_optimum.students FOLDER COMMAND...

writes `FOLDER/NAME/` with `onnx/` and `onnx_int8/`, and `FOLDER/NAME.safetensors`: the inputs as `input.NAME`, and for
each variant the outputs as `VARIANT.NAME`, and what `generate` gives, as `VARIANT.tokens` and with beams as
`VARIANT.beams`. Then it runs the command with `HF_ENDPOINT` set to a hub on loopback, and exits as the command did.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from hub.client import environment
from hub.server import Hub, running_hub
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny import VOCAB, tiny_bert_classifier, tiny_bert_config, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_compress import facts
from hf_compress.hub import push
from hf_compress.onnx import export_onnx, graph, load_onnx, quantize_onnx

from .kinds import (
    BEAMS,
    BOTH,
    EXTERNAL,
    FOLDER,
    GENERATING,
    INLINE,
    LOADERS,
    NEW_TOKENS,
    NOT_PROMPT,
    ROPE_THETA,
    VARIANTS,
)

TEXTS = ["the film was very good", "a dull story", "i love the music but not the end"]
PAD, START, END, SIZE = 0, 1, 2, 64
TOKENS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
WIDTH, LAYERS, HEADS = 32, 2, 2
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n# A small model\n"


def main(folder: Path, command: list[str]) -> int:
    """All students, then the command; its exit status."""
    assert BUILDERS.keys() == LOADERS.keys()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_compress").setLevel(logging.ERROR)  # that int8 was not measured is not the matter here
    for name in LOADERS:
        print(name, flush=True)
        make(folder, name)
    with served(folder) as hub:
        settings = environment(hub.url, folder / "home", None) | {FOLDER: str(folder)}
        del settings["PYTHONPATH"]  # of this environment
        return subprocess.run(command, env=settings).returncode


def make(folder: Path, name: str) -> None:
    """One student, its graphs and what they give."""
    torch.manual_seed(len(name))
    student = folder / name
    model, processing_class, inputs = BUILDERS[name]()
    model.save_pretrained(student)
    if processing_class is not None:
        processing_class.save_pretrained(student)
    export_onnx(student)
    quantize_onnx(student, gate=None)
    found = {f"input.{key}": value for key, value in inputs.items()}
    for variant in VARIANTS:
        found |= {f"{variant}.{key}": value for key, value in given(student / variant, name, inputs).items()}
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{name}.safetensors")


def given(variant: Path, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a variant on some inputs, and what it generates after them."""
    model = load_onnx(variant, provider="cpu")
    found = {key: value for key, value in model(**inputs).items() if isinstance(value, Tensor)}
    if name in GENERATING:
        prompt = {key: value for key, value in inputs.items() if key not in NOT_PROMPT}
        for key, beams in BEAMS.items():
            found[key] = model.generate(**prompt, do_sample=False, num_beams=beams, max_new_tokens=NEW_TOKENS)
    return found


@contextmanager
def served(folder: Path) -> Iterator[Hub]:
    """A hub with the classifier as it is, and exported once more to float32 alone, its weights inside and outside."""
    (folder / "home").mkdir()
    with (
        mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
        mock.patch.object(constants, "HF_HUB_OFFLINE", False),
        mock.patch.dict(os.environ, NO_PROXY="127.0.0.1"),
        running_hub() as hub,
    ):
        publish(hub, folder / "bert-classifier", BOTH)
        for name, most in ((INLINE, graph.INLINE_BYTES), (EXTERNAL, 10_000)):
            student = folder / name.replace("/", "-")
            model, processing_class, _ = BUILDERS["bert-classifier"]()
            model.save_pretrained(student)
            processing_class.save_pretrained(student)
            with mock.patch.object(graph, "INLINE_BYTES", most):
                export_onnx(student)
            publish(hub, student, name)
        yield hub


def publish(hub: Hub, student: Path, name: str) -> None:
    """What a push asks for beside the model, and the push."""
    (student / "README.md").write_text(CARD, encoding="utf-8")
    (student / "LICENSE").write_text("Apache License\n", encoding="utf-8")
    facts.register(student, [student / "model.safetensors"])
    push(student, name, token=hub.token, endpoint=hub.url)


Built = tuple[PreTrainedModel, Any, dict[str, Tensor]]


def texts() -> dict[str, Tensor]:
    """Three texts of three lengths, padded on the right."""
    return dict(tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt"))


def encoder(kind: Any) -> Callable[[], Built]:
    return lambda: (kind(tiny_bert_config(num_labels=2)).eval(), tiny_tokenizer(), texts())


def generic_tokenizer() -> PreTrainedTokenizerFast:
    """Of no model: transformers 5 saves it as a `TokenizersBackend`."""
    words = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", *VOCAB[5 : SIZE + 2]])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)


def prompts(*, side: str = "left") -> dict[str, Tensor]:
    """Two rows, the second three tokens shorter."""
    ids = torch.randint(END + 1, SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}


def positioned() -> dict[str, Tensor]:
    """Of a decoder: Optimum counts padding too where it is not told the positions."""
    given = prompts()
    return given | {"position_ids": (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def answers() -> dict[str, Tensor]:
    """What the decoder has been given so far."""
    ids = torch.randint(END + 1, SIZE, (2, 4), generator=torch.Generator().manual_seed(1))
    return {"decoder_input_ids": torch.cat([torch.full((2, 1), START), ids], 1)}


def llama() -> Built:
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=SIZE,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=0.3,
        **TOKENS,
    )
    return LlamaForCausalLM(config).eval(), generic_tokenizer(), positioned()


def gpt2() -> Built:
    config = GPT2Config(
        vocab_size=SIZE, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=SIZE, initializer_range=0.3, **TOKENS
    )
    return GPT2LMHeadModel(config).eval(), generic_tokenizer(), positioned()


def t5() -> Built:
    config = T5Config(
        vocab_size=SIZE,
        d_model=WIDTH,
        d_ff=2 * WIDTH,
        d_kv=WIDTH // HEADS,
        num_layers=LAYERS,
        num_heads=HEADS,
        **TOKENS,
    )
    return T5ForConditionalGeneration(config).eval(), generic_tokenizer(), prompts() | answers()


def bart() -> Built:
    sizes = {f"{side}_layers": LAYERS for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 2 * WIDTH for side in ("encoder", "decoder")}
    config = BartConfig(
        vocab_size=SIZE, d_model=WIDTH, max_position_embeddings=SIZE, init_std=0.3, forced_eos_token_id=END,
        **sizes, **TOKENS,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval(), generic_tokenizer(), prompts(side="right") | answers()


def vit() -> Built:
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        image_size=32,
        patch_size=16,
        num_labels=3,
        initializer_range=0.3,
    )
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return ViTForImageClassification(config).eval(), processor, {"pixel_values": torch.randn(2, 3, 32, 32)}


def whisper() -> Built:
    sizes = {f"{side}_layers": LAYERS for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 2 * WIDTH for side in ("encoder", "decoder")}
    config = WhisperConfig(
        vocab_size=SIZE,
        d_model=WIDTH,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        init_std=0.3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
        **TOKENS,
    )
    return WhisperForConditionalGeneration(config).eval(), None, {"input_features": torch.randn(2, 8, 32)} | answers()


BUILDERS: dict[str, Callable[[], Built]] = {
    "bert-classifier": lambda: (tiny_bert_classifier(), tiny_tokenizer(), texts()),
    "bert-tagger": encoder(BertForTokenClassification),
    "bert-spans": encoder(BertForQuestionAnswering),
    "bert-masked": encoder(BertForMaskedLM),
    "bert-states": encoder(BertModel),
    "llama-tied": llama,
    "gpt2": gpt2,
    "t5": t5,
    "bart": bart,
    "vit": vit,
    "whisper": whisper,
}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
