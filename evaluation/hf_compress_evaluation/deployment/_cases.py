"""The models that are deployed: tiny ones of every kind, and real weights with real text, images and speech."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_compress.errors import ConfigurationError
from hf_compress.onnx import Gate
from hf_compress_evaluation.demo import data as sentiment
from hf_compress_evaluation.demo.recipe import packaged as minilm_folder

from . import _assets

ROWS = 1000
"""Sentences on which decisions are compared."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, and what it is tried on."""

    model: PreTrainedModel
    processing: Any
    gate: Gate
    """Limits of the bar where the model has one, else lenient: the figures are what counts."""
    inputs: Callable[[int], Mapping[str, Tensor]]
    """From the number of rows to what is timed."""
    shape: str
    """Of what is timed, beside the number of rows."""
    scores: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)
    """By name, from a model (torch or exported) to a figure of its own."""
    texts: Sequence[str] = ()
    """From which models that generate go on, or which they transform; also compared token by token."""


def _lenient(features: Sequence[Any], **limits: Any) -> Gate:
    return Gate(features=features, **{"min_agreement": 0.0, "min_similarity": 0.0, "max_rise": 1e9} | limits)


def _words(tokenizer: Any, length: int, *, kinds: bool = False) -> Callable[[int], Mapping[str, Tensor]]:
    """Rows of random tokens without padding, with their kinds for a model that takes them."""

    def make(rows: int) -> Mapping[str, Tensor]:
        draw = torch.Generator().manual_seed(rows)
        ids = torch.randint(5, len(tokenizer), (rows, length), generator=draw)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if kinds:
            found["token_type_ids"] = torch.zeros_like(ids)
        return found

    return make


def _minilm_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(minilm_folder())


def _sentences() -> tuple[list[str], list[int]]:
    rows = sentiment.load_sentiment().test.rows
    return list(rows["text"])[:ROWS], list(rows["label"])[:ROWS]


def _train(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], rate: float) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def bert_tiny() -> Case:
    """A masked language model whose table is its head."""
    tokenizer = _minilm_tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=512, initializer_range=0.1)  # fmt: skip
    gate = _lenient(_sentences()[0][:200])
    return Case(model=BertForMaskedLM(config).eval(), processing=tokenizer, gate=gate,
                inputs=_words(tokenizer, 32, kinds=True), shape="32 tokens")  # fmt: skip


def minilm_encoder() -> Case:
    """MiniLM-L6 as it comes, hidden states."""
    tokenizer = _minilm_tokenizer()
    model = AutoModel.from_pretrained(minilm_folder()).eval()
    return Case(model=model, processing=tokenizer, gate=_lenient(_sentences()[0][:200]),
                inputs=_words(tokenizer, 32, kinds=True), shape="32 tokens")  # fmt: skip


def minilm_classifier() -> Case:
    """MiniLM-L6 after an epoch of 2,000 rated sentences."""
    tokenizer = _minilm_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)
    rows = sentiment.load_sentiment().labelled.rows

    def batches() -> Iterator[Mapping[str, Tensor]]:
        for at in range(0, 2000, 32):
            batch = rows[at : at + 32]
            inputs = tokenizer(batch["text"], padding=True, truncation=True, max_length=64, return_tensors="pt")
            yield {**inputs, "labels": torch.tensor(batch["label"])}

    _train(model, batches(), 5e-5)
    texts, labels = _sentences()
    gate = Gate(features=texts, labels=labels, max_drop=0.01, min_agreement=0.98)
    inputs = _words(tokenizer, 32, kinds=True)
    return Case(model=model.eval(), processing=tokenizer, gate=gate, inputs=inputs, shape="32 tokens")


def _llama(tied: bool) -> Case:
    tokenizer = _minilm_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=352, max_position_embeddings=512,
                         tie_word_embeddings=tied, initializer_range=0.1, pad_token_id=0, bos_token_id=None,
                         eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 1e5})  # fmt: skip
    texts = _sentences()[0][:100]
    return Case(model=LlamaForCausalLM(config).eval(), processing=tokenizer, gate=_lenient(texts),
                inputs=_words(tokenizer, 32), shape="32 tokens", texts=texts[:4])  # fmt: skip


def llama_tied() -> Case:
    """A Llama of two layers whose table is its head."""
    return _llama(True)


def llama_untied() -> Case:
    """The same with a head of its own."""
    return _llama(False)


def gpt2_tiny() -> Case:
    """A GPT-2 of two layers."""
    tokenizer = _minilm_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=128, n_layer=2, n_head=4, n_positions=512,
                        initializer_range=0.1, bos_token_id=None, eos_token_id=None)  # fmt: skip
    texts = _sentences()[0][:100]
    return Case(model=GPT2LMHeadModel(config).eval(), processing=tokenizer, gate=_lenient(texts),
                inputs=_words(tokenizer, 32), shape="32 tokens", texts=texts[:4])  # fmt: skip


