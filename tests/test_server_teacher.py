"""A model behind a server as teacher: by token ids, over a real connection on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from stub import GradientKeeper
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError, TeacherError
from hf_compress.facts import Model
from hf_compress.teachers.endpoint import Endpoint
from hf_compress.teachers.server import ServerTeacher

TASK = "text-generation"
Change = Callable[[dict[str, Any]], None]


@contextmanager
def served(model: nn.Module, change: Change | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A completions endpoint that answers as vLLM does, and the requests that it had."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            requests.append(body)
            with torch.no_grad():
                logits = model(torch.tensor([body["prompt"]])).logits[0].log_softmax(-1)
            values, ids = logits.topk(body["prompt_logprobs"], -1)
            rows: list[dict[str, Any]] = []
            for place in range(len(logits)):
                pairs = zip(ids[place].tolist(), values[place].tolist(), strict=True)
                row = {str(token): {"logprob": value, "decoded_token": "x"} for token, value in pairs}
                if place + 1 < len(logits):  # the prompt's own token is always among them
                    own = body["prompt"][place + 1]
                    row[str(own)] = {"logprob": float(logits[place, own]), "decoded_token": "x"}
                rows.append(row)
            last = {f"token_id:{token}": about["logprob"] for token, about in rows[-1].items()}
            choice = {"prompt_logprobs": [None, *rows[:-1]], "logprobs": {"top_logprobs": [last]}, "text": "x"}
            if change is not None:
                change(choice)
            data = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def trainer(folder: Path, teacher: Any, method: Any = "kd", memory: Any = "auto") -> tuple[Trainer, GradientKeeper]:
    keeper = GradientKeeper()
    made = Trainer(
        model=testing.models(TASK)[0],
        args=TrainingArguments(
            str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_steps=1, max_grad_norm=0.0,
        ),
        train_dataset=testing.rows(TASK, 4),  # type: ignore[arg-type]  # map-style
        data_collator=testing.collate,
        callbacks=[DistillCallback(teacher, method, memory=memory), keeper],
    )  # fmt: skip
    return made, keeper


def teacher_at(url: str, **settings: Any) -> ServerTeacher:
    return ServerTeacher(Endpoint(url=url, model="big", retries=0), **({"vocab": testing.VOCAB} | settings))


@pytest.mark.parametrize("memory", ["dense", "chunked"])
def test_it_teaches_what_the_model_teaches(memory: str, tmp_path: Path) -> None:
    plain, expected = trainer(tmp_path, testing.models(TASK)[1])
    plain.train()
    with served(testing.models(TASK)[1]) as (url, requests):
        made, found = trainer(tmp_path, teacher_at(url, top_k=testing.VOCAB), memory=memory)
        made.train()
    assert toys.logged(made, "distill_loss") == pytest.approx(toys.logged(plain, "distill_loss"), rel=1e-4)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=1e-5, msg=name)
    assert sorted(len(request["prompt"]) for request in requests) == sorted(testing.LENGTHS)
    assert made.model.config.compression["teacher"]["name"] == "big"


def test_the_likeliest_and_the_text_s_own_tokens_are_used() -> None:
    model = testing.models(TASK)[1]
    batch = testing.collate(testing.rows(TASK, 4))
    with served(model) as (url, _):
        _, logits = teacher_at(url, top_k=4).apart(batch)
    whole = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    index = torch.tensor([0, 13, 27])  # of rows of 12: the first, second and third text
    assert logits is not None
    found = logits.rows(index, torch.zeros(3, testing.VOCAB))
    for row, place in zip(found, index.tolist(), strict=True):
        text, time = divmod(place, 12)
        own = int(batch["input_ids"][text, time + 1])
        known = {*whole[text, time].topk(4).indices.tolist(), own}
        torch.testing.assert_close(row[list(known)], whole[text, time][list(known)], rtol=1e-4, atol=1e-4)
        assert row.exp().sum() == pytest.approx(1.0, abs=1e-4)


def _without(choice: dict[str, Any]) -> None:
    del choice["prompt_logprobs"]


def _texts(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [None, *({f"t{k}": v for k, v in row.items()} for row in choice["prompt_logprobs"][1:])]


def _strange(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][1]["9999"] = {"logprob": -1.0}


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (_without, TeacherError, "gives no prompt_logprobs.*returns text alone.*vLLM"),
        (_texts, TeacherError, "names tokens by their text"),
        (_strange, MismatchError, "names token 9999, the student has 60"),
    ],
)
def test_a_server_that_does_not_name_ids_is_refused(
    change: Change, error: type[Exception], told: str, tmp_path: Path
) -> None:
    with served(testing.models(TASK)[1], change) as (url, _):
        made, _ = trainer(tmp_path, teacher_at(url))
        with pytest.raises(error, match=told):
            made.train()


def test_a_server_that_is_gone_stops_the_run_before_any_weight_changes(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, teacher_at("http://127.0.0.1:9/v1"))
    before = testing.weights_hash(testing.models(TASK)[0])
    with pytest.raises(TeacherError, match="did not answer after 1 tries"):
        made.train()
    next(one for one in made.callback_handler.callbacks if isinstance(one, DistillCallback)).detach()
    assert testing.weights_hash(made.model) == before


def test_what_a_server_cannot_give_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gives no \['hidden"):
        teacher_at("http://127.0.0.1:9/v1").prepare(frozenset({"hidden:1", "logits"}), torch.device("cpu"))
    with pytest.raises(ConfigurationError, match="must be above 0"):
        teacher_at("http://127.0.0.1:9/v1", top_k=0)
    with pytest.raises(MismatchError, match="vocabulary"):
        trainer(tmp_path, teacher_at("http://127.0.0.1:9/v1", vocab=61))


def test_the_record_holds_a_hub_id_and_never_a_path() -> None:
    for model, name in (("me/big", "me/big"), ("/srv/models/big", None), ("./big model", None)):
        assert ServerTeacher(Endpoint(url="http://127.0.0.1:9/v1", model=model), vocab=9).describe() == Model(
            name=name, architecture="served"
        )


def test_on_policy_batches_can_be_asked_for(tmp_path: Path) -> None:
    class Shifted(toys.Toy):
        """Replaces the tokens of a batch by others."""

        def batch(self, inputs: Any, step: Any) -> Any:
            ids = inputs["input_ids"].clamp(max=testing.VOCAB - 2) + inputs["attention_mask"]
            return inputs | {"input_ids": ids, "labels": ids.masked_fill(inputs["attention_mask"] == 0, -100)}

    with served(testing.models(TASK)[1]) as (url, requests):
        trainer(tmp_path, teacher_at(url), Shifted())[0].train()
    texts = [row["input_ids"] for row in testing.rows(TASK, 4)]
    assert len(requests) == 4
    assert all(request["prompt"] not in texts for request in requests)
