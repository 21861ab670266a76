"""A tree behind a text scored in one forward, and what of it is kept."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from hf_compress import testing
from hf_compress.errors import ConfigurationError
from hf_compress.tree_decoding import CachedModel, check_call, positions


@dataclass
class Fork:
    """A root and two children, the second of which has a child."""

    depths: Tensor
    sees: Tensor


FORK = Fork(
    depths=torch.tensor([0, 1, 1, 2]),
    sees=torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool(),
)


def test_each_node_is_scored_as_the_end_of_its_own_text_and_what_is_kept_goes_on() -> None:
    model = testing.models("text-generation")[0].eval()
    assert isinstance(model, LlamaForCausalLM)
    text, ids = torch.tensor([[5, 6, 7, 8]]), torch.tensor([8, 20, 21, 22])
    with torch.no_grad():
        scorer = CachedModel(model, text)
        scored = scorer.score(ids, FORK)
        for node in range(4):
            path = torch.cat([text[0, :-1], ids[FORK.sees[node]]])
            torch.testing.assert_close(scored[node], model(path[None]).logits[0, -1], rtol=1e-4, atol=1e-4)
        scorer.keep(torch.tensor([0, 2, 3]))
        assert scorer.length == 6
        after = scorer.score(torch.tensor([30, 31, 32, 33]), FORK)[0]
        whole = model(torch.tensor([[5, 6, 7, 8, 21, 22, 30]])).logits[0, -1]
    torch.testing.assert_close(after, whole, rtol=1e-4, atol=1e-4)
    assert positions(model) == model.config.max_position_embeddings


@pytest.mark.parametrize("sampling", [True, False])
def test_sampling_and_processors_are_for_those_that_serve_them(sampling: bool) -> None:
    ids, config = torch.ones(1, 3, dtype=torch.long), GenerationConfig(do_sample=True)
    if sampling:
        check_call("mine", ids, [print], config, {}, sampling=True)
    else:
        with pytest.raises(ConfigurationError, match=r"mine: greedy decoding of one row, got sample\. Pass do_sample"):
            check_call("mine", ids, [], config, {})
    with pytest.raises(ConfigurationError, match=r"got beam_search\. Pass .*num_beams=1"):
        check_call("mine", ids, [], GenerationConfig(num_beams=2), {}, sampling=sampling)
