"""What an evaluation came to, for machines: `metrics.json`; with AP by the size of objects, and the kinds of errors.

The format is described in docs/guide.md ("Report and figures"). Everything comes from an `EvalResult` with records:
no image is looked at again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.boxes import box_iou
from utils.eval.coco import ImageRecord
from utils.files import atomic_write
from utils.metrics import CURVE_POINTS, IOU_THRESHOLDS, APResult, ap_per_class, chosen_labels, match_detections

if TYPE_CHECKING:
    from utils.eval.evaluate import EvalResult

FORMAT, FORMAT_VERSION = "yolov5-slim-metrics", 1
SIZES = ("small", "medium", "large")  # as COCO has them
SIZE_BOUNDS_PX2 = (32**2, 96**2)
FILE_CURVE_POINTS = 101  # of a curve in the file
PLACED_IOU = 0.1  # less of it with a label of the class is no attempt at it
DUPLICATE, WRONG_CLASS, BADLY_PLACED, BACKGROUND = ERROR_KINDS = (
    "duplicate",
    "wrong class",
    "badly placed",
    "background",
)


class Verdict(NamedTuple):
    """What is right and wrong in one image at IoU 0.5; n detections, m labels."""

    right: np.ndarray  # (n,) bool
    kinds: np.ndarray  # (n,) int: which of ERROR_KINDS a wrong detection is, -1 for right ones
    missed: np.ndarray  # rising indices of the labels that no detection is right about

    @property
    def counts(self) -> tuple[int, int, int]:
        """Right and wrong detections, and missed labels."""
        right = int(self.right.sum())
        return right, len(self.right) - right, len(self.missed)


def judge(detections: np.ndarray, labels: np.ndarray) -> Verdict:
    """Says of one image's detections which are right, what is wrong about the others, and which labels are missed.

    A wrong detection is the duplicate of one that is right, has the place of a label of another class (IoU 0.5), lies
    badly on one of its own class (IoU 0.1), or is of the background; the first of these that holds.

    Args:
        detections: (n, 6) [x1, y1, x2, y2, confidence, class], most confident first.
        labels: (m, 5) [class, x1, y1, x2, y2] in the same pixels.
    """
    n, threshold = len(detections), IOU_THRESHOLDS[0]
    kinds = np.full(n, ERROR_KINDS.index(BACKGROUND))
    if not n or not len(labels):
        return Verdict(np.zeros(n, bool), kinds, np.arange(len(labels)))
    right = match_detections(detections, labels, IOU_THRESHOLDS[:1])[:, 0]
    chosen, overlap = chosen_labels(detections, labels)
    kinds[overlap >= PLACED_IOU] = ERROR_KINDS.index(BADLY_PLACED)
    kinds[box_iou(labels[:, 1:5], detections[:, :4]).max(0) >= threshold] = ERROR_KINDS.index(WRONG_CLASS)
    kinds[overlap >= threshold] = ERROR_KINDS.index(DUPLICATE)
    kinds[right] = -1
    return Verdict(right, kinds, np.setdiff1d(np.arange(len(labels)), chosen[right]))


def confident(record: ImageRecord, confidence: float) -> np.ndarray:
    """Returns an image's detections (n, 6) of at least that confidence."""
    return record.detections[record.detections[:, 4] >= confidence]


def size_results(records: Sequence[ImageRecord]) -> dict[str, APResult]:
    """Returns the average precision of small, medium and large objects: area below 32 x 32 px, to 96 x 96, above.

    A label counts by its own area. A detection counts with the label that it is right about at IoU 0.5, and others by
    their own area; so little differs from COCO's figures.
    """
    correct, scores, sizes, label_classes, label_sizes = [], [], [], [], []
    for _, _, detections, labels in records:
        right = match_detections(detections, labels)
        own, of_labels = _size_classes(detections[:, :4]), _size_classes(labels[:, 1:5])
        if right.any():
            chosen, _ = chosen_labels(detections, labels)
            own = np.where(right[:, 0], of_labels[chosen], own)
        correct.append(right)
        scores.append(detections[:, 4:6])
        sizes.append(own)
        label_classes.append(labels[:, 0])
        label_sizes.append(of_labels)
    right, rows, own = (np.concatenate(arrays) for arrays in (correct, scores, sizes))
    classes, of_labels = np.concatenate(label_classes), np.concatenate(label_sizes)
    return {
        name: ap_per_class(right[own == size], *rows[own == size].T, classes[of_labels == size])
        for size, name in enumerate(SIZES)
    }


