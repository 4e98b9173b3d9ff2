"""What `evaluate` runs: anything that turns images into rows, and the clock that times it.

A runtime of `models.backends` is a predictor as it is, a PyTorch module through `ModulePredictor`. Not here: NMS, and
what becomes of the detections.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Array = Any  # np.ndarray or Tensor


class Predictor(Protocol):
    """A model that is ready to run.

    Attributes:
        chosen: whether `infer` returns detections that were chosen inside the model, not raw rows.
    """

    chosen: bool

    def preprocess(self, images: np.ndarray) -> Any:
        """Turns letterboxed images, uint8 (b, 3, h, w) RGB, into the model's input."""
        ...

    def infer(self, inputs: Any) -> Array:
        """Returns rows (b, n, 5 + nc), or where `chosen` detections (b, max_det, 6) filled up with zeros."""
        ...

    def synchronize(self) -> None:
        """Waits for the device."""
        ...


class ModulePredictor:
    """A PyTorch module as a predictor; within `with` it is in evaluation mode and computes no gradients.

    Not torch.inference_mode: what modules keep from call to call (grids of anchors) would be unusable in training.

    Attributes:
        raw: the head's raw outputs for the last images, which losses are computed from; empty where the module returns
            decoded rows alone.
    """

    chosen = False

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Takes a module that is on `device`; bfloat16 or float16 run it under autocast.

        Args:
            module: maps images (b, 3, h, w) in 0 to 1 to decoded rows (b, n, 5 + nc), or to (rows, raw outputs).
            device: where it is.
            dtype: what to compute in.
        """
        self.raw: Sequence[Tensor] = ()
        self._module, self._device, self._dtype = module, device, dtype
        self._was_training = module.training
        self._no_grad = torch.no_grad()

    def __enter__(self) -> ModulePredictor:
        """Switches to evaluation mode."""
        self._was_training = self._module.training
        self._module.eval()
        self._no_grad.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Puts the module back into the mode that it was in."""
        self._no_grad.__exit__(kind, error, trace)
        self._module.train(self._was_training)

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w), into fractions on the device, channels last."""
        # One byte per value while it is moved and laid out, four only afterwards.
        moved = torch.from_numpy(images).to(self._device, non_blocking=True)
        return moved.contiguous(memory_format=torch.channels_last).float().div_(255)

    def infer(self, inputs: Tensor, augment: bool = False) -> Tensor:
        """Returns decoded rows (b, n, 5 + nc), with `augment` of several views of each image; keeps the raw outputs."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            output = self._module(inputs, augment=True) if augment else self._module(inputs)
        rows, raw = output if isinstance(output, tuple) else (output, None)
        self.raw = raw or ()
        return rows

    def synchronize(self) -> None:
        """Waits for the device's queue, where it has one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


class AugmentedPredictor:
    """A predictor that looks at every image in several sizes, mirrored too (`models.tta`)."""

    chosen = False

    def __init__(self, predictor: Any) -> None:
        """Takes a checkpoint's runtime of `models.backends`, or a `ModulePredictor` of one."""
        self._predictor = predictor
        self.preprocess, self.synchronize = predictor.preprocess, predictor.synchronize

    def infer(self, inputs: Any) -> Array:
        """Returns the rows of all views (b, n, 5 + nc)."""
        return self._predictor.infer(inputs, augment=True)


class Clock:
    """Adds up the time of each stage, waiting for the device at the end of each."""

    def __init__(self, predictor: Predictor) -> None:
        """Starts at zero."""
        self.seconds = {"pre": 0.0, "inference": 0.0, "nms": 0.0}
        self.shape: tuple[int, ...] = (0, 3, 0, 0)  # of the largest batch
        self._wait = predictor.synchronize
        self._last = 0.0

    def start(self, shape: Sequence[int]) -> None:
        """Begins with a batch of this shape."""
        self.shape = max(self.shape, tuple(shape))
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        self._wait()
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now

    def per_image_ms(self, images: int) -> tuple[float, float, float]:
        """Returns milliseconds per image of pre-processing, inference and NMS."""
        pre, inference, nms = (1e3 * seconds / max(images, 1) for seconds in self.seconds.values())
        return pre, inference, nms
