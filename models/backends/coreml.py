"""Core ML models, on macOS: the only system whose Core ML can be called from Python.

The input is an image or an array of values 0 to 1; the first output is raw rows, or detections (`export.py --nms`).
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
from PIL import Image

from models.backends.base import ArrayBackend, cannot_load, require, without_half
from models.backends.metadata import graph_of
from utils.errors import UserError
from utils.log import LOGGER


class CoreMlBackend(ArrayBackend):
    """A Core ML model; takes one image at a time."""

    channels_last = True

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a model.

        Raises:
            UserError: another system than macOS, coremltools is missing or cannot read it, it is no YOLOv5 detector, or
                an unknown device.
        """
        if platform.system() != "Darwin":
            raise UserError(f"--weights {path}: Core ML models run on macOS only, this is {platform.system()}.")
        coremltools = require("coremltools", "coremltools", path)
        without_half(half, "Core ML")
        units = {"": "ALL", "mps": "CPU_AND_GPU", "cpu": "CPU_ONLY"}.get(device.strip().lower())
        if units is None:
            raise UserError(
                f"--device {device}: Core ML runs on cpu, mps (CPU and GPU), or where it likes (leave it out)."
            )
        try:
            self._model = coremltools.models.MLModel(str(path), compute_units=getattr(coremltools.ComputeUnit, units))
        except (OSError, RuntimeError, ValueError) as error:
            raise cannot_load(path, "Core ML", error) from error
        self.device = f"Core ML (coremltools {coremltools.__version__}) {units}"
        LOGGER.info(f"{path}: {self.device}")
        description = self._model.get_spec().description
        images, output = description.input[0], description.output[0]
        self._input, self._output = images.name, output.name
        self._takes_images = images.type.WhichOneof("Type") == "imageType"
        size = images.type.imageType
        shape = [1, 3, size.height, size.width] if self._takes_images else list(images.type.multiArrayType.shape)
        graph = graph_of(shape, list(output.type.multiArrayType.shape), path)
        self.take_description(dict(self._model.user_defined_metadata), graph, path)
        self.dynamic = False

    def preprocess(self, images: np.ndarray) -> np.ndarray:
        """Turns images, uint8 (b, 3, h, w) RGB, into (b, h, w, 3): uint8 for image inputs, else values 0 to 1."""
        if self._takes_images:
            return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        return super().preprocess(images)

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the output for images (b, h, w, 3)."""
        if self._takes_images:
            found = self._model.predict({self._input: Image.fromarray(inputs[0])})
        else:
            found = self._model.predict({self._input: np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))})
        return np.asarray(found[self._output], np.float32)


load = CoreMlBackend
