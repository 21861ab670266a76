"""Token Recycling through `generate`: the tokens of greedy decoding in fewer forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.decoding import token_recycling as module
from hf_compress_plugins.decoding.token_recycling import TokenRecycling, build_tree
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_compress.errors import ConfigurationError
from hf_compress.tree_decoding import check_model

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
        elif kind == "roberta":
            model = RobertaForCausalLM(RobertaConfig(**SIZES, is_decoder=True, type_vocab_size=1))
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
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "roberta"])
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


def test_the_model_is_called_once_a_step_and_once_for_the_prompt_whose_logits_are_not_computed() -> None:
    model, method, read = build("llama"), TokenRecycling(), list[int]()
    model.register_forward_hook(lambda *called: read.append(called[-1].logits.shape[1]))
    greedy(model, prompt(1), max_new_tokens=40, custom_generate=method)
    assert read == [1] + [81] * method.forwards


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model that has learned sentences of a small grammar: each word stands before one of two."""
    model, draw = build("llama", seed=3).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        ids = torch.randint(3, VOCAB, (16, 1), generator=draw)
        for _ in range(23):
            turn = torch.randint(0, 2, (16, 1), generator=draw)
            ids = torch.cat([ids, 3 + (ids[:, -1:] * 5 + turn) % (VOCAB - 3)], 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_output_of_a_trained_model_is_greedy_s(trained: Any) -> None:
    method, forwards = TokenRecycling(), 0
    for seed in range(12):
        ids = prompt(seed, 1 + seed)
        assert torch.equal(
            greedy(trained, ids, max_new_tokens=30, custom_generate=method), greedy(trained, ids, max_new_tokens=30)
        )
        forwards += method.forwards
    assert forwards < 12 * 30 / 1.5


def test_equal_logits_are_resolved_as_greedy_does() -> None:
    model, ids = build("qwen2"), prompt(4)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    head.weight.data[VOCAB // 2 :] = head.weight.data[: VOCAB // 2]
    found = greedy(model, ids, max_new_tokens=40, custom_generate=TokenRecycling())
    assert torch.equal(found, greedy(model, ids, max_new_tokens=40))
    assert int(found[0, ids.shape[1] :].max()) < VOCAB // 2


class Ends(StoppingCriteria):
    """Ends behind a pair of tokens, wherever it stands in a draft."""

    def __init__(self, pair: list[int]) -> None:
        self.pair = pair

    def __call__(self, input_ids: Tensor, scores: Any, **settings: Any) -> Tensor:
        return torch.tensor([row[-2:].tolist() == self.pair for row in input_ids])


@pytest.mark.parametrize("place", [4, 11, 18])
def test_a_stopping_criterion_ends_it_in_the_middle_of_a_draft(place: int) -> None:
    model, ids, method = build("llama"), prompt(1), TokenRecycling()
    plain = greedy(model, ids, max_new_tokens=40, custom_generate=method)  # so that drafts are long
    pair = plain[0, ids.shape[1] + place : ids.shape[1] + place + 2].tolist()
    found = greedy(model, ids, max_new_tokens=40, stopping_criteria=[Ends(pair)], custom_generate=method)
    assert torch.equal(found, greedy(model, ids, max_new_tokens=40, stopping_criteria=[Ends(pair)]))
    assert found[0, -2:].tolist() == pair


def test_a_text_may_reach_the_last_position_of_a_model() -> None:
    model, method = build("gpt2"), TokenRecycling()
    ids = prompt(5, 217)
    for _ in range(2):  # the second time with long drafts
        found = greedy(model, ids, max_new_tokens=40, custom_generate=method)  # 257 tokens, the last is not read
        assert torch.equal(found, greedy(model, ids, max_new_tokens=40))
    with pytest.raises(IndexError):  # as without it
        greedy(model, ids, max_new_tokens=45, custom_generate=method)


def test_rotary_frequencies_that_change_with_the_length_are_refused_where_they_do() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 32, "rope_parameters": rope})).eval()
    ids, method = prompt(0), TokenRecycling()
    for _ in range(2):
        found = greedy(model, ids, max_new_tokens=25, custom_generate=method)
        assert torch.equal(found, greedy(model, ids, max_new_tokens=25))
    with pytest.raises(ConfigurationError, match="behind 32 tokens, and 33"):
        greedy(model, ids, max_new_tokens=26, custom_generate=method)


