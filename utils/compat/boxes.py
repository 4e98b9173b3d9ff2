"""Boxes, overlap and suppression by YOLOv5 6.1's conventions, over `utils.boxes` and `utils.nms`.

Boxes may have more columns, which are kept; `scale_coords` and `clip_coords` work in place. Arrays and tensors are
taken alike, and the same kind is returned, unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import boxes, nms
from utils.eval.coco import COCO80_TO_91

Array = Any  # np.ndarray or torch.Tensor


def _change_boxes(change: Callable[[Array], Array], x: Array) -> Array:
    """Returns `x` (..., 4 or more) with its first four columns taken through a function of boxes (n, 4)."""
    rows = x.reshape(-1, x.shape[-1])
    library = np if isinstance(x, np.ndarray) else torch
    return library.concatenate((change(rows[:, :4]), rows[:, 4:]), 1).reshape(x.shape)


def xyxy2xywh(x: Array) -> Array:
    """Corners to centre and size: (n, 4 or more), or one box (4,)."""
    return _change_boxes(boxes.xyxy2xywh, x)


def xywh2xyxy(x: Array) -> Array:
    """Centre and size to corners: (n, 4 or more), or one box (4,)."""
    return _change_boxes(boxes.xywh2xyxy, x)


def xywhn2xyxy(x: Array, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Array:
    """Normalised centre boxes (n, 4 or more) to corners in px of a w x h image that stands at (padw, padh)."""
    return _change_boxes(partial(boxes.xywhn2xyxy, w=w, h=h, padw=padw, padh=padh), x)


def xyxy2xywhn(x: Array, w: float = 640, h: float = 640, clip: bool = False, eps: float = 0.0) -> Array:
    """Corners (n, 4 or more) in px to normalised centre boxes; `clip` first limits them to the image less `eps`."""
    return _change_boxes(partial(boxes.xyxy2xywhn, w=w, h=h, clip=clip, eps=eps), x)


def xyn2xy(x: Array, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Array:
    """Normalised points (n, 2) to px of a w x h image that stands at (padw, padh)."""
    points = np.copy(x) if isinstance(x, np.ndarray) else x.clone()
    points[:, 0] = x[:, 0] * w + padw
    points[:, 1] = x[:, 1] * h + padh
    return points


def segment2box(segment: np.ndarray, width: int = 640, height: int = 640) -> np.ndarray:
    """Returns the box (4,) xyxy around those points of a polygon (k, 2) px that lie in the image; zeros for none."""
    inside = segment[((segment >= 0) & (segment <= (width, height))).all(axis=1)]
    return np.concatenate((inside.min(0), inside.max(0))) if len(inside) else np.zeros(4, segment.dtype)


def segments2boxes(segments: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the boxes (n, 4) xywh around n polygons (k, 2)."""
    corners = [np.concatenate((points.min(0), points.max(0))) for points in segments]
    return boxes.xyxy2xywh(np.array(corners).reshape(-1, 4))


def resample_segments(segments: Sequence[np.ndarray], n: int = 1000) -> list[np.ndarray]:
    """Returns the polygons (k, 2) with n points (n, 2) each."""
    return [boxes.resample_segment(points, n) for points in segments]


def scale_coords(
    img1_shape: Sequence[int], coords: Array, img0_shape: Sequence[int], ratio_pad: Sequence | None = None
) -> Array:
    """Takes corners from a letterboxed image back to the original and clips them, in place.

    Args:
        img1_shape: (height, width) of the letterboxed image.
        coords: (n, 4 or more), corners in the first four columns; changed.
        img0_shape: (height, width) of the original, and whatever else its shape has.
        ratio_pad: ((ratio_h, ratio_w), (pad_w, pad_h)) where the loader recorded them.

    Returns:
        `coords`.
    """
    coords[:, :4] = boxes.scale_boxes(img1_shape, coords[:, :4], img0_shape, ratio_pad)
    return coords


def clip_coords(boxes_xyxy_px: Array, shape: Sequence[int]) -> None:
    """Limits corners (n, 4 or more) to an image of (height, width), in place."""
    boxes_xyxy_px[:, :4] = boxes.clip_boxes(boxes_xyxy_px[:, :4], shape)


scale_boxes = scale_coords  # 7.0's names
clip_boxes = clip_coords


def bbox_iou(
    box1: Tensor,
    box2: Tensor,
    x1y1x2y2: bool = True,
    GIoU: bool = False,
    DIoU: bool = False,
    CIoU: bool = False,
    eps: float = 1e-7,
) -> Tensor:
    """Returns the overlap (n,) of boxes.

    Args:
        box1: (4,), one box to be compared with all, or (4, n).
        box2: (n, 4).
        x1y1x2y2: corners; else centre and size.
        GIoU: the generalised IoU.
        DIoU: the one with the distance of the centres.
        CIoU: the one with distance and aspect ratio.
        eps: keeps divisions finite.
    """
    return boxes.bbox_iou(box1.T if box1.ndim > 1 else box1, box2, not x1y1x2y2, GIoU, DIoU, CIoU, eps)


def wh_iou(wh1: Array, wh2: Array) -> Array:
    """Returns the IoU (n, m) of sizes (n, 2) and (m, 2), laid on one corner."""
    library = np if isinstance(wh1, np.ndarray) else torch
    first, second = (library.concatenate((library.zeros_like(wh), wh), 1) for wh in (wh1, wh2))
    return boxes.box_iou(first, second)


def non_max_suppression(
    prediction: Array | Sequence[Array],
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    labels: Sequence[Array] = (),
    max_det: int = 300,
) -> list[Array]:
    """Suppresses as `utils.nms.non_max_suppression`; of what a model returns, (rows, ...), the rows are taken."""
    rows = prediction[0] if isinstance(prediction, (list, tuple)) else prediction
    return nms.non_max_suppression(rows, conf_thres, iou_thres, classes, agnostic, multi_label, labels, max_det)


def coco80_to_coco91_class() -> list[int]:
    """Returns COCO's category number (of 91) for each of the 80 classes."""
    return list(COCO80_TO_91)
