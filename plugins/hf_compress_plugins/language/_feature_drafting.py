"""Trees of tokens drafted by a model that goes on from features of its own making."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_compress.tree_decoding import additive


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Drafted tokens behind the last token of a text, which is node 0; parents stand before their children."""

    ids: Tensor
    """(node,)"""
    parents: Tensor
    """(node,) 0 for the root too."""
    depths: Tensor
    """(node,) 0 for the root."""
    sees: Tensor
    """(node, node) bool: root, ancestors and itself."""

    def child(self, node: int, token: int) -> int | None:
        """The node of that token behind another node; None: it was not drafted there."""
        found = ((self.parents == node) & (self.ids == token))[1:].nonzero()
        return int(found[0]) + 1 if len(found) else None


def best(scores: Tensor, count: int) -> Tensor:
    """(kept,) places of the highest scores, in order of place.

    Args:
        scores: (candidate,) cumulative log-probabilities: none is above its parent's, and parents come first. So of
            equals the first are kept, and with each its ancestors.
        count: at most so many.
    """
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def assemble(root: int, ids: Tensor, parents: Tensor, kept: Tensor) -> Draft:
    """The tree of the candidates that were kept.

    Args:
        root: last token of the text.
        ids: (candidate,) tokens.
        parents: (candidate,) places of their parents, -1 for the root.
        kept: (node,) places, ancestors among them, ascending.
    """
    place = {-1: 0} | {old: new for new, old in enumerate(kept.tolist(), 1)}
    above = [0, *(place[parent] for parent in parents[kept].tolist())]
    depths, sees = [0] * len(above), torch.eye(len(above), dtype=torch.bool)
    for node in range(1, len(above)):
        depths[node] = depths[above[node]] + 1
        sees[node] |= sees[above[node]]
    first = torch.full_like(ids[:1], root) if len(ids) else torch.tensor([root], device=ids.device)
    return Draft(
        ids=torch.cat([first, ids[kept]]),
        parents=torch.tensor(above, device=ids.device),
        depths=torch.tensor(depths, device=ids.device),
        sees=sees.to(ids.device),
    )


class FeatureDrafter:
    """A drafter with the text that it has read so far.

    Args:
        model: from (tokens, features of the tokens before) to `predict`, which its `lm_head` makes logits of, and
            `regress`, the features for the next step.
    """

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model, self.cache, self.length = model, DynamicCache(config=model.config), 0
        self._last: tuple[Tensor, Tensor] | None = None

    def read(self, features: Tensor, ids: Tensor) -> None:
        """Goes on in the text.

        Args:
            features: (token, width) of the target, each of the token before.
            ids: (token,)
        """
        output = self.model(input_ids=ids[None], hidden_states=features[None], cache=self.cache)
        self.length += len(ids)
        self._last = output.predict[0, -1:], output.regress[0, -1:]

    def draft(self, root: int, *, levels: int, top_k: int, nodes: int, device: torch.device) -> Draft:
        """A tree behind the last token read, grown where it is likeliest.

        Each level expands the `top_k` likeliest tokens of the one before into `top_k` tokens each, by the product of
        the drafted probabilities from the root on; of all of them the likeliest stay.

        Args:
            root: the last token read.
            levels: longest path behind the root; 0, or nothing read: the root alone.
            top_k: tokens.
            nodes: of the tree, the root among them.
            device: of the tree.
        """
        ids, parents, scores = ([torch.empty(0, dtype=kind, device=device)] for kind in (torch.long, torch.long, None))
        if self._last is None or levels < 1:
            return assemble(root, ids[0], parents[0], parents[0])
        predict, regress = self._last
        above, so_far = torch.full((1,), -1, device=device), torch.zeros(1, device=device)
        sees = torch.zeros(1, 0, dtype=torch.bool, device=device)
        for level in range(levels):
            log_q = self.model.lm_head(predict).float().log_softmax(-1)
            top = log_q.topk(min(top_k, log_q.shape[-1]))
            reached = (so_far[:, None] + top.values).flatten()
            start = sum(map(len, ids))
            ids.append(top.indices.flatten())
            parents.append(above.repeat_interleave(top.values.shape[1]))
            scores.append(reached)
            if level == levels - 1:
                break
            chosen = reached.topk(min(top_k, len(reached))).indices
            row = chosen // top.values.shape[1]
            sees = torch.cat([sees[row], torch.eye(len(row), dtype=torch.bool, device=device)], 1)
            predict, regress = self._step(regress[row], ids[-1][chosen], sees, self.length + level)
            above, so_far = start + chosen, reached[chosen]
        self.cache.crop(min(self.length - self.cache.get_seq_length(), 0))
        kept = best(torch.cat(scores), nodes - 1)
        return assemble(root, torch.cat(ids), torch.cat(parents), kept)

    def _step(self, features: Tensor, ids: Tensor, sees: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """`predict` and `regress`, (node, width), of one level; the cache holds its nodes until it is cropped."""
        text = torch.ones(len(ids), self.length, dtype=torch.bool, device=ids.device)
        output = self.model(
            input_ids=ids[None],
            hidden_states=features[None],
            attention_mask=additive(torch.cat([text, sees], 1), features.dtype),
            position_ids=torch.full_like(ids, position)[None],
            cache=self.cache,
        )
        return output.predict[0], output.regress[0]
