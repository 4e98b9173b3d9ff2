"""`--multi-scale`: another image size for every batch."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from utils.checks import round_up


def largest_side(imgsz: int, stride: int) -> int:
    """Returns the largest side that `rescaled` makes of a batch, in pixels."""
    return (imgsz + imgsz // 2 + stride - 1) // stride * stride


def rescaled(images: Tensor, imgsz: int, stride: int, seed: int, iteration: int) -> Tensor:
    """Resizes a batch (B, 3, H, W) to a random size between half and one and a half times the image side.

    The longer side is two strides at least: of a single cell of a single image batch norm can reckon no variance.

    Args:
        images: float, any memory format.
        imgsz: the run's image side in pixels.
        stride: sides become multiples of it.
        seed: the run's.
        iteration: number of the batch since the run's start; with the seed it settles the size.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1, iteration])))
    side = int(generator.integers(imgsz // 2, imgsz + imgsz // 2 + stride)) // stride * stride
    side = max(side, 2 * stride)
    factor = side / max(images.shape[2:])
    if factor == 1:
        return images
    shape = [round_up(length * factor, stride) for length in images.shape[2:]]
    return F.interpolate(images, size=shape, mode="bilinear", align_corners=False)
