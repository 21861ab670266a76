"""Classes with inputs of their own export as others do: they say what these look like and which axes vary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hf_compress_plugins.decoding._modeling_masked_diffusion import MaskedDiffusionConfig, MaskedDiffusionForMaskedLM
from hf_compress_plugins.encoders._modeling_mend import DemonstrationConfig, DemonstrationModel
from hf_compress_plugins.generative._modeling_edm import EDMDenoiser, EDMDenoiserConfig
from hf_compress_plugins.graphs._modeling_node_mlp import NodeMLPConfig, NodeMLPForSequenceClassification
from hf_compress_plugins.language._modeling_fspad import FSPADDrafter, FSPADDrafterConfig
from hf_compress_plugins.speech._modeling_codec import SpeechCodec, SpeechCodecConfig
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from hf_compress.errors import ConfigurationError
from hf_compress.onnx import export_model, load_onnx


class PairConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed
    model_type = "pair"


@dataclass
class Sums(ModelOutput):  # type: ignore[misc]  # transformers is not typed
    left: Tensor | None = None
    mean: Tensor | None = None


class Pair(PreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """The sums of two vectors a row, and their rows' number."""

    config_class = PairConfig
    main_input_name = "left"
    export_axes: ClassVar[Any] = {"left": ("rows", "2*halves"), "right": ("rows", "2*halves")}

    def __init__(self, config: PairConfig, frozen: bool = False) -> None:
        super().__init__(config)
        self.scale, self.frozen = nn.Parameter(torch.tensor(2.0)), frozen
        self.post_init()

    def example_inputs(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(batch, 2 * length, generator=generator) for name in ("left", "right")}

    def forward(self, left: Tensor, right: Tensor) -> Sums:
        halves = (self.scale * (left + right)).unflatten(1, (2, -1))
        total = halves.new_zeros(3, 2) if self.frozen else halves.sum(2)
        return Sums(left=total, mean=halves.mean())


AutoConfig.register("pair", PairConfig, exist_ok=True)


def test_axes_that_are_named_vary_and_an_output_may_be_called_as_an_input(tmp_path: Path) -> None:
    model = Pair(PairConfig()).eval()
    export_model(model, None, tmp_path / "onnx")
    loaded = load_onnx(tmp_path / "onnx")
    for batch, length in ((1, 3), (5, 8)):
        given = model.example_inputs(batch, length, torch.Generator().manual_seed(0))
        found, expected = loaded(**given), model(**given)
        for name in ("left", "mean"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_an_output_that_does_not_vary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="left: axis 0 should vary"):
        export_model(Pair(PairConfig(), frozen=True).eval(), None, tmp_path / "onnx")


def test_a_class_that_does_not_say_is_refused_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Pair, "example_inputs")
    with pytest.raises(ConfigurationError, match=r"Pair takes left.*example_inputs.*export_axes"):
        export_model(Pair(PairConfig()), None, tmp_path / "onnx")


NETWORKS: dict[str, PreTrainedModel] = {
    "denoiser": EDMDenoiser(EDMDenoiserConfig(hidden_size=16, num_hidden_layers=1)),
    "codec": SpeechCodec(
        SpeechCodecConfig(strides=(2, 2), channels=8, hidden_size=16, codebooks=2, codebook_size=16, feature_size=8)
    ),
    "nodes": NodeMLPForSequenceClassification(NodeMLPConfig(features=7, num_labels=3)),
    "masked diffusion": MaskedDiffusionForMaskedLM(MaskedDiffusionConfig(vocab_size=50, hidden_size=16)),
    "demonstrations": DemonstrationModel(
        DemonstrationConfig(
            body_config={"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512},
            num_virtual_tokens=4,
            target_size=24,
        )
    ),
    "drafter": FSPADDrafter(
        FSPADDrafterConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_methods_export_with_parity(name: str, tmp_path: Path) -> None:
    done = export_model(NETWORKS[name].eval(), None, tmp_path / "onnx")
    assert done.value("parity_max_abs_diff") < 1e-5
