"""Boxes: formats, scaling between images, overlap; polygons; and what is detected in an image.

Every function takes NumPy arrays or torch tensors and returns the same kind; torch is imported only when a tensor is
handed in. Boxes are (n, 4), or one (4,); what stands behind the first four columns (a confidence, a class) is kept by
the formats and by `clip_boxes` and `scale_boxes`. `xyxy` is (x1, y1, x2, y2), `xywh` is (x centre, y centre, width,
height); an `n` behind it means fractions of the image's sides.
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
        rows = to_numpy(rows)
        numbers = rows[:, 5:].astype(np.int64)
        return cls(rows[:, :4], rows[:, 4], numbers[:, 0], numbers[:, 1] if rows.shape[1] > 6 else None)

    @property
    def rows(self) -> np.ndarray:
        """The same as an array (n, 6) [x1, y1, x2, y2, confidence, class], float32; with tracks (n, 7)."""
        tracks = () if self.track_ids is None else (self.track_ids,)
        columns = (self.boxes_xyxy, self.confidences, self.classes, *tracks)
        return np.column_stack(columns).astype(np.float32, copy=False)

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


def to_numpy(values: Array) -> np.ndarray:
    """Returns an array as it is, and a tensor, on any device, as an array."""
    return values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()


def _join(columns: Sequence[Array], boxes: Array) -> Array:
    """Stacks a box's four new columns and appends those that `boxes` (..., 4 or more) has behind its first four."""
    if isinstance(boxes, np.ndarray):
        joined = np.stack(columns, axis=-1)
        return joined if boxes.shape[-1] == 4 else np.concatenate((joined, boxes[..., 4:]), axis=-1)
    import torch

    joined = torch.stack(tuple(columns), dim=-1)
    return joined if boxes.shape[-1] == 4 else torch.cat((joined, boxes[..., 4:]), dim=-1)


def _clip(values: Array, low: float, high: float) -> Array:
    return np.clip(values, low, high) if isinstance(values, np.ndarray) else values.clamp(low, high)


def xyxy2xywh(x: Array) -> Array:
    """Corners to centre and size."""
    x1, y1, x2, y2 = (x[..., column] for column in range(4))
    return _join([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], x)


def xywh2xyxy(x: Array) -> Array:
    """Centre and size to corners."""
    center_x, center_y, w, h = (x[..., column] for column in range(4))
    return _join([center_x - w / 2, center_y - h / 2, center_x + w / 2, center_y + h / 2], x)


def xywhn2xyxy(x: Array, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Array:
    """Normalised centre boxes to corners in pixels of a w x h image that stands at (padw, padh)."""
    corners = xywh2xyxy(x)
    x1, y1, x2, y2 = (corners[..., column] for column in range(4))
    return _join([x1 * w + padw, y1 * h + padh, x2 * w + padw, y2 * h + padh], x)


def xyxy2xywhn(x: Array, w: float = 640, h: float = 640, clip: bool = False, eps: float = 0.0) -> Array:
    """Corners in pixels to normalised centre boxes; `clip` first limits them to the image less `eps`."""
    centers = xyxy2xywh(clip_boxes(x, (h - eps, w - eps)) if clip else x)
    center_x, center_y, width, height = (centers[..., column] for column in range(4))
    return _join([center_x / w, center_y / h, width / w, height / h], x)


def clip_boxes(boxes: Array, shape: Sequence[float]) -> Array:
    """Returns corners limited to an image of (height, width): [0, width] x [0, height]."""
    limits = (shape[1], shape[0], shape[1], shape[0])
    return _join([_clip(boxes[..., column], 0, limits[column]) for column in range(4)], boxes)


def scale_boxes(
    img1_shape: Sequence[int],
    boxes: Array,
    img0_shape: Sequence[int],
    ratio_pad: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Array:
    """Takes corners from a letterboxed image back to the image that it was made of, clipped to it.

    Args:
        img1_shape: (height, width) of the letterboxed image.
        boxes: corners in its pixels.
        img0_shape: (height, width) of the original.
        ratio_pad: ((ratio_h, ratio_w), (pad_w, pad_h)) where the letterbox's own are known; else worked out from the
            sizes. The ratios differ: sides are resized to whole pixels (YOLOv5 has the height's serve both axes).
    """
    if ratio_pad is None:
        gain = min(img1_shape[0] / img0_shape[0], img1_shape[1] / img0_shape[1])
        resized_h, resized_w = (max(round(side * gain), 1) for side in img0_shape[:2])
        ratio_h, ratio_w = resized_h / img0_shape[0], resized_w / img0_shape[1]
        pad_w, pad_h = (img1_shape[1] - resized_w) / 2, (img1_shape[0] - resized_h) / 2
    else:
        (ratio_h, ratio_w), (pad_w, pad_h) = ratio_pad
    pads, ratios = (pad_w, pad_h, pad_w, pad_h), (ratio_w, ratio_h, ratio_w, ratio_h)
    unscaled = _join([(boxes[..., column] - pads[column]) / ratios[column] for column in range(4)], boxes)
    return clip_boxes(unscaled, img0_shape)


def box_iou(box1: Array, box2: Array) -> Array:
    """Returns the intersection over union (n, m) of every pair of (n, 4) and (m, 4) corners; 0 for empty boxes."""
    top_left = _maximum(box1[:, None, :2], box2[None, :, :2])
    bottom_right = _minimum(box1[:, None, 2:4], box2[None, :, 2:4])
    sides = _clip(bottom_right - top_left, 0, math.inf)
    inter = sides[..., 0] * sides[..., 1]
    union = _areas(box1)[:, None] + _areas(box2)[None, :] - inter
    return inter / _clip(union, 1e-12, math.inf)


def wh_iou(wh1: Array, wh2: Array) -> Array:
    """Returns the intersection over union (n, m) of sizes (n, 2) and (m, 2), laid on one corner."""
    inter = _minimum(wh1[:, None], wh2[None]).prod(-1)
    return inter / (wh1.prod(-1)[:, None] + wh2.prod(-1)[None] - inter)


def bbox_ioa(box1: Array, box2: Array, eps: float = 1e-7) -> Array:
    """Returns the share (n,) of each of the corners `box2` (n, 4) that `box1` (4,) covers."""
    top_left = _maximum(box1[None, :2], box2[:, :2])
    bottom_right = _minimum(box1[None, 2:4], box2[:, 2:4])
    sides = _clip(bottom_right - top_left, 0, math.inf)
    return sides[..., 0] * sides[..., 1] / (_areas(box2) + eps)


def bbox_iou(
    box1: Array,
    box2: Array,
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
        (xywh2xyxy(boxes) if xywh else boxes).unbind(-1) for boxes in (box1, box2)
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
    return (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])


def _maximum(first: Array, second: Array) -> Array:
    if isinstance(first, np.ndarray):
        return np.maximum(first, second)
    import torch

    return torch.maximum(first, second)


def _minimum(first: Array, second: Array) -> Array:
    return -_maximum(-first, -second)


def resample_segments(segments: Sequence[np.ndarray], n: int = 1000) -> list[np.ndarray]:
    """Returns polygons (k, 2) with n points (n, 2) each, at equal steps of index along the closed line."""
    resampled = []
    for points in segments:
        closed = np.concatenate([points, points[:1]], axis=0)
        steps = np.linspace(0, len(closed) - 1, n)
        columns = [np.interp(steps, np.arange(len(closed)), closed[:, axis]) for axis in range(2)]
        resampled.append(np.stack(columns, axis=-1).astype(np.float32))
    return resampled
