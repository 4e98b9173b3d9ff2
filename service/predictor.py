"""A model for batches of pictures whose senders may each want other thresholds; plain functions of arrays.

Gives for each image what `models.inference.predictor.Detector` gives for it alone. Not here: queues and threads
(`batching`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import cv2
import numpy as np

from models.backends.base import Backend
from utils.boxes import scale_boxes
from utils.errors import UserError, check_image_size
from utils.images import letterbox
from utils.nms import NMSConfig
from utils.plots.boxes import class_name

DEFAULT_SIDE = 640  # px, where neither the options nor the model's file say


class Prepared(NamedTuple):
    """A picture ready for the model."""

    inputs: np.ndarray  # letterboxed, uint8 (3, h, w) RGB
    picture_hw: tuple[int, int]
    nms: NMSConfig
    ratio_pad: tuple[tuple[float, float], tuple[float, float]] | None = None  # as `scale_boxes` takes it


class Predictor:
    """A loaded model with its input size and default thresholds.

    Attributes:
        backend: the model.
        shape_hw: height and width that pictures are scaled to.
        defaults: how detections are chosen where a request does not say.
    """

    def __init__(self, backend: Backend, imgsz: Sequence[int] | None, defaults: NMSConfig) -> None:
        """Takes a model and warms it up.

        Args:
            backend: the model.
            imgsz: one side, or height and width, in px; None takes the size that the model was exported for.
            defaults: how detections are chosen where a request does not say.

        Raises:
            UserError: a size that the model does not take, or a threshold below the one inside it.
        """
        self.backend, self.defaults = backend, defaults
        self.shape_hw = _shape_for(backend, imgsz)
        backend.warm_up(*self.shape_hw)

    @property
    def lowest_conf(self) -> float:
        """The lowest confidence that boxes can have: above 0 where the model itself drops the others."""
        return self.backend.metadata.nms.conf_thres if self.backend.has_nms else 0.0

    def thresholds(self, conf: float | None, iou: float | None) -> NMSConfig:
        """Returns a request's thresholds, the defaults in place of None.

        Raises:
            UserError: the model chooses its boxes itself and is asked to choose otherwise.
        """
        if self.backend.has_nms:
            inside = self.backend.metadata.nms
            if iou is not None and iou != inside.iou_thres:
                raise UserError(f"iou {iou:g}: the suppression is inside this model, with IoU {inside.iou_thres:g}")
            if conf is not None and conf < inside.conf_thres:
                raise UserError(f"conf {conf:g}: this model itself drops boxes below {inside.conf_thres:g}")
        wished = {"conf_thres": conf, "iou_thres": iou}
        return replace(self.defaults, **{name: value for name, value in wished.items() if value is not None})

    def prepare(self, image: np.ndarray, nms: NMSConfig) -> Prepared:
        """Letterboxes a picture, uint8 (h, w, 3) BGR."""
        boxed = letterbox(image, self.shape_hw, auto=self.backend.dynamic, stride=self.backend.stride)
        inputs = cv2.cvtColor(boxed.image, cv2.COLOR_BGR2RGB).transpose(2, 0, 1)
        return Prepared(inputs, image.shape[:2], nms, boxed.ratio_pad(image.shape))

    def detect(self, batch: Sequence[Prepared]) -> list[np.ndarray]:
        """Detects in pictures that were letterboxed to one shape.

        Returns:
            For each picture (k, 6) [x1, y1, x2, y2 in whole px of the picture, confidence, class], most confident
            first.
        """
        rows = self.backend.infer(self.backend.preprocess(np.stack([item.inputs for item in batch])))
        self.backend.synchronize()
        return [self._choose(rows[index : index + 1], item) for index, item in enumerate(batch)]

    def _choose(self, rows: Any, item: Prepared) -> np.ndarray:
        """Turns one picture's rows, (1, n, 5 + nc) or chosen (1, max_det, 6), into detections of the picture."""
        found = item.nms.narrow(rows[0]) if self.backend.has_nms else item.nms.suppress(rows)[0]
        found = np.array(_to_numpy(found), np.float32)
        padded_hw = item.inputs.shape[1:]
        found[:, :4] = scale_boxes(padded_hw, found[:, :4], item.picture_hw, item.ratio_pad).round()
        return found

    def records(self, detections: np.ndarray) -> list[dict[str, Any]]:
        """Returns detections (k, 6) as records of the columns that YOLOv5's hub interface has."""
        records = []
        for *box_xyxy, confidence, class_id in detections.tolist():
            record = dict(zip(("xmin", "ymin", "xmax", "ymax"), box_xyxy, strict=True))
            record |= {"confidence": round(confidence, 6), "class": int(class_id)}
            records.append(record | {"name": class_name(self.backend.names, int(class_id))})
        return records


def _to_numpy(array: Any) -> np.ndarray:
    """Returns an array, or a tensor on any device, as an array."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def _shape_for(backend: Backend, imgsz: Sequence[int] | None) -> list[int]:
    """Returns the height and width that pictures are scaled to."""
    own = [side for side in backend.metadata.shape_hw if side]
    shape_hw = list(imgsz or own or [DEFAULT_SIDE])
    shape_hw = shape_hw * 2 if len(shape_hw) == 1 else shape_hw
    if len(shape_hw) != 2:
        raise UserError(f"--imgsz {' '.join(map(str, shape_hw))}: one side, or height and width, are expected.")
    shape_hw = check_image_size(shape_hw, backend.stride)
    if not backend.dynamic and shape_hw != own:
        fixed = " ".join(map(str, own))
        raise UserError(f"--imgsz {' '.join(map(str, shape_hw))}: this model was exported for --imgsz {fixed} alone.")
    return shape_hw
