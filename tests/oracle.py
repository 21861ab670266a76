"""Authors' values and gradients, with a switch that `ci/oracles` uses to prove that each is really compared."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "oracles"

PERTURBED: list[tuple[str, str]] = []
"""(file, tensor) that `load` returns changed: by 1 % of its largest magnitude, integers by 1."""

INPUTS = {
    "taid": ("student_logits", "teacher_logits", "mask", "b1/mask", "update_only/loss_in"),
    "taid_repo_divergences": ("student_logits", "teacher_logits", "mask", "inf/*_logits"),
    "gkd_jsd": ("*_logits", "labels", "onpolicy/prompts", "onpolicy/prompt_attention_mask", "onpolicy/generated"),
    "minilm": ("attention_mask", "student_?", "teacher_?", "bert.input_ids", "bert.student.*", "bert.teacher.*"),
    "distilbert_triple": ("student_*", "teacher_*", "attention_mask", "mlm_labels"),
    "adaspec": ("*_logits", "labels"),
    "diswot": ("*_feat", "semantic.labels", "semantic.*_pooled", "semantic.*_fc", "semantic_eq.teacher_fc_grad"),
    "alm": (
        "input_ids_*",
        "chunk_matrix_*",
        "loss_mask_*",
        "space_mask_*",
        "teacher_hidden",
        "student_hidden",
        "teacher_logits",
        "student_logits",
    ),
    "token_recycling": ("E1", "E2", "bfs.adjacency"),
    "ff_g2m": ("*_logits", "labels", "idx_train", "edges_loop", "edges_no_loop"),
    "llmlingua2": ("filter.variation_rate", "filter.alignment_gap", "decide.token_probs"),
    "sid_edm": (
        *("true_?", "fake_?", "*_u", "*_normal", "*_eps", "*_alpha", "*_tmax", "da_real", "f_images", "da_images"),
        *("ga_images", "g_a1_images", "g_a12_images", "g_b1_images"),
    ),
    "sid_lsg": (
        *("G_?", "fake_?", "real_?", "emb", "fs_images", "*_noise", "*_alpha", "gen_*_timesteps", "fs_timesteps"),
        *("samp?_z", "samp?_upstream", "gen_*[!d]_images"),
    ),
    "dparallel": (
        *("*.input_ids", "*.prompt_lengths", "*.logits", "*.logits_rev", "*.masked", "*.masked_rev"),
        *("dec.x", "dec.mask_index"),
    ),
    "acm": (
        *("learners.*", "x", "teacher_out", "gated.choices", "stage2_table.errors", "stage3.gate_probs_?"),
        "stage3.gate_logits_?",
    ),
    "autodistil": ("attention_mask", "hidden_teacher", "*.hidden_student", "student.*", "teacher.[qkv]*"),
    "dm_codec": (
        *("?_feature", "??_feature", "?_lm", "??_lm", "?_sm", "??_sm", "dr?", "dg?", "rec_x", "rec_xhat"),
        *("rvq_x", "rvq_codebook?"),
    ),
    "dmae": ("imgs", "noise", "tokens", "pred", "feat_*", "proj_*"),
    "ofa_kd": ("*_logits", "labels", "soft_targets", "soft_mask"),
    "krr_st": ("net.*", "x_*", "y_*"),
    "sstoken": ("logits", "labels", "attn_mean_heads", "history_token_losses", "one_response/labels"),
    "aligndistil": ("*_logits", "labels"),
    "loyalty": ("student_probs", "teacher_probs"),
    "stochastok": ("ids",),
    "sinkd": ("*_logits",),
    "pld": ("*_logits", "labels"),
    "fspad": ("in/*", "w/*"),
    "margin_mse": (
        *("batch?.student_*", "batch?.teacher_*", "inter.student_*", "inter.teacher_*"),
        *("st.query", "st.pos", "st.neg?", "st.teacher_scores"),
    ),
    "dear": ("b?n?.student", "b?n?.teacher", "slide.*.relevance"),
    "distiller_mi_alpha": (
        *("*.scores", "*.log_baseline", "mlp.student_hidden", "mlp.teacher_hidden", "mlp.mask", "mlp.baseline.*"),
        *("mlp.critic.*", "simple.logits_?", "simple.teacher_hidden"),
    ),
    "distiller_pipeline_table": ("*",),
    "return_of_the_encoder": (
        "student_logits",
        "same_vocab.student_logits",
        "teacher_logits",
        "align.source_ids",
        "align.generated_ids",
    ),
    "mend": ("demo_ids", "query_*", "teacher_*", "kl.*_logits", "llm.*", "virtual_demo"),
    "eagle_objective": ("predict_features", "target_features", "head_weight", "loss_mask"),
}
"""Tensors of each file that are given to us, as patterns; all others are outputs and must be compared by a test."""

UNTESTED: dict[tuple[str, str], str] = {
    (
        "dparallel",
        "b2_bug.noisy*",
    ): "the authors' code writes one row's masks into all rows of a batch",
}
"""Outputs that no test compares, with the reason."""


def load(name: str) -> dict[str, Tensor]:
    """All tensors of an oracle file."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    for file, tensor in PERTURBED:
        if file == name:
            tensors[tensor] = perturb(tensors[tensor])
    return tensors


def perturb(tensor: Tensor) -> Tensor:
    """Changed as `PERTURBED` says; NaN stays NaN, a tensor of zeros, up to rounding, becomes 0.01."""
    if not tensor.is_floating_point():
        return tensor + 1
    finite = tensor[tensor.isfinite()]
    size = finite.abs().max() if len(finite) else torch.ones(())
    return tensor + 0.01 * (size if size > 1e-6 else 1.0)


def metadata(name: str) -> dict[str, Any]:
    """The file's metadata; values that are JSON are parsed."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        raw = file.metadata() or {}
    return {key: json.loads(value) if value.startswith(("{", "[")) else value for key, value in raw.items()}


def outputs(name: str) -> list[str]:
    """Names of the tensors that a test must compare."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        names = list(file.keys())
    return sorted(t for t in names if not any(fnmatch.fnmatchcase(t, pattern) for pattern in INPUTS[name]))


def reason(name: str, tensor: str) -> str | None:
    """Why that output is not compared, or None."""
    return next(
        (why for (file, pattern), why in UNTESTED.items() if file == name and fnmatch.fnmatch(tensor, pattern)), None
    )
