"""A model of the hub, as its cache holds it, is loaded within the same limits as a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile import FAULTS
from recipes import write_teacher

from hf_compress.errors import ConfigurationError, ForeignFileError
from hf_compress.foreign import refusing
from hf_compress.teachers import model as teachers


def cached(folder: Path, hub: Path) -> None:
    """A folder as the one snapshot of `me/model` in a Hugging Face cache: links to blobs."""
    root = hub / "models--me--model"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "snapshots" / "0a1b").mkdir(parents=True)
    (root / "refs" / "main").write_text("0a1b")
    for path in folder.iterdir():
        shutil.move(path, root / "blobs" / path.name)
        (root / "snapshots" / "0a1b" / path.name).symlink_to(f"../../blobs/{path.name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config_of_a_hundred_thousand_layers", "modules"),
        ("config_of_ten_million_layers", "asks for 10000000"),
        ("config_of_a_trillion_tokens", "numbers or more"),
        ("weights_with_a_key_twice", "appears twice"),
    ],
)
def test_a_model_of_the_hub_is_measured_by_its_weights(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, spoil in (("good", None), ("bad", FAULTS[name])):
        write_teacher(tmp_path / place)
        if spoil is not None:
            spoil(tmp_path / place)
        cached(tmp_path / place, tmp_path / "hub" / place)
        for constant in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
            monkeypatch.setattr(constant, str(tmp_path / "hub" / place))
        if spoil is None:
            assert teachers.load_teacher("me/model").config.num_hidden_layers == 3
        else:
            with pytest.raises(ForeignFileError, match=said):
                teachers.load_teacher("me/model")


def test_a_missing_package_is_no_fault_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="pip install x"), refusing(tmp_path, "as a teacher", "Do it."):
        raise ImportError("pip install x")


def test_ctrl_c_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), refusing(tmp_path, "as a teacher", "Do it."):
        raise KeyboardInterrupt