def _size_classes(boxes_xyxy_px: np.ndarray) -> np.ndarray:
    """Returns the index in SIZES of each box (n, 4)."""
    return np.digitize(np.prod(boxes_xyxy_px[:, 2:] - boxes_xyxy_px[:, :2], axis=1), SIZE_BOUNDS_PX2)


def best_confidences(result: APResult) -> tuple[np.ndarray, np.ndarray]:
    """Returns the confidence (k,) at which each class's F1 is highest, and that F1 (k,)."""
    best = result.f1_curve.argmax(1)
    return best / (CURVE_POINTS - 1), result.f1_curve[np.arange(len(best)), best]


def metrics_content(result: EvalResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `metrics.json` holds.

    Args:
        result: the evaluation's, with records.
        about: what else is known: model, data, split, options, versions ...
    """
    names, details, matrix = result.names, result.details, result.confusion
    at = np.linspace(0, CURVE_POINTS - 1, FILE_CURVE_POINTS)

    def sampled(curve: np.ndarray) -> list[float]:
        return _rounded(np.interp(at, np.arange(CURVE_POINTS), curve))

    confidences, f1s = best_confidences(details)
    categories = result.categories or list(names)  # COCO's are more than one where all classes are treated as one
    classes = {
        class_id: {"id": class_id, "name": name, "labels": 0, "category_id": categories[class_id]}
        for class_id, name in names.items()
    }
    for row, class_id in enumerate(details.classes.tolist()):
        classes[class_id].update(
            labels=int(details.label_counts[row]),
            true_positives=int(details.true_positives[row]),
            false_positives=int(details.false_positives[row]),
            **_numbers(precision=details.precision[row], recall=details.recall[row], f1=details.f1[row]),
            **_numbers(map50=details.ap[row, 0], map=details.ap[row].mean()),
            ap_by_iou=_rounded(details.ap[row]),
            **_numbers(best_confidence=confidences[row], best_f1=f1s[row]),
            curves={
                "precision": sampled(details.precision_curve[row]),
                "recall": sampled(details.recall_curve[row]),
                "f1": sampled(details.f1_curve[row]),
                "precision_over_recall": sampled(details.pr_curve[row]),
            },
        )
    measured = bool(details.label_counts.sum())
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **about,
        "images": result.seen,
        "labels": int(details.label_counts.sum()),
        "background_images_with_detections": result.alarmed,
        **_numbers(precision=result.precision, recall=result.recall, map50=result.map50, map=result.map),
        **_numbers(fitness=result.fitness, confidence=details.confidence if measured else math.nan),
        "speed_ms": dict(zip(("pre_process", "inference", "nms"), _rounded(result.speed_ms), strict=True)),
        "iou_thresholds": _rounded(IOU_THRESHOLDS),
        "curve_axis": _rounded(np.linspace(0, 1, FILE_CURVE_POINTS)),
        "classes": list(classes.values()),
        "sizes": {
            name: {
                "labels": int(of_size.label_counts.sum()),
                **_numbers(map50=_mean(of_size.ap[:, 0]), map=_mean(of_size.ap)),
            }
            for name, of_size in size_results(result.records).items()
        },
        "confusion_matrix": {
            "confidence": matrix.conf,
            "iou": matrix.iou_thres,
            "names": [*names.values(), "background"],
            "counts": matrix.matrix.tolist(),
        },
        "coco": {name: _number(value) for name, value in result.coco._asdict().items()} if result.coco else None,
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def _number(value: float) -> float | None:
    """Returns a figure to six decimals; None, as JSON has no other word, for one that is not measured."""
    return round(float(value), 6) if math.isfinite(value) else None


def _numbers(**figures: float) -> dict[str, float | None]:
    return {name: _number(value) for name, value in figures.items()}


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return np.round(np.asarray(values, float), 6).tolist()


def write_metrics(file: Path, content: Mapping[str, Any]) -> None:
    """Writes `metrics.json`, all or nothing; what is no plain data in it becomes text.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(content, allow_nan=False, default=str), encoding="utf-8")
