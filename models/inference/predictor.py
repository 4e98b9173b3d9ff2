"""A loaded model as a function from pictures to boxes: letterbox, inference, suppression, back to the picture.

Any runtime of `models.backends` will do. Pictures go through in batches of one shape, whole or in tiles. Not here:
reading, drawing and writing (`utils.media`, `utils.plots.boxes`), and their interplay (`models.inference.pipeline`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from models.backends.base import Array, Backend, LayerHook
from utils.boxes import scale_boxes
from utils.errors import UserError, check_image_size
from utils.images import letterbox
from utils.log import LOGGER
from utils.nms import NMSConfig
from utils.plots.boxes import class_name
from utils.tiles import Tiling, merge, windows

STAGES = ("pre-process", "inference", "NMS")
MAX_BATCH = 16  # windows in one run of the model, whatever the picture's size

RatioPad = tuple[tuple[float, float], tuple[float, float]]
PictureHook = Callable[[int, int, str, np.ndarray], None]  # picture's number, layer's row, its block, maps (1, c, h, w)


class WindowBatch(NamedTuple):
    """Windows of pictures, of one shape once letterboxed: what the model sees in one run."""

    images: np.ndarray  # uint8 (b, 3, h, w) RGB
    pictures: list[int]  # the picture that each is a window of
    windows_xyxy: np.ndarray  # (b, 4) int, where in that picture, px
    ratio_pads: list[RatioPad]  # what leads back to the window, as `scale_boxes` takes it


class Detector:
    """A model with its thresholds, which also keeps the time of each stage.

    Attributes:
        last_s: seconds that each of STAGES took in the last call.
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
        augment: bool = False,
        tiling: Tiling | None = None,
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
            augment: look at every picture in several sizes, mirrored too (checkpoints alone).
            tiling: cut pictures into windows of this size; None takes every picture as one.
        """
        self.last_s = dict.fromkeys(STAGES, 0.0)
        self._backend, self._shape_hw, self._augment, self._tiling = backend, shape_hw, augment, tiling
        self._nms = NMSConfig(conf_thres, iou_thres, max_det, agnostic, classes)
        if backend.has_nms:
            _tell_what_is_fixed(self._nms, backend.metadata.nms)
        self._total_s, self._seen = dict.fromkeys(STAGES, 0.0), 0
        backend.warm_up(*shape_hw)

    def prepare(self, pictures: Sequence[np.ndarray]) -> list[WindowBatch]:
        """Letterboxes pictures, uint8 (h, w, 3) BGR of any sizes, or their windows, and joins those of one shape."""
        by_shape: dict[tuple[int, ...], list[tuple[np.ndarray, int, np.ndarray, RatioPad]]] = {}
        for number, picture in enumerate(pictures):
            for window in self._windows(picture):
                left, top, right, bottom = window
                cut = picture[top:bottom, left:right]
                boxed = letterbox(cut, self._shape_hw, auto=self._backend.dynamic, stride=self._backend.stride)
                image = cv2.cvtColor(boxed.image, cv2.COLOR_BGR2RGB).transpose(2, 0, 1)
                by_shape.setdefault(image.shape, []).append((image, number, window, boxed.ratio_pad(cut.shape)))
        return [
            _join(entries[start : start + MAX_BATCH])
            for entries in by_shape.values()
            for start in range(0, len(entries), MAX_BATCH)
        ]

    def __call__(
        self, batches: Sequence[WindowBatch], count: int, visualize: PictureHook | None = None
    ) -> list[np.ndarray]:
        """Detects in `count` pictures.

        Args:
            batches: what `prepare` made of them.
            count: how many pictures they were.
            visualize: called with a picture's number and each layer's output for it.

        Returns:
            For each picture (k, 6) [x1, y1, x2, y2 in whole px of the picture, confidence, class], most confident
            first.
        """
        self.last_s = dict.fromkeys(STAGES, 0.0)
        found: list[list[np.ndarray]] = [[] for _ in range(count)]
        windows: list[list[np.ndarray]] = [[] for _ in range(count)]
        for batch in batches:
            for number, window, detections in zip(
                batch.pictures, batch.windows_xyxy, self._run(batch, visualize), strict=True
            ):
                found[number].append(detections)
                windows[number].append(window)
        merged = [self._merge(*parts) for parts in zip(found, windows, strict=True)]
        for stage, seconds in self.last_s.items():
            self._total_s[stage] += seconds
        self._seen += count
        return merged

    def detect(self, picture: np.ndarray) -> np.ndarray:
        """Detects in one picture, uint8 (h, w, 3) BGR; see `__call__`."""
        return self(self.prepare([picture]), 1)[0]

    def speed(self) -> str:
        """Returns a line about the mean time of each stage; empty when no picture was seen."""
        if not self._seen:
            return ""
        times = ", ".join(f"{1000 * self._total_s[stage] / self._seen:.1f}ms {stage}" for stage in STAGES)
        return f"Speed: {times} per image at shape {(1, 3, *self._shape_hw)}\n"

    def _windows(self, picture: np.ndarray) -> np.ndarray:
        """Returns the windows (n, 4) int xyxy that a picture (h, w, 3) is looked at through."""
        height, width = picture.shape[:2]
        return windows(height, width, self._tiling) if self._tiling else np.array([[0, 0, width, height]])

    def _run(self, batch: WindowBatch, visualize: PictureHook | None) -> list[np.ndarray]:
        """Returns the detections (k, 6) of each window, in px of its picture."""
        clock = [self._now()]
        inputs = self._backend.preprocess(batch.images)
        clock.append(self._now())
        rows = self._backend.infer(inputs, visualize and _per_picture(visualize, batch.pictures), self._augment)
        clock.append(self._now())
        found = [self._nms.narrow(one) for one in rows] if self._backend.has_nms else self._nms.suppress(rows)
        clock.append(self._now())
        for stage, start, end in zip(STAGES, clock, clock[1:], strict=False):
            self.last_s[stage] += end - start
        padded_hw = batch.images.shape[2:]
        return [
            _in_picture(one, padded_hw, *place)
            for one, *place in zip(found, batch.windows_xyxy, batch.ratio_pads, strict=True)
        ]

    def _merge(self, found: list[np.ndarray], windows_xyxy: list[np.ndarray]) -> np.ndarray:
        """Returns a picture's detections (k, 6), their corners in whole px, from those of its windows."""
        if len(found) == 1:
            (detections,) = found
        else:
            detections = merge(found, np.stack(windows_xyxy), self._nms)
        detections[:, :4] = detections[:, :4].round()
        return detections

    def _now(self) -> float:
        """Returns the time once the device has done its work."""
        self._backend.synchronize()
        return time.perf_counter()


