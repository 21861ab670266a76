"""A model with another tokenizer: its embeddings from those of the old tokens that spell the same.

Gee, Zugarini, Rigutini, Torroni: Fast Vocabulary Transfer for Language Model Compression, 2022, arXiv:2402.09977.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_compress.errors import ConfigurationError
from hf_compress_plugins.tokenizers._alignment import Roles, byte_forms, roles_of, sentence_pieces, special_ids
from hf_compress_plugins.tokenizers._modeling_expanded_input import (
    ExpandedInputConfig,
    ExpandedInputForCausalLM,
    suffix_hash,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Attributes of a tokenizer, in the order in which they decide what a token that plays several is."""


def average(embeddings: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """(new token, …) mean of the old rows of each new token's pieces; of all old rows for one that has none.

    Args:
        embeddings: (old token, …), any float type; averaged in float32 or wider.
        pieces: old ids of each new token; one id copies its row.
    """
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    counts = torch.tensor([len(ids) for ids in pieces], device=embeddings.device)
    ids = torch.tensor([index for each in pieces for index in each], dtype=torch.long, device=embeddings.device)
    owner = torch.arange(len(pieces), device=embeddings.device).repeat_interleave(counts)
    wide = embeddings.to(dtype)
    sums = wide.new_zeros(len(pieces), *wide.shape[1:]).index_add_(0, owner, wide[ids])
    shape = (-1, *[1] * (wide.dim() - 1))
    found = torch.where(counts.view(shape) > 0, sums / counts.clamp(min=1).view(shape), wide.mean(0))
    return found.to(embeddings.dtype)


def old_pieces(
    tokenizer: Any, new_tokenizer: Any, *, roles: Roles | str | None = None, new_roles: Roles | str | None = None
) -> list[list[int]]:
    """The old ids that stand for each new token.

    Args:
        tokenizer: the old one, byte-level or SentencePiece.
        new_tokenizer: the new one.
        roles: the old tokenizer's special tokens by role, or their family.
        new_roles: the new one's.

    Returns:
        by new id: a special token's counterpart by role, else the old token of the same name, else the old pieces of
        its name; any other token's twin of the same bytes, else its old pieces.
    """
    forms, old_special = byte_forms(tokenizer), special_ids(tokenizer)
    same = {form: index for index, form in _rarest_first(tokenizer, forms) if index not in old_special}
    names, played = tokenizer.get_vocab(), _counterparts(tokenizer, new_tokenizer, roles, new_roles)
    new_forms, new_special = byte_forms(new_tokenizer), special_ids(new_tokenizer)
    cut, found = _cutter(tokenizer), list[list[int]]([] for _ in range(max(new_forms) + 1))
    for index, form in new_forms.items():
        twin = same.get(form)
        if index in new_special:
            twin = names.get(played.get(form, form))
        found[index] = cut(form) if twin is None else [twin]
    return found


def _rarest_first(tokenizer: Any, forms: Mapping[int, str]) -> list[tuple[int, str]]:
    """Id and form of each token, those that stand for a single byte where no piece fits before pieces of that form."""
    spare = {index for token, index in tokenizer.get_vocab().items() if token.startswith("<0x")}
    return sorted(forms.items(), key=lambda pair: (pair[0] not in spare, pair[0]))


def _counterparts(
    tokenizer: Any, new_tokenizer: Any, roles: Roles | str | None, new_roles: Roles | str | None
) -> dict[str, str]:
    """New special token to the old one of its role; a tokenizer's attributes decide before the tables."""
    found: dict[str, str] = {}
    pairs = [(getattr(new_tokenizer, name), getattr(tokenizer, name)) for name in SPECIAL]
    old, new = roles_of(roles, tokenizer), roles_of(new_roles, new_tokenizer)
    pairs += [(tokens[0], old[role][0]) for role, tokens in new.items() if role in old]
    for ours, theirs in pairs:
        if ours is not None and theirs is not None:
            found.setdefault(str(ours), str(theirs))
    return found


def _cutter(tokenizer: Any) -> Callable[[str], list[int]]:
    """Cuts a string of bytes into the tokenizer's pieces, without its pre-tokenizer."""
    model, pieces, names = tokenizer.backend_tokenizer.model, sentence_pieces(tokenizer), tokenizer.get_vocab()
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def cut(form: str) -> list[int]:
        if not pieces:
            return [piece.id for piece in model.tokenize(form)]
        raw = bytes(bytes_of[letter] for letter in form if letter in bytes_of)
        try:
            return [piece.id for piece in model.tokenize(raw.decode().replace(" ", "▁"))]
        except UnicodeDecodeError:
            return [names[name] for name in (f"<0x{byte:02X}>" for byte in raw) if name in names]

    return cut


def fvt(
    model: PreTrainedModel,
    tokenizer: Any,
    new_tokenizer: Any,
    *,
    texts: Any = None,  # noqa: ARG001  # the part's signature
    roles: Roles | str | None = None,
    new_roles: Roles | str | None = None,
) -> PreTrainedModel:
    """The model with the new tokenizer, input and output embeddings made of the old ones; start of a student.

    Args:
        model: any with token embeddings; left as it is.
        tokenizer: the model's, byte-level or SentencePiece.
        new_tokenizer: byte-level or SentencePiece.
        texts: not used.
        roles: the old special tokens by role, or the name of their family; None: what the tokenizer calls them.
        new_roles: the new ones'.

    Returns:
        a new model; its config and generation config have the new vocabulary's size and special ids.

    Raises:
        ConfigurationError: for a tokenizer of another kind, or one that has more tokens than the model.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if max(tokenizer.get_vocab().values()) >= size:
        raise ConfigurationError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds only {size}: they do not belong together."
        )
    pieces = old_pieces(tokenizer, new_tokenizer, roles=roles, new_roles=new_roles)
    made = copy.deepcopy(model)
    made.resize_token_embeddings(len(pieces), mean_resizing=False)
    with torch.no_grad():
        _write(model.get_input_embeddings(), made.get_input_embeddings(), pieces)
        _write(model.get_output_embeddings(), made.get_output_embeddings(), pieces)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for settings in (made.config, made.config.get_text_config(), getattr(made, "generation_config", None)):
            if settings is not None:
                setattr(settings, name, getattr(new_tokenizer, name))
    if getattr(made.get_input_embeddings(), "padding_idx", None) is not None:
        made.get_input_embeddings().padding_idx = new_tokenizer.pad_token_id
    return made


def _write(old: nn.Module | None, new: nn.Module | None, pieces: Sequence[Sequence[int]]) -> None:
    for name in ("weight", "bias"):
        value, target = getattr(old, name, None), getattr(new, name, None)
        if value is not None and target is not None:
            target.copy_(average(value, pieces))


def byte_tokenizer(tokenizer: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes, and the special tokens of the given one behind them."""
    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    named = {name: getattr(tokenizer, name) for name in SPECIAL if getattr(tokenizer, name) is not None}
    others = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    made.add_special_tokens(list(dict.fromkeys([*map(str, named.values()), *others])))
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def expanded(
    model: PreTrainedModel,
    tokenizer: Any,
    new_tokenizer: Any,
    *,
    longest: int = 16,
    roles: Roles | str | None = None,
    new_roles: Roles | str | None = None,
) -> ExpandedInputForCausalLM:
    """`fvt`, and at each new token the old embedding of the longest old token that ends there is added; for bytes.

    Args:
        model: a causal language model; left as it is.
        tokenizer: the model's.
        new_tokenizer: its tokens are to be short: bytes.
        longest: new tokens that an old one may consist of; longer ones are not looked for.
        roles: as `fvt`.
        new_roles: as `fvt`.

    Raises:
        ConfigurationError: as `fvt`, and if no old token can be spelled.
    """
    inner = fvt(model, tokenizer, new_tokenizer, roles=roles, new_roles=new_roles)
    known = _spelled(tokenizer, new_tokenizer, longest)
    config = ExpandedInputConfig(text_config=inner.config, expanded_size=len(known) + 1, longest=longest)
    made: ExpandedInputForCausalLM = ExpandedInputForCausalLM(config).to(inner.dtype)
    made.inner.load_state_dict(inner.state_dict())
    made.generation_config = copy.deepcopy(inner.generation_config)
    made.fill(model.get_input_embeddings().weight.detach(), known)
    return made


def _spelled(tokenizer: Any, new_tokenizer: Any, longest: int) -> Mapping[int, int]:
    """Hash of its spelling in new tokens to old id, of all old tokens that are short enough."""
    special, cut = special_ids(tokenizer), _cutter(new_tokenizer)
    found = {
        suffix_hash(ids): index
        for index, form in _rarest_first(tokenizer, byte_forms(tokenizer))
        if index not in special and 0 < len(ids := cut(form)) <= longest
    }
    if not found:
        raise ConfigurationError(f"no token of the old tokenizer is spelled by at most {longest} of the new one.")
    return found
