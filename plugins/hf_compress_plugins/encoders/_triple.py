"""Parts of DistilBERT's loss that compare with a teacher: squared logits, cosine of last states, and where.

Sanh, Debut, Chaumond, Wolf: DistilBERT, a distilled version of BERT, 2019, arXiv:1910.01108; weights, positions and
means as in its authors' training script.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_compress.errors import MismatchError
from hf_compress.objective import Positions, Signals, require_one_shape

STATES = "hidden:-1"
"""The tap that the cosine compares."""


def squared_logits(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(position,) ‖z_s - z_t‖², summed over the classes; the teacher's are detached here.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("squared logits", student_logits, teacher_logits, "Give both models one vocabulary.")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return (student_logits.to(dtype) - teacher_logits.detach().to(dtype)).square().sum(-1)


def state_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """(row,) 1 - cos(h_s, h_t), 0 … 2, of states (row, width); the teacher's are detached here.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("cosine of states", student, teacher, "Give both models the same tokens.")
    dtype = torch.promote_types(student.dtype, torch.float32)
    return 1 - nn.functional.cosine_similarity(student.to(dtype), teacher.detach().to(dtype), dim=-1)


def scored(signals: Signals, *, of_tokens: bool) -> Positions:
    """Where logits are compared: at every real token, or at the run's own positions (rows, labelled tokens)."""
    if not of_tokens:
        return signals.positions
    index = signals.tokens.flatten().nonzero().squeeze(-1)
    example = index // signals.tokens.shape[1]
    return replace(signals.positions, index=index, example=example, labels=None)


def real_states(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The states of real tokens (row, width), and the example (row,) of each.

    Args:
        states: (batch, time, width).
        tokens: (batch, time) bool, the real tokens; (batch, 1), all real, for images, whose states are all taken.

    Raises:
        MismatchError: for states of another shape.
    """
    if states.dim() == 3 and tokens.shape[1] == 1 and bool(tokens.all()):
        tokens = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if states.dim() != 3 or states.shape[:2] != tokens.shape:
        raise MismatchError(
            f"states of shape {tuple(states.shape)} do not fit tokens of shape {tuple(tokens.shape)}. Both models must "
            "be transformers that read the same tokens; set cosine=0 for others."
        )
    return states[tokens], torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)[tokens]


def mean_of_examples(values: Tensor, example: Tensor, count: int) -> Tensor:
    """(count, …) means over each example's rows of values (row, …), in float32 or wider; 0 for one without rows."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    sums = values.new_zeros(count, *values.shape[1:]).index_add(0, example, values)
    rows = torch.bincount(example, minlength=count).clamp(min=1).to(values.dtype)
    return sums / rows.view(-1, *[1] * (values.dim() - 1))
