"""What every runtime offers: names, strides, and images in, rows out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.backends.metadata import Metadata
from utils.checks import UserError

Array = Any  # np.ndarray or torch.Tensor
LayerHook = Callable[[int, str, np.ndarray], None]  # (row of the model, block's name, output float32 (b, c, h, w))

AUGMENT_NEEDS_CHECKPOINT = "--augment is for checkpoints (.pt), not for exported models: give one, or leave it out."


class Backend(ABC):
    """A loaded model.

    Attributes:
        metadata: what the file says of itself.
        dynamic: whether images may be of any size that is a multiple of the stride; else all must be of
            `metadata.shape_hw`. Any number may come at a time: `infer` cuts and fills where the file takes a fixed one.
        device: where it runs, in words.
    """

    metadata: Metadata
    dynamic: bool
    device: str

    @property
    def names(self) -> dict[int, str]:
        """Class number to name."""
        return self.metadata.names

    @property
    def stride(self) -> int:
        """The largest stride; sides of the images must be multiples of it."""
        return self.metadata.stride

    @property
    def chosen(self) -> bool:
        """Whether `infer` returns detections that were chosen inside the model, not raw rows."""
        return self.metadata.nms is not None

    @abstractmethod
    def preprocess(self, images: np.ndarray) -> Array:
        """Turns letterboxed images, uint8 (b, 3, h, w) RGB, into the runtime's input on its device."""

    @abstractmethod
    def infer(self, inputs: Array, visualize: LayerHook | None = None, augment: bool = False) -> Array:
        """Runs the model on preprocessed images.

        Args:
            inputs: what `preprocess` returned.
            visualize: called with every layer's output where the runtime shows them.
            augment: look at every image in several sizes, mirrored too, and return the rows of all (`models.tta`).

        Returns:
            Rows (b, n, 5 + nc) [x, y, w, h in px, objectness, class probabilities]; where `chosen`, detections
            (b, max_det, 6) [x1, y1, x2, y2 in px, confidence, class], most confident first, filled up with zeros.
            Float32; the next call may write over them.

        Raises:
            UserError: `visualize` or `augment` on a runtime other than PyTorch, or images of a size that it does not
                take.
        """

    @abstractmethod
    def warm_up(self, height: int, width: int) -> None:
        """Runs once on an empty image where a device's first run is slow, so that it does not count."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for the device, so that a clock shows what a step took."""

    def predict(self, images: np.ndarray) -> Array:
        """Returns what `infer` returns for letterboxed images, uint8 (b, 3, h, w) RGB, as the caller's own."""
        found = self.infer(self.preprocess(images))
        return np.array(found) if isinstance(found, np.ndarray) else found


class ArrayBackend(Backend):
    """A runtime that takes and gives NumPy arrays; a subclass says how it is loaded and adds `run`.

    Attributes:
        batch: how many images the graph takes at a time; None for any number.
        most: how many at most, where any number up to it will do.
        channels_last: whether it reads (b, h, w, 3).
        input_dtype: what it reads.
    """

    batch: int | None
    most: int | None = None
    channels_last = False
    input_dtype: type[np.floating] = np.float32

    @abstractmethod
    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Runs the model once, with `batch` images where that is not None; returns float32 in the file's own units."""

    def preprocess(self, images: np.ndarray) -> np.ndarray:
        """Turns images, uint8 (b, 3, h, w) RGB, into values 0 to 1 in the model's layout."""
        if self.channels_last:
            images = images.transpose(0, 2, 3, 1)
        scaled = np.empty(images.shape, self.input_dtype)
        return np.divide(images, 255, out=scaled, dtype=self.input_dtype)

    def infer(self, inputs: np.ndarray, visualize: LayerHook | None = None, augment: bool = False) -> np.ndarray:
        """Runs the model, a fixed number of images at a time where it knows no other; see `Backend.infer`."""
        if visualize is not None:
            raise UserError("--visualize shows the layers of a checkpoint (.pt); an exported model hides its own.")
        if augment:
            raise UserError(AUGMENT_NEEDS_CHECKPOINT)
        height, width = inputs.shape[1:3] if self.channels_last else inputs.shape[2:4]
        self._check_shape(height, width)
        size = self.batch or min(self.most or len(inputs), len(inputs))
        found = self.run(inputs) if len(inputs) == size else self._run_in_parts(inputs, size)
        if self.metadata.boxes_normalised:
            found = np.array(found)  # what the runtime gave may be its own memory
            found[..., :4] *= np.array((width, height, width, height), np.float32)
        return found

    def warm_up(self, height: int, width: int) -> None:
        """Does nothing: on a CPU a first run costs hardly more than the next, and each size of image has its own."""

    def synchronize(self) -> None:
        """Returns at once: `run` waits for its result."""

    def joined(self, parts: Sequence[Array]) -> Array:
        """Returns the outputs of several runs as one."""
        return np.concatenate(parts)

    def filled(self, part: Array, missing: int) -> Array:
        """Returns inputs with `missing` empty images behind them."""
        return np.concatenate((part, np.zeros_like(part, shape=(missing, *part.shape[1:]))))

    def _run_in_parts(self, inputs: Array, size: int) -> Array:
        """Runs `size` images at a time, the last ones filled up with empty images."""
        parts = []
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            missing = size - len(part) if self.batch else 0
            found = self.run(self.filled(part, missing) if missing else part)[: len(part)]
            parts.append(np.array(found) if isinstance(found, np.ndarray) else found)
        return self.joined(parts)

    def _check_shape(self, height: int, width: int) -> None:
        """Refuses images that a fixed model cannot take."""
        if not self.dynamic and (height, width) != self.metadata.shape_hw:
            fixed = "x".join(map(str, self.metadata.shape_hw))
            raise UserError(
                f"this model was exported for images of {fixed} px (height x width), not {height}x{width}: "
                f"use --imgsz {' '.join(map(str, self.metadata.shape_hw))}, or export it with --dynamic."
            )
