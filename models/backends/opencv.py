"""ONNX files in OpenCV's own network module (`--dnn`): no runtime to install; CPU, float32.

OpenCV lacks operators that open image sizes need, so files exported with --dynamic may be refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from models.backends.base import ArrayBackend, cpu_only, describe, find_export, graph_of, thread_count, without_half
from models.backends.safety import OnnxFile, read_onnx
from utils.errors import UserError
from utils.log import LOGGER

PROBE_PX = 64  # side of the image that shows whether it can be computed, where any will do


class OpenCvBackend(ArrayBackend):
    """A network."""

    def __init__(self, network: Any, content: OnnxFile, where: Path, device: str) -> None:
        """Takes a `cv2.dnn.Net`.

        Args:
            network: it.
            content: what the file says of itself.
            where: the file, for messages.
            device: where it runs, in words.

        Raises:
            UserError: not a YOLOv5 detector.
        """
        self._network, self.device = network, device
        graph = graph_of(content.input_shape, content.output_shape)
        self.batch = graph.batch or 1  # it plans for the number that it meets first
        found = self.run(np.zeros((self.batch, 3, graph.height or PROBE_PX, graph.width or PROBE_PX), np.float32))
        self.metadata = describe(content.texts, graph._replace(columns=found.shape[2]), where)
        self.dynamic = self.metadata.dynamic

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the first output for images (b, 3, h, w)."""
        self._network.setInput(np.ascontiguousarray(inputs))
        output = self._network.forward()
        return output if output.ndim == 3 else output.reshape(len(inputs), *output.shape[-2:])


def load(weights: str | Path, device: str = "", half: bool = False) -> OpenCvBackend:
    """Loads an ONNX file.

    Raises:
        UserError: no such file, OpenCV cannot read it, it takes tensors from outside its folder, or another device.
    """
    cpu_only(device, "OpenCV")
    path = find_export(weights)
    content = read_onnx(path)
    if len(content.input_shape) != 4:
        raise UserError(f"{path}: its input has the shape {content.input_shape}, not that of images (b, 3, h, w).")
    without_half(half, "OpenCV")
    cv2.setNumThreads(thread_count())
    words = f"OpenCV {cv2.__version__} CPU ({thread_count()} threads)"
    LOGGER.info(f"{path}: {words}")
    try:
        network = cv2.dnn.readNetFromONNX(str(path))
        backend = OpenCvBackend(network, content, path, words)
    except cv2.error as error:
        hint = "Leave out --dnn, or export the model for one image size (without --dynamic)."
        raise UserError(f"--weights {path}: OpenCV cannot run it ({error.err or error}). {hint}") from error
    return backend
