"""A drafter of one layer that predicts a language model's next feature, so that a forward of it gives several tokens.

Gui, Xiao, Su, Chen: Boosting Lossless Speculative Decoding via Feature Sampling and Partial Alignment Distillation,
2024, arXiv:2408.15562; the framework is EAGLE's (Li et al., arXiv:2401.15077 and 2406.16858).

f_i is the target's feature of token x_i, as its head receives it, e its embedding of x_{i+1}:

    feature sampling:  h0 = W [e ; f_i] + b,  h = h0 + W_down( SiLU(W_gate e) ∘ (W_up RMSNorm(h0)) )
    layer:             a = h + attention(h),  [predict ; regress] = [a ; a] + W2_down( SiLU(W2_gate m) ∘ (W2_up m) ),
                       m = RMSNorm(a)
    v = mean over positions of mean over features of SmoothL1( regress_i, f_{i+1} )
    c = - mean over positions of Σ_x softmax(head(f_{i+1}))[x] · log softmax(head(predict_i))[x]
    L = v + 0.1 c

Head and embedding are the target's and frozen, its features are detached; what the drafter reads of them in training
gets noise (U(0,1) - 0.5) · 0.2 · 512 / length. A position is scored where x_i is labelled and x_{i+1} is there; a row's
first token is not, as its label is nobody's target. Without feature sampling and with one output for both it is EAGLE.

    drafter = fspad(target)                                      # train it: DistillCallback(target, "fspad")
    target.generate(**inputs, custom_generate=FSPADDecoding(drafter))

Decoding is EAGLE-2's: the drafter goes on from its own `regress`, a tree grows where the product of the drafted
probabilities is highest, and one forward of the target scores all of it. At each node on the accepted path the token
is chosen from the target's own scores, by argmax or by a draw, and the next node is the drafted one of that token, if
there is one. So every token is one of plain decoding: greedy output is equal token for token, sampling draws from the
same distributions, and from the same seed the same tokens. Where scores differ by no more than rounding they may turn,
because a tree is added up in another order than one token: not seen in float32, common in half precision.

Differences from the authors' code: it divides by the scored positions + 1e-5, and it samples by rejecting the drafted
tokens in turn, which is the same as drawing first where no draw decides what is drafted. They train with AdamW
(β 0.9 and 0.95, 5e-5, 2,000 steps of warm-up, batches of 4, 20 epochs) and clip each gradient's values at 0.5, where a
Trainer clips their norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_compress.errors import ConfigurationError, MismatchError, UnknownNameError
from hf_compress.heads import CAPS, FACTORS
from hf_compress.objective import IGNORED, Inputs, Needs, Objective, Signals, Sizes, Step, check_unpacked, tokens
from hf_compress.registry import Method
from hf_compress.taps import Taps, evaluating, unwrap, watching
from hf_compress.tree_decoding import CachedModel, check_call, check_model, positions
from hf_compress_plugins.language._feature_drafting import Draft, FeatureDrafter
from hf_compress_plugins.language._modeling_fspad import FSPADDrafter, FSPADDrafterConfig

FEATURES = "hidden:-1"
"""What the head receives."""
OF_THE_TARGET = ("vocab_size", "hidden_size", "tie_word_embeddings", "num_hidden_layers")
TAKEN = (
    *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Settings that a drafter takes from its target unless they are given."""


@dataclass(frozen=True, kw_only=True)
class FSPADConfig:
    """Hyper-parameters of the objective; the authors' defaults."""

    feature_weight: float = 1.0
    """Of v."""
    token_weight: float = 0.1
    """Of c."""
    noise: float = 0.2
    """Width of the noise for a text of 512 tokens."""

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.feature_weight, self.token_weight, self.noise)):
            raise ConfigurationError(f"fspad: weights and noise must be finite and at least 0, got {self}.")


def scored(labels: Tensor, real: Tensor) -> Tensor:
    """(batch, time - 1) bool: whether what is drafted from feature i and token i + 1 is compared.

    Args:
        labels: (batch, time) -100 where a token is not of the answer.
        real: (batch, time) bool, False on padding.
    """
    follows = F.pad(real[:, :-2], (1, 0), value=False)
    return (labels[:, :-1] != IGNORED) & real[:, :-1] & real[:, 1:] & follows


