"""Models of sentence-transformers: its trainers are refused, and its transformers are distilled by a plain Trainer.

`ci/trainers` makes an environment with sentence-transformers and runs this.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from stub import arguments
from torch import Tensor
from transformers import BertModel, DataCollatorWithPadding, Trainer

from hf_compress import DistillCallback, shrink
from hf_compress.errors import ConfigurationError
from hf_compress.testing import weights_hash

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.base.modules import Transformer  # noqa: E402
from sentence_transformers.cross_encoder.losses import CrossEntropyLoss  # noqa: E402
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling  # noqa: E402

_DRAW = random.Random(0)
SENTENCES = [" ".join(_DRAW.choices(tiny.WORDS, k=_DRAW.randint(3, 12))) for _ in range(256)]
TRAIN, TEST = SENTENCES[:192], SENTENCES[192:]


@pytest.fixture
def teacher(tmp_path: Path) -> Any:
    """Four layers, mean pooling, unit length."""
    folder = str(tmp_path / "encoder")
    BertModel(tiny.tiny_bert_config(num_hidden_layers=4)).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    body = Transformer(folder)
    return st.SentenceTransformer(modules=[body, Pooling(32, "mean"), Normalize()], device="cpu")


def shrunk(teacher: Any) -> Any:
    """The same modules around half the layers."""
    student = copy.deepcopy(teacher)
    student[0].model = shrink(teacher[0].auto_model, layers=2)
    return student


def distil(student: Any, source: Any, folder: Path, data: Dataset, method: str | None = None) -> None:
    """What the README says to do: the transformer alone, in a plain Trainer."""
    settings = {"max_steps": 120, "per_device_train_batch_size": 16, "optim": "adamw_torch", "learning_rate": 1e-3}
    Trainer(
        model=student[0].auto_model,
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(student.tokenizer),
        callbacks=[DistillCallback(source, method)],
    ).train()


def tokenized(student: Any, *texts: list[str]) -> Dataset:
    return Dataset.from_dict(dict(student.tokenizer(*texts, truncation=True)))


def embeddings(model: Any) -> Tensor:
    return model.encode(TEST, convert_to_tensor=True)


def closeness(student: Any, teacher: Any) -> float:
    """Mean cosine of the two models' embeddings of held-out sentences."""
    return torch.nn.functional.cosine_similarity(embeddings(student), embeddings(teacher)).mean().item()


# ---------------------------------------------------------------------- its trainers


@pytest.mark.parametrize("whole", [True, False], ids=["model", "transformer"])
def test_its_trainer_is_refused_with_the_way_out(whole: bool, teacher: Any, tmp_path: Path) -> None:
    student = shrunk(teacher)
    args = st.SentenceTransformerTrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    data = Dataset.from_dict({"a": TRAIN[:8], "b": TRAIN[8:16], "score": [0.0, 1.0] * 4})
    given = {"model": student, "args": args, "train_dataset": data, "loss": CosineSimilarityLoss(student)}
    callback = DistillCallback(teacher if whole else teacher[0].auto_model)
    with pytest.raises(ConfigurationError, match=r"student\[0\]\.auto_model.*teacher\[0\]\.auto_model"):
        st.SentenceTransformerTrainer(**given, callbacks=[callback])
    assert [name for name, _ in student.named_children()] == ["0", "1", "2"]


def test_the_trainer_of_cross_encoders_is_refused_too(tmp_path: Path) -> None:
    student, teacher = cross_encoder(tmp_path / "student", 2), cross_encoder(tmp_path / "teacher", 4)
    args = st.CrossEncoderTrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    data = Dataset.from_dict({"a": TRAIN[:8], "b": TRAIN[8:16], "label": [0, 1] * 4})
    given = {"model": student, "args": args, "train_dataset": data, "loss": CrossEntropyLoss(student)}
    with pytest.raises(ConfigurationError, match=r"student\[0\]\.auto_model"):
        st.CrossEncoderTrainer(**given, callbacks=[DistillCallback(teacher)])


# ---------------------------------------------------------------------- its transformers


@pytest.mark.parametrize("folder", [False, True], ids=["transformer", "folder"])
def test_a_distilled_transformer_shows_in_the_embeddings(folder: bool, teacher: Any, tmp_path: Path) -> None:
    """The teacher may be a folder that `save_pretrained` wrote: its transformer is at the top."""
    teacher.save_pretrained(str(tmp_path / "teacher"))
    student, before = shrunk(teacher), weights_hash(teacher)
    start = closeness(student, teacher)
    source = str(tmp_path / "teacher") if folder else teacher[0].auto_model
    distil(student, source, tmp_path, tokenized(student, TRAIN))
    assert closeness(student, teacher) > 0.5 + start / 2
    assert weights_hash(teacher) == before

    student.save_pretrained(str(tmp_path / "student"))
    loaded = st.SentenceTransformer(str(tmp_path / "student"), device="cpu")
    assert torch.equal(embeddings(loaded), embeddings(student))
    assert loaded[0].auto_model.config.num_hidden_layers == 2
    assert loaded[0].auto_model.config.compression["methods"][0]["name"] == "features"


def test_a_whole_model_as_teacher_is_refused_with_the_way_out(teacher: Any, tmp_path: Path) -> None:
    student = shrunk(teacher)
    with pytest.raises(ConfigurationError, match=r"DistillCallback\(teacher\[0\]\.auto_model\)"):
        distil(student, teacher, tmp_path, tokenized(student, TRAIN))


def cross_encoder(folder: Path, layers: int) -> Any:
    tiny.tiny_bert_classifier(seed=layers, num_hidden_layers=layers).save_pretrained(str(folder))
    tiny.tiny_tokenizer().save_pretrained(str(folder))
    return st.CrossEncoder(str(folder), device="cpu")


def test_a_cross_encoder_learns_its_teachers_probabilities(tmp_path: Path) -> None:
    student, teacher = cross_encoder(tmp_path / "student", 2), cross_encoder(tmp_path / "teacher", 4)
    left, right = TRAIN[:96], TRAIN[96:]

    def distance() -> float:
        found = [m.predict(list(zip(left, right, strict=True)), apply_softmax=True) for m in (student, teacher)]
        return float(abs(found[0] - found[1]).mean())

    start = distance()
    distil(student, teacher[0].auto_model, tmp_path, tokenized(student, left, right), "kd")
    assert distance() < 0.5 * start
