"""Detection metrics: which detections are right, and average precision with its curves.

Pure functions on NumPy arrays; nothing is drawn or printed here. Covers YOLOv5's figures, matched for every IoU
threshold on its own. Not here: the confusion matrix (`utils.eval.confusion`), COCO's twelve figures
(`utils.eval.coco`). Sorts are stable: of detections with equal confidence the one that came first ranks first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from utils.boxes import box_iou

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
CURVE_POINTS = 1000  # confidences (and recalls) at which the curves are sampled
CURVE_AXIS = np.linspace(0, 1, CURVE_POINTS)
AP_POINTS = 101  # recalls at which the area under precision over recall is integrated
SMOOTHING_POINTS = 101  # running mean over the F1 curve before its highest point is sought
EPS = 1e-16
FITNESS_WEIGHTS = (0.1, 0.9)  # of mAP50 and mAP50-95


class APResult(NamedTuple):
    """Average precision of the k classes that have labels, and their curves.

    precision, recall, f1, true_positives and false_positives are those at `confidence`, where the class-mean F1 at
    IoU 0.5 is highest. Curves run over confidences (or recalls) 0 to 1 in CURVE_POINTS steps, at IoU 0.5.
    """

    classes: np.ndarray  # (k,) int, rising
    label_counts: np.ndarray  # (k,) int
    ap: np.ndarray  # (k, t), one column for each IoU threshold
    precision: np.ndarray  # (k,)
    recall: np.ndarray  # (k,)
    f1: np.ndarray  # (k,)
    true_positives: np.ndarray  # (k,) int
    false_positives: np.ndarray  # (k,) int
    confidence: float
    precision_curve: np.ndarray  # (k, CURVE_POINTS) over confidence
    recall_curve: np.ndarray  # (k, CURVE_POINTS) over confidence
    f1_curve: np.ndarray  # (k, CURVE_POINTS) over confidence
    pr_curve: np.ndarray  # (k, CURVE_POINTS), precision over recall

    @property
    def mean_precision(self) -> float:
        """Precision, averaged over the classes."""
        return _mean(self.precision)

    @property
    def mean_recall(self) -> float:
        """Recall, averaged over the classes."""
        return _mean(self.recall)

    @property
    def map50(self) -> float:
        """Mean average precision at the first IoU threshold, 0.5."""
        return _mean(self.ap[:, 0])

    @property
    def map(self) -> float:
        """Mean average precision over all IoU thresholds."""
        return _mean(self.ap)

    def maps(self, nc: int) -> np.ndarray:
        """Average precision (nc,) of each class over all IoU thresholds; a class without labels has the overall."""
        values = np.full(nc, self.map)
        values[self.classes] = self.ap.mean(1)
        return values


def _mean(values: np.ndarray) -> float:
    """Mean, 0 for no values."""
    return float(values.mean()) if values.size else 0.0


def match_detections(detections: np.ndarray, labels: np.ndarray, thresholds: np.ndarray = IOU_THRESHOLDS) -> np.ndarray:
    """Says which detections of one image are right, for each IoU threshold on its own.

    Each detection goes to the label of its class that it overlaps most (the first of equals), if the overlap reaches
    the threshold; of the detections at one label the most confident is right. There is no second choice.

    Args:
        detections: (n, 6) [x1, y1, x2, y2, confidence, class], most confident first.
        labels: (m, 5) [class, x1, y1, x2, y2] in the same pixels.
        thresholds: (t,) IoU thresholds.

    Returns:
        (n, t) bool.
    """
    n, m, t = len(detections), len(labels), len(thresholds)
    if not n or not m:
        return np.zeros((n, t), dtype=bool)
    overlap = box_iou(labels[:, 1:5], detections[:, :4])
    overlap = np.where(labels[:, 0:1] == detections[None, :, 5], overlap, -1.0)
    chosen = overlap.argmax(0)  # (n,) label of each detection
    reaches = overlap.max(0)[:, None] >= thresholds  # (n, t)
    rank = np.arange(n)[:, None]
    first = np.full((m, t), n)  # the earliest detection that reaches each label
    np.minimum.at(first, chosen, np.where(reaches, rank, n))
    return reaches & (first[chosen] == rank)


def average_precisions(
    correct: np.ndarray, confidence: np.ndarray, predicted: np.ndarray, target: np.ndarray
) -> APResult:
    """Average precision of every class that has labels.

    Args:
        correct: (n, t) bool from `match_detections`, all images together.
        confidence: (n,) of the detections.
        predicted: (n,) their classes.
        target: (m,) classes of all labels.
    """
    order = np.argsort(-confidence, kind="stable")
    correct, confidence, predicted = correct[order], confidence[order], predicted[order]
    classes, counts = np.unique(target.astype(np.int64), return_counts=True)
    ap = np.zeros((len(classes), correct.shape[1]))
    precision_curve, recall_curve, pr_curve = np.zeros((3, len(classes), CURVE_POINTS))
    for row, (class_id, count) in enumerate(zip(classes, counts, strict=True)):
        mine = predicted == class_id
        if mine.any():
            ap[row], precision_curve[row], recall_curve[row], pr_curve[row] = _one_class(
                correct[mine], confidence[mine], int(count)
            )
    f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + EPS)
    best = int(_smooth(f1_curve.mean(0)).argmax()) if len(classes) else 0
    precision, recall = precision_curve[:, best], recall_curve[:, best]
    found = (recall * counts).round()
    return APResult(
        classes=classes,
        label_counts=counts,
        ap=ap,
        precision=precision,
        recall=recall,
        f1=f1_curve[:, best],
        true_positives=found.astype(np.int64),
        false_positives=(found / (precision + EPS) - found).round().astype(np.int64),
        confidence=float(CURVE_AXIS[best]),
        precision_curve=precision_curve,
        recall_curve=recall_curve,
        f1_curve=f1_curve,
        pr_curve=pr_curve,
    )


def _one_class(
    correct: np.ndarray, confidence: np.ndarray, label_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Average precision and curves of one class.

    Args:
        correct: (d, t) bool, d >= 1.
        confidence: (d,) falling.
        label_count: how many labels the class has.

    Returns:
        (t,) average precision; (CURVE_POINTS,) precision over confidence, recall over confidence, precision over
        recall, at the first threshold.
    """
    hits = correct.cumsum(0)
    precision = hits / np.arange(1, len(hits) + 1)[:, None]
    recall = hits / label_count
    ap = np.array([average_precision(*curve) for curve in zip(recall.T, precision.T, strict=True)])
    # Falling confidence is rising -confidence, as np.interp wants it; above the highest one nothing is detected.
    precision_curve = np.interp(-CURVE_AXIS, -confidence, precision[:, 0], left=1)
    recall_curve = np.interp(-CURVE_AXIS, -confidence, recall[:, 0], left=0)
    pr_curve = np.interp(CURVE_AXIS, *precision_envelope(recall[:, 0], precision[:, 0]))
    return ap, precision_curve, recall_curve, pr_curve