def noisy(features: Tensor, real: Tensor, *, scale: float, generator: torch.Generator) -> Tensor:
    """Features with uniform noise of ± scale · 256 / length; what is drawn for a token does not depend on padding.

    Args:
        features: (batch, time, width).
        real: (batch, time) bool; a row's length is its real tokens.
        scale: width of the noise for 512 tokens.
        generator: of the draws.
    """
    lengths = real.sum(1)
    draws = torch.rand(int(lengths.sum()), features.shape[-1], generator=generator, device=features.device) - 0.5
    added = torch.zeros_like(features)
    added[real] = (draws * (scale * 512) / lengths.repeat_interleave(lengths)[:, None]).to(features.dtype)
    return features + added


def feature_loss(regress: Tensor, features: Tensor) -> Tensor:
    """(position,) mean over features of SmoothL1.

    Args:
        regress: (position, width) of the drafter.
        features: (position, width) of the target, detached here.
    """
    dtype = torch.promote_types(regress.dtype, torch.float32)
    return F.smooth_l1_loss(regress.to(dtype), features.detach().to(dtype), reduction="none").mean(-1)


def token_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(position,) nats, cross-entropy of the drafted distribution under the target's.

    Args:
        student_logits: (position, vocab) the head of what was drafted.
        teacher_logits: (position, vocab) the head of the target's feature, detached here.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    wanted = teacher_logits.detach().to(dtype).softmax(-1)
    return -(wanted * student_logits.to(dtype).log_softmax(-1)).sum(-1)


class FSPAD(Objective):
    """The target's features and distributions one token ahead, for a drafter made by `fspad`."""

    Config = FSPADConfig
    config: FSPADConfig
    task_weight: ClassVar[float | None] = 0.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(student=frozenset(), teacher=frozenset({FEATURES}), mean_over="examples")

    def count(self, inputs: Inputs) -> int | None:
        return int(scored(_labels(inputs), tokens(inputs)).sum())

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        check_unpacked("fspad", signals.inputs)
        drafter, ids, real = unwrap(step.student), signals.inputs["input_ids"], signals.tokens
        features = signals.teacher[FEATURES]
        _check(drafter, features, ids)
        head, settings = drafter.lm_head, self.config
        features = features.masked_fill(~real[..., None], 0.0).to(head.weight.dtype)  # half would round the noise
        given = features
        if drafter.training and settings.noise:
            given = noisy(features, real, scale=settings.noise, generator=step.generator)
        drafted = step.run_student(
            grad=torch.is_grad_enabled(),
            input_ids=ids[:, 1:],
            hidden_states=given[:, :-1] if ids.shape[1] > 1 else None,  # of one token nothing is drafted
            attention_mask=(real[:, :-1] & real[:, 1:]).long(),
        )
        here = scored(_labels(signals.inputs), real)
        wanted = features[:, 1:][here]
        with torch.no_grad():
            teacher_logits = F.linear(wanted, head.weight)
        example = here.nonzero()[:, 0]
        found = {
            "features": settings.feature_weight * feature_loss(drafted.regress[here], wanted),
            "tokens": settings.token_weight * token_loss(head(drafted.predict[here].to(wanted.dtype)), teacher_logits),
        }
        return {name: value.new_zeros(len(ids)).index_add(0, example, value) for name, value in found.items()}


def _labels(inputs: Inputs) -> Tensor:
    """Data without labels is an answer as a whole."""
    labels = inputs.get("labels")
    return inputs["input_ids"] if labels is None else labels


def _check(drafter: Any, features: Tensor, ids: Tensor) -> None:
    config = getattr(drafter, "config", None)
    if getattr(config, "model_type", None) != FSPADDrafterConfig.model_type:
        raise MismatchError(f"fspad: the student must come from fspad(target, …), got a {type(drafter).__name__}.")
    if features.shape != (*ids.shape, drafter.config.hidden_size):
        raise MismatchError(
            f"fspad: features {tuple(features.shape)} for tokens {tuple(ids.shape)} and a drafter of width "
            f"{drafter.config.hidden_size}. The teacher must be the language model that the drafter was made from."
        )


