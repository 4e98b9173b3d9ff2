"""A loaded model as a function from pictures to boxes: letterbox, inference, suppression, back to the picture.

Any runtime of `models.backends` will do. Not here: reading, drawing and writing (`utils.data`, `utils.draw`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from models.backends.base import Array, Backend, LayerHook
from models.backends.metadata import Suppression
from utils.boxes import scale_boxes
from utils.checks import UserError, check_image_size
from utils.data.sources import Frame
from utils.images import letterbox
from utils.log import LOGGER
from utils.nms import non_max_suppression

STAGES = ("pre-process", "inference", "NMS")


class Limits(NamedTuple):
    """Which detections are kept; see `Detector`."""

    conf_thres: float
    iou_thres: float
    classes: Sequence[int] | None
    agnostic: bool
    max_det: int

    def suppress(self, rows: Array) -> Array:
        """Returns the detections (k, 6) among a model's rows (1, n, 5 + nc)."""
        return non_max_suppression(rows, **self._asdict())[0]

    def narrow(self, detections: Array) -> np.ndarray:
        """Returns those of detections (m, 6), chosen inside a model and filled up with zeros, that are wanted."""
        found = detections if isinstance(detections, np.ndarray) else detections.cpu().numpy()
        wanted = found[:, 4] > self.conf_thres
        if self.classes is not None:
            wanted &= np.isin(found[:, 5], list(self.classes))
        return found[wanted][: self.max_det]


class Detector:
    """A model with its thresholds, which also keeps the time of each stage.

    Attributes:
        last_s: seconds that each of STAGES took for the last picture.
    """

    def __init__(
        self,
        backend: Backend,
        shape_hw: Sequence[int],
        conf_thres: float = 0.25,
        iou_thres: float = 0.45,
        classes: Sequence[int] | None = None,
        agnostic: bool = False,
        max_det: int = 1000,
    ) -> None:
        """Takes a model and how it is to be used.

        Args:
            backend: the model.
            shape_hw: height and width that pictures are scaled to, multiples of the model's stride.
            conf_thres: confidences must exceed it.
            iou_thres: boxes of a class that overlap a more confident one by more are dropped.
            classes: class numbers to keep; None keeps all.
            agnostic: suppress across classes.
            max_det: most detections in a picture.
        """
        self.last_s = dict.fromkeys(STAGES, 0.0)
        self._backend, self._shape_hw = backend, shape_hw
        self._limits = Limits(conf_thres, iou_thres, classes, agnostic, max_det)
        if backend.chosen:
            _tell_what_is_fixed(self._limits, backend.metadata.nms)
        self._total_s, self._seen = dict.fromkeys(STAGES, 0.0), 0
        backend.warm_up(*shape_hw)

    def letterboxed(self, frames: Iterable[Frame]) -> Iterator[tuple[Frame, np.ndarray | None]]:
        """Yields each frame with the model's input, uint8 (1, 3, h, w) RGB; None where the frame is damaged."""
        for frame in frames:
            inputs = None
            if frame.image is not None:
                boxed = letterbox(frame.image, self._shape_hw, auto=self._backend.dynamic, stride=self._backend.stride)
                inputs = cv2.cvtColor(boxed.image, cv2.COLOR_BGR2RGB)[None].transpose(0, 3, 1, 2)
            yield frame, inputs

    def __call__(self, images: np.ndarray, picture_hw: Sequence[int], visualize: LayerHook | None = None) -> np.ndarray:
        """Detects in one picture.

        Args:
            images: the letterboxed picture, uint8 (1, 3, h, w) RGB.
            picture_hw: its height and width before that.
            visualize: called with each layer's output.

        Returns:
            (k, 6) [x1, y1, x2, y2 in whole px of the picture, confidence, class], most confident first.
        """
        clock = [self._now()]
        inputs = self._backend.preprocess(images)
        clock.append(self._now())
        rows = self._backend.infer(inputs, visualize)
        clock.append(self._now())
        found = self._limits.narrow(rows[0]) if self._backend.chosen else self._limits.suppress(rows)
        clock.append(self._now())
        for stage, start, end in zip(STAGES, clock, clock[1:], strict=False):
            self.last_s[stage] = end - start
            self._total_s[stage] += end - start
        self._seen += 1
        found = np.array(found if isinstance(found, np.ndarray) else found.cpu().numpy())
        found[:, :4] = scale_boxes(images.shape[2:], found[:, :4], picture_hw).round()
        return found

    def speed(self) -> str:
        """Returns a line about the mean time of each stage; empty when no picture was seen."""
        if not self._seen:
            return ""
        times = ", ".join(f"{1000 * self._total_s[stage] / self._seen:.1f}ms {stage}" for stage in STAGES)
        return f"Speed: {times} per image at shape {(1, 3, *self._shape_hw)}\n"

    def _now(self) -> float:
        """Returns the time once the device has done its work."""
        self._backend.synchronize()
        return time.perf_counter()


def shape_for(backend: Backend, imgsz: Sequence[int] | None, default_px: int) -> list[int]:
    """Returns height and width that pictures are scaled to: what was asked for, else what suits the model.

    Args:
        backend: the model.
        imgsz: --imgsz, one side or two; None where it was not given.
        default_px: the side then, where the model takes any.

    Raises:
        UserError: the model takes one size only, and it is another.
    """
    asked = None if imgsz is None else list(imgsz) * 2 if len(imgsz) == 1 else list(imgsz)
    if backend.dynamic:
        return check_image_size(asked or [default_px, default_px], backend.stride)
    only = list(backend.metadata.shape_hw)
    if asked is None:
        LOGGER.info(f"Image size {only[0]}x{only[1]}, the one that the model was exported for")
    elif asked != only:
        sides, fixed = (" ".join(map(str, shape)) for shape in (asked, only))
        raise UserError(
            f"--img-size {sides}: the model was exported for {fixed} (height, width) and takes no other: leave the "
            "option out, or export the checkpoint with --dynamic or for that size."
        )
    return only


def _tell_what_is_fixed(limits: Limits, inside: Suppression) -> None:
    """Says where a model that chooses detections itself cannot do as asked."""
    fixed = []
    if limits.conf_thres < inside.conf_thres:
        fixed.append(f"--conf-thres at least {inside.conf_thres}")
    if limits.iou_thres != inside.iou_thres:
        fixed.append(f"--iou-thres {inside.iou_thres}")
    if limits.max_det > inside.max_det:
        fixed.append(f"--max-det at most {inside.max_det}")
    if limits.agnostic != inside.agnostic:
        fixed.append("--agnostic-nms" if inside.agnostic else "no --agnostic-nms")
    if fixed:
        LOGGER.info(f"The model chooses detections itself (export.py --nms): {', '.join(fixed)} holds")