def precision_envelope(recall: np.ndarray, precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Closes the curve at recall 0 and 1 and makes precision fall.

    Args:
        recall: (d,) rising.
        precision: (d,).

    Returns:
        (d + 2,) recall and (d + 2,) precision, the highest that is reached at that recall or a higher one.
    """
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([1.0], precision, [0.0]))
    return recall, np.maximum.accumulate(precision[::-1])[::-1]


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the precision envelope, by trapezoids at AP_POINTS recalls; at most 0.995.

    The precision 0 that closes the curve at recall 1 takes half a trapezoid even from perfect detections.

    Args:
        recall: (d,) rising.
        precision: (d,).
    """
    values = np.interp(np.linspace(0, 1, AP_POINTS), *precision_envelope(recall, precision))
    return float((values[:-1] + values[1:]).sum() / (2 * (AP_POINTS - 1)))


def _smooth(curve: np.ndarray) -> np.ndarray:
    """Running mean of a curve (p,) over SMOOTHING_POINTS points, its ends repeated."""
    half = SMOOTHING_POINTS // 2
    padded = np.concatenate((np.full(half, curve[0]), curve, np.full(half, curve[-1])))
    return np.convolve(padded, np.full(SMOOTHING_POINTS, 1 / SMOOTHING_POINTS), mode="valid")


def fitness(map50: float, map50_95: float) -> float:
    """The single figure by which checkpoints are compared."""
    return FITNESS_WEIGHTS[0] * map50 + FITNESS_WEIGHTS[1] * map50_95
