"""Token Recycling: the candidates that each greedy step throws away are kept and drafted later.

Luo, Wang, Zhu, Zhang, Zhang, Yang, Xu: Turning Trash into Treasure: Accelerating Inference of Large Language Models
with Token Recycling, ACL 2025, arXiv:2408.08696, section 3.

    M[a] = the k most likely tokens the last time token a was read         (vocab, k), kept between requests
    draft: root = the last accepted token; node n = M[ parent(n) ][ rank(n) ], a fixed tree of 80 nodes
    one forward over root and nodes, each seeing the prefix, its ancestors and itself;  y = argmax at each
    accept the root-to-leaf path with most nodes n such that n = y at n's parent, the first of equals
    M[read token] = top k of its logits, accepted or not;  next root = y at the last accepted node

The output is that of plain greedy decoding, token for token, in float32; in half precision another batch shape can turn
a near tie. No training, no draft model. Gains need text that repeats itself.

    generate = TokenRecycling()
    model.generate(**inputs, custom_generate=generate)

Differences from the authors' code: it leaves out the final eos and may go beyond `max_new_tokens` by up to the tree's
depth; here the result ends exactly where `generate` would end. Where a token stands at several nodes its last node's
candidates are kept, on every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_compress.errors import ConfigurationError
from hf_compress.registry import Method

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
        return Tree(**{name: tensor.to(device) for name, tensor in vars(self).items()})


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


def steps(scorer: Scorer, adjacency: Tensor, root: int, tree: Tree) -> Iterator[tuple[list[int], int]]:
    """Endless steps: the tokens that were read and accepted, the root first, and the next root, not read yet."""
    while True:
        ids = draft(adjacency, root, tree)
        logits = scorer.score(ids, tree)
        predictions = logits.argmax(-1)
        nodes = accept(ids, predictions, tree)
        scorer.keep(nodes)
        recycle(adjacency, ids, logits)
        root = int(predictions[nodes[-1]])
        yield ids[nodes].tolist(), root


class CachedModel:
    """A causal LM with its key-value cache as a `Scorer`.

    Args:
        model: any causal LM that takes a 4-D mask, position ids and a dynamic cache.
        prompt: (1, time) ids; all but the last are read here.
    """

    def __init__(self, model: Any, prompt: Tensor) -> None:
        from transformers import DynamicCache

        self.model, self.cache, self.length = model, DynamicCache(config=model.config), 0
        if prompt.shape[1] > 1:
            model(input_ids=prompt[:, :-1], cache=self.cache, use_cache=True)
            self.length = prompt.shape[1] - 1

    def score(self, ids: Tensor, tree: Tree) -> Tensor:
        prefix = torch.ones(len(ids), self.length, dtype=torch.bool, device=ids.device)
        sees = torch.cat([prefix, tree.sees], 1)[None, None]
        mask = torch.zeros(sees.shape, dtype=self.model.dtype, device=ids.device)
        output = self.model(
            input_ids=ids[None],
            attention_mask=mask.masked_fill(~sees, torch.finfo(mask.dtype).min),
            position_ids=(self.length + tree.depths)[None],
            cache=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[0]
        return logits

    def keep(self, nodes: Tensor) -> None:
        kept = torch.cat([torch.arange(self.length, device=nodes.device), self.length + nodes])
        for layer in self.cache.layers:
            layer.keys = layer.keys[:, :, kept]
            layer.values = layer.values[:, :, kept]
        self.length += len(nodes)


class TokenRecycling:
    """What `generate(custom_generate=…)` calls; keeps its adjacency matrix between calls.

    Args:
        candidates: k, columns of the matrix; at least the largest rank of the tree plus one.
        paths: the tree's nodes.

    Attributes:
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
            ConfigurationError: for more than one row, sampling, beams, padding or logits processors.
        """
        _check(input_ids, logits_processor, generation_config, kwargs)
        tree, device = self.tree.to(input_ids.device), input_ids.device
        if self.adjacency is None or len(self.adjacency) != model.config.get_text_config().vocab_size:
            size = model.config.get_text_config().vocab_size
            self.adjacency = torch.zeros(size, self.candidates, dtype=torch.long)
        self.adjacency = self.adjacency.to(device)
        self.forwards = self.accepted = 0
        sequence = input_ids
        scorer = CachedModel(model, input_ids)
        if any(getattr(layer, "is_sliding", False) for layer in scorer.cache.layers):
            raise ConfigurationError(
                "token_recycling: a model with sliding-window attention keeps no whole cache to choose from. Leave "
                "custom_generate out."
            )
        for read, root in steps(scorer, self.adjacency, int(input_ids[0, -1]), tree):
            self.forwards += 1
            for token in [*read[1:], root]:
                sequence = torch.cat([sequence, torch.tensor([[token]], device=device)], 1)
                self.accepted += 1
                if bool(stopping_criteria(sequence, None).all()):
                    return sequence
        raise AssertionError("steps are endless")


def _check(input_ids: Tensor, logits_processor: Any, generation_config: Any, kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if len(input_ids) != 1 or (mask is not None and not bool(mask.bool().all())):
        raise ConfigurationError(f"token_recycling: one row without padding at a time, got {tuple(input_ids.shape)}.")
    if generation_config.do_sample or generation_config.num_beams not in (None, 1) or len(logits_processor or ()):
        raise ConfigurationError(
            "token_recycling: greedy decoding only, without logits processors. Pass do_sample=False, num_beams=1 and "
            "no penalties, or leave custom_generate out."
        )


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
