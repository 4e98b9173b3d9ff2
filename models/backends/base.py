"""What every runtime offers to detection: names, strides, and images in, rows out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # np.ndarray or torch.Tensor
LayerHook = Callable[[int, str, np.ndarray], None]  # (row of the model, block's name, output float32 (b, c, h, w))


class Backend(ABC):
    """A loaded model.

    Attributes:
        names: class number to name.
        stride: the largest stride; sides of the images must be multiples of it.
        dynamic: whether images may be of any such size; else all must be of the size that was exported.
    """

    names: dict[int, str]
    stride: int
    dynamic: bool

    @abstractmethod
    def preprocess(self, images: np.ndarray) -> Array:
        """Turns letterboxed images, uint8 (b, 3, h, w) RGB, into the runtime's input on its device."""

    @abstractmethod
    def infer(self, inputs: Array, visualize: LayerHook | None = None) -> Array:
        """Returns rows (b, n, 5 + nc) [x, y, w, h in px, objectness, class probabilities] for preprocessed images.

        Args:
            inputs: what `preprocess` returned.
            visualize: called with every layer's output where the runtime shows them.

        Raises:
            UserError: `visualize` on a runtime that hides its layers.
        """

    @abstractmethod
    def warm_up(self, height: int, width: int) -> None:
        """Runs once on an empty image where a device's first run is slow, so that it does not count."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for the device, so that a clock shows what a step took."""

    def predict(self, images: np.ndarray) -> Array:
        """Returns rows (b, n, 5 + nc) for letterboxed images, uint8 (b, 3, h, w) RGB."""
        return self.infer(self.preprocess(images))
