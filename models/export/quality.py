"""What an export costs in accuracy: its mAP beside the checkpoint's, on the same images of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.backends import Backend
from models.backends.metadata import Suppression
from models.validation import check_classes, image_shape, make_loader, open_subject
from utils.data.spec import load_spec
from utils.eval.evaluate import evaluate
from utils.nms import non_max_suppression

BATCH_SIZE = 16
WORKERS = 0  # exporters leave threads behind that forked loader processes might hang on


class MapComparison(NamedTuple):
    """mAP50-95 of both."""

    checkpoint: float
    exported: float

    @property
    def drop(self) -> float:
        """What the export loses; negative where it gains."""
        return self.checkpoint - self.exported


def compare_map(
    weights: str | Path, exported: str | Path, data: str | Path, shape_hw: tuple[int, int], device: str = ""
) -> MapComparison:
    """Evaluates a checkpoint and its export on a data set's validation split.

    Both get the same batches: images padded to the export's shape, or rectangles where it takes any. Where detections
    are chosen inside the export, the checkpoint's are chosen in the same way.

    Args:
        weights: the checkpoint.
        exported: the file or folder made of it.
        data: data set YAML.
        shape_hw: height and width that it was exported for, px; a dynamic one gets rectangles of the longer side.
        device: where both run; empty chooses.

    Raises:
        UserError: a file, the data set or the device is not there, or the classes are not the data set's.
    """
    spec = load_spec(data, need=("val",), download=False)
    subjects = [open_subject(weights, device), open_subject(exported, device)]
    for subject in subjects:
        check_classes(subject, spec)
    export = subjects[1]
    shape = export.shape_hw or image_shape(export, max(shape_hw))
    loader = make_loader(export, spec, shape, batch_size=BATCH_SIZE, workers=WORKERS)
    try:
        checkpoint, exported = (subject.build() for subject in subjects)
        judged = _Choosing(checkpoint, export.nms) if export.nms else checkpoint
        found = [evaluate(model, loader, names=spec.names, quiet=True).map for model in (judged, exported)]
    finally:
        loader.close()
    return MapComparison(*found)


class _Choosing:
    """A checkpoint as a predictor that chooses its detections as an export with NMS inside does."""

    chosen = True

    def __init__(self, backend: Backend, suppression: Suppression) -> None:
        self._backend, self._suppression = backend, suppression
        self.preprocess, self.synchronize = backend.preprocess, backend.synchronize

    def infer(self, inputs: Any) -> np.ndarray:
        """Returns detections (b, max_det, 6) [x1, y1, x2, y2 in px, confidence, class], filled up with zeros."""
        how = self._suppression
        found = non_max_suppression(
            self._backend.infer(inputs), how.conf_thres, how.iou_thres, agnostic=how.agnostic, max_det=how.max_det
        )
        filled = np.zeros((len(found), how.max_det, 6), np.float32)
        for place, detections in zip(filled, found, strict=True):
            place[: len(detections)] = detections.cpu().numpy()
        return filled