def fspad(teacher: PreTrainedModel, *, config: Mapping[str, Any] | None = None) -> FSPADDrafter:
    """An untrained drafter for a language model, with copies of its embedding and head.

    Args:
        teacher: the target: embedding, blocks, and a head that is one matrix, as of a Llama.
        config: sizes other than the target's, `feature_sampling=False`, `partial_alignment=False`.

    Raises:
        MismatchError: for a target without these sizes, or whose logits are not its head times its features.
        UnknownNameError: for a setting that a drafter does not have.
    """
    text = teacher.config.get_text_config(decoder=True)
    head = _head(teacher, text)
    embedding = teacher.get_input_embeddings().weight
    settings = {name: getattr(text, name) for name in TAKEN if getattr(text, name, None) is not None}
    rope = getattr(text, "rope_parameters", None) or {}
    if "rope_type" in rope and "partial_rotary_factor" not in rope:
        settings["rope_parameters"] = dict(rope)
    known = FSPADDrafterConfig().to_dict().keys() - set(OF_THE_TARGET)
    for name in config or {}:
        if name not in known:
            raise UnknownNameError("setting of a drafter", name, known)
    sizes = {"vocab_size": embedding.shape[0], "hidden_size": embedding.shape[1]}
    tied = head.data_ptr() == embedding.data_ptr()
    drafter = FSPADDrafter(FSPADDrafterConfig(**settings | dict(config or {}) | sizes, tie_word_embeddings=tied))
    with torch.no_grad():
        drafter.embed_tokens.weight.copy_(embedding)
        drafter.lm_head.weight.copy_(head)
    return drafter


def _head(teacher: Any, text: Any) -> Tensor:
    """(vocab, width) the matrix that makes logits of features: shown on a few tokens."""
    module, missing = teacher.get_output_embeddings(), [name for name in TAKEN[:2] if not hasattr(text, name)]
    if getattr(module, "weight", None) is None:
        missing.insert(0, "output embedding")
    if missing:
        raise MismatchError(
            f"fspad: the target must be a language model as a Llama is one; {type(teacher).__name__} has no "
            f"{' and no '.join(missing)}."
        )
    taps = Taps(teacher, {FEATURES, "logits"}, 0)
    try:
        with torch.no_grad(), evaluating(teacher), watching(taps):
            output = teacher(input_ids=torch.arange(4, device=teacher.device)[None] % len(module.weight))
        found = taps.read(output)
    finally:
        taps.remove()
    weight: Tensor = module.weight
    logits, plain = found["logits"], F.linear(found[FEATURES], weight)
    off = (logits - plain).abs().max() > (1e-3 if weight.dtype == torch.float32 else 2e-2) * plain.abs().max()
    scaled = [name for name in (*CAPS, *FACTORS) if getattr(text, name, None) not in (None, 1.0)]
    if off or scaled:
        raise MismatchError(
            f"fspad: the logits of {type(teacher).__name__} are not its head times its last hidden state "
            f"({', '.join(scaled) or 'a bias, a scale or a cap'}), which a drafter would be taught. Use another target."
        )
    return weight


