"""Boxes: formats, scaling between images, overlap; segments to boxes; and what is detected in an image.

Every function takes NumPy arrays or torch tensors of shape (n, 4) and returns the same kind; torch is imported only
when a tensor is handed in. `xyxy` is (x1, y1, x2, y2), `xywh` is (x centre, y centre, width, height); `norm` boxes
are fractions of the image's sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = Any  # np.ndarray or torch.Tensor


@dataclass(frozen=True)
class Detections:
    """What was found in one image, most confident first.

    Indexing with a slice, a mask or numbers gives some of them.

    Attributes:
        boxes_xyxy: corners (n, 4) in px of the image.
        confidences: (n,).
        classes: class numbers (n,), int64.
        track_ids: numbers of the tracks (n,), int64, -1 for none (yet); None without tracking.
    """

    boxes_xyxy: np.ndarray
    confidences: np.ndarray
    classes: np.ndarray
    track_ids: np.ndarray | None = None

    @classmethod
    def from_rows(cls, rows: Array) -> Detections:
        """Takes rows (n, 6) [x1, y1, x2, y2, confidence, class], as NMS returns them, or (n, 7) with the track."""
        rows = rows if isinstance(rows, np.ndarray) else rows.cpu().numpy()
        numbers = rows[:, 5:].astype(np.int64)
        return cls(rows[:, :4], rows[:, 4], numbers[:, 0], numbers[:, 1] if rows.shape[1] > 6 else None)

    @property
    def rows(self) -> np.ndarray:
        """The same as an array (n, 6) [x1, y1, x2, y2, confidence, class], float32."""
        return np.column_stack((self.boxes_xyxy, self.confidences, self.classes)).astype(np.float32, copy=False)

    def rounded(self) -> Detections:
        """Returns them with corners in whole px."""
        return replace(self, boxes_xyxy=self.boxes_xyxy.round())

    def __len__(self) -> int:
        """Returns their number."""
        return len(self.boxes_xyxy)

    def __getitem__(self, index: Any) -> Detections:
        """Returns those of a slice, a mask (n,) or numbers (m,)."""
        tracks = None if self.track_ids is None else self.track_ids[index]
        return Detections(self.boxes_xyxy[index], self.confidences[index], self.classes[index], tracks)


def _stack(columns: Sequence[Array]) -> Array:
    """Stacks (n,) columns to (n, k), in the library that they come from."""
    if isinstance(columns[0], np.ndarray):
        return np.stack(columns, axis=-1)
    import torch

    return torch.stack(tuple(columns), dim=-1)


def _clip(values: Array, low: float, high: float) -> Array:
    """Limits values, in the library that they come from."""
    return np.clip(values, low, high) if isinstance(values, np.ndarray) else values.clamp(low, high)


def xyxy2xywh(boxes_xyxy: Array) -> Array:
    """Corners (n, 4) to centre and size (n, 4)."""
    x1, y1, x2, y2 = (boxes_xyxy[..., column] for column in range(4))
    return _stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def xywh2xyxy(boxes_xywh: Array) -> Array:
    """Centre and size (n, 4) to corners (n, 4)."""
    x, y, w, h = (boxes_xywh[..., column] for column in range(4))
    return _stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])


def xywhn2xyxy(boxes_xywh_norm: Array, w: float, h: float, padw: float = 0, padh: float = 0) -> Array:
    """Normalised centre boxes (n, 4) to corners (n, 4) in pixels of a w x h image that stands at (padw, padh)."""
    boxes_xyxy_norm = xywh2xyxy(boxes_xywh_norm)
    x1, y1, x2, y2 = (boxes_xyxy_norm[..., column] for column in range(4))
    return _stack([x1 * w + padw, y1 * h + padh, x2 * w + padw, y2 * h + padh])


def xyxy2xywhn(boxes_xyxy_px: Array, w: float, h: float, clip: bool = False, eps: float = 0.0) -> Array:
    """Corners (n, 4) in pixels to normalised centre boxes (n, 4); `clip` first limits them to the image less `eps`."""
    if clip:
        boxes_xyxy_px = clip_boxes(boxes_xyxy_px, (h - eps, w - eps))
    boxes_xywh_px = xyxy2xywh(boxes_xyxy_px)
    x, y, width, height = (boxes_xywh_px[..., column] for column in range(4))
    return _stack([x / w, y / h, width / w, height / h])


def clip_boxes(boxes_xyxy_px: Array, shape_hw: Sequence[float]) -> Array:
    """Returns corners (n, 4) limited to [0, width] x [0, height]."""
    h, w = shape_hw[0], shape_hw[1]
    limits = (w, h, w, h)
    return _stack([_clip(boxes_xyxy_px[..., column], 0, limits[column]) for column in range(4)])


def scale_boxes(
    padded_hw: Sequence[int],
    boxes_xyxy_px: Array,
    image_hw: Sequence[int],
    ratio_pad: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Array:
    """Takes corners (n, 4) from a letterboxed image back to the image that it was made of, clipped to it.

    Args:
        padded_hw: (height, width) of the letterboxed image.
        boxes_xyxy_px: corners in its pixels.
        image_hw: (height, width) of the original.
        ratio_pad: ((ratio_h, ratio_w), (pad_w, pad_h)) where the letterbox's own are known; else worked out from the
            sizes. The ratios differ: sides are resized to whole pixels (YOLOv5 has the height's serve both axes).
    """
    if ratio_pad is None:
        gain = min(padded_hw[0] / image_hw[0], padded_hw[1] / image_hw[1])
        resized_h, resized_w = (max(round(side * gain), 1) for side in image_hw[:2])
        ratio_h, ratio_w = resized_h / image_hw[0], resized_w / image_hw[1]
        pad_w, pad_h = (padded_hw[1] - resized_w) / 2, (padded_hw[0] - resized_h) / 2
    else:
        (ratio_h, ratio_w), (pad_w, pad_h) = ratio_pad
    pads, ratios = (pad_w, pad_h, pad_w, pad_h), (ratio_w, ratio_h, ratio_w, ratio_h)
    unscaled = _stack([(boxes_xyxy_px[..., column] - pads[column]) / ratios[column] for column in range(4)])
    return clip_boxes(unscaled, image_hw)


def box_iou(first_xyxy: Array, second_xyxy: Array) -> Array:
    """Returns the intersection over union (n, m) of every pair of (n, 4) and (m, 4) corners; 0 for empty boxes."""
    top_left = _maximum(first_xyxy[:, None, :2], second_xyxy[None, :, :2])
    bottom_right = _minimum(first_xyxy[:, None, 2:4], second_xyxy[None, :, 2:4])
    sides = _clip(bottom_right - top_left, 0, math.inf)
    inter = sides[..., 0] * sides[..., 1]
    union = _areas(first_xyxy)[:, None] + _areas(second_xyxy)[None, :] - inter
    return inter / _clip(union, 1e-12, math.inf)


def bbox_ioa(box_xyxy: Array, boxes_xyxy: Array, eps: float = 1e-7) -> Array:
    """Returns the share (n,) of each of `boxes_xyxy` (n, 4) that `box_xyxy` (4,) covers."""
    top_left = _maximum(box_xyxy[None, :2], boxes_xyxy[:, :2])
    bottom_right = _minimum(box_xyxy[None, 2:4], boxes_xyxy[:, 2:4])
    sides = _clip(bottom_right - top_left, 0, math.inf)
    return sides[..., 0] * sides[..., 1] / (_areas(boxes_xyxy) + eps)


def bbox_iou(
    first: Array,
    second: Array,
    xywh: bool = True,
    GIoU: bool = False,
    DIoU: bool = False,
    CIoU: bool = False,
    eps: float = 1e-7,
) -> Array:
    """Returns the overlap (n,) of matching rows of two (n, 4) tensors of boxes, differentiable in both.

    IoU, or one of its generalisations: GIoU (Rezatofighi et al. 2019, arXiv:1902.09630), DIoU and CIoU (Zheng et al.
    2020, arXiv:1911.08287). `eps` enters where YOLOv5 has it, heights included, so that its weights see its losses.
    """
    import torch

    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = (
        (xywh2xyxy(boxes) if xywh else boxes).unbind(-1) for boxes in (first, second)
    )
    aw, ah, bw, bh = ax2 - ax1, ay2 - ay1 + eps, bx2 - bx1, by2 - by1 + eps
    inter = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0) * (
        torch.minimum(ay2, by2) - torch.maximum(ay1, by1)
    ).clamp(min=0)
    union = aw * ah + bw * bh - inter + eps
    iou = inter / union
    if not (GIoU or DIoU or CIoU):
        return iou
    hull_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    if GIoU:
        hull = hull_w * hull_h + eps
        return iou - (hull - union) / hull
    distance = ((bx1 + bx2 - ax1 - ax2) ** 2 + (by1 + by2 - ay1 - ay2) ** 2) / 4
    diagonal = hull_w**2 + hull_h**2 + eps
    if DIoU:
        return iou - distance / diagonal
    v = (4 / math.pi**2) * (torch.atan(bw / bh) - torch.atan(aw / ah)) ** 2
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return iou - (distance / diagonal + v * alpha)


def _areas(boxes_xyxy: Array) -> Array:
    """Areas (n,) of corners (n, 4)."""
    return (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])


def _maximum(first: Array, second: Array) -> Array:
    """Elementwise maximum, in the library that the arrays come from."""
    if isinstance(first, np.ndarray):
        return np.maximum(first, second)
    import torch

    return torch.maximum(first, second)


def _minimum(first: Array, second: Array) -> Array:
    """Elementwise minimum, in the library that the arrays come from."""
    return -_maximum(-first, -second)


def resample_segment(points: np.ndarray, count: int = 1000) -> np.ndarray:
    """Returns `count` points (count, 2) at equal steps of index along the closed polygon `points` (k, 2)."""
    closed = np.concatenate([points, points[:1]], axis=0)
    steps = np.linspace(0, len(closed) - 1, count)
    columns = [np.interp(steps, np.arange(len(closed)), closed[:, axis]) for axis in range(2)]
    return np.stack(columns, axis=-1).astype(np.float32)
