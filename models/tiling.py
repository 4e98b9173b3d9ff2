"""Validation in tiles: any model as a predictor of whole pictures that looks at them through overlapping windows.

Each window is brought to the model's size as plain validation brings a picture, so that a picture no larger than a
tile gives the same detections either way. Not here: where windows lie and how their detections are joined
(`utils.tiles`), and the same for `detect.py` (`models.detector`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from models.validation import PAD_STRIDES, Shape
from utils.boxes import scale_boxes
from utils.data.dataset import ShapeInfo, rectangular_batches
from utils.data.fullsize import full_size_loader
from utils.data.labels import load_labels
from utils.data.loader import DetectionLoader
from utils.data.spec import DataSpec
from utils.eval.predictor import Predictor
from utils.images import letterbox, resized_wh
from utils.nms import non_max_suppression
from utils.tiles import Tiling, merge, windows


class View(NamedTuple):
    """A window of a picture, letterboxed."""

    image: np.ndarray  # uint8 (3, h, w) RGB
    window_xyxy: np.ndarray  # (4,) int, where in the picture, px
    shape: ShapeInfo  # what leads back to the window

    def in_picture(self, detections: np.ndarray) -> np.ndarray:
        """Takes detections (k, 6) from the letterboxed window's px to the picture's."""
        original_hw, *ratio_pad = self.shape
        boxes_xyxy = scale_boxes(self.image.shape[1:], detections[:, :4], original_hw, ratio_pad)
        return np.concatenate((boxes_xyxy + np.tile(self.window_xyxy[:2], 2), detections[:, 4:]), 1, dtype=np.float32)


class TiledPredictor:
    """Detects in one whole picture at a time, tile by tile.

    Its `infer` does all the work, suppression included; so the times of an evaluation show it under inference.
    """

    chosen = True

    def __init__(
        self,
        predictor: Predictor,
        tiling: Tiling,
        shape: Shape,
        stride: int,
        *,
        pad: float = PAD_STRIDES,
        batch_size: int = 32,
        conf_thres: float = 0.001,
        iou_thres: float = 0.6,
        max_det: int = 300,
        agnostic: bool = False,
    ) -> None:
        """Takes a model and how it is to be used.

        Args:
            predictor: the model.
            tiling: how pictures are cut.
            shape: long side of the windows as the model sees them, or height and width that all are padded to, px.
            stride: what those sides must be multiples of.
            pad: border that windows get where `shape` is a long side, in strides.
            batch_size: most windows in one run of the model.
            conf_thres: confidences must exceed it.
            iou_thres: boxes of a class that overlap a more confident one by more are dropped.
            max_det: most detections in a window, and in a picture.
            agnostic: suppress across classes.
        """
        self._predictor, self._tiling = predictor, tiling
        self._shape, self._stride, self._pad = shape, stride, pad
        self._batch_size, self._conf_thres, self._iou_thres = batch_size, conf_thres, iou_thres
        self._max_det, self._agnostic = max_det, agnostic

    def preprocess(self, images: np.ndarray) -> list[View]:
        """Cuts one picture, uint8 (1, 3, h, w) RGB, into letterboxed windows."""
        (picture,) = images
        return [
            letterboxed_window(picture, window_xyxy, self._shape, self._stride, self._pad)
            for window_xyxy in windows(*picture.shape[1:], self._tiling)
        ]

    def infer(self, inputs: Sequence[View]) -> np.ndarray:
        """Returns a picture's detections (1, k, 6) [x1, y1, x2, y2 in its px, confidence, class] from its windows."""
        found, windows_xyxy = [], []
        for batch in self._batches(inputs):
            for view, detections in zip(batch, self._detect(batch), strict=True):
                found.append(view.in_picture(detections))
                windows_xyxy.append(view.window_xyxy)
        if len(found) == 1:
            return found[0][None]
        return merge(found, np.stack(windows_xyxy), self._iou_thres, self._agnostic, self._max_det)[None]

    def synchronize(self) -> None:
        """Waits for the device."""
        self._predictor.synchronize()

    def _batches(self, views: Sequence[View]) -> Iterator[Sequence[View]]:
        """Yields views of one shape together, at most `batch_size` at a time."""
        by_shape: dict[tuple[int, ...], list[View]] = {}
        for view in views:
            by_shape.setdefault(view.image.shape, []).append(view)
        for alike in by_shape.values():
            for start in range(0, len(alike), self._batch_size):
                yield alike[start : start + self._batch_size]

    def _detect(self, batch: Sequence[View]) -> list[np.ndarray]:
        """Returns for each view its detections (k, 6) in px of the letterboxed window."""
        images = np.stack([view.image for view in batch])
        output: Any = self._predictor.infer(self._predictor.preprocess(images))
        if self._predictor.chosen:
            return [rows[rows[:, 4] > self._conf_thres][: self._max_det] for rows in np.asarray(output)]
        if isinstance(output, np.ndarray):  # suppressing many candidates is faster by far in torch
            output = torch.from_numpy(np.require(output, requirements="W"))
        found = non_max_suppression(
            output, self._conf_thres, self._iou_thres, None, self._agnostic, multi_label=True, max_det=self._max_det
        )
        return [detections.cpu().numpy() for detections in found]


def letterboxed_window(
    picture: np.ndarray, window_xyxy: np.ndarray, shape: Shape, stride: int, pad: float = PAD_STRIDES
) -> View:
    """Cuts a window out of a picture and brings it to the model's size, as plain validation does a picture of its own.

    Args:
        picture: uint8 (3, h, w) RGB.
        window_xyxy: (4,) int, px.
        shape: long side of the result before padding, or its height and width, px.
        stride: what the result's sides are multiples of.
        pad: border where `shape` is a long side, in strides.
    """
    left, top, right, bottom = window_xyxy.tolist()
    cut = np.ascontiguousarray(picture[:, top:bottom, left:right].transpose(1, 2, 0))
    width, height = right - left, bottom - top
    fitting_wh = resized_wh((width, height), shape)
    if fitting_wh != (width, height):
        shrinks = max(fitting_wh) < max(width, height)
        cut = cv2.resize(cut, fitting_wh, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    padded_hw = shape
    if isinstance(shape, int):
        padded_hw = rectangular_batches(np.array([[width, height]]), 1, shape, stride, pad)[1][0].tolist()
    boxed = letterbox(cut, padded_hw, auto=False, scaleup=False)
    ratio_w, ratio_h = boxed.ratio
    ratio_hw = (cut.shape[0] * ratio_h / height, cut.shape[1] * ratio_w / width)
    image = np.ascontiguousarray(boxed.image.transpose(2, 0, 1))
    return View(image, window_xyxy, ShapeInfo((height, width), ratio_hw, boxed.pad))


def make_tiled_loader(
    spec: DataSpec, *, task: str = "val", workers: int = 8, single_cls: bool = False, need_labels: bool = True
) -> DetectionLoader:
    """Makes the loader of a split's whole pictures, which a `TiledPredictor` takes."""
    table = load_labels(getattr(spec, task), spec, single_cls, workers, f"{task}: ", need_labels)
    return full_size_loader(table, workers)
