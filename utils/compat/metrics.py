"""Metrics by YOLOv5 6.1's signatures, over `utils.eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.errors import UserError
from utils.eval import confusion, metrics
from utils.log import LOGGER
from utils.plots import as_mapping
from utils.plots.evaluation import drawable_names, plot_confusion, plot_curves

Names = Mapping[int, str] | Sequence[str]


class PrecisionRecall(NamedTuple):
    """The interpolated area under precision over recall, and the curve that was integrated."""

    ap: float
    mpre: np.ndarray  # (d + 2,) precision, falling
    mrec: np.ndarray  # (d + 2,) recall from 0 to 1


class APPerClass(NamedTuple):
    """What `ap_per_class` returns for the k classes that have labels."""

    tp: np.ndarray  # (k,)
    fp: np.ndarray  # (k,)
    p: np.ndarray  # (k,) precision at the best F1
    r: np.ndarray  # (k,)
    f1: np.ndarray  # (k,)
    ap: np.ndarray  # (k, 10)
    classes: np.ndarray  # (k,) int32


def fitness(x: np.ndarray) -> np.ndarray:
    """Returns one figure (n,) for each row (n, 4 or more) of [P, R, mAP50, mAP50-95]."""
    return metrics.fitness(x[:, 2], x[:, 3])


def compute_ap(recall: Sequence[float], precision: Sequence[float]) -> PrecisionRecall:
    """Returns the average precision of a curve: recall (d,) rising, precision (d,)."""
    recall, precision = np.asarray(recall, dtype=float), np.asarray(precision, dtype=float)
    mrec, mpre = metrics.precision_envelope(recall, precision)
    return PrecisionRecall(metrics.average_precision(recall, precision), mpre, mrec)


def ap_per_class(
    tp: np.ndarray,
    conf: np.ndarray,
    pred_cls: np.ndarray,
    target_cls: np.ndarray,
    plot: bool = False,
    save_dir: str | Path = ".",
    names: Names = (),
) -> APPerClass:
    """Returns precision, recall and average precision of each class that has labels.

    Args:
        tp: (n, t) whether each detection is right at each IoU threshold.
        conf: (n,) confidences.
        pred_cls: (n,) classes of the detections.
        target_cls: (m,) classes of the labels.
        plot: draw PR_curve.png, F1_curve.png, P_curve.png and R_curve.png.
        save_dir: an existing folder for them.
        names: of the classes.
    """
    result = metrics.average_precisions(tp, conf, pred_cls, target_cls)
    if plot:
        plot_curves(result, drawable_names(as_mapping(names)), Path(save_dir))
    return APPerClass(
        result.true_positives,
        result.false_positives,
        result.precision,
        result.recall,
        result.f1,
        result.ap,
        result.classes.astype(np.int32),
    )


class ConfusionMatrix(confusion.ConfusionMatrix):
    """The confusion matrix; images without detections or labels count as well, so hand in all of them."""

    def process_batch(self, detections: Any, labels: Any) -> None:
        """Adds one image: detections (n, 6) [xyxy, confidence, class] or None, labels (m, 5) [class, xyxy]."""
        found = np.zeros((0, 6)) if detections is None else _to_numpy(detections)
        self.update(found, _to_numpy(labels))

    def tp_fp(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns true and false positives (nc,) of each class."""
        right = self.matrix.diagonal()
        return right[:-1], (self.matrix.sum(1) - right)[:-1]

    def plot(self, normalize: bool = True, save_dir: str | Path = "", names: Names = ()) -> None:
        """Draws `confusion_matrix.png`, its columns as shares, into a folder.

        Raises:
            UserError: counts instead of shares are asked for, or the file cannot be written.
        """
        if not normalize:
            raise UserError("ConfusionMatrix.plot draws shares; take counts from its attribute 'matrix'.")
        plot_confusion(self, drawable_names(as_mapping(names)), Path(save_dir) / "confusion_matrix.png")

    def print(self) -> None:
        """Logs the counts, a line for each predicted class."""
        for row in self.matrix:
            LOGGER.info(" ".join(map(str, row)))


def _to_numpy(rows: Any) -> np.ndarray:
    """Returns an array, or a tensor on any device, as an array."""
    return rows if isinstance(rows, np.ndarray) else rows.detach().cpu().numpy()
