"""`hf-compress shrink`: a student's folder, and the table of what it gave up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from recipes import write_inputs
from tiny import WORDS, tiny_bert_classifier, tiny_plain_tokenizer, tiny_tokenizer

from hf_compress import cli
from hf_compress.errors import ConfigurationError
from hf_compress.shrinking.folder import Request, shrink_folder
from hf_compress.shrinking.width import Width

ROWS = ["the film was good", "a book was dull", "not bad", "zebra"]
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["hf-compress", "shrink", *map(str, arguments)])
        cli.app(standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_command_writes_a_student_with_its_tokenizer_and_says_what_it_gave_up(
    inputs: Path, tmp_path: Path, command: Command
) -> None:
    sizes = ("--layers", "0,2", "--hidden", 16, "--heads", 1, "--intermediate", 32)
    texts = ("--vocabulary-texts", inputs / "train.csv", "--data", inputs / "test.csv")

    said = json.loads(command(inputs / "big", tmp_path / "small", *sizes, *texts, "--json"))

    student = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert [change["size"] for change in said["changes"]] == ["vocabulary", "hidden", "heads", "neurons", "layers"]
    assert said["changes"][-1]["parameters_after"] == student.num_parameters()
    assert said["outputs"]["positions"] == 20
    assert 0 <= said["outputs"]["agreement"] <= 1
    assert said["outputs"]["kl"] > 0
    assert len(tokenizer) == student.config.vocab_size == said["changes"][0]["after"]
    assert student.config.compression_start == (
        f"vocabulary {len(tokenizer)} of {said['changes'][0]['before']}, layers 0, 2 of 3, hidden 16 of 32, "
        "heads 1 of 2, neurons 32 of 64 of the teacher, chosen by activations"
    )
    assert student.config.label2id == {"negative": 0, "positive": 1}


def test_the_table_has_a_line_for_each_size(inputs: Path, tmp_path: Path, command: Command) -> None:
    said = command(inputs / "big", tmp_path / "small", "--layers", 1, "--intermediate", 16)

    assert "parameters after" in said
    assert ["layers" in line or "neurons" in line for line in said.splitlines()].count(True) == 2


def test_norms_may_choose_beside_rows(inputs: Path, tmp_path: Path) -> None:
    request = Request(width=Width(intermediate=16), by="norms")

    changes, found = shrink_folder(str(inputs / "big"), tmp_path / "small", request, rows=ROWS)

    assert found is not None
    assert [change.of for change in changes] == ["weight norm"]


def test_layers_that_are_no_numbers_are_refused(inputs: Path, tmp_path: Path, command: Command) -> None:
    with pytest.raises(ConfigurationError, match="--layers two: expected a number, or layers as in 0,2,5"):
        command(inputs / "big", tmp_path / "small", "--layers", "two")


def test_a_masked_language_model_is_compared_where_both_read_the_same_pieces(tmp_path: Path) -> None:
    """A vocabulary of the first text alone: that row gives the teacher's own logits, the others are left out."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        config = tiny_bert_classifier().config
        hf.BertForMaskedLM(config).save_pretrained(tmp_path / "big")
    tokenizer.save_pretrained(tmp_path / "big")

    changes, found = shrink_folder(
        str(tmp_path / "big"), tmp_path / "small", Request(batch_size=2), texts=ROWS[:1], rows=[*ROWS[:1], *ROWS[1:3]]
    )

    assert [change.size for change in changes] == ["vocabulary"]
    assert found is not None
    assert found.positions == len(tokenizer(ROWS[0])["input_ids"])
    assert (found.agreement, found.kl) == (1.0, pytest.approx(0.0, abs=1e-6))


def test_rows_of_a_language_model_without_padding_are_read_one_by_one(tmp_path: Path) -> None:
    tokenizer = tiny_plain_tokenizer()
    tokenizer.pad_token = None
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    hf.GPT2LMHeadModel(hf.GPT2Config(**size, bos_token_id=3, eos_token_id=3)).save_pretrained(tmp_path / "big")
    tokenizer.save_pretrained(tmp_path / "big")

    request = Request(layers=1, width=Width(intermediate=8), by="activations")
    _, found = shrink_folder(str(tmp_path / "big"), tmp_path / "small", request, rows=ROWS)

    assert found is not None
    assert found.positions == sum(len(tokenizer(row)["input_ids"]) - 1 for row in ROWS)


def test_a_narrow_encoder_without_a_head_is_written_without_a_comparison(tmp_path: Path) -> None:
    hf.BertModel(tiny_bert_classifier().config).save_pretrained(tmp_path / "big")
    tiny_tokenizer().save_pretrained(tmp_path / "big")

    _, found = shrink_folder(
        str(tmp_path / "big"), tmp_path / "small", Request(width=Width(hidden=16, heads=1)), rows=ROWS
    )

    assert found is None
    assert (tmp_path / "small" / "tokenizer.json").exists()


def test_a_processor_of_images_comes_along(tmp_path: Path) -> None:
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "big")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "big" / "preprocessor_config.json").write_text(json.dumps(processor))

    shrink_folder(str(tmp_path / "big"), tmp_path / "small", Request(width=Width(intermediate=8)))

    assert json.loads((tmp_path / "small" / "preprocessor_config.json").read_text()) == processor


@pytest.mark.parametrize(
    ("request_", "given", "message"),
    [
        (Request(), {}, "nothing is asked to be smaller"),
        (Request(layers=1, by="activations"), {}, "and are measured on rows. Give such a size and data"),
        (Request(layers=1, by="luck"), {}, "chosen by norms or activations, got 'luck'"),  # type: ignore[arg-type]
        (Request(layers=1, vocabulary=9), {}, "counted on texts"),
        (Request(vocabulary=9), {"texts": WORDS}, r"size=9: \d+ pieces must stay"),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(
    inputs: Path, tmp_path: Path, request_: Request, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        shrink_folder(str(inputs / "big"), tmp_path / "small", request_, **given)

    assert not (tmp_path / "small").exists()


def test_a_folder_that_holds_something_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(ConfigurationError, match="holds something already"):
        shrink_folder(str(inputs / "big"), tmp_path, Request(layers=1))

    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_rows_for_a_model_that_reads_no_texts_alone_are_refused(tmp_path: Path) -> None:
    config = hf.T5Config(vocab_size=87, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "big")
    tiny_tokenizer().save_pretrained(tmp_path / "big")

    with pytest.raises(ConfigurationError, match=r"or an answer too. Leave data out, or call shrink\(teacher, data="):
        shrink_folder(str(tmp_path / "big"), tmp_path / "small", Request(decoder_layers=1), rows=ROWS)
