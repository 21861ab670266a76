"""A child of test_secrets.py: a whole compression by a careless user, and everything that goes wrong in it.

Its working folder holds a `.env`; tokens are in the environment, in the TrainingArguments and in addresses. What is
logged at DEBUG by anybody goes to standard error, each error with its whole traceback into `errors/`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import torch
import transformers
from hf_compress_cards import card
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_compress import DistillCallback, cli, facts, hub, licences, shrink
from hf_compress.onnx import export_onnx
from hf_compress.recipe import Recipe, validated

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
for library in (transformers, datasets, huggingface_hub):
    library.utils.logging.set_verbosity_debug()
socket.gethostname = lambda: os.environ["CANARY_HOST"]

TOKEN, PASSWORD, HUB = (os.environ[name] for name in ("CANARY_ARGUMENT", "CANARY_PASSWORD", "HF_ENDPOINT"))
ADDRESS = HUB.replace("://", f"://me:{PASSWORD}@")
STUDENT = Path("student")


def trainer(output: str, rows: int = 8, **settings: Any) -> Trainer:
    teacher = AutoModelForSequenceClassification.from_pretrained("me/big")
    tokenizer = AutoTokenizer.from_pretrained("me/big")
    texts = tokenizer(["the film was good", "the book was bad"] * (rows // 2))
    data = datasets.Dataset.from_dict(dict(texts) | {"labels": [1, 0] * (rows // 2)})
    arguments = TrainingArguments(
        output, hub_token=TOKEN, max_steps=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=1,
        logging_steps=1, report_to=[], use_cpu=True,
    )  # fmt: skip
    student = shrink(teacher, layers=2)
    callback = DistillCallback("me/big", **settings)
    return Trainer(model=student, processing_class=tokenizer, args=arguments, train_dataset=data, callbacks=[callback])


def compress() -> None:
    run = trainer("out", data="sentences")
    run.train()
    run.save_model(str(STUDENT))
    run.processing_class.save_pretrained(STUDENT)
    print("the arguments:", run.args)
    export_onnx(STUDENT)
    licences.state(STUDENT, "mit")
    card.write(STUDENT, repo_id="me/small")
    print(hub.push(STUDENT, "me/small").describe())


def no_number() -> None:
    run = trainer("nan", data="sentences")
    with torch.no_grad():
        run.model.classifier.weight.fill_(float("nan"))
    run.train()


def token_as_a_name() -> None:
    trainer("named", data=f"rows of {TOKEN}").train()


def uploaded_arguments() -> None:
    run = trainer("uploaded", data="sentences")
    run.args.push_to_hub, run.args.hub_strategy = True, HubStrategy.END
    (callback,) = [each for each in run.callback_handler.callbacks if isinstance(each, DistillCallback)]
    callback.attach(run)


def pushed(**settings: Any) -> Callable[[], object]:
    return lambda: hub.push(STUDENT, "me/other", **settings)


def with_token_in_a_card() -> None:
    before = (STUDENT / "README.md").read_text()
    (STUDENT / "README.md").write_text(f"{before}\nexport HF_TOKEN={TOKEN}\n")
    try:
        hub.push(STUDENT, "me/other")
    finally:
        (STUDENT / "README.md").write_text(before)


def command(*arguments: str) -> Callable[[], object]:
    def run() -> None:
        sys.argv = ["hf-compress", *arguments]
        os.environ["HF_COMPRESS_DEBUG"] = "1"
        cli.main()

    return run


RECIPE = {"task": "text-classification", "teacher": "me/big", "data": {"train": "rows.csv"}, "student": {"layers": 2}}
FAILING: dict[str, Callable[[], object]] = {
    "a NaN": no_number,
    "a token as a name": token_as_a_name,
    "arguments that would be uploaded": uploaded_arguments,
    "an unknown token": pushed(token=TOKEN),
    "an address with a password": pushed(endpoint=ADDRESS),
    "a hub that repeats the token": pushed(),
    "a hub that is gone": pushed(endpoint="http://127.0.0.1:9", token=TOKEN),
    "a token in a card": with_token_in_a_card,
    "a token in a recipe": lambda: validated(Recipe, RECIPE | {"token": TOKEN}, "recipe.yaml"),
    "a token as a number": lambda: validated(Recipe, RECIPE | {"seed": TOKEN}, "recipe.yaml"),
    "a token in a record": lambda: facts.Data(name=f"my {TOKEN}", rows=1, fingerprint="0"),
    "a command with a password": command("push", "student", f"{ADDRESS}/me/other"),
    "a command with an address of no repository": command("push", "student", f"{HUB}/other?token={TOKEN}"),
    "a distill with a password": command(
        "distill", "me/big", "--task", "text-classification", "--data", "rows.csv", "--layers", "2", "--output",
        "distilled", "--push", f"{ADDRESS}/me/other",
    ),
}  # fmt: skip


def main() -> None:
    compress()
    Path("errors").mkdir()
    for name, fail in FAILING.items():
        try:
            fail()
        except (Exception, SystemExit) as error:
            told = [*traceback.format_exception(error), repr(error), str(error), *map(repr, error.args)]
            Path("errors", f"{name}.txt").write_text("\n".join(told), encoding="utf-8")


if __name__ == "__main__":
    main()