def smollm2() -> Case:
    """SmolLM2-135M-Instruct on texts of licences."""
    model, tokenizer = _assets.smollm2()
    texts = _assets.licences(length=1000, count=48)
    gate = Gate(features=texts, max_rise=0.02, min_agreement=0.9, batch_size=8)
    return Case(model=model, processing=tokenizer, gate=gate, inputs=_words(tokenizer, 32), shape="32 tokens",
                texts=[text[:80] for text in texts[:4]])  # fmt: skip


def t5_tiny() -> Case:
    """A T5 of two layers that has learned to give a sentence's first words back, turned around."""
    tokenizer, words = _minilm_tokenizer(), 5
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=tokenizer.sep_token_id)  # fmt: skip
    model = T5ForConditionalGeneration(config)
    texts = [" ".join(text.split()[:words]) for text in sentiment.load_sentiment().unlabelled.rows["text"]]

    def batches() -> Iterator[Mapping[str, Tensor]]:
        for step in range(400):
            rows = [texts[(step * 32 + row) % len(texts)] for row in range(32)]
            turned = [" ".join(reversed(row.split())) for row in rows]
            source, target = (
                tokenizer(each, padding=True, truncation=True, max_length=16, return_tensors="pt")
                for each in (rows, turned)
            )
            labels = target["input_ids"][:, 1:]
            masked = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
            yield {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": masked}

    _train(model, batches(), 2e-3)
    return Case(model=model.eval(), processing=tokenizer, gate=_lenient(texts[:100], new_tokens=12),
                inputs=_words(tokenizer, 32), shape="32 tokens, 10 generated", texts=texts[:8])  # fmt: skip


def dinov2() -> Case:
    """DINOv2-small on noise images of 224 pixels."""
    model, processor = _assets.dinov2()

    def images(rows: int) -> Mapping[str, Tensor]:
        draw = torch.Generator().manual_seed(rows)
        return {"pixel_values": torch.randn(rows, 3, 224, 224, generator=draw)}

    features = [{"pixel_values": image} for image in images(8)["pixel_values"]]
    return Case(model=model, processing=processor, gate=_lenient(features, batch_size=4), inputs=images,
                shape="224 x 224 pixels")  # fmt: skip


def whisper() -> Case:
    """Whisper tiny.en on recordings of people reading."""
    try:
        import jiwer
    except ImportError as error:
        raise ConfigurationError("pip install jiwer: it counts the wrong words") from error
    model, processor = _assets.whisper()
    recordings = _assets.speech()
    spectra = processor.feature_extractor(
        [samples for samples, _ in recordings], sampling_rate=16000, return_tensors="pt"
    )["input_features"]

    def error_rate(candidate: Any) -> float:
        """Through the pipeline, as a user would ask."""
        hear = pipeline("automatic-speech-recognition", model=candidate, tokenizer=processor.tokenizer,
                        feature_extractor=processor.feature_extractor)  # fmt: skip
        found = [hear(samples.copy())["text"] for samples, _ in recordings]
        return float(jiwer.wer([_plain(text) for _, text in recordings], [_plain(text) for text in found]))

    return Case(
        model=model,
        processing=processor,
        gate=_lenient([{"input_features": spectrum} for spectrum in spectra], batch_size=5),
        inputs=lambda rows: {"input_features": spectra[torch.arange(rows) % len(spectra)]},
        shape="30 seconds, 10 tokens generated",
        scores={"word error rate": error_rate},
    )


def _plain(text: str) -> str:
    """Words alone, as the transcripts have them."""
    text = text.lower().replace("-", " ").replace("mr.", "mister")
    return text.translate(str.maketrans("", "", string.punctuation)).strip()


class BagConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """Of `BagForSequenceClassification`."""

    model_type = "bag-of-words"

    def __init__(self, vocab_size: int = 100, hidden_size: int = 128, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class BagForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """A third party's model: the mean of the words, then a layer."""

    config_class = BagConfig
    main_input_name = "input_ids"

    def __init__(self, config: BagConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits (batch, class)."""
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask)[..., None]
        mean = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(self.layer(mean).tanh()))


def own_model() -> Case:
    """A PreTrainedModel that transformers does not know."""
    tokenizer = _minilm_tokenizer()
    torch.manual_seed(0)
    model = BagForSequenceClassification(BagConfig(vocab_size=len(tokenizer), num_labels=3)).eval()
    nn.init.normal_(model.classifier.weight)
    return Case(model=model, processing=tokenizer, gate=_lenient(_sentences()[0][:200]),
                inputs=_words(tokenizer, 32), shape="32 tokens")  # fmt: skip


CASES: Mapping[str, Callable[[], Case]] = {
    "BERT-tiny": bert_tiny,
    "MiniLM encoder": minilm_encoder,
    "MiniLM classifier": minilm_classifier,
    "Llama-tiny, tied": llama_tied,
    "Llama-tiny, untied": llama_untied,
    "GPT-2-tiny": gpt2_tiny,
    "SmolLM2-135M": smollm2,
    "T5-tiny": t5_tiny,
    "DINOv2-small": dinov2,
    "Whisper-tiny": whisper,
    "a class of one's own": own_model,
}
