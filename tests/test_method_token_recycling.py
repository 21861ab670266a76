"""Token Recycling through `generate`: the tokens of greedy decoding in fewer forwards."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.decoding import token_recycling as module
from hf_compress_plugins.decoding.token_recycling import TokenRecycling, build_tree
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_compress.errors import ConfigurationError

VOCAB = 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "eos_token_id": None,
    "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip


def build(kind: str, attention: str = "sdpa", seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            config: Any = GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
                eos_token_id=None, pad_token_id=0, bos_token_id=2,
            )  # fmt: skip
            model: Any = GPT2LMHeadModel(config)
        elif kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
        else:
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.set_attn_implementation(attention)
    return model.eval()


def prompt(seed: int, length: int = 7) -> Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_the_output_is_greedy_s_token_for_token(kind: str, attention: str) -> None:
    model, method = build(kind, attention), TokenRecycling()
    for seed in range(4):
        for length in (1, 7):
            ids = prompt(seed, length)
            plain = greedy(model, ids, max_new_tokens=40)
            assert torch.equal(greedy(model, ids, max_new_tokens=40, custom_generate=method), plain)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 13])
def test_the_limit_is_kept_exactly(limit: int) -> None:
    model, ids = build("llama"), prompt(0)
    found = greedy(model, ids, max_new_tokens=limit, custom_generate=TokenRecycling())
    assert torch.equal(found, greedy(model, ids, max_new_tokens=limit))


def test_an_end_is_kept_and_nothing_follows_it() -> None:
    model = build("llama")
    ids = prompt(3)
    plain = greedy(model, ids, max_new_tokens=40)
    end = int(plain[0, ids.shape[1] + 9])
    found = greedy(model, ids, max_new_tokens=40, eos_token_id=end, custom_generate=TokenRecycling())
    assert torch.equal(found, greedy(model, ids, max_new_tokens=40, eos_token_id=end))
    assert int(found[0, -1]) == end
    assert found.shape[1] <= ids.shape[1] + 10


def test_fewer_forwards_than_tokens_and_still_fewer_with_what_was_kept() -> None:
    model, method = build("llama"), TokenRecycling()
    ids = prompt(1)
    counts = []
    for _ in range(2):
        greedy(model, ids, max_new_tokens=40, custom_generate=method)
        assert method.accepted == 40
        counts.append(method.forwards)
    assert counts[1] < counts[0] < 40
    fresh = TokenRecycling()
    greedy(model, ids, max_new_tokens=40, custom_generate=fresh)
    assert fresh.forwards == counts[0]


def test_the_model_is_called_once_a_step() -> None:
    model, method = build("llama"), TokenRecycling()
    with mock.patch.object(model, "forward", wraps=model.forward) as called:
        greedy(model, prompt(1), max_new_tokens=40, custom_generate=method)
    assert called.call_count == method.forwards + 1  # and the prompt


def test_a_matrix_of_another_vocabulary_is_not_used() -> None:
    method = TokenRecycling()
    method.adjacency = torch.full((7, 8), 6)
    model, ids = build("llama"), prompt(2)
    found = greedy(model, ids, max_new_tokens=20, custom_generate=method)
    assert torch.equal(found, greedy(model, ids, max_new_tokens=20))
    assert method.adjacency.shape == (VOCAB, 8)


@pytest.mark.parametrize(
    ("rows", "settings"),
    [(2, {}), (1, {"do_sample": True}), (1, {"num_beams": 2}), (1, {"repetition_penalty": 1.3})],
)
def test_what_is_not_greedy_decoding_of_one_row_is_refused(rows: int, settings: dict[str, Any]) -> None:
    ids = prompt(0).expand(rows, -1)
    with pytest.raises(ConfigurationError, match="token_recycling"):
        build("llama").generate(ids, max_new_tokens=4, custom_generate=TokenRecycling(), **settings)


def test_padding_and_sliding_windows_are_refused() -> None:
    ids = prompt(0)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ConfigurationError, match="without padding"):
        build("llama").generate(ids, attention_mask=mask, max_new_tokens=4, custom_generate=TokenRecycling())
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    with pytest.raises(ConfigurationError, match="sliding-window"):
        greedy(model, ids, max_new_tokens=4, custom_generate=TokenRecycling())


def test_a_tree_out_of_order_or_with_too_many_ranks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="after its parent"):
        build_tree([(0, 1), (0,)])
    with pytest.raises(ConfigurationError, match="candidates must be above"):
        TokenRecycling(candidates=4)


@pytest.mark.parametrize("name", ["draft", "accept", "recycle", "steps"])
def test_each_function_is_reached(name: str) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        greedy(build("llama"), prompt(0), max_new_tokens=4, custom_generate=TokenRecycling())
