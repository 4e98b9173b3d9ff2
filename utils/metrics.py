"""Detection metrics: which detections are right, average precision with its curves, the confusion matrix, fitness.

Matched for every IoU threshold on its own. Sorts are stable: of detections with equal confidence the one that came
first ranks first. COCO's twelve metrics are in `utils.eval.coco`; curves and matrix are drawn by
`utils.plots.evaluation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import boxes
from utils.boxes import bbox_ioa, box_iou, to_numpy, wh_iou
from utils.errors import UserError
from utils.log import LOGGER

__all__ = [
    "ConfusionMatrix",
    "ap_per_class",
    "bbox_ioa",
    "bbox_iou",
    "box_iou",
    "compute_ap",
    "fitness",
    "wh_iou",
]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
CURVE_POINTS = 1000  # confidences (and recalls) at which the curves are sampled
AP_POINTS = 101  # recalls at which the area under precision over recall is integrated
SMOOTHING_POINTS = 101  # running mean over the F1 curve before its highest point is sought
EPS = 1e-16
FITNESS_WEIGHTS = (0.1, 0.9)  # of mAP50 and mAP50-95

Names = Mapping[int, str] | Sequence[str]


@dataclass(frozen=True)
class APResult:
    """Average precision of the k classes that have labels, and their curves; unpacks to its first seven fields.

    The first five are those at `confidence`, where the class-mean F1 at IoU 0.5 is highest. Curves run over confidences
    (or recalls) 0 to 1 in CURVE_POINTS steps, at IoU 0.5.
    """

    true_positives: np.ndarray  # (k,) int
    false_positives: np.ndarray  # (k,) int
    precision: np.ndarray  # (k,)
    recall: np.ndarray  # (k,)
    f1: np.ndarray  # (k,)
    ap: np.ndarray  # (k, t), one column for each IoU threshold
    classes: np.ndarray  # (k,) int32, rising
    label_counts: np.ndarray  # (k,) int
    confidence: float
    precision_curve: np.ndarray  # (k, CURVE_POINTS) over confidence
    recall_curve: np.ndarray  # (k, CURVE_POINTS) over confidence
    f1_curve: np.ndarray  # (k, CURVE_POINTS) over confidence
    pr_curve: np.ndarray  # (k, CURVE_POINTS), precision over recall

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields what YOLOv5's `ap_per_class` returns: tp, fp, p, r, f1, ap, classes."""
        yield from (self.true_positives, self.false_positives, self.precision, self.recall, self.f1, self.ap)
        yield self.classes

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
    chosen, overlap = chosen_labels(detections, labels)
    reaches = overlap[:, None] >= thresholds  # (n, t)
    rank = np.arange(n)[:, None]
    first = np.full((m, t), n)  # the earliest detection that reaches each label
    np.minimum.at(first, chosen, np.where(reaches, rank, n))
    return reaches & (first[chosen] == rank)


