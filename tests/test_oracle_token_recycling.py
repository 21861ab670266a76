"""Token Recycling's tree, drafts and whole loop against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.decoding.token_recycling import PATHS, Tree, accept, build_tree, draft, recycle, step
from torch import Tensor

TREE = build_tree()


class Table:
    """Logits at a node: E1 of its token plus E2 of the token before it on its path."""

    def __init__(self, prompt: list[int]) -> None:
        data = oracle.load("token_recycling")
        self.own, self.before, self.last = data["E1"], data["E2"], prompt[-2]

    def score(self, ids: Tensor, tree: Tree) -> Tensor:
        self.ids = ids
        before = ids[tree.parents].clone()
        before[0] = self.last
        return self.own[ids] + self.before[before]

    def keep(self, nodes: Tensor) -> None:
        self.last = int(self.ids[nodes[-1]])


def test_the_tree() -> None:
    data = oracle.load("token_recycling")
    assert [list(path) for path in PATHS] == oracle.metadata("token_recycling")["tree_template"]
    assert torch.equal(TREE.sees.int(), data["tree.attention"].int())
    assert torch.equal(TREE.depths, data["tree.position_ids"])
    assert torch.equal(TREE.parents[1:], data["tree.father_index"][1:])
    assert data["tree.father_index"][0] == -1  # of the root, which has none
    assert torch.equal(TREE.ranks[1:], data["tree.candidate_index"][1:])
    assert data["tree.candidate_index"][0] == -1
    starts = [int((TREE.depths == depth).nonzero()[0]) for depth in range(1, 7)] + [len(TREE.depths)]
    assert starts == data["tree.level_starts"].tolist()
    assert sorted(map(tuple, TREE.paths.tolist())) == sorted(map(tuple, data["tree.search_path"].tolist()))


def test_a_draft() -> None:
    data = oracle.load("token_recycling")
    assert torch.equal(draft(data["bfs.adjacency"], 4, TREE), data["bfs.draft_ids"])


def loop(adjacency: Tensor) -> tuple[list[int], list[int], Tensor]:
    """Sequence, accepted tokens of each step, and the matrix: theirs stops before it recycles the last step."""
    about = oracle.metadata("token_recycling")
    prompt, limit = about["prompt"], int(about["max_new_tokens"])
    sequence, lengths, before = list(prompt[:-1]), list[int](), adjacency.clone()
    table, root = Table(prompt), prompt[-1]
    while len(sequence) - len(prompt) <= limit:
        before = adjacency.clone()
        read, root = step(table, adjacency, root, TREE)
        sequence += read
        lengths.append(len(read))
    return sequence, lengths, before


@pytest.mark.parametrize("round_", [0, 1])
def test_the_loop(round_: int) -> None:
    """Round 1 starts with the matrix that round 0 left."""
    data, adjacency = oracle.load("token_recycling"), torch.zeros(32, 8, dtype=torch.long)
    for _ in range(round_):
        adjacency = loop(adjacency)[2]
    sequence, lengths, after = loop(adjacency)
    assert sequence == data[f"round{round_}.sequence"].tolist()
    assert lengths == data[f"round{round_}.accept_lengths"].tolist()
    assert torch.equal(after, data[f"round{round_}.adjacency_after"])


def test_acceptance_and_recycling_are_what_the_loop_calls() -> None:
    ids = torch.zeros(len(TREE.parents), dtype=torch.long)
    assert accept(ids, torch.ones_like(ids), TREE).tolist() == [0]
    adjacency = torch.zeros(3, 2, dtype=torch.long)
    recycle(adjacency, torch.tensor([1, 1]), torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]))
    assert adjacency.tolist() == [[0, 0], [2, 1], [0, 0]]
