"""How often to show which image: weights of classes and images for `--image-weights`.

Images of classes that are rare, or on which the model does badly, are drawn more often; drawing is the loader's.
"""

from __future__ import annotations

import numpy as np


def class_weights(classes: np.ndarray, nc: int) -> np.ndarray:
    """Returns weights (nc,) float64 inverse to how often each class occurs among (M,) labels, summing to nc.

    A class without labels counts as one with a single label.
    """
    counts = np.bincount(classes.astype(np.int64), minlength=nc).astype(np.float64)
    inverse = 1 / np.maximum(counts, 1)
    return inverse / inverse.sum() * nc


def image_weights(
    classes: np.ndarray, offsets: np.ndarray, weights_of_classes: np.ndarray, maps: np.ndarray
) -> np.ndarray:
    """Returns how likely each image is to be drawn, relative to the others.

    Args:
        classes: (M,) class of every label, image by image.
        offsets: (N + 1,) int64, image i has the labels offsets[i] to offsets[i + 1].
        weights_of_classes: (nc,) from `class_weights`.
        maps: (nc,) mAP50-95 of each class at the last validation; zeros before the first.

    Returns:
        (N,) float64, 0 for an image without labels; all ones where no image has any weight.
    """
    nc = len(weights_of_classes)
    wanted = weights_of_classes * (1 - np.asarray(maps, dtype=np.float64)) ** 2 / nc
    image_of_label = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    weights = np.bincount(image_of_label, weights=wanted[classes.astype(np.int64)], minlength=len(offsets) - 1)
    return weights if weights.any() else np.ones_like(weights)
