"""StochasTok's claim: a model trained on randomly split tokens knows the letters inside its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from string import ascii_lowercase

import numpy as np
import torch
from hf_compress_plugins.tokenizers.stochastok import StochasTokConfig, byte_vocabulary, stochastok
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import Claim
from . import _characters as characters

MERGES, LENGTH, STEPS = 800, 64, 600
FEWEST = 80
"""Tokens that must have a letter, and lack it, for it to be probed."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + MERGES + 1
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([characters.text()[: -characters.HELD_OUT]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@cache
def rows(*, held_out: bool = False) -> list[dict[str, list[int]]]:
    """Rows of `LENGTH` tokens as the tokenizer makes them."""
    text = characters.text()
    part = text[-characters.HELD_OUT :] if held_out else text[: -characters.HELD_OUT]
    ids = tokenizer()(part)["input_ids"]
    cut = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return [{"input_ids": row, "labels": row} for row in cut]


def model(seed: int) -> LlamaForCausalLM:
    """Four layers of width 128; one matrix for tokens in and out, as the authors have it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer()),
                hidden_size=128,
                intermediate_size=330,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
            )
        )


def bits_per_byte(trained: LlamaForCausalLM) -> float:
    """On held-out text with its tokens whole: bits of all predicted tokens by the bytes that they spell."""
    sizes = torch.ones(len(tokenizer()))
    for token, index in byte_vocabulary(tokenizer()).items():
        sizes[index] = len(token)
    nats, spelt, data = 0.0, 0.0, rows(held_out=True)
    for start in range(0, len(data), 64):
        ids = torch.tensor([row["input_ids"] for row in data[start : start + 64]])
        log_p = trained(input_ids=ids).logits[:, :-1].log_softmax(-1)
        nats -= float(log_p.gather(-1, ids[:, 1:, None]).sum())
        spelt += float(sizes[ids[:, 1:]].sum())
    return nats / spelt / float(np.log(2))


def probes(features: torch.Tensor, tokens: Sequence[str], seed: int) -> dict[str, float]:
    """Balanced accuracy of logistic regressions in five folds of the tokens: their letters (mean), their length."""
    short = float(np.median([len(token) for token in tokens]))
    targets = {letter: np.array([letter in token for token in tokens]) for letter in ascii_lowercase}
    common = [t for t in targets.values() if FEWEST <= t.sum() <= len(tokens) - FEWEST]
    inputs = torch.nn.functional.layer_norm(features, features.shape[-1:]).numpy()

    def accuracy(target: np.ndarray) -> float:
        order = np.random.default_rng(seed).permutation(len(target))
        probe = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500)
        return float(cross_val_score(probe, inputs[order], target[order], scoring="balanced_accuracy").mean())

    return {
        "letters": float(np.mean([accuracy(target) for target in common])),
        "length": accuracy(np.array([len(token) > short for token in tokens])),
    }


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One model from one start on rows that are the tokenizer's, or expanded anew in each epoch."""
    if variant == "plain":
        trained = characters.train(model(seed), steps=STEPS, seed=seed, learning_rate=2e-3, data=rows())
    else:
        config = StochasTokConfig(p=float(variant.rpartition("=")[2]))
        data = stochastok(rows(), tokenizer=tokenizer(), config=config, seed=seed, max_length=LENGTH)
        trained = characters.train(
            model(seed), steps=STEPS, seed=seed, learning_rate=2e-3, data=data, callbacks=[data.callback()]
        )
    trained.eval()
    known = {index: token for token, index in byte_vocabulary(tokenizer()).items() if len(token) > 1}
    ids, tokens = list(known), [token.decode(errors="replace").lower() for token in known.values()]
    with torch.no_grad():
        embedded = trained.get_input_embeddings()(torch.tensor(ids))
        hidden = trained.base_model(input_ids=torch.tensor(ids)[:, None]).last_hidden_state[:, 0]
        found = {"bits per byte, whole tokens": bits_per_byte(trained)}
    for name, features in (("embedding", embedded), ("last state", hidden)):
        measured = probes(features, tokens, seed)
        found |= {f"{what} from the {name}, balanced accuracy": value for what, value in measured.items()}
    return found


CLAIM = Claim(
    published="Large gains on games about the letters of words after fine-tuning, at no loss on standard benchmarks; "
    "multi-digit addition is learnt where the plain tokenizer's model fails (figures only as plots).",
    check=f"Python's help texts, byte-level BPE with {MERGES} merges. 4 layers of width 128, {STEPS} steps of 24 rows "
    f"of {LENGTH} tokens, the expanded rows cut to {LENGTH} too. Then logistic regressions on the frozen vector of "
    "each token of two bytes or more, five folds of the tokens: does it contain a letter (mean over the common "
    "letters), is it longer than the median token. Held-out text is read with whole tokens.",
    expected="Letters and length are read from the vectors more often right with p = 0.1 than without, at bits per "
    "byte that are at most slightly higher.",
    variants=("plain", "p=0.1", "p=0.5"),
    run=run,
)