def _join(entries: Sequence[tuple[np.ndarray, int, np.ndarray, RatioPad]]) -> WindowBatch:
    """Joins images (3, h, w), each with its picture's number, its window and the way back to that, to a batch."""
    images, pictures, places, ratio_pads = zip(*entries, strict=True)
    stacked = images[0][None] if len(images) == 1 else np.stack(images)  # a view: one picture is the usual case
    return WindowBatch(stacked, list(pictures), np.stack(places), list(ratio_pads))


def _in_picture(found: Array, padded_hw: Sequence[int], window_xyxy: np.ndarray, ratio_pad: RatioPad) -> np.ndarray:
    """Takes detections (k, 6) from a letterboxed window to the picture that it is cut from."""
    left, top, right, bottom = window_xyxy.tolist()
    moved = np.array(found if isinstance(found, np.ndarray) else found.cpu().numpy())
    moved[:, :4] = scale_boxes(padded_hw, moved[:, :4], (bottom - top, right - left), ratio_pad)
    moved[:, :4] += (left, top, left, top)
    return moved


def _per_picture(hook: PictureHook, pictures: Sequence[int]) -> LayerHook:
    """Returns a hook for the maps (b, c, h, w) of a batch that calls `hook` with those (1, c, h, w) of each picture."""

    def show(row: int, block: str, maps: np.ndarray) -> None:
        for index, number in enumerate(pictures):
            hook(number, row, block, maps[index : index + 1])

    return show


def class_summary(classes: Sequence[int], names: Mapping[int, str]) -> str:
    """Returns `2 persons, 1 tie` for the classes that were found, in their order; empty for none."""
    counts = [(classes.count(class_id), class_name(names, class_id)) for class_id in sorted(set(classes))]
    return ", ".join(f"{count} {name}{'s' * (count > 1 and name.isascii())}" for count, name in counts)


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


def _tell_what_is_fixed(limits: NMSConfig, inside: NMSConfig) -> None:
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
        LOGGER.info(f"The model chooses detections itself: {', '.join(fixed)} holds")
