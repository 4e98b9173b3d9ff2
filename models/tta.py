"""Test-time augmentation: a model looks at every image in three sizes, once mirrored, and all rows go to NMS.

The first view leaves out the coarsest level, whose large objects the smallest view finds as well, and the last view
the finest level, whose small objects the first has found. Takes any model with a detection head; on exported ones it
does not work, since their heads' levels cannot be told apart. Not here: NMS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class View(NamedTuple):
    """How an image is shown to the model: its sides times `scale`, left and right swapped where `mirrored`."""

    scale: float
    mirrored: bool = False


VIEWS = (View(1.0), View(0.83, mirrored=True), View(0.67))
PAD_VALUE = 0.447  # about the mean of photographs


def augmented_rows(predict: Callable[[Tensor], Tensor], images: Tensor, strides: Sequence[float] | Tensor) -> Tensor:
    """Predicts from every view of images.

    Args:
        predict: maps images (b, ch, h, w) to rows (b, n, 5 + nc) [x, y, w, h in px, objectness, class probabilities],
            level by level in the order of `strides`.
        images: (b, ch, h, w), values 0 to 1, h and w multiples of the largest stride.
        strides: (nl,) pixels per cell of each level.

    Returns:
        The rows of all views (b, m, 5 + nc), boxes in px of `images`.
    """
    strides_px = [round(stride) for stride in torch.as_tensor(strides).tolist()]
    found = []
    for number, view in enumerate(VIEWS):
        seen = scaled(images.flip(3) if view.mirrored else images, view.scale, max(strides_px))
        levels = split_levels(predict(seen), seen.shape[2:], strides_px)
        if len(levels) > 1 and number == 0:
            del levels[strides_px.index(max(strides_px))]
        if len(levels) > 1 and number == len(VIEWS) - 1:
            del levels[strides_px.index(min(strides_px))]
        found += [in_image(rows, view, images.shape[3]) for rows in levels]
    return torch.cat(found, dim=1)


def scaled(images: Tensor, scale: float, multiple: int) -> Tensor:
    """Resizes images (b, ch, h, w) by `scale`, and pads them on the right and below to multiples of `multiple` px."""
    if scale == 1:
        return images
    sides = [side * scale for side in images.shape[2:]]
    height, width = (int(side) for side in sides)
    resized = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
    padded_height, padded_width = (math.ceil(side / multiple) * multiple for side in sides)
    return F.pad(resized, (0, padded_width - width, 0, padded_height - height), value=PAD_VALUE)


def split_levels(rows: Tensor, shape_hw: Sequence[int], strides_px: Sequence[int]) -> list[Tensor]:
    """Splits rows (b, n, 5 + nc) of images of height and width `shape_hw`, px, into those of each level."""
    cells = [math.prod(side // stride for side in shape_hw) for stride in strides_px]
    anchors_per_cell = rows.shape[1] // sum(cells)
    return list(rows.split([anchors_per_cell * count for count in cells], dim=1))


def in_image(rows: Tensor, view: View, width: int) -> Tensor:
    """Takes the boxes of rows (b, n, 5 + nc) from a view to the image of `width` px that it shows."""
    boxes_xywh = rows[..., :4] / view.scale
    if view.mirrored:
        boxes_xywh = torch.cat((width - boxes_xywh[..., :1], boxes_xywh[..., 1:]), dim=-1)
    return torch.cat((boxes_xywh, rows[..., 4:]), dim=-1)
