"""DMAE's claim: a small masked autoencoder gains from a large one's states, with few visible patches too."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.vision.dmae import DMAE, masked_student
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from hf_compress import DistillCallback

from . import Claim
from . import _digits as digits

SIDE, PATCH, LABELLED = 16, 4, 100
TEACHER_STEPS, STEPS, TUNING = 2000, 1500, 150
METHODS = ("reconstruction alone", "aligned")


def autoencoder(width: int, layers: int, seed: int, mask: float = 0.75) -> ViTMAEForPreTraining:
    """A masked autoencoder on sixteen patches; its decoder has two layers of the width."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        small = ViTMAEConfig(
            image_size=SIDE, patch_size=PATCH, num_channels=1, mask_ratio=mask, hidden_size=width,
            num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * width, decoder_hidden_size=width,
            decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=2 * width,
        )  # fmt: skip
        return masked_student(ViTMAEForPreTraining(small))


def enlarged(pixels: Tensor) -> Tensor:
    """(image, 1, side, side)."""
    return nn.functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear")


def unlabelled(batch: Any) -> dict[str, Tensor]:
    """Images alone."""
    return {"pixel_values": enlarged(torch.stack([row["pixel_values"] for row in batch]))}


def labelled(batch: Any) -> dict[str, Tensor]:
    """Images and labels."""
    found = digits.collate(batch)
    return found | {"pixel_values": enlarged(found["pixel_values"])}


@cache
def teacher() -> ViTMAEForPreTraining:
    """Six layers of width 96, pre-trained on all training images with a quarter of the patches visible."""
    return digits.train(
        autoencoder(96, 6, 100), steps=TEACHER_STEPS, seed=100, data_collator=unlabelled, learning_rate=1e-3
    )


def features(model: ViTMAEForPreTraining) -> Tensor:
    """(image, dim) of all images: the mean over all patches."""
    encoder = copy.deepcopy(model).eval().vit
    encoder.config.mask_ratio = 0.0
    with torch.no_grad():
        states: Tensor = encoder(enlarged(digits.images()[0])).last_hidden_state
    return states[:, 1:].mean(1)


def probed(model: ViTMAEForPreTraining) -> float:
    """Accuracy of a logistic regression on 100 labelled images; mean over twelve parts of the training images."""
    states, labels = features(model).numpy(), digits.images()[1].numpy()
    found = []
    for start in range(0, digits.TRAIN, LABELLED):
        part, test = slice(start, start + LABELLED), slice(digits.TRAIN, None)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(states[part], labels[part])
        found.append(float(probe.score(states[test], labels[test])))
    return sum(found) / len(found)


def tuned(model: ViTMAEForPreTraining, seed: int) -> float:
    """Accuracy after fine-tuning the encoder on the first 100 labelled images."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("id2label", "label2id")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = ViTForImageClassification(ViTConfig(**config, num_labels=10))
    classifier.vit.load_state_dict(model.vit.state_dict(), strict=False)
    digits.train(
        classifier, steps=TUNING, seed=seed, data=digits.rows()[:LABELLED], data_collator=labelled, learning_rate=1e-3
    )
    pixels, labels = (tensor[digits.TRAIN :] for tensor in digits.images())
    with torch.no_grad():
        return float((classifier.eval()(enlarged(pixels)).logits.argmax(-1) == labels).float().mean())


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student, pre-trained without labels."""
    method, masked = variant.split(", ")
    mask = float(masked.removesuffix(" masked"))
    student, target = autoencoder(48, 3, seed, mask), copy.deepcopy(teacher())
    target.config.mask_ratio = mask
    callbacks = [] if method == METHODS[0] else [DistillCallback(target, DMAE(student_layer=2, teacher_layer=4))]
    digits.train(student, steps=STEPS, seed=seed, data_collator=unlabelled, learning_rate=1e-3, callbacks=callbacks)
    return {
        "accuracy of a probe": probed(student),
        "accuracy fine-tuned": tuned(student, seed),
        "accuracy of a probe of the teacher": probed(teacher()),
    }


CLAIM = Claim(
    published="An MAE ViT-L gives a ViT-B 84.0 % on ImageNet, 1.2 points above distilling the fine-tuned ViT-L; 83.6 % "
    "with 95 % of the patches masked.",
    check=f"Digits at {SIDE} x {SIDE} in sixteen patches, 1,200 images without labels. Teacher: an MAE of 6 layers of "
    f"width 96, {TEACHER_STEPS} steps of 64 images. Students: 3 layers of width 48, {STEPS} steps, alone or with block "
    f"2 aligned to the teacher's block 4. Then a logistic regression on {LABELLED} labels (mean over twelve draws), "
    f"and fine-tuning on {LABELLED}, {TUNING} steps.",
    expected="The aligned student above the other, with nine tenths masked too.",
    variants=tuple(f"{method}, {mask} masked" for mask in (0.75, 0.9) for method in METHODS),
    run=run,
)
