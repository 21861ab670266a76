"""A frozen model as teacher."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_compress import facts, foreign, licences
from hf_compress.errors import ConfigurationError, ForeignFileError, MismatchError
from hf_compress.heads import Dense, Head, Lazy, Logits, UnprovenError, prove
from hf_compress.objective import Inputs, Kind, sizes
from hf_compress.outputs import decoder_inputs, tensors
from hf_compress.taps import Reached, Taps, unwrap, watching

logger = logging.getLogger(__name__)

NEVER = frozenset({"labels", "num_items_in_batch", "start_positions", "end_positions", "fused_lm_head"})
"""Inputs that would make the teacher compute a loss of its own."""
_REACHING = frozenset({"revision", "token", "cache_dir", "subfolder"})
"""Settings of a teacher that say where it lies, which its config needs too."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+", re.ASCII)


class ModelTeacher:
    """Runs a frozen model under `no_grad`, in eval mode and in its own dtype, outside the student's module tree.

    `requires_grad` and the training mode are restored by `close`, as the object is the user's.
    """

    def __init__(self, model: nn.Module, kind: Kind | None = None) -> None:
        self.model = model
        self.sizes = sizes(unwrap(model), kind)
        self._taps: Taps | None = None
        self._frozen: list[nn.Parameter] = []
        self._modes: list[nn.Module] = []
        self._head: Head | None = None
        self._tried = False
        parameters = inspect.signature(model.forward).parameters
        self._accepted = None if _takes_any(parameters) and not parameters.keys() & {"input_ids"} else set(parameters)
        if self._accepted is not None and _takes_any(parameters):  # adapters hand on what the model inside names
            self._accepted |= inspect.signature(unwrap(model).forward).parameters.keys()

    @property
    def reads(self) -> tuple[str, ...] | None:
        """Columns that its forward names; None: it takes any."""
        return None if self._accepted is None else tuple(sorted(self._accepted - NEVER))

    def prepare(self, taps: frozenset[str], device: torch.device, until: str | None = None) -> None:
        if self._taps is not None:
            return
        self._modes = [module for module in self.model.modules() if module.training]
        self._frozen = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.eval()
        self.model.requires_grad_(False)
        if not getattr(self.model, "hf_device_map", None) and getattr(self.model, "hf_quantizer", None) is None:
            self.model.to(device)  # what was placed by a map or is quantized stays where it was loaded
        self._taps = Taps(self.model, taps, self.sizes.layers, until)

    def __call__(self, inputs: Inputs) -> Mapping[str, Tensor]:
        if self._taps is None:
            raise ConfigurationError("the teacher was called before `prepare`.")
        given: dict[str, Any] = dict(inputs)
        if self._taps.hidden_states:
            given["output_hidden_states"] = True
        if getattr(self.sizes.config, "return_dict", True) is False:
            given["return_dict"] = True
        output = None
        with watching(self._taps), contextlib.suppress(Reached):
            output = self.run(**given)
        return {name: tensor.detach() for name, tensor in self._taps.read(output).items()}

    def apart(self, inputs: Inputs) -> tuple[Mapping[str, Tensor], Logits | None]:
        """The taps but the logits, and the logits by rows: computed when they are asked for, where that is proven."""
        if self._taps is None or "logits" not in self._taps.names:
            return self(inputs), None
        if self._head is None and not self._tried:
            self._tried = True
            self._prove(inputs)
        if self._head is None:
            taps = dict(self(inputs))
            return taps, Dense(taps.pop("logits"))
        self._head.skip()
        try:
            taps = dict(self(inputs))
        finally:
            self._head.stop()
        del taps["logits"]
        return taps, Lazy(self._head.take(), self._head)

    def _prove(self, inputs: Inputs) -> None:
        given = {name: value for name, value in self.prepared(inputs).items() if isinstance(value, Tensor)}
        two = {name: value[:2, :8] if value.dim() == 2 else value[:2] for name, value in given.items() if value.dim()}
        try:
            self._head = prove(self.model, self.sizes.kind, two, task=False).head
        except UnprovenError as error:
            logger.warning("hf_compress: the teacher's logits are kept whole: %s", error)

    def run(self, *, grad: bool = False, **inputs: Any) -> Any:
        given = self.prepared(inputs)
        if self.model.training:  # switched back by the user, or by another run that has ended
            self.model.eval()
        with torch.set_grad_enabled(grad):
            output = self.model(**given)
        device = next((value.device for value in given.values() if isinstance(value, Tensor)), None)
        return tensors(output, device)

    def prepared(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that the teacher's forward names, and no others."""
        always = {"output_hidden_states", "return_dict"}
        given = {
            name: value
            for name, value in inputs.items()
            if name not in NEVER and (self._accepted is None or name in self._accepted or name in always)
        }
        labels = inputs.get("labels")
        if self._decodes_labels and "decoder_input_ids" not in given:
            if labels is None:
                raise MismatchError("an encoder-decoder teacher needs labels or decoder_input_ids in the batch.")
            given["decoder_input_ids"] = decoder_inputs(unwrap(self.model), labels)
        if self._accepted is not None and "use_cache" in self._accepted:
            given["use_cache"] = False
        dtype = getattr(self.model, "dtype", None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            return given
        real = {k: v.to(dtype) for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return given | real  # images and sound, for a teacher in half precision

    @property
    def _decodes_labels(self) -> bool:
        """Whether its decoder reads the answer; under another head it reads the input, shifted by the model."""
        named = self._accepted is None or "decoder_input_ids" in self._accepted
        return getattr(self.sizes.config, "is_encoder_decoder", False) and self.sizes.kind == "tokens" and named

    def describe(self) -> facts.Model:
        source = getattr(self.sizes.config, "_name_or_path", "")
        name = hub_name(source)
        return facts.Model(
            name=name,
            licence=licences.of_source(source),
            revision=getattr(self.sizes.config, "_commit_hash", None) if name else None,
            architecture=type(self.model).__name__,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            layers=self.sizes.layers or None,
        )

    def close(self) -> None:
        if self._taps is None:
            return
        self._taps.remove()
        self._taps = None
        if self._head is not None:
            self._head.remove()
        self._head, self._tried = None, False
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for module in self._modes:
            module.training = True


def hub_name(name: str | None) -> str | None:
    """A model's name for the record, if it is a hub id; never a path."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _is_model(architecture: object) -> bool:
    return inspect.isclass(architecture) and issubclass(architecture, transformers.PreTrainedModel)


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def load_teacher(
    source: str, student: nn.Module | None = None, settings: Mapping[str, Any] = MappingProxyType({})
) -> nn.Module:
    """Loads a teacher with the architecture that its config names.

    Args:
        source: hub id or folder; safetensors weights, no code of the repository is run.
        student: decides the head where the config names no architecture; None: then it is an error.
        settings: of `from_pretrained`: revision, dtype, device_map, quantization_config, token and so on.

    Raises:
        ConfigurationError: for settings that would run foreign code or load pickles.
        ForeignFileError: if the folder has no config or no weights, or weights are missing for some parameters: they
            would be random, and the student would learn noise.
    """
    if forbidden := sorted({"trust_remote_code", "use_safetensors", "output_loading_info"} & settings.keys()):
        raise ConfigurationError(
            f"teacher_kwargs: {forbidden} cannot be set; a teacher is loaded from safetensors and runs no code of its "
            "own. For anything else load the model yourself and pass it."
        )
    where = {name: value for name, value in settings.items() if name in _REACHING}
    with foreign.loading(source, "as a teacher", "Give a folder or hub id with config and safetensors.", where):
        config = foreign.config(source, use="as a teacher", where=where)
        named = (config.architectures or [type(unwrap(student)).__name__ if student is not None else "none"])[0]
        architecture: Any = getattr(transformers, str(named), None)
        if not _is_model(architecture):
            raise ConfigurationError(
                f"{source}: the teacher's architecture {named!r} is no model of transformers; pass the model."
            )
        model, report = architecture.from_pretrained(source, output_loading_info=True, **foreign.SAFE, **settings)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ForeignFileError(
            source,
            f"has no weights for {missing[:5]} ({len(missing)} in all); they would be random.",
            f"Give a fine-tuned {named}, or fine-tune this one first.",
        )
    teacher: nn.Module = model
    return teacher