class FSPADDecoding:
    """What `generate(custom_generate=…)` calls, greedy or sampling; one row, no cache of your own.

    Args:
        drafter: made by `fspad` from the model that generates, and trained.
        depth: how often the drafter goes on from its own drafts; the longest path has one token more.
        top_k: tokens that a level expands, and into how many each; 1: a chain.
        nodes: of the tree that the target scores, the last token of the text among them.

    Attributes:
        each: of the last call, tokens that each forward of the target gave, its prompt's not counted.
    """

    def __init__(self, drafter: PreTrainedModel, *, depth: int = 5, top_k: int = 8, nodes: int = 63) -> None:
        if depth < 0 or top_k < 1 or nodes < 1:
            raise ConfigurationError(
                f"fspad: depth must be at least 0, top_k and nodes at least 1, got {depth}, {top_k} and {nodes}."
            )
        if getattr(drafter.config, "_attn_implementation", None) not in ("sdpa", "eager"):
            raise ConfigurationError("fspad: the drafter's attention takes no tree; set_attn_implementation('sdpa').")
        self.drafter, self.depth, self.top_k, self.nodes = drafter, depth, top_k, nodes
        self.each: list[int] = []

    @property
    def forwards(self) -> int:
        """Of the target in the last call, its prompt not counted."""
        return len(self.each)

    @property
    def accepted(self) -> int:
        """Tokens of the last call."""
        return sum(self.each)

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """(1, time) prompt and its continuation.

        Raises:
            ConfigurationError: for more than one row, padding, beams, other inputs than ids, more than ids asked for,
                or a model whose attention a tree does not fit.
            MismatchError: for a model of another width or vocabulary than the drafter's target.
        """
        check_model("fspad", model, generation_config.max_length)
        check_call("fspad", input_ids, logits_processor, generation_config, kwargs, sampling=True)
        self._check_pair(model)
        self.each = []
        self.drafter.to(model.device)
        taps = Taps(model, {FEATURES}, 0)
        try:
            with evaluating(self.drafter):
                return self._decode(
                    _Chooser(logits_processor, stopping_criteria, sample=generation_config.do_sample),
                    taps, input_ids.to(model.device), min(positions(model), generation_config.max_length - 1),
                )  # fmt: skip
        finally:
            taps.remove()

    def _decode(self, chooser: _Chooser, taps: Taps, sequence: Tensor, limit: int) -> Tensor:
        drafting = FeatureDrafter(self.drafter)
        with watching(taps):
            target = CachedModel(taps.model, sequence)
        if target.length:
            drafting.read(taps.record[FEATURES][0], sequence[0, 1:])
        while True:
            length, root = sequence.shape[1], int(sequence[0, -1])
            levels = min(self.depth + 1, limit - length)
            draft = drafting.draft(
                root, levels=levels, top_k=self.top_k, nodes=self.nodes, device=sequence.device
            )  # fmt: skip
            with watching(taps):
                logits = target.score(draft.ids, draft)
            sequence, nodes, ended = chooser.follow(draft, logits, sequence)
            self.each.append(sequence.shape[1] - length)
            if ended:
                return sequence
            target.keep(nodes)
            drafting.read(taps.record[FEATURES][0, nodes], sequence[0, length:])

    def _check_pair(self, model: Any) -> None:
        own, text = self.drafter.config, model.config.get_text_config(decoder=True)
        for name in ("hidden_size", "vocab_size"):
            if getattr(own, name) != getattr(text, name, None):
                raise MismatchError(
                    f"fspad: the drafter's {name} is {getattr(own, name)}, the model's {getattr(text, name, None)}. "
                    "Generate with the model that the drafter was made from."
                )


class _Chooser:
    """Chooses tokens as `generate` does, from scores that a forward gave for all of a tree."""

    def __init__(self, processors: Any, criteria: Any, *, sample: bool) -> None:
        self.processors, self.criteria, self.sample = processors, criteria, sample

    def follow(self, draft: Draft, logits: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Along the tree as long as the chosen token was drafted.

        Args:
            draft: the tree.
            logits: (node, vocab) the target's.
            sequence: (1, time) ids up to the root.

        Returns:
            the sequence with the chosen tokens, the nodes that were passed, and whether it has ended.
        """
        node: int | None = 0
        passed = list[int]()
        while node is not None:
            passed.append(node)
            scores = self.processors(sequence, logits[node][None].to(copy=True, dtype=torch.float32))
            chosen = torch.multinomial(scores.softmax(-1), 1) if self.sample else scores.argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, chosen], 1)
            if bool(self.criteria(sequence, None).all()):
                return sequence, sequence.new_tensor(passed), True
            node = draft.child(node, int(chosen))
        return sequence, sequence.new_tensor(passed), False


AutoConfig.register("fspad_drafter", FSPADDrafterConfig, exist_ok=True)
AutoModel.register(FSPADDrafterConfig, FSPADDrafter, exist_ok=True)

METHOD = Method(
    title="Boosting Lossless Speculative Decoding via Feature Sampling and Partial Alignment Distillation",
    paper="arXiv:2408.15562",
    authors="Lujun Gui, Bin Xiao, Lei Su, Weipeng Chen",
    year=2024,
    summary="A one-layer drafter of a language model's features, and decoding with it whose output is unchanged.",
    bibtex="""@misc{gui2024fspad,
  title = {Boosting Lossless Speculative Decoding via Feature Sampling and Partial Alignment Distillation},
  author = {Gui, Lujun and Xiao, Bin and Su, Lei and Chen, Weipeng},
  year = {2024}, eprint = {2408.15562}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity", "divergence"),
    knowledge=("feature",),
    tasks=("text-generation",),
    objective=FSPAD,
    student=fspad,
    generation=FSPADDecoding,
)
