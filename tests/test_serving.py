"""Programs of cards that serve a graph without torch: what they find, and what gets none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import bare
import pytest
import serving
from hf_compress_cards import render
from hf_compress_cards import serving as cards

from hf_compress import facts
from hf_compress.facts import Evidence, Record

REFUSE = '''
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
'''  # fmt: skip
RESULTS = Path(__file__).parent.parent / "evaluation" / "results" / cards.FIGURES


def test_the_programs_find_without_torch_what_load_onnx_gives(tmp_path: Path) -> None:
    """`ci/serving` does so for every case, in environments that have no torch."""
    names = ["text-classification", "feature-extraction", "text-generation"]
    for name in names:
        (tmp_path / name).mkdir()
        serving.prepare(name, tmp_path / name)
    (tmp_path / "refuse").mkdir()
    (tmp_path / "refuse" / "sitecustomize.py").write_text(REFUSE)
    done = subprocess.run(
        [sys.executable, bare.__file__, *(tmp_path / name for name in names)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "refuse")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [*json.loads(done.stdout)] == names


def test_every_form_was_run_in_a_bare_environment_and_the_cards_show_its_figures() -> None:
    shipped = (resources.files("hf_compress_cards") / cards.FIGURES).read_text(encoding="utf-8")
    assert RESULTS.read_text(encoding="utf-8") == shipped
    found = json.loads(shipped)
    differences = found["largest difference from load_onnx"]
    assert differences.keys() == serving.CASES.keys()
    assert max(differences.values()) <= bare.TOLERANCE
    programs = resources.files("hf_compress_cards") / "programs"
    tags = {path.name.removesuffix(".jinja") for path in programs.iterdir() if not path.name.startswith("_")}
    assert {name.partition(",")[0] for name in differences} == tags
    for kind, packages in cards.NEEDS.items():
        own = found[kind]
        assert {"torch", "transformers"}.isdisjoint(own["packages"])
        told = cards.needs("image-classification" if kind == "images" else None)[1]
        assert told is not None
        assert told.startswith(f"{own['megabytes']:.0f} MB installed")
        assert all(f"{name} {own['packages'][name]}" in told for name in packages)


def made(folder: Path, *, variant: str = "onnx", recorded: bool = True, **written: dict[str, Any]) -> Path:
    """A student folder with a graph of no bytes and these JSON files beside it; `config` is the student's own."""
    (folder / variant).mkdir(parents=True)
    paths = [folder / variant / name for name in ("model.onnx", "tokenizer.json")]
    for path in paths:
        path.write_bytes(b"")
    for name, value in written.items():
        path = folder / "config.json" if name == "config" else folder / variant / f"{name}.json"
        path.write_text(json.dumps(value))
        paths += [path] if name != "config" else []
    entries = [
        Evidence(file=path.relative_to(folder).as_posix(), bytes=0, sha256="0" * 64) for path in paths if recorded
    ]
    facts.save(folder, Record(evidence=tuple(entries)))
    return folder


CLASSIFIER = {"architectures": ["BertForSequenceClassification"], "max_position_embeddings": 512}
TOKENIZER = {"pad_token": "[PAD]", "model_max_length": 128}
VIT = {"architectures": ["ViTForImageClassification"]}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 9}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip


def test_the_smallest_variant_that_a_cpu_runs_is_served(tmp_path: Path) -> None:
    for name in ("onnx", "onnx_int8", "onnx_fp16"):
        made(tmp_path / "of" / name, variant=name, config=CLASSIFIER, tokenizer_config=TOKENIZER)
    assert 'Path("onnx_int8/onnx_int8")' in render(tmp_path / "of" / "onnx_int8")
    assert "InferenceSession" not in render(tmp_path / "of" / "onnx_fp16")
    both = facts.load(tmp_path / "of" / "onnx").evidence + facts.load(tmp_path / "of" / "onnx_int8").evidence
    assert cards.variant(Record(evidence=both), "text-classification") == "onnx_int8"


@pytest.mark.parametrize(
    ("config", "tokenizer", "told"),
    [
        ({}, {}, 'labels = ["LABEL_0", "LABEL_1"]'),
        ({"id2label": {"0": "no", "1": "yes"}}, {}, '["id2label"].values()'),
        ({"id2label": {"0": "yes"}}, {}, "1 / (1 + np.exp(-logits))"),
        ({}, {}, "enable_truncation(128)"),
        ({"max_position_embeddings": 64}, {}, "enable_truncation(64)"),
        ({"max_position_embeddings": 514}, {"model_max_length": 10**30}, "enable_truncation(512)"),
        ({}, {"pad_token": "<pad>"}, r'token_to_id("\x3cpad>")'),
    ],
)
def test_the_settings_come_from_the_files_beside_the_graph(
    tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any], told: str
) -> None:
    folder = made(tmp_path / "student", config=CLASSIFIER | config, tokenizer_config=TOKENIZER | tokenizer)
    code = serving.program(render(folder))
    assert told in code
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    "written",
    [
        {"config": CLASSIFIER, "tokenizer_config": {"model_max_length": 128}},
        {"config": CLASSIFIER | {"id2label": {"1": "b", "0": "a"}}, "tokenizer_config": TOKENIZER},
        {"config": CLASSIFIER | {"id2label": 5}, "tokenizer_config": TOKENIZER},
        {"config": CLASSIFIER, "tokenizer_config": TOKENIZER | {"pad_token": "a  b"}},
        {"config": CLASSIFIER, "tokenizer_config": TOKENIZER, "recorded": False},
        {"config": {"architectures": ["T5ForConditionalGeneration"]}, "tokenizer_config": TOKENIZER},
        {"config": {"architectures": ["BertForMaskedLM"]}, "tokenizer_config": TOKENIZER},
        {"config": VIT},
        {"config": VIT, "preprocessor_config": PROCESSOR | {"image_processor_type": "ConvNextImageProcessor"}},
        {"config": VIT, "preprocessor_config": PROCESSOR | {"size": 8}},
        {"config": VIT, "preprocessor_config": PROCESSOR | {"do_pad": True}},
        {"config": VIT, "preprocessor_config": PROCESSOR | {"do_resize": False}},
        {"config": VIT, "preprocessor_config": PROCESSOR | {"image_mean": [0.5]}},
        {"config": VIT, "preprocessor_config": PROCESSOR | {"resample": 17}},
        {"config": VIT, "preprocessor_config": PROCESSOR | {"resample": -1}},
        {
            "config": VIT,
            "preprocessor_config": PROCESSOR | {"do_center_crop": True, "crop_size": {"height": 9, "width": 9}},
        },
        {"config": VIT | {"num_channels": 1}, "preprocessor_config": PROCESSOR},
    ],
)
def test_what_is_not_certain_gets_no_program(tmp_path: Path, written: dict[str, Any]) -> None:
    card = render(made(tmp_path / "student", **written))
    assert "InferenceSession" not in card
    assert "Without torch" not in card


def test_an_image_processor_becomes_its_steps(tmp_path: Path) -> None:
    code = serving.program(render(made(tmp_path / "student", config=VIT, preprocessor_config=PROCESSOR)))
    assert "image.resize((9, 8), Image.Resampling.BILINEAR)" in code
    assert "np.asarray(image) / 255\npixels = (pixels - [0.5, 0.5, 0.5]) / [0.5, 0.5, 0.5]" in code
    assert "crop" not in code
