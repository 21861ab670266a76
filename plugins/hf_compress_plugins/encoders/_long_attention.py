"""Encoders of transformers whose attention is not full: which lengths they take, how they stay what they are, and a
student of fewer layers.

Longformer (Beltagy, Peters, Cohan, 2020, arXiv:2004.05150), BigBird (Zaheer et al., 2020, arXiv:2007.14062),
Nyströmformer (Xiong et al., 2021, arXiv:2102.03902).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_compress import shrink
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.taps import body, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL = ("bert", "roberta")
"""Types of models with full attention that Longformer can take the weights of."""
_HEADS = {
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.decoder.": "lm_head.decoder.",
    "cls.predictions.bias": "lm_head.bias",
}
"""BERT's names of the head for masked tokens, and Longformer's."""


def kind(config: Any) -> str:
    """The type of a model by its config; "" without one."""
    return str(getattr(config, "model_type", ""))


def is_landmarks(config: Any) -> bool:
    """Whether a config is of a Nyströmformer that computes its approximation, not full attention."""
    return kind(config) == "nystromformer" and config.num_landmarks != config.segment_means_seq_len


def shortest(config: Any) -> int:
    """The least number of tokens that a BigBird with sparse attention does not switch to full attention for."""
    return int((5 + 2 * config.num_random_blocks) * config.block_size) + 1


def is_sparse(config: Any) -> bool:
    """Whether a config is of a BigBird with sparse attention."""
    return kind(config) == "big_bird" and config.attention_type == "block_sparse"


def longest(config: Any) -> int | None:
    """How many tokens a model has positions for; None where its config does not tell."""
    found = getattr(config, "max_position_embeddings", None)
    if found is not None and kind(config) in ("longformer", "roberta"):
        return int(found) - int(config.pad_token_id) - 1  # their first position stands behind that of padding
    return found


def check_length(config: Any, length: int, whose: str, *, padded: bool = False) -> None:
    """Whether a model computes what its config says on rows of that length, padding included.

    Args:
        config: of the model; None is let through.
        length: tokens of a row.
        padded: whether a row has padding, which is part of a Nyströmformer's means; transformers 5 fails on it.
        whose: "student" or "teacher", for the message.

    Raises:
        MismatchError: with what to change.
    """
    most = longest(config)
    if most is not None and length > most:
        raise MismatchError(f"the {whose} has positions for {most} tokens, and a row has {length}. Cut the rows.")
    if is_sparse(config) and length < shortest(config):
        raise MismatchError(
            f"the {whose}, a BigBird, computes sparse attention on rows of at least {shortest(config)} tokens and full "
            f"attention below, and a row has {length}. Pad all rows to one length, or set attention_type="
            '"original_full".'
        )
    if is_landmarks(config) and length != config.segment_means_seq_len:
        raise MismatchError(
            f"the {whose}, a Nyströmformer, takes means over parts of rows of {config.segment_means_seq_len} tokens, "
            f"and a row has {length}: sentences would be mixed. Pad all rows to that length, or call "
            f"set_length(model, {length})."
        )
    if is_landmarks(config) and padded:
        raise MismatchError(
            f"the {whose}, a Nyströmformer, takes padding into its means over parts of a row. Give rows without, as "
            "long_rows makes them."
        )


def check_attention(config: Any, whose: str) -> None:
    """Whether the settings of a Nyströmformer can be computed.

    Raises:
        ConfigurationError: if its landmarks do not divide the length.
    """
    if is_landmarks(config) and config.segment_means_seq_len % config.num_landmarks:
        raise ConfigurationError(
            f"the {whose}'s {config.num_landmarks} landmarks do not divide its length of "
            f"{config.segment_means_seq_len} tokens. Call set_length(model, length) with a multiple."
        )


def set_length(model: PreTrainedModel, length: int) -> None:
    """Tells a Nyströmformer how long all rows will be, in tokens, padding included.

    Raises:
        ConfigurationError: for another model, or a length that is no multiple of its landmarks or no more than these:
            with as many landmarks as tokens it computes full attention.
    """
    config: Any = model.config
    if kind(config) != "nystromformer":
        raise ConfigurationError(f"set_length is for a Nyströmformer, got {type(model).__name__}.")
    if length <= config.num_landmarks or length % config.num_landmarks:
        raise ConfigurationError(
            f"the length must be a multiple of the {config.num_landmarks} landmarks and above them, got {length}."
        )
    config.segment_means_seq_len = length
    for module in model.modules():
        if hasattr(module, "seq_len") and hasattr(module, "num_landmarks"):
            module.seq_len = length


def switched(model: nn.Module) -> bool:
    """Whether a BigBird with sparse attention has been turned to full attention by a short batch."""
    inner: Any = body(model) or unwrap(model)
    return is_sparse(getattr(inner, "config", None)) and inner.attention_type != "block_sparse"


def keep_sparse(model: nn.Module) -> None:
    """Lets a BigBird choose its attention by each batch: otherwise one short batch turns it to full attention for good.

    A hook of this model alone; it is not saved. Of other models nothing is changed.
    """
    inner: Any = body(model) or unwrap(model)
    if not is_sparse(getattr(inner, "config", None)):
        return
    if _by_length not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_by_length, with_kwargs=True)
    if switched(model):
        inner.set_attention_type("block_sparse")


def _by_length(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = args[0] if args else next(kwargs[name] for name in ("input_ids", "inputs_embeds") if name in kwargs)
    enough = given.shape[1] >= shortest(module.config)
    module.set_attention_type("block_sparse" if enough else "original_full")


def alternate(depth: int, number: int) -> list[int]:
    """Indices of `number` of `depth` layers, from the first to the last as evenly as can be: 0, 2, 4, 7, 9, 11 of 12,
    as DistilBERT's script has them; the last one alone for 1.

    Raises:
        ConfigurationError: unless 1 ≤ number ≤ depth.
    """
    if not 1 <= number <= depth:
        raise ConfigurationError(f"layers must lie in 1 … {depth}, the teacher's number, got {number}.")
    if number == 1:
        return [depth - 1]
    return [round(place * (depth - 1) / (number - 1)) for place in range(number)]


def to_longformer(teacher: PreTrainedModel, layers: Sequence[int], *, window: int, length: int) -> PreTrainedModel:
    """A Longformer with the weights of some layers of a BERT or RoBERTa.

    As its authors convert RoBERTa (section 5): queries, keys and values of global attention are copies of the local
    ones, and the learned positions are repeated up to the length. With a window of twice the length it computes what
    the teacher computes.

    Args:
        teacher: a BERT or RoBERTa for masked tokens or for tagging.
        layers: which layers, rising.
        window: tokens that each token sees, half of them on each side; even and at least 4.
        length: most tokens of a row.

    Raises:
        ConfigurationError: for another model, or a window that Longformer cannot compute.
    """
    import transformers

    source: Any = teacher.config
    name = type(teacher).__name__
    task = next((end for end in ("ForMaskedLM", "ForTokenClassification") if name.endswith(end)), None)
    if kind(source) not in FULL or task is None:
        raise ConfigurationError(
            f"a Longformer takes the weights of a BERT or RoBERTa for masked tokens or tagging, got {name}."
        )
    if window < 4 or window % 2:
        raise ConfigurationError(f"window must be even and at least 4 tokens, got {window}.")
    if task == "ForMaskedLM" and source.hidden_act != "gelu":
        raise ConfigurationError(f"Longformer's head has gelu, and the teacher's {source.hidden_act!r}.")
    known = transformers.LongformerConfig().to_dict().keys() - {"model_type", "architectures", "attention_window"}
    settings = {key: value for key, value in source.to_dict().items() if key in known}
    settings |= {"id2label": source.id2label, "label2id": source.label2id}
    first = source.pad_token_id + 1
    settings |= {"num_hidden_layers": len(layers), "max_position_embeddings": length + first}
    config = transformers.LongformerConfig(**settings, attention_window=window)
    student: PreTrainedModel = getattr(transformers, f"Longformer{task}")(config)
    state = _renamed(shrink(teacher, layers=layers).state_dict(), kind(source))
    positions = "longformer.embeddings.position_embeddings.weight"
    state[positions] = _repeated(state[positions], 0 if kind(source) == "bert" else first, first, length)
    missing, unexpected = student.load_state_dict(state, strict=False)
    left = [name for name in (*missing, *unexpected) if not name.endswith(("position_ids", "token_type_ids"))]
    if left:
        raise ConfigurationError(f"a Longformer cannot take {left} of a {name}.")
    return student.to(teacher.dtype)


def _renamed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """By Longformer's names, with global queries, keys and values."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = name.replace(f"{prefix}.", "longformer.", 1) if name.startswith(f"{prefix}.") else name
        for old, new in _HEADS.items():
            own = own.replace(old, new)
        found[own] = tensor
        for letter in ("query", "key", "value"):
            if f".self.{letter}." in own:
                found[own.replace(f".{letter}.", f".{letter}_global.")] = tensor
    return found


def _repeated(table: Tensor, before: int, first: int, length: int) -> Tensor:
    """(first + length, width): the positions of a table, which begin at row `before`, again and again from `first`."""
    own = table[before:]
    rows = torch.arange(length, device=table.device) % len(own)
    return torch.cat([table.new_zeros(first, table.shape[1]), own[rows]])
