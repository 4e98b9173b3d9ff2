"""Core ML models, on macOS: the only system whose Core ML can be called from Python.

The input is an image or an array of values 0 to 1; the first output is raw rows, or detections (`export.py --nms`).
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.backends.base import ArrayBackend, Graph, describe, find_export, graph_of, require, without_half
from utils.errors import UserError
from utils.log import LOGGER


class CoreMlBackend(ArrayBackend):
    """A Core ML model; takes one image at a time."""

    channels_last = True

    def __init__(self, model: Any, where: Path, device: str) -> None:
        """Takes a `coremltools.models.MLModel`.

        Args:
            model: it.
            where: the file, for messages.
            device: where it runs, in words.

        Raises:
            UserError: not a YOLOv5 detector.
        """
        self._model, self.device = model, device
        description = model.get_spec().description
        images, output = description.input[0], description.output[0]
        self._input, self._output = images.name, output.name
        self._takes_pictures = images.type.WhichOneof("Type") == "imageType"
        graph = self._graph(images, output)
        self.metadata = describe(dict(model.user_defined_metadata), graph, where)
        self.dynamic, self.batch = False, graph.batch

    def preprocess(self, images: np.ndarray) -> np.ndarray:
        """Turns images, uint8 (b, 3, h, w) RGB, into (b, h, w, 3): uint8 for pictures, else values 0 to 1."""
        if self._takes_pictures:
            return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        return super().preprocess(images)

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the output for images (b, h, w, 3)."""
        if self._takes_pictures:
            found = self._model.predict({self._input: Image.fromarray(inputs[0])})
        else:
            found = self._model.predict({self._input: np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))})
        return np.asarray(found[self._output], np.float32)

    def _graph(self, images: Any, output: Any) -> Graph:
        """Returns the lengths of input and output."""
        shape = list(output.type.multiArrayType.shape)
        if self._takes_pictures:
            picture = images.type.imageType
            return graph_of([1, 3, picture.height, picture.width], shape)
        return graph_of(list(images.type.multiArrayType.shape), shape)


def load(weights: str | Path, device: str = "", half: bool = False) -> CoreMlBackend:
    """Loads a Core ML model.

    Raises:
        UserError: nothing there, another system than macOS, coremltools is missing or cannot read it, or an unknown
            device.
    """
    path = find_export(weights)
    if platform.system() != "Darwin":
        raise UserError(f"--weights {path}: Core ML models run on macOS only, this is {platform.system()}.")
    coremltools = require("coremltools", "coremltools", path)
    without_half(half, "Core ML")
    units = {"": "ALL", "mps": "CPU_AND_GPU", "cpu": "CPU_ONLY"}.get(device.strip().lower())
    if units is None:
        raise UserError(f"--device {device}: Core ML runs on cpu, mps (CPU and GPU), or where it likes (leave it out).")
    try:
        model = coremltools.models.MLModel(str(path), compute_units=getattr(coremltools.ComputeUnit, units))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--weights {path}: Core ML cannot load it ({str(error).splitlines()[0]}).") from error
    words = f"Core ML (coremltools {coremltools.__version__}) {units}"
    LOGGER.info(f"{path}: {words}")
    return CoreMlBackend(model, path, words)
