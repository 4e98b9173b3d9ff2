"""Non-maximum suppression: a detector's raw rows to the few boxes that are kept.

Tensors are suppressed by torchvision's kernel on their own device, NumPy arrays (exported models) without importing
torch. Nothing handed in is changed, and no time limit drops an image. Not here: mapping boxes back to the original
image (`utils.boxes.scale_boxes`), test-time augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from utils.boxes import xywh2xyxy
from utils.errors import UserError

Array = Any  # np.ndarray or torch.Tensor

MIN_SIDE_PX = 2  # boxes with a side outside these limits are dropped
MAX_SIDE_PX = 7680
MAX_CANDIDATES = 30_000  # per image, of highest score, enter the suppression
CHUNK = 512  # candidates that are suppressed at a time


@dataclass(frozen=True)
class NMSConfig:
    """How detections are chosen among a model's predictions; the fields are arguments of `non_max_suppression`.

    Attributes:
        conf_thres: confidences must exceed it.
        iou_thres: boxes of one class that overlap a more confident one by more than this are dropped.
        max_det: maximum detections per image.
        agnostic: boxes suppress each other whatever their classes.
        classes: class numbers to keep; None keeps all.
        multi_label: every class above the threshold makes a detection, not only a box's best.
    """

    conf_thres: float = 0.25
    iou_thres: float = 0.45
    max_det: int = 300
    agnostic: bool = False
    classes: Sequence[int] | None = None
    multi_label: bool = False

    def suppress(self, prediction: Array, labels: Sequence[Array] = ()) -> list[Array]:
        """Returns the detections (k, 6) of each image among rows (b, n, 5 + nc); see `non_max_suppression`."""
        return non_max_suppression(prediction, labels=labels, **vars(self))

    def narrow(self, detections: Array) -> Array:
        """Returns those of an image's detections (m, 6), chosen inside a model and filled up with zeros, that pass."""
        xp = _library(detections)
        wanted = detections[:, 4] > self.conf_thres
        if self.classes is not None:
            wanted &= _is_one_of(xp, xp.asarray(detections[:, 5], dtype=xp.int64), self.classes)
        return detections[wanted][: self.max_det]


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
    """Returns for each image the detections (k, 6) [x1, y1, x2, y2, confidence, class], most confident first.

    Rows of equal confidence keep the order in which the model wrote them. Floating point of any width is taken;
    suppression is computed in float64, where shifting the boxes of each class apart costs no precision.

    Args:
        prediction: (b, n, 5 + nc) rows [x, y, w, h in pixels, objectness, class probabilities]; or what a model
            returns, (rows, ...).
        conf_thres: objectness and score (objectness x class probability) must exceed it.
        iou_thres: boxes of one class that overlap a more confident one by more than this are dropped.
        classes: class ids to keep; None keeps all.
        agnostic: boxes suppress each other whatever their classes.
        multi_label: every class above the threshold makes a detection, not only the best (with nc > 1).
        labels: for each image rows (m, 5) [class, x, y, w, h in pixels] that join the candidates with score 1.
        max_det: at most this many detections an image.

    Returns:
        A list of b arrays of the kind that came in, float32.

    Raises:
        UserError: a threshold is outside 0 to 1.
    """
    for option, value in (("--conf-thres", conf_thres), ("--iou-thres", iou_thres)):
        if not 0 <= value <= 1:
            raise UserError(f"{option} {value}: a threshold between 0 and 1 is expected.")
    prediction = prediction[0] if isinstance(prediction, (list, tuple)) else prediction
    xp = _library(prediction)
    if xp is not np and prediction.device.type == "mps":  # no float64 there
        prediction = prediction.cpu()
    multi_label = multi_label and prediction.shape[2] > 6
    results = []
    for image, image_rows in enumerate(_likely_rows(xp, prediction, conf_thres)):
        if len(labels) and len(labels[image]):
            image_rows = xp.concatenate((image_rows, _label_rows(xp, labels[image], image_rows)), 0)
        candidates = _candidates(xp, image_rows, conf_thres, multi_label, classes)
        results.append(_suppress(xp, candidates, iou_thres, agnostic, max_det))
    return results


def suppress_again(detections: Array, nms: NMSConfig) -> Array:
    """Suppresses what was detected already, in several windows of one image.

    Args:
        detections: (k, 6) [x1, y1, x2, y2, confidence, class] in any order.
        nms: its overlap, classes' agnosticism and number of detections hold.

    Returns:
        The rows (m, 6) that are kept, most confident first; equal ones stay in order.
    """
    order = _falling_order(_library(detections), detections[:, 4])
    return _suppress(_library(detections), detections[order], nms.iou_thres, nms.agnostic, nms.max_det)


