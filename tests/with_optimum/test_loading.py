"""What is exported here, loaded by Optimum: the same logits and the same tokens, from a folder and from a hub.

Optimum needs transformers 4, so the folders are made in another environment; `ci/optimum` makes both and runs this.
"""

from __future__ import annotations

import os
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from .kinds import (
    BEAMS,
    BOTH,
    EXTERNAL,
    FOLDER,
    GENERATING,
    INLINE,
    LOADERS,
    NEW_TOKENS,
    NOT_PROMPT,
    ROPE_THETA,
    VARIANTS,
)

ort = pytest.importorskip("optimum.onnxruntime")

import transformers  # noqa: E402

TOLERANCE = {"onnx": 1e-4, "onnx_int8": 1e-4}
"""Of outputs; int8 is the same graph on the same kernels."""


@pytest.fixture(scope="session")
def students() -> Path:
    """Where the students lie."""
    if FOLDER not in os.environ:
        pytest.skip(f"{FOLDER} is not set; `ci/optimum` makes the students")
    return Path(os.environ[FOLDER])


@cache
def opened(folder: Path, name: str) -> Any:
    return getattr(ort, LOADERS[name]).from_pretrained(folder)


def tensors(students: Path, name: str, prefix: str) -> dict[str, Tensor]:
    found = load_file(students / f"{name}.safetensors")
    return {key.removeprefix(f"{prefix}."): value for key, value in found.items() if key.startswith(f"{prefix}.")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LOADERS)
def test_outputs_are_the_same(students: Path, name: str, variant: str) -> None:
    found = opened(students / name / variant, name)(**tensors(students, name, "input"))
    expected = tensors(students, name, variant)
    compared = [key for key in found if key in expected]
    assert {"logits", "start_logits", "last_hidden_state"}.intersection(compared)
    for key in compared:
        torch.testing.assert_close(found[key], expected[key], atol=TOLERANCE[variant], rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", GENERATING)
def test_generated_tokens_are_the_same_and_the_cache_is_used(
    students: Path, name: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(students / name / variant, name)
    decoder = getattr(model, "decoder", model)
    forward, widths = decoder.forward, list[int]()

    @wraps(forward)  # `generate` looks at its arguments
    def counted(**inputs: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(decoder, "forward", counted)
    given = tensors(students, name, "input")
    prompt = {key: value for key, value in given.items() if key not in NOT_PROMPT}
    for key, beams in BEAMS.items():
        widths.clear()
        tokens = model.generate(**prompt, do_sample=False, num_beams=beams, max_new_tokens=NEW_TOKENS)
        assert torch.equal(tokens, tensors(students, name, variant)[key])
        assert len(widths) > 2
        assert set(widths[1:]) == {1}


def test_the_tokenizer_and_the_rope_are_read_as_they_were_written(students: Path) -> None:
    folder = students / "llama-tied" / "onnx"
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.rope_theta == ROPE_THETA
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__name__ == "PreTrainedTokenizerFast"
    assert tokenizer.padding_side == "left"
    assert tokenizer(["the film", "the"], padding=True)["attention_mask"] == [[1, 1], [0, 1]]
    assert transformers.AutoImageProcessor.from_pretrained(students / "vit" / "onnx").size["height"] == 32


@pytest.mark.parametrize(("name", "variant"), [(INLINE, "onnx"), (EXTERNAL, "onnx"), (BOTH, "onnx_int8")])
def test_a_hub_serves_them(students: Path, name: str, variant: str) -> None:
    model = ort.ORTModelForSequenceClassification.from_pretrained(name, subfolder=variant)
    assert_outputs(model, students, variant)
    assert Path(model.path).with_name("model.onnx_data").exists() == (name == EXTERNAL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, subfolder=variant)
    assert len(tokenizer("the film").input_ids) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fetched_variant_is_opened_as_a_folder(students: Path, variant: str) -> None:
    folder = snapshot_download(BOTH, allow_patterns=f"{variant}/*")
    assert_outputs(ort.ORTModelForSequenceClassification.from_pretrained(f"{folder}/{variant}"), students, variant)


def test_of_two_variants_on_a_hub_optimum_takes_the_one_that_was_named(students: Path) -> None:
    """It takes the first path that begins with the subfolder; `onnx/` sorts before `onnx_int8/`."""
    model = ort.ORTModelForSequenceClassification.from_pretrained(BOTH, subfolder="onnx")
    assert_outputs(model, students, "onnx")


def assert_outputs(model: Any, students: Path, variant: str) -> None:
    found = model(**tensors(students, "bert-classifier", "input")).logits
    torch.testing.assert_close(found, tensors(students, "bert-classifier", variant)["logits"])


def test_a_pipeline_takes_them(students: Path) -> None:
    folder = students / "llama-tied" / "onnx"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pipe = ort.pipeline("text-generation", model=opened(folder, "llama-tied"), tokenizer=tokenizer)
    (answer,) = pipe("the film was", max_new_tokens=NEW_TOKENS, do_sample=False)
    assert answer["generated_text"].startswith("the film was")