def chosen_labels(detections: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which label of its class each detection (n,) overlaps most, and how much: -1 where there is none.

    Args:
        detections: (n, 6) [x1, y1, x2, y2, confidence, class].
        labels: (m, 5) [class, x1, y1, x2, y2] in the same pixels, at least one.
    """
    overlap = box_iou(labels[:, 1:5], detections[:, :4])
    overlap = np.where(labels[:, 0:1] == detections[None, :, 5], overlap, -1.0)
    return overlap.argmax(0), overlap.max(0)


def ap_per_class(
    tp: np.ndarray,
    conf: np.ndarray,
    pred_cls: np.ndarray,
    target_cls: np.ndarray,
    plot: bool = False,
    save_dir: str | Path = ".",
    names: Names = (),
) -> APResult:
    """Returns precision, recall and average precision of every class that has labels.

    Args:
        tp: (n, t) bool from `match_detections`, all images together.
        conf: (n,) confidences.
        pred_cls: (n,) classes of the detections.
        target_cls: (m,) classes of all labels.
        plot: draw PR_curve.png, F1_curve.png, P_curve.png and R_curve.png.
        save_dir: an existing folder for them.
        names: of the classes, for them.
    """
    order = np.argsort(-conf, kind="stable")
    tp, conf, pred_cls = tp[order], conf[order], pred_cls[order]
    classes, counts = np.unique(target_cls.astype(np.int32), return_counts=True)
    axis = np.linspace(0, 1, CURVE_POINTS)
    ap = np.zeros((len(classes), tp.shape[1]))
    precision_curve, recall_curve, pr_curve = np.zeros((3, len(classes), CURVE_POINTS))
    for row, (class_id, count) in enumerate(zip(classes, counts, strict=True)):
        mine = pred_cls == class_id
        if not mine.any():
            continue
        hits = tp[mine].cumsum(0)
        precision, recall = hits / np.arange(1, len(hits) + 1)[:, None], hits / count
        curves = [compute_ap(*curve) for curve in zip(recall.T, precision.T, strict=True)]
        ap[row] = [area for area, _, _ in curves]
        _, envelope, recalls = curves[0]
        pr_curve[row] = np.interp(axis, recalls, envelope)
        # Falling confidence is rising -confidence, as np.interp wants it; above the highest one nothing is detected.
        precision_curve[row] = np.interp(-axis, -conf[mine], precision[:, 0], left=1)
        recall_curve[row] = np.interp(-axis, -conf[mine], recall[:, 0], left=0)
    f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + EPS)
    best = int(_smooth(f1_curve.mean(0)).argmax()) if len(classes) else 0
    precision, recall = precision_curve[:, best], recall_curve[:, best]
    found = (recall * counts).round()
    result = APResult(
        true_positives=found.astype(np.int64),
        false_positives=(found / (precision + EPS) - found).round().astype(np.int64),
        precision=precision,
        recall=recall,
        f1=f1_curve[:, best],
        ap=ap,
        classes=classes,
        label_counts=counts,
        confidence=float(axis[best]),
        precision_curve=precision_curve,
        recall_curve=recall_curve,
        f1_curve=f1_curve,
        pr_curve=pr_curve,
    )
    if plot:
        from utils.plots.boxes import as_mapping
        from utils.plots.evaluation import drawable_names, plot_curves

        plot_curves(result, drawable_names(as_mapping(names)), Path(save_dir))
    return result


def compute_ap(recall: np.ndarray, precision: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns the area under the precision envelope of one class, and that envelope.

    The envelope is the highest precision that is reached at a recall or a higher one, from recall 0, precision 1 to
    recall 1, precision 0. It is integrated by trapezoids at AP_POINTS recalls: the precision 0 at the end takes half a
    trapezoid even from perfect detections, so that the area is 0.995 at most.

    Args:
        recall: (d,) rising.
        precision: (d,).

    Returns:
        The area; precision (d + 2,); recall (d + 2,).
    """
    recall = np.concatenate(([0.0], recall, [1.0]))
    envelope = np.maximum.accumulate(np.concatenate(([1.0], precision, [0.0]))[::-1])[::-1]
    heights = np.interp(np.linspace(0, 1, AP_POINTS), recall, envelope)
    return float((heights[:-1] + heights[1:]).sum() / (2 * (AP_POINTS - 1))), envelope, recall


def _smooth(curve: np.ndarray) -> np.ndarray:
    """Running mean of a curve (p,) over SMOOTHING_POINTS points, its ends repeated."""
    padded = np.pad(curve, SMOOTHING_POINTS // 2, mode="edge")
    return np.convolve(padded, np.full(SMOOTHING_POINTS, 1 / SMOOTHING_POINTS), mode="valid")


def fitness(x: np.ndarray) -> np.ndarray:
    """Returns the figure (n,) by which checkpoints are compared, of rows (n, 4 or more) [P, R, mAP50, mAP50-95]."""
    return FITNESS_WEIGHTS[0] * x[:, 2] + FITNESS_WEIGHTS[1] * x[:, 3]


def bbox_iou(
    box1: Any,
    box2: Any,
    x1y1x2y2: bool = True,
    GIoU: bool = False,
    DIoU: bool = False,
    CIoU: bool = False,
    eps: float = 1e-7,
) -> Any:
    """Returns the overlap (n,) of boxes as YOLOv5 6.1 takes them; the losses call `utils.boxes.bbox_iou`.

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


class ConfusionMatrix:
    """Counts pairs of predicted and true classes; the last index, `nc`, is the background.

    Counts every image that it is given, those without labels or without detections included.

    Attributes:
        matrix: (nc + 1, nc + 1) int64, rows predicted, columns true. [i, nc] counts detections of class i where there
            is no label, [nc, j] labels of class j that nothing found.
    """

    def __init__(self, nc: int, conf: float = 0.25, iou_thres: float = 0.45):
        """Starts from zero; detections at or below `conf` and overlaps at or below `iou_thres` do not count."""
        self.nc = nc
        self.conf = conf
        self.iou_thres = iou_thres
        self.matrix = np.zeros((nc + 1, nc + 1), dtype=np.int64)

    def process_batch(self, detections: Any, labels: Any) -> None:
        """Adds one image.

        Every detection goes to the label that it overlaps most, whatever the classes, and each label takes the best
        overlapping of those; of equals the first.

        Args:
            detections: (n, 6) [x1, y1, x2, y2, confidence, class], an array or a tensor; or None.
            labels: (m, 5) [class, x1, y1, x2, y2] in the same pixels.
        """
        detections = np.zeros((0, 6)) if detections is None else to_numpy(detections)
        labels = to_numpy(labels)
        detections = detections[detections[:, 4] > self.conf]
        predicted, true = detections[:, 5].astype(np.int64), labels[:, 0].astype(np.int64)
        label_of = np.full(len(predicted), -1)
        if len(predicted) and len(true):
            overlap = box_iou(labels[:, 1:5], detections[:, :4])
            chosen, best = overlap.argmax(0), overlap.max(0)
            order = np.argsort(-best, kind="stable")  # best overlaps first
            order = order[best[order] > self.iou_thres]
            _, first = np.unique(chosen[order], return_index=True)  # of each label
            winners = order[first]
            label_of[winners] = chosen[winners]
        missed = np.ones(len(true), dtype=bool)
        missed[label_of[label_of >= 0]] = False
        true_or_background = np.append(true, self.nc)[label_of]  # -1 picks the background
        np.add.at(self.matrix, (predicted, true_or_background), 1)
        np.add.at(self.matrix, (self.nc, true[missed]), 1)

    def normalised(self) -> np.ndarray:
        """The matrix (nc + 1, nc + 1) with every column as shares of its sum; an empty column is 0."""
        return self.matrix / np.maximum(self.matrix.sum(0, keepdims=True), 1)

    def tp_fp(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns true and false positives (nc,) of each class."""
        right = self.matrix.diagonal()
        return right[:-1], (self.matrix.sum(1) - right)[:-1]

    def plot(self, normalize: bool = True, save_dir: str | Path = "", names: Names = ()) -> None:
        """Draws `confusion_matrix.png`, its columns as shares, into a folder.

        Raises:
            UserError: counts instead of shares are asked for, or the file cannot be written.
        """
        from utils.plots.boxes import as_mapping
        from utils.plots.evaluation import drawable_names, plot_confusion

        if not normalize:
            raise UserError("ConfusionMatrix.plot draws shares; take counts from its attribute 'matrix'.")
        plot_confusion(self, drawable_names(as_mapping(names)), Path(save_dir) / "confusion_matrix.png")

    def print(self) -> None:
        """Logs the counts, a line for each predicted class."""
        for row in self.matrix:
            LOGGER.info(" ".join(map(str, row)))
