"""Overlap of predicted and true regions in images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_compress.errors import MismatchError

from ._base import Offline

Counts = NDArray[np.float64]


class MeanIou(Offline):
    """Intersection over union of each class's pixels over all images, and its mean over the classes, in [0, 1].

    Args of `compute`: predictions and references, maps (height, width) of class ids, each image of its own size;
    `num_labels`; `ignore_index`: pixels of that reference do not count; `nan_to_num`: what stands for a class that
    occurs nowhere, which is NaN by class, and left out of a mean, without it; `label_map`: {old id: new id} of
    references; `reduce_labels`: 0 is background, ignored as 255, and the other ids count down by one.

    Returns:
        `mean_iou`, `mean_accuracy` (mean of the classes' recall), `overall_accuracy` (of the pixels), and by class
        `per_category_iou`, `per_category_accuracy` (num_labels,). A predicted id beyond `num_labels` is a wrong pixel
        of no class.

    Everingham et al.: The PASCAL Visual Object Classes Challenge, IJCV 88(2), 2010; names and treatment of classes as
    in the online metric, which follows MMSegmentation.

    Raises:
        MismatchError: if maps of one image differ in size, or no pixel counts.
    """

    INPUTS = "predictions: (height, width) class ids of an image; references: the same"
    FEATURES = datasets.Features(
        {
            "predictions": datasets.List(datasets.List(datasets.Value("int32"))),
            "references": datasets.List(datasets.List(datasets.Value("int32"))),
        }
    )

    def score(
        self,
        *,
        predictions: Sequence[Any],
        references: Sequence[Any],
        num_labels: int,
        ignore_index: int,
        nan_to_num: float | None = None,
        label_map: Mapping[int, int] | None = None,
        reduce_labels: bool = False,
    ) -> dict[str, float | Counts]:
        both, predicted, true = (np.zeros(num_labels) for _ in range(3))
        for image, (given, truth) in enumerate(zip(predictions, references, strict=True)):
            found, wanted = np.asarray(given, np.int64), _relabelled(truth, label_map, reduce_labels)
            if found.shape != wanted.shape:
                raise MismatchError(
                    f"mean_iou: image {image} is predicted as {found.shape} and labelled as {wanted.shape} pixels. "
                    "Resize the logits to the label's size first."
                )
            counts = wanted != ignore_index
            found, wanted = found[counts], wanted[counts]
            both += _histogram(wanted[found == wanted], num_labels)
            predicted += _histogram(found, num_labels)
            true += _histogram(wanted, num_labels)
        if not true.sum():
            raise MismatchError(
                f"mean_iou: no pixel has a class from 0 to {num_labels - 1} after {ignore_index} is ignored. "
                "Check num_labels, ignore_index and reduce_labels."
            )
        with np.errstate(invalid="ignore"):  # 0/0 of a class that occurs nowhere, which a mean leaves out
            iou, accuracy = both / (predicted + true - both), both / true
        result: dict[str, float | Counts] = {
            "mean_iou": float(np.nanmean(iou)),
            "mean_accuracy": float(np.nanmean(accuracy)),
            "overall_accuracy": float(both.sum() / true.sum()),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }
        if nan_to_num is not None:
            result |= {name: np.nan_to_num(each, nan=nan_to_num) for name, each in result.items() if "per_" in name}
        return result


def _relabelled(truth: Any, label_map: Mapping[int, int] | None, reduce_labels: bool) -> NDArray[np.int64]:
    given = np.array(truth, np.int64)
    labels = given.copy()
    for old, new in (label_map or {}).items():
        labels[given == old] = new
    if reduce_labels:
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    return labels


def _histogram(ids: NDArray[np.int64], num_labels: int) -> Counts:
    known = ids[(ids >= 0) & (ids < num_labels)]
    return np.bincount(known, minlength=num_labels).astype(np.float64)
