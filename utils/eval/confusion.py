"""The confusion matrix of a detector: which class was taken for which, what was missed, what was invented.

Counts every image, those without labels or without detections included. Drawn by `utils.plots.evaluation`.
"""

from __future__ import annotations

import numpy as np

from utils.boxes import box_iou


class ConfusionMatrix:
    """Counts pairs of predicted and true classes; the last index, `nc`, is the background.

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

    def update(self, detections: np.ndarray, labels: np.ndarray) -> None:
        """Adds one image.

        Every detection goes to the label that it overlaps most, whatever the classes, and each label takes the best
        overlapping of those; of equals the first.

        Args:
            detections: (n, 6) [x1, y1, x2, y2, confidence, class].
            labels: (m, 5) [class, x1, y1, x2, y2] in the same pixels.
        """
        detections = detections[detections[:, 4] > self.conf]
        predicted, true = detections[:, 5].astype(np.int64), labels[:, 0].astype(np.int64)
        label_of = np.full(len(predicted), -1)
        if len(predicted) and len(true):
            label_of = self._pair(box_iou(labels[:, 1:5], detections[:, :4]))
        missed = np.ones(len(true), dtype=bool)
        missed[label_of[label_of >= 0]] = False
        true_or_background = np.append(true, self.nc)[label_of]  # -1 picks the background
        np.add.at(self.matrix, (predicted, true_or_background), 1)
        np.add.at(self.matrix, (self.nc, true[missed]), 1)

    def _pair(self, overlap: np.ndarray) -> np.ndarray:
        """Pairs labels with detections one to one.

        Args:
            overlap: (m, n) IoU, m labels and n detections, both at least 1.

        Returns:
            (n,) the label of each detection, or -1.
        """
        chosen, best = overlap.argmax(0), overlap.max(0)
        order = np.argsort(-best, kind="stable")  # best overlaps first
        order = order[best[order] > self.iou_thres]
        _, first = np.unique(chosen[order], return_index=True)  # of each label
        label_of = np.full(overlap.shape[1], -1)
        winners = order[first]
        label_of[winners] = chosen[winners]
        return label_of

    def normalised(self) -> np.ndarray:
        """The matrix (nc + 1, nc + 1) with every column as shares of its sum; an empty column is 0."""
        return self.matrix / np.maximum(self.matrix.sum(0, keepdims=True), 1)