def test_what_was_kept_does_not_change_the_output() -> None:
    model, ids, method = build("gpt2"), prompt(2), TokenRecycling()
    plain = greedy(model, ids, max_new_tokens=40)
    for seed in range(3):
        method.adjacency = torch.randint(0, VOCAB, (VOCAB, 8), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(greedy(model, ids, max_new_tokens=40, custom_generate=method), plain)


def test_a_saved_matrix_goes_on_in_another_object_and_model(tmp_path: Path) -> None:
    model, ids, method, other = build("llama"), prompt(1), TokenRecycling(), TokenRecycling()
    with pytest.raises(ConfigurationError, match="Generate first"):
        method.save(tmp_path / "matrix.safetensors")
    plain = greedy(model, ids, max_new_tokens=40, custom_generate=method)
    method.save(tmp_path / "matrix.safetensors")
    first = method.forwards
    other.load(tmp_path / "matrix.safetensors")
    assert method.adjacency is not None
    assert other.adjacency is not None
    assert torch.equal(other.adjacency, method.adjacency)
    assert torch.equal(greedy(model, ids, max_new_tokens=40, custom_generate=other), plain)
    assert other.forwards < first
    relative = build("gpt2")
    assert torch.equal(
        greedy(relative, ids, max_new_tokens=9, custom_generate=other), greedy(relative, ids, max_new_tokens=9)
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(VOCAB, 8, dtype=torch.long)},
        {"adjacency": torch.zeros(VOCAB, 7, dtype=torch.long)},
        {"adjacency": torch.zeros(VOCAB, 8)},
        {"adjacency": torch.zeros(0, 8, dtype=torch.long)},
        {"adjacency": torch.full((VOCAB, 8), VOCAB)},
        {"adjacency": torch.full((VOCAB, 8), -1)},
    ],
)
def test_a_file_that_is_no_matrix_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "matrix.safetensors")
    with pytest.raises(ConfigurationError, match="has to hold"):
        TokenRecycling().load(tmp_path / "matrix.safetensors")
    (tmp_path / "matrix.safetensors").write_text("text")
    with pytest.raises(ConfigurationError, match="no safetensors file"):
        TokenRecycling().load(tmp_path / "matrix.safetensors")


def test_a_matrix_of_another_vocabulary_is_refused() -> None:
    method = TokenRecycling()
    method.adjacency = torch.full((7, 8), 6)
    with pytest.raises(ConfigurationError, match=r"7 tokens .* fit a model of 24"):
        greedy(build("llama"), prompt(2), max_new_tokens=20, custom_generate=method)
    assert method.adjacency.tolist() == [[6] * 8] * 7


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (2, {}, "2 rows"),
        (1, {"do_sample": True}, "sample"),
        (1, {"num_beams": 2}, "beam_search"),
        (1, {"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor"),
        (1, {"min_new_tokens": 3, "eos_token_id": 1}, "MinNewTokens"),
        (1, {"return_dict_in_generate": True}, "return_dict_in_generate"),
        (1, {"cache": DynamicCache()}, "cache of your own"),
        (1, {"position_ids": torch.arange(7)[None] + 1}, "position_ids of your own"),
        (1, {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}, "without padding"),
    ],
)
def test_what_is_not_greedy_decoding_of_one_row_is_refused(rows: int, settings: dict[str, Any], message: str) -> None:
    ids = prompt(0).expand(rows, -1)
    with pytest.raises(ConfigurationError, match=f"token_recycling.*{message}"):
        build("llama").generate(ids, max_new_tokens=4, custom_generate=TokenRecycling(), **settings)


def test_embeddings_as_a_prompt_are_refused() -> None:
    model = build("llama")
    with pytest.raises(ConfigurationError, match="besides ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=4, custom_generate=TokenRecycling())


LOCAL = GPTNeoConfig(
    vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
    bos_token_id=2, eos_token_id=None,
)  # fmt: skip
ALIBI = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)
ENCODER = T5Config(
    vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, decoder_start_token_id=0
)  # fmt: skip
RECURRENT = Qwen3NextConfig(
    **SIZES
    | {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 2,
        "moe_intermediate_size": 8,
    }
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), "keep no whole cache"),
        (lambda: GPTNeoForCausalLM(LOCAL), "keep no whole cache"),
        (lambda: Qwen3NextForCausalLM(RECURRENT), "keep no whole cache"),
        (lambda: BloomForCausalLM(ALIBI), "no position_ids"),
        (lambda: FalconForCausalLM(FalconConfig(**SIZES, alibi=True)), "alibi"),
        (lambda: T5ForConditionalGeneration(ENCODER), "has an encoder"),
    ],
)
def test_a_model_that_a_tree_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make().eval().generate(prompt(0), max_new_tokens=4, custom_generate=TokenRecycling())


def test_attention_that_takes_no_tree_is_refused() -> None:
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigurationError, match="set_attn_implementation"):
        check_model("token_recycling", model, 9)


def test_a_tree_out_of_order_or_with_too_many_ranks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="after its parent"):
        build_tree([(0, 1), (0,)])
    with pytest.raises(ConfigurationError, match="candidates must be above"):
        TokenRecycling(candidates=4)


@pytest.mark.parametrize("name", ["draft", "accept", "recycle", "step"])
def test_each_function_is_reached(name: str) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        greedy(build("llama"), prompt(0), max_new_tokens=4, custom_generate=TokenRecycling())
