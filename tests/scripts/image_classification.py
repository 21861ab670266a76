"""As transformers' examples/pytorch/image-classification/run_image_classification.py: images by a transform."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _small import SIZES, arguments
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, ViTConfig, ViTForImageClassification

from hf_compress import DistillCallback, shrink


def main(output: str, *, distil: bool) -> Trainer:
    config = ViTConfig(image_size=8, patch_size=4, num_hidden_layers=3, num_labels=2, **SIZES)
    teacher = ViTForImageClassification(config)
    pictures = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3), dtype=np.uint8)
    data = Dataset.from_dict({"image": pictures.tolist(), "labels": [0, 1] * 8})

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        pixels = [torch.tensor(image, dtype=torch.float32).permute(2, 0, 1) / 255 for image in rows["image"]]
        return {"pixel_values": pixels, "labels": rows["labels"]}

    data.set_transform(transform)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    def compute_metrics(predictions: Any) -> dict[str, float]:
        return {"accuracy": float((np.argmax(predictions.predictions, 1) == predictions.label_ids).mean())}

    trainer = Trainer(
        model=shrink(teacher, layers=1),
        args=arguments(output, remove_unused_columns=False),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        compute_metrics=compute_metrics,
        callbacks=[DistillCallback(teacher)] if distil else [],
    )
    trainer.train()
    return trainer
