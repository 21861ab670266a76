"""A causal language model on a server as teacher: the likeliest tokens of each position, by their ids.

vLLM's OpenAI-compatible server gives them as `prompt_logprobs`: for each token of the prompt a mapping from token id to
its log-probability over the whole vocabulary, given the tokens before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hf_compress import facts
from hf_compress.errors import ConfigurationError, MismatchError, TeacherError
from hf_compress.heads import Logits
from hf_compress.objective import Inputs, Sizes, tokens
from hf_compress.teachers.endpoint import Endpoint
from hf_compress.teachers.model import hub_name
from hf_compress.teachers.sparse import Sparse

Row = list[tuple[int, float]]
"""Token ids and log-probabilities of one position."""


class ServerTeacher:
    """Targets of a model that a server runs; for causal students with the same token ids.

    ```python
    DistillCallback(ServerTeacher(Endpoint(url="http://127.0.0.1:8000/v1", model="big"), vocab=32000))
    ```

    A student's tokens go to the server as ids, one request a row. Answers are not kept: fill a `CacheTeacher` from a
    model, or train one epoch.

    Args:
        endpoint: the server, e.g. of `vllm serve MODEL --max-logprobs 64`.
        vocab: size of the student's logits.
        top_k: likeliest tokens asked for.
        workers: requests at a time.

    Raises:
        ConfigurationError: for sizes below 1.
    """

    columns: frozenset[str] = frozenset()
    fixed = False

    def __init__(self, endpoint: Endpoint, *, vocab: int, top_k: int = 20, workers: int = 4) -> None:
        if min(vocab, top_k, workers) < 1:
            raise ConfigurationError(f"ServerTeacher: vocab, top_k and workers must be above 0, got {vocab}, {top_k}.")
        self.endpoint, self.top_k, self.workers = endpoint, top_k, workers
        self.sizes = Sizes(kind="causal", layers=0, width=0, heads=0, vocab=vocab, config=None)
        self._device = torch.device("cpu")

    def prepare(self, taps: frozenset[str], device: torch.device, until: str | None = None) -> None:
        if other := sorted(taps - {"logits"}):
            raise ConfigurationError(f"ServerTeacher: a server gives no {other}; use methods on logits.")
        self._device = device

    def __call__(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Zeros in the shape of logits, for a dry forward; `apart` asks the server."""
        return {"logits": torch.zeros(*inputs["input_ids"].shape, self.sizes.vocab, device=self._device)}

    def apart(self, inputs: Inputs) -> tuple[Mapping[str, Tensor], Logits | None]:
        """The likeliest tokens after each real token of a batch.

        Raises:
            TeacherError: if the server cannot be asked, or its answers hold no token ids.
            MismatchError: for an id that the student does not have.
        """
        ids, mask = inputs["input_ids"], tokens(inputs)
        texts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        with ThreadPoolExecutor(self.workers) as pool:
            found = [row for rows in pool.map(self._ask, texts) for row in rows]
        most = max((len(row) for row in found), default=1)
        chosen = torch.full((len(found), most), -1, dtype=torch.long)
        known = torch.zeros(len(found), most)
        for number, row in enumerate(found):
            for rank, (token, value) in enumerate(row):
                chosen[number, rank], known[number, rank] = token, value
        if len(found) and int(chosen.max()) >= self.sizes.vocab:
            raise MismatchError(
                f"the server names token {int(chosen.max())}, the student has {self.sizes.vocab}. Use a teacher with "
                "the student's tokenizer, or a method of the tokenizers family."
            )
        return {}, Sparse(chosen.to(self._device), known.to(self._device), mask.to(self._device))

    def _ask(self, ids: Sequence[int]) -> list[Row]:
        """A row for each token: what is likely after it."""
        if not ids:
            return []
        body = {
            "model": self.endpoint.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.top_k,
            "logprobs": self.top_k,
            "return_tokens_as_token_ids": True,
        }
        reply = self.endpoint.post("completions", body)
        try:
            choice = reply.json()["choices"][0]
            listed = choice.get("prompt_logprobs")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise TeacherError(
                f"the teacher's server sent no completion: {self.endpoint.shown(reply.text)}."
            ) from error
        if not isinstance(listed, list) or len(listed) != len(ids):
            raise TeacherError(
                "the teacher's server gives no prompt_logprobs, or not one for each token: a server that returns text "
                "alone cannot be told which of its tokens are meant. Serve the model with vLLM (--max-logprobs "
                f"{self.top_k}), or cache it: hf-compress cache."
            )
        return [*(self._row(entry) for entry in listed[1:]), self._last(choice)]

    def _row(self, entry: Any) -> Row:
        """One position, its keys token ids."""
        try:
            row = [(int(token), float(about["logprob"])) for token, about in entry.items()]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise TeacherError(
                "the teacher's server names tokens by their text, which several tokens may share. Serve the model with "
                "vLLM, which names them by id."
            ) from error
        return row

    def _last(self, choice: Mapping[str, Any]) -> Row:
        """What is likely after the last token; nothing scores it in a causal model, so it may be missing."""
        try:
            first = choice["logprobs"]["top_logprobs"][0]
            return [(int(token.removeprefix("token_id:")), float(value)) for token, value in first.items()]
        except (ValueError, LookupError, TypeError, AttributeError):
            return [(0, 0.0)]

    def holds(self, inputs: Inputs) -> bool:
        """Any batch can be asked for."""
        return True

    def prefetch(self, batches: Sequence[Inputs]) -> None:
        """Nothing is fetched ahead."""

    def epoch_began(self, epoch: int) -> None:
        """Nothing changes with an epoch."""

    def flush(self) -> None:
        """Nothing is kept."""

    def run(self, *, grad: bool = False, **inputs: Any) -> Any:
        raise ConfigurationError("ServerTeacher: a method that calls the teacher itself needs the model.")

    def describe(self) -> facts.Model:
        return facts.Model(name=hub_name(self.endpoint.model), architecture="served")

    def close(self) -> None:
        """Nothing was taken."""