def _library(array: Array) -> Any:
    """Returns the module (NumPy or torch) whose functions take `array`."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def _likely_rows(xp: Any, prediction: Array, conf_thres: float) -> list[Array]:
    """Copies out the rows that can still pass: objectness above the threshold and sides within the limits.

    Args:
        xp: the array library.
        prediction: (b, n, 5 + nc).
        conf_thres: the objectness must exceed it.

    Returns:
        For each image (r, 5 + nc) float32 rows, in their order.
    """
    image_index, row_index = xp.where(prediction[:, :, 4] > conf_thres)
    sides = prediction[:, :, 2:4][image_index, row_index]
    fitting = ((sides >= MIN_SIDE_PX) & (sides <= MAX_SIDE_PX)).all(1)
    image_index, row_index = image_index[fitting], row_index[fitting]
    rows = xp.asarray(prediction[image_index, row_index], dtype=xp.float32)
    counts = xp.bincount(image_index, minlength=len(prediction)).tolist()
    ends = np.cumsum(counts).tolist()
    return [rows[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _label_rows(xp: Any, labels: Array, like: Array) -> Array:
    """Known boxes (m, 5) [class, x, y, w, h] as prediction rows (m, 5 + nc) of objectness and class probability 1."""
    place = _place(like)
    rows = xp.zeros((len(labels), like.shape[1]), dtype=xp.float32, **place)
    rows[:, :4] = labels[:, 1:5]
    rows[:, 4] = 1
    rows[xp.arange(len(labels), **place), 5 + xp.asarray(labels[:, 0], dtype=xp.int64)] = 1
    return rows


def _place(array: Array) -> dict[str, Any]:
    """Keyword arguments that create an array where `array` lies."""
    return {} if isinstance(array, np.ndarray) else {"device": array.device}


def _candidates(xp: Any, rows: Array, conf_thres: float, multi_label: bool, classes: Sequence[int] | None) -> Array:
    """Turns rows (r, 5 + nc) into candidate detections (c, 6), most confident first, at most MAX_CANDIDATES."""
    scores = rows[:, 5:] * rows[:, 4:5]
    if multi_label:
        row_index, class_index = xp.where(scores > conf_thres)
    else:
        best = scores.argmax(1)
        row_index = xp.where(scores[xp.arange(len(rows), **_place(rows)), best] > conf_thres)[0]
        class_index = best[row_index]
    if classes is not None:
        wanted = _is_one_of(xp, class_index, classes)
        row_index, class_index = row_index[wanted], class_index[wanted]
    confidence = scores[row_index, class_index]
    order = _falling_order(xp, confidence)[:MAX_CANDIDATES]
    row_index = row_index[order]
    columns = (confidence[order][:, None], xp.asarray(class_index[order], dtype=xp.float32)[:, None])
    return xp.concatenate((xywh2xyxy(rows[:, :4])[row_index], *columns), 1)


def _is_one_of(xp: Any, class_index: Array, classes: Sequence[int]) -> Array:
    return xp.isin(class_index, xp.asarray(list(classes), dtype=xp.int64, **_place(class_index)))


def _falling_order(xp: Any, values: Array) -> Array:
    """Indices (n,) that sort values (n,) from high to low; equal ones stay in order."""
    if xp is np:
        return np.argsort(-values, kind="stable")
    return xp.argsort(values, descending=True, stable=True)


def _suppress(xp: Any, candidates: Array, iou_thres: float, agnostic: bool, max_det: int) -> Array:
    """Keeps the first `max_det` of candidates (c, 6), sorted by confidence, that no better one overlaps too much.

    Goes through them chunk by chunk, each beside what was kept of the former ones, and stops when enough are kept: the
    result is that of suppressing all at once, whose cost is quadratic in their number.
    """
    boxes_xyxy = xp.asarray(candidates[:, :4], dtype=xp.float64)
    if not agnostic and len(candidates):
        span = boxes_xyxy.max() - boxes_xyxy.min() + 1
        boxes_xyxy = boxes_xyxy + xp.asarray(candidates[:, 5:6], dtype=xp.float64) * span
    indices = xp.arange(len(candidates), **_place(candidates))
    kept = indices[:0]
    for start in range(0, len(candidates), CHUNK):
        pool = xp.concatenate((kept, indices[start : start + CHUNK]), 0)
        kept = pool[_greedy(xp, boxes_xyxy[pool], candidates[pool, 4], iou_thres)]
        if len(kept) >= max_det:
            break
    return candidates[kept[:max_det]]


def _greedy(xp: Any, boxes_xyxy: Array, confidence: Array, iou_thres: float) -> Array:
    """Indices of the boxes (n, 4), in order of confidence (n,), that no kept earlier one overlaps beyond the limit."""
    if xp is not np:
        return _torchvision_nms()(boxes_xyxy, xp.asarray(confidence, dtype=xp.float64), iou_thres)
    kept = []
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    left = np.arange(len(boxes_xyxy))
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        top_left = np.maximum(boxes_xyxy[best, :2], boxes_xyxy[left, :2])
        bottom_right = np.minimum(boxes_xyxy[best, 2:], boxes_xyxy[left, 2:])
        overlap = (bottom_right - top_left).clip(0).prod(1)
        left = left[overlap <= iou_thres * (areas[best] + areas[left] - overlap)]
    return np.array(kept, dtype=np.int64)


def _torchvision_nms() -> Callable[[Array, Array, float], Array]:
    """Returns torchvision's kernel, loading its library alone: importing the package costs two seconds at every start.

    Raises:
        UserError: torchvision is not installed, or not for this PyTorch.
    """
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        package = find_spec("torchvision")
        folder = Path(package.origin).parent if package and package.origin else None
        libraries = [file for file in sorted(folder.glob("_C*")) if file.suffix in (".so", ".pyd")] if folder else []
        try:
            for library in libraries:
                torch.ops.load_library(str(library))
        except OSError as error:
            raise UserError(f"torchvision does not fit this PyTorch ({error}): install its match.") from error
        if not hasattr(torch.ops.torchvision, "nms"):
            raise UserError("torchvision's compiled part is missing: install the torchvision of this PyTorch.")
    return torch.ops.torchvision.nms
