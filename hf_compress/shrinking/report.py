"""What a student gave up before it is trained: its sizes beside the teacher's, and its outputs on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress import distiller, divergences, outputs
from hf_compress import objective as o
from hf_compress.errors import ConfigurationError
from hf_compress.taps import evaluating

from .student import Change

COLUMNS = ("size", "teacher", "student", "parameters before", "parameters after", "kept", "of")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Outputs of a student beside its teacher's, means over what is scored."""

    positions: int
    """Rows; tokens of a language model or a tagger."""
    agreement: float | None = None
    """Fraction of equal decisions."""
    kl: float | None = None
    """KL from the teacher's to the student's distribution, nats."""
    cosine: float | None = None
    """Of the outputs of a model without classes."""


def compared(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
    *,
    ids: Tensor | None = None,
) -> Compared:
    """Runs both on data and compares logits, or what models without a head give.

    Args:
        teacher: put into eval mode meanwhile, as the student.
        student: of any size.
        batches: pairs of the teacher's and the student's inputs by name: the same, unless their tokens have other ids.
        ids: of a student with a smaller vocabulary, the teacher's id of each of its tokens.

    Raises:
        ConfigurationError: if there is no batch, or the outputs of the two cannot be compared.
    """
    kind, sums, count = o.kind_of(teacher), {"agreement": 0.0, "kl": 0.0, "cosine": 0.0}, 0
    with evaluating(teacher), evaluating(student), torch.no_grad():
        for theirs, ours in batches:
            given, found = (_outputs(model, inputs) for model, inputs in ((teacher, theirs), (student, ours)))
            if kind != "none":
                where = o.positions(kind, _plain(theirs, teacher))
                given, found = (distiller.select_logits(outputs.logits_of(each), where) for each in (given, found))
                if ids is not None and given.shape[-1] > found.shape[-1]:
                    given = given[:, ids.to(given.device)]
                sums["agreement"] += _equal(given, found, kind)
                if kind != "labels":
                    log_p, log_q = divergences.log_probabilities("shrink", found, given)
                    sums["kl"] += float(divergences.kl(log_p, log_q).sum())
            else:
                given, found = (_states(each, theirs) for each in (given, found))
                if given.shape != found.shape:
                    raise ConfigurationError(
                        f"shrink: the teacher gives {given.shape[-1]} numbers and the student {found.shape[-1]}; "
                        "without a head they cannot be compared. Leave the data out, or cut a model with its head."
                    )
                sums["cosine"] += float(nn.functional.cosine_similarity(given, found, dim=-1).sum())
            count += len(given)
    if not count:
        raise ConfigurationError("shrink: there is nothing to compare the outputs on. Give rows, or leave data out.")
    named = {"none": ("cosine",), "labels": ("agreement",)}.get(kind, ("agreement", "kl"))
    return Compared(positions=count, **{name: sums[name] / count for name in named})


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model(**_plain(inputs, model), return_dict=True)


def _states(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """(position, dim) of what a model without classes gives; without padding."""
    found, mask = outputs.first(output), inputs.get("attention_mask")
    if found.dim() == 3 and mask is not None and mask.shape == found.shape[:2]:
        return found[mask.bool().to(found.device)]
    return found.flatten(0, -2)


def _plain(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """On the model's device, without labels: a loss is not wanted."""
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if name not in ("labels", "start_positions", "end_positions")
    }


def _equal(given: Tensor, found: Tensor, kind: o.Kind) -> float:
    """How many rows are decided alike; of independent labels their mean fraction in a row."""
    if kind == "labels":
        return float(((given > 0) == (found > 0)).float().mean(-1).sum())
    return float((given.argmax(-1) == found.argmax(-1)).sum())


def rows(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    """Lines of a table under `COLUMNS`."""
    return [
        (
            change.size,
            f"{change.before:,}",
            f"{change.after:,}",
            f"{change.parameters_before:,}",
            f"{change.parameters_after:,}",
            f"{change.kept:.1%}",
            change.of,
        )
        for change in changes
    ]


def below(found: Compared | None) -> list[str]:
    """Lines under the table."""
    if found is None:
        return []
    said = {
        "agreement": "{:.1%} equal decisions",
        "kl": "KL {:.3f} nats",
        "cosine": "cosine {:.3f}",
    }
    values = [text.format(value) for name, text in said.items() if (value := getattr(found, name)) is not None]
    return [f"before training, with the teacher on {found.positions:,} positions: {', '.join(values)}"]


def as_json(changes: Sequence[Change], found: Compared | None) -> dict[str, Any]:
    """The same as plain values."""
    return {"changes": [asdict(change) for change in changes], "outputs": None if found is None else asdict(found)}
