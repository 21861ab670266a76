"""Token Recycling: the candidates that each greedy step throws away are kept and drafted later.

Luo, Wang, Zhu, Zhang, Zhang, Yang, Xu: Turning Trash into Treasure: Accelerating Inference of Large Language Models
with Token Recycling, ACL 2025, arXiv:2408.08696, section 3.

    M[a] = the k most likely tokens the last time token a was read         (vocab, k), kept between requests
    draft: root = the last accepted token; node n = M[ parent(n) ][ rank(n) ], a fixed tree of 80 nodes
    one forward over root and nodes, each seeing the prefix, its ancestors and itself;  y = argmax at each
    accept the root-to-leaf path with most nodes n such that n = y at n's parent, the first of equals
    M[read token] = top k of its logits, accepted or not;  next root = y at the last accepted node

The output is that of plain greedy decoding, token for token: y is its argmax, the first of equal logits. Where the two
best logits differ by no more than rounding they may turn, because 81 tokens are added up in another order than one: not
seen in float32, common in half precision. Models and settings whose output would differ for another reason are refused.
No training, no draft model. Gains need text that repeats itself.

    generate = TokenRecycling()
    model.generate(**inputs, do_sample=False, custom_generate=generate)

Differences from the authors' code: it leaves out the final eos, may go beyond `max_new_tokens` by up to the tree's
depth and does not recycle the last step; here the result ends exactly where `generate` would end, every step is
recycled, and no node is drafted behind the last position that a model has. Where a token stands at several nodes its
last node's candidates are kept, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_compress.errors import ConfigurationError
from hf_compress.registry import Method
from hf_compress.tree_decoding import CachedModel, check_call, check_model, positions

NAME = "token_recycling"
CANDIDATES = 8
"""k, as in the paper."""

_NODES = (
    "0 1 2 3 4 5 6 7 "
    "00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70 "
    "000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500 "
    "0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000 "
    "00000 00001 00002 00010 00020 00100 01000 10000 "
    "000000 000001 000100"
)
PATHS: tuple[tuple[int, ...], ...] = tuple(tuple(map(int, path)) for path in _NODES.split())
"""The authors' tree "2.2.2": a node is the ranks of the candidates on the way to it."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A draft tree with its root as node 0, nodes by level."""

    parents: Tensor
    """(node,) parent of each; 0 for the root."""
    ranks: Tensor
    """(node,) which candidate of its parent each is; 0 for the root."""
    depths: Tensor
    """(node,) 0 for the root."""
    sees: Tensor
    """(node, node) bool: root, ancestors and itself."""
    paths: Tensor
    """(leaf, depth + 1) nodes from the root to each leaf, -1 behind its end."""

    def to(self, device: torch.device) -> Tree:
        """The tree with its tensors on a device."""
        return Tree(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def cut(self, depth: int) -> Tree:
        """The tree without its nodes below a depth; 0 leaves the root."""
        if depth >= self.paths.shape[1] - 1:
            return self
        count = int((self.depths <= depth).sum())
        return Tree(
            parents=self.parents[:count],
            ranks=self.ranks[:count],
            depths=self.depths[:count],
            sees=self.sees[:count, :count],
            paths=self.paths[:, : depth + 1],
        )


def build_tree(paths: Sequence[Sequence[int]] = PATHS) -> Tree:
    """A tree from the rank paths of its nodes, parents before children, level by level.

    Raises:
        ConfigurationError: if a node's parent is missing or comes later.
    """
    nodes: list[tuple[int, ...]] = [(), *map(tuple, paths)]
    place = {node: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes[1:], 1):
        if place.get(node[:-1], index) >= index or len(node) < len(nodes[index - 1]):
            raise ConfigurationError(f"token_recycling: node {node} must come after its parent, level by level.")
    depth = max(map(len, nodes))
    lines = [[place[node[:length]] for length in range(len(node) + 1)] for node in nodes]
    inner = {node[:-1] for node in nodes[1:]}
    sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for index, line in enumerate(lines):
        sees[index, line] = True
    leaves = [
        line + [-1] * (depth + 1 - len(line)) for node, line in zip(nodes, lines, strict=True) if node not in inner
    ]
    return Tree(
        parents=torch.tensor([place[node[:-1]] for node in nodes]),
        ranks=torch.tensor([node[-1] if node else 0 for node in nodes]),
        depths=torch.tensor([len(node) for node in nodes]),
        sees=sees,
        paths=torch.tensor(leaves),
    )


def draft(adjacency: Tensor, root: int, tree: Tree) -> Tensor:
    """(node,) token ids of the tree grown from a root.

    Args:
        adjacency: (vocab, k) candidates of each token.
        root: the last accepted token.
        tree: its shape.
    """
    ids = torch.full_like(tree.parents, root)
    for depth in range(1, int(tree.depths.max()) + 1):
        level = tree.depths == depth
        ids[level] = adjacency[ids[tree.parents[level]], tree.ranks[level]]
    return ids


def accept(ids: Tensor, predictions: Tensor, tree: Tree) -> Tensor:
    """(accepted,) nodes of the best path, the root first.

    Args:
        ids: (node,) drafted tokens.
        predictions: (node,) the model's next token after each.
        tree: their shape.
    """
    behind = tree.paths[:, 1:] < 0
    right = (ids[tree.paths[:, 1:]] == predictions[tree.paths[:, :-1]]) & ~behind
    reward = right.long().cumprod(-1).sum(-1)
    best = int(reward.argmax())
    return tree.paths[best, : int(reward[best]) + 1]


def recycle(adjacency: Tensor, ids: Tensor, logits: Tensor) -> None:
    """Writes the top k of each read token's logits into its row, in place; of equal tokens the last one's.

    Args:
        adjacency: (vocab, k).
        ids: (node,)
        logits: (node, vocab)
    """
    candidates = logits.topk(adjacency.shape[1], dim=-1).indices
    later = torch.triu(ids[:, None] == ids[None, :], diagonal=1).any(-1)  # a later node has the same token
    adjacency[ids[~later]] = candidates[~later]


class Scorer(Protocol):
    """A model with a committed prefix."""

    def score(self, ids: Tensor, tree: Tree) -> Tensor:
        """(node, vocab) logits of a drafted tree behind the prefix."""

    def keep(self, nodes: Tensor) -> None:
        """Makes those nodes of the tree just scored part of the prefix."""


def step(scorer: Scorer, adjacency: Tensor, root: int, tree: Tree) -> tuple[list[int], int]:
    """One forward: the tokens that were read and accepted, the root first, and the next root, not read yet."""
    ids = draft(adjacency, root, tree)
    logits = scorer.score(ids, tree)
    predictions = logits.argmax(-1)
    nodes = accept(ids, predictions, tree)
    scorer.keep(nodes)
    recycle(adjacency, ids, logits)
    return ids[nodes].tolist(), int(predictions[nodes[-1]])


class TokenRecycling:
    """What `generate(custom_generate=…)` calls; keeps its adjacency matrix between calls, for one vocabulary.

    Args:
        candidates: k, columns of the matrix; at least the largest rank of the tree plus one.
        paths: the tree's nodes.

    Attributes:
        adjacency: (vocab, k) int64, None before the first call.
        forwards: of the last call, its prompt not counted.
        accepted: tokens of the last call that came from them.
    """

    def __init__(self, *, candidates: int = CANDIDATES, paths: Sequence[Sequence[int]] = PATHS) -> None:
        self.tree = build_tree(paths)
        if candidates <= int(self.tree.ranks.max()):
            raise ConfigurationError(
                f"token_recycling: the tree uses rank {int(self.tree.ranks.max())}, so candidates must be above it, "
                f"got {candidates}."
            )
        self.candidates = candidates
        self.adjacency: Tensor | None = None
        self.forwards = self.accepted = 0

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """(1, time) prompt and its greedy continuation.

        Raises:
            ConfigurationError: for more than one row, padding, other inputs than ids, what is not greedy decoding or
                returns more than ids, a model whose attention a tree does not fit, or a matrix of another vocabulary.
        """
        check_model(NAME, model, generation_config.max_length)
        check_call(NAME, input_ids, logits_processor, generation_config, kwargs)
        adjacency, tree = self._matrix(model), self.tree.to(model.device)
        limit = positions(model)
        scorer = CachedModel(model, input_ids.to(model.device))
        self.forwards = self.accepted = 0
        sequence, root = input_ids, int(input_ids[0, -1])
        while True:
            read, root = step(scorer, adjacency, root, tree.cut(max(0, limit - sequence.shape[1])))
            self.forwards += 1
            for token in [*read[1:], root]:
                sequence = torch.cat([sequence, sequence.new_tensor([[token]])], 1)
                self.accepted += 1
                if bool(stopping_criteria(sequence, None).all()):
                    return sequence

    def save(self, path: str | Path) -> None:
        """Writes the matrix to a safetensors file, for other processes and models of the same vocabulary.

        Raises:
            ConfigurationError: before the first call, when there is none.
        """
        if self.adjacency is None:
            raise ConfigurationError(f"token_recycling: no matrix for {path} yet. Generate first.")
        save_file({"adjacency": self.adjacency.cpu()}, path)

    def load(self, path: str | Path) -> None:
        """Goes on from a saved matrix.

        Raises:
            ConfigurationError: if the file is not a matrix of as many candidates.
        """
        try:
            matrix = load_file(path).get("adjacency", torch.empty(0))
        except SafetensorError as error:
            raise ConfigurationError(f"token_recycling: {path} is no safetensors file: {error}.") from error
        fits = matrix.dtype == torch.long and matrix.dim() == 2 and matrix.shape[1] == self.candidates and len(matrix)
        if not fits or int(matrix.min()) < 0 or int(matrix.max()) >= len(matrix):
            raise ConfigurationError(
                f"token_recycling: {path} has to hold `adjacency`, (vocab, {self.candidates}) int64 token ids, "
                f"got {tuple(matrix.shape)} {matrix.dtype}."
            )
        self.adjacency = matrix

    def _matrix(self, model: Any) -> Tensor:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        if self.adjacency is None:
            self.adjacency = torch.zeros(vocab, self.candidates, dtype=torch.long)
        if len(self.adjacency) != vocab or vocab < self.candidates:
            raise ConfigurationError(
                f"token_recycling: a matrix of {len(self.adjacency)} tokens and {self.candidates} candidates does not "
                f"fit a model of {vocab} tokens. Use one TokenRecycling for each vocabulary."
            )
        self.adjacency = self.adjacency.to(model.device)
        return self.adjacency


METHOD = Method(
    title="Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    paper="arXiv:2408.08696",
    authors="Xianzhen Luo, Yixuan Wang, Qingfu Zhu, Zhiming Zhang, Xuanyu Zhang, Qing Yang, Dongliang Xu",
    year=2025,
    summary="Drafts from the candidates of earlier steps: greedy output, fewer forward passes, no training.",
    bibtex="""@inproceedings{luo2025turning,
  title = {Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling},
  author = {Luo, Xianzhen and Wang, Yixuan and Zhu, Qingfu and Zhang, Zhiming and Zhang, Xuanyu and Yang, Qing and
            Xu, Dongliang},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2025}, eprint = {2408.08696}, archivePrefix = {arXiv}
}""",
    tasks=("text-generation",),
    generation=TokenRecycling,
)
