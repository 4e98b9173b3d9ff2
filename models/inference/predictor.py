"""Images to detections, the only way: letterbox, inference, NMS, back to the image, whole or in tiles.

Any runtime of `models.backends` will do, a PyTorch module among them (`models.backends.pytorch.ModuleBackend`).
Not here: reading, drawing and writing (`utils.media`, `utils.plots.boxes`), their interplay
(`models.inference.pipeline`), and the loop over a data set (`utils.eval.evaluate`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from models.backends.base import Array, Backend, LayerHook
from utils.boxes import Detections, scale_boxes, to_numpy
from utils.images import DEFAULT_IMGSZ, letterbox, resize, resized_wh
from utils.nms import NMSConfig
from utils.plots.boxes import class_name
from utils.tiles import Tiling, merge, windows

STAGES = ("pre-process", "inference", "NMS")
MAX_BATCH = 16  # windows in one run of the model, whatever the image's size

RatioPad = tuple[tuple[float, float], tuple[float, float]]
ImageHook = Callable[[int, int, str, np.ndarray], None]  # image's number, layer's row, its block, maps (1, c, h, w)


class Window(NamedTuple):
    """An image, or a tile of one, as the model is to see it."""

    inputs: np.ndarray  # letterboxed, uint8 (3, h, w) RGB
    xyxy: tuple[int, int, int, int]  # where in the image, px
    ratio_pad: RatioPad  # what leads back to it, as `scale_boxes` takes it


class Predictor:
    """A model with all that decides what it detects in an image; it also keeps the time of each stage.

    `prepare` and a call do the work for images of any size; the first may run in another thread, ahead. `predict` is
    the model and NMS alone, for batches that a data loader has brought to the model's size.

    Attributes:
        backend: the model.
        nms: how detections are chosen where a call does not say.
        seconds: that each of STAGES took in all calls so far.
        last_s: in the last call.
        shape: what images are fitted into, as given.
    """

    def __init__(
        self,
        backend: Backend,
        nms: NMSConfig | None = None,
        shape: int | Sequence[int] = DEFAULT_IMGSZ,
        *,
        tiling: Tiling | None = None,
        augment: bool = False,
        val_pad: float | None = None,
        max_batch: int = MAX_BATCH,
    ) -> None:
        """Takes a model and how it is to be used.

        Args:
            backend: the model.
            nms: how detections are chosen; None for the defaults.
            shape: height and width that images are fitted into, multiples of the model's stride, px; or one number,
                with `val_pad`: the long side of rectangles, without it: of squares.
            tiling: cut images into windows of this size; None takes every image as one.
            augment: test-time augmentation (3 scales, flip; checkpoints alone).
            val_pad: bring images to size as validation does, which shrinks by area averaging; rectangles get this
                border, in strides. None: as detection does.
            max_batch: most windows in one run of the model.
        """
        self.backend, self.nms = backend, nms or NMSConfig()
        self.seconds, self.last_s = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
        self.shape = [shape, shape] if isinstance(shape, int) and val_pad is None else shape
        self._tiling, self._val_pad, self._max_batch = tiling, val_pad, max_batch
        self._options = {"augment": True} if augment else {}
        self._has_nms, self._stride = backend.has_nms, backend.stride
        self._seen = 0

    def prepare(self, image: np.ndarray, rgb: bool = False) -> list[Window]:
        """Letterboxes an image, uint8 (h, w, 3) BGR (`rgb`: RGB) of any size, or its tiles."""
        height, width = image.shape[:2]
        places = windows(height, width, self._tiling).tolist() if self._tiling else [[0, 0, width, height]]
        prepared = []
        for left, top, right, bottom in places:
            cut = image[top:bottom, left:right]
            boxed, ratio_pad = self._letterbox(cut)
            boxed = boxed if rgb else cv2.cvtColor(boxed, cv2.COLOR_BGR2RGB)
            prepared.append(Window(boxed.transpose(2, 0, 1), (left, top, right, bottom), ratio_pad))
        return prepared

    def __call__(
        self,
        images: Sequence[Sequence[Window]],
        nms: Sequence[NMSConfig] | None = None,
        visualize: ImageHook | None = None,
    ) -> list[Detections]:
        """Detects in images.

        Args:
            images: what `prepare` made of each.
            nms: how detections are chosen in each; None for the predictor's own way.
            visualize: called with an image's number and each layer's output for it.

        Returns:
            For each image what was found, in its px, most confident first.
        """
        self.last_s = dict.fromkeys(STAGES, 0.0)
        wanted = nms or [self.nms] * len(images)
        found: list[dict[int, np.ndarray]] = [{} for _ in images]  # of each image the rows of its windows
        by_shape: dict[tuple[int, ...], list[tuple[int, int, Window]]] = {}
        for number, image in enumerate(images):
            for place, window in enumerate(image):
                by_shape.setdefault(window.inputs.shape, []).append((number, place, window))
        for entries in by_shape.values():
            for start in range(0, len(entries), self._max_batch):
                numbers, places, batch = zip(*entries[start : start + self._max_batch], strict=True)
                inputs = batch[0].inputs[None] if len(batch) == 1 else np.stack([window.inputs for window in batch])
                hook = visualize and _per_image(visualize, numbers)
                chosen = self._run(inputs, [wanted[number] for number in numbers], visualize=hook)
                for number, place, window, rows in zip(numbers, places, batch, chosen, strict=True):
                    found[number][place] = _in_image(rows, inputs.shape[2:], window)
        self._seen += len(images)
        detections = []
        for rows, image, how in zip(found, images, wanted, strict=True):
            parts = [rows[place] for place in range(len(image))]
            whole = parts[0] if len(parts) == 1 else merge(parts, np.array([one.xyxy for one in image]), how)
            detections.append(Detections.from_rows(whole))
        return detections

    def detect(self, image: np.ndarray) -> Detections:
        """Detects in one image, uint8 (h, w, 3) BGR."""
        return self([self.prepare(image)])[0]

    def predict(self, images: np.ndarray, labels: Sequence[Array] = ()) -> list[np.ndarray]:
        """Detects in a data loader's batch.

        Args:
            images: uint8 (b, 3, h, w) RGB, brought to the model's size; with tiling they may be of any size.
            labels: for each image known boxes that join the candidates, as `non_max_suppression` takes them.

        Returns:
            For each image (k, 6) [x1, y1, x2, y2 in its px, confidence, class], most confident first.
        """
        if self._tiling:
            return [self([self.prepare(image.transpose(1, 2, 0), rgb=True)])[0].rows for image in images]
        self._seen += len(images)
        return self._run(images, [self.nms] * len(images), labels)

    def speed(self) -> str:
        """Returns a line about the mean time of each stage; empty when no image was seen."""
        if not self._seen:
            return ""
        times = ", ".join(f"{1000 * self.seconds[stage] / self._seen:.1f}ms {stage}" for stage in STAGES)
        return f"Speed: {times} per image at shape {(1, 3, *self.shape)}"

    def _letterbox(self, cut: np.ndarray) -> tuple[np.ndarray, RatioPad]:
        """Returns a window (h, w, 3) as large as the model wants it, and what leads back."""
        if self._val_pad is None:
            boxed = letterbox(cut, self.shape, auto=self.backend.dynamic, stride=self._stride)
            return boxed.image, boxed.ratio_pad(cut.shape)
        height, width = cut.shape[:2]
        cut = resize(cut, resized_wh((width, height), self.shape), by_area=True)
        padded_hw = self.shape
        if isinstance(padded_hw, int):
            from utils.dataloaders.dataset import rectangular_batches

            sizes_wh = np.array([[width, height]])
            _, (padded_hw,) = rectangular_batches(sizes_wh, 1, padded_hw, self._stride, self._val_pad)
            padded_hw = padded_hw.tolist()
        boxed = letterbox(cut, padded_hw, auto=False, scaleup=False)
        ratio_w, ratio_h = boxed.ratio
        return boxed.image, ((cut.shape[0] * ratio_h / height, cut.shape[1] * ratio_w / width), boxed.pad)

    def _run(
        self,
        images: np.ndarray,
        nms: Sequence[NMSConfig],
        labels: Sequence[Array] = (),
        visualize: LayerHook | None = None,
    ) -> list[np.ndarray]:
        """Returns the detections (k, 6) of each of images, uint8 (b, 3, h, w) RGB, in their px."""
        options = {"visualize": visualize, **self._options} if visualize else self._options
        clock = [time.perf_counter()]
        inputs = self.backend.preprocess(images)
        clock.append(self._now())
        rows = self.backend.infer(inputs, **options)
        clock.append(self._now())
        found = [to_numpy(one) for one in self._choose(rows, nms, labels)]
        clock.append(self._now())
        for stage, start, end in zip(STAGES, clock, clock[1:], strict=False):
            self.last_s[stage] += end - start
            self.seconds[stage] += end - start
        return found

    def _choose(self, rows: Array, nms: Sequence[NMSConfig], labels: Sequence[Array]) -> list[Array]:
        """Returns the detections (k, 6) of each image among a model's rows (b, n, 5 + nc), or chosen (b, n, 6)."""
        if self._has_nms:
            return [how.narrow(chosen) for how, chosen in zip(nms, rows, strict=True)]
        if any(how.multi_label for how in nms) and isinstance(rows, np.ndarray):
            import torch  # with validation's many candidates NMS is six times as fast there

            rows = torch.from_numpy(np.require(rows, requirements="W"))  # copied only if they may not be written to
        labels = [known.to(rows.device) for known in labels]
        if all(how == nms[0] for how in nms):
            return nms[0].suppress(rows, labels)
        return [how.suppress(rows[index : index + 1])[0] for index, how in enumerate(nms)]

    def _now(self) -> float:
        """Returns the time once the device has done its work."""
        self.backend.synchronize()
        return time.perf_counter()


def _in_image(rows: np.ndarray, padded_hw: Sequence[int], window: Window) -> np.ndarray:
    """Takes detections (k, 6) from a letterboxed window to the image that it is cut from."""
    left, top, right, bottom = window.xyxy
    boxes_xyxy = scale_boxes(padded_hw, rows[:, :4], (bottom - top, right - left), window.ratio_pad)
    return np.concatenate((boxes_xyxy + (left, top, left, top), rows[:, 4:]), 1, dtype=np.float32)


def _per_image(hook: ImageHook, numbers: Sequence[int]) -> LayerHook:
    """Returns a hook for the maps (b, c, h, w) of a batch that calls `hook` with those (1, c, h, w) of each image."""

    def show(row: int, block: str, maps: np.ndarray) -> None:
        for index, number in enumerate(numbers):
            hook(number, row, block, maps[index : index + 1])

    return show


def class_summary(classes: Sequence[int], names: Mapping[int, str]) -> str:
    """Returns `2 persons, 1 tie` for the classes that were found, in their order; empty for none."""
    counts = [(classes.count(class_id), class_name(names, class_id)) for class_id in sorted(set(classes))]
    return ", ".join(f"{count} {name}{'s' * (count > 1 and name.isascii())}" for count, name in counts)
